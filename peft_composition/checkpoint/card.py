"""Writes model cards of saved compositions from their files.

PEFT writes the card before it saves the config, so `CompositionConfig.save_pretrained` completes it. transformers'
`model.push_to_hub` and `Trainer.create_model_card` write the card again afterwards, which is why `push_to_hub` and
`CompositionCardMixin` exist.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME

from ..drafts import CARD_DRAFT, draft_in, take_place
from ..names import LORA_SUBFOLDER
from ..references import Provenance, is_hub_id
from .explained import PAGE, remove_outdated_report
from .exported import remove_outdated_export
from .markdown import BEGIN, END, is_on_hub, section_of
from .saved import SavedComposition


if TYPE_CHECKING:
    from transformers import Trainer

    _TrainerBase = Trainer
else:
    _TrainerBase = object


TAG = "peft-composition"
NEW_TITLE = "# Composition of LoRA adapters"
# A mark is a whole line, which text from others never is. If somebody deletes an end mark, its begin mark must not
# swallow the text up to the end mark of a later section.
_SECTION = re.compile(
    rf"^{BEGIN}(?P<fields>[^>\n]*)-->[ \t]*$(?:(?!^{BEGIN}).)*?^{END}[ \t]*$", re.DOTALL | re.MULTILINE
)
_FIELD = re.compile(r"(\w+)=(\S+)")
_LICENSE_ID = re.compile(r"(?!other$|unknown$)[a-z0-9][a-z0-9.+-]*")


def write_model_card(
    folder: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    repo_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write or update the section about a saved composition in its model card.

    Only the part between the marks `<!-- peft-composition:begin -->` and `<!-- peft-composition:end -->` is replaced;
    all other text stays. The library, the tag, the upstream adapters and, if it is a Hub id, the base model are added
    to the metadata. So is the license, if all adapters state the same one and the card has none.

    Args:
        folder: the folder of the card and of the composition that `save_pretrained` wrote.
        subfolder: the composition's subfolder of `folder`; PEFT saves an adapter that is not named "default" in a
            subfolder. Default: `folder` itself.
        repo_id: the repository that the folder is pushed to, for the loading code. Default: the repository that the
            card already names, otherwise the folder itself.
        metrics: evaluation results of these weights, by name. Default: none.

    Returns:
        The path of the card.

    Raises:
        ValueError: the folder holds no saved composition.
    """
    root = Path(folder)
    subfolder = subfolder or None
    saved = SavedComposition.opened(root, subfolder)
    path = root / REPOCARD_NAME
    card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n\n---\n{NEW_TITLE}\n")
    repo_id = repo_id or _repository_of(card.text, subfolder)
    card.text = _with_section(card.text, section_of(saved, repo_id, metrics or {}), subfolder)
    subfolders = [_subfolder_in(found) for found in _SECTION.finditer(card.text)]
    described = [saved if other == subfolder else SavedComposition(root, other) for other in subfolders]
    _complete_metadata(cast(ModelCardData, card.data), [other for other in described if other.is_complete])
    with draft_in(root, CARD_DRAFT) as draft:
        card.save(draft / REPOCARD_NAME)
        take_place(draft / REPOCARD_NAME, path)
    return path


def complete_card(folder: Path) -> None:
    """Complete the card that PEFT wrote into the folder of a saved composition, or above it for a named one.

    An export that was made from other weights is removed.
    """
    if remove_outdated_export(folder):
        warnings.warn(
            f"{folder / LORA_SUBFOLDER} held the plain LoRA of earlier weights and was removed. To export the new "
            f"weights, call peft_composition.add_to_checkpoint({str(folder)!r}).",
            stacklevel=2,
        )
    if remove_outdated_report(folder):
        warnings.warn(
            f"{folder / PAGE} was about earlier weights and was removed. To explain the new weights, call "
            "peft_composition.explain(model, data).save_beside(folder).",
            stacklevel=2,
        )
    if (folder / REPOCARD_NAME).is_file():
        write_model_card(folder)
    else:
        write_model_card(folder.parent, subfolder=folder.name)


def _with_section(text: str, section: str, subfolder: str | None) -> str:
    """A card's text with the section of one composition replaced or added.

    A first section goes before the first second-level heading, further ones after the last section.
    """
    sections = [*_SECTION.finditer(text)]
    for found in sections:
        if _subfolder_in(found) == subfolder:
            return text[: found.start()] + section + text[found.end() :]
    boilerplate = "\n".join(ModelCard.from_template(ModelCardData()).text.splitlines())
    if text.startswith(boilerplate):  # PEFT's card for a new folder: headings without content
        text = f"{NEW_TITLE}\n{text.removeprefix(boilerplate)}"
        place = len(NEW_TITLE) + 1
    else:
        place = sections[-1].end() if sections else _before_first_heading(text)
    return f"{text[:place].rstrip()}\n\n{section}\n\n{text[place:].lstrip()}".lstrip()


def _before_first_heading(text: str) -> int:
    """The position of the first second-level heading outside code blocks, or of the end."""
    place, in_code = 0, False
    for line in text.splitlines(keepends=True):
        if line.startswith("```"):
            in_code = not in_code
        elif line.startswith("## ") and not in_code:
            return place
        place += len(line)
    return place


def _subfolder_in(section: re.Match[str]) -> str | None:
    """The subfolder of the composition that a section is about."""
    return _fields_of(section).get("subfolder")


def _fields_of(section: re.Match[str]) -> dict[str, str]:
    """The fields of the begin mark of a section."""
    found = _FIELD.findall(section["fields"])
    return {name: unquote(value, errors="surrogatepass") for name, value in found}


def _repository_of(text: str, subfolder: str | None) -> str | None:
    """The repository that a card names in the section of a composition."""
    for section in _SECTION.finditer(text):
        if _subfolder_in(section) == subfolder:
            return _fields_of(section).get("repository")
    return None


def _complete_metadata(data: ModelCardData, compositions: list[SavedComposition]) -> None:
    """Add metadata about the compositions; existing values stay, unless the Hub would refuse them."""
    data.library_name = "peft"
    known = [composition.base_model for composition in compositions if composition.base_model]
    data.base_model = known[0] if known else _hub_ids(data.base_model)
    data["base_model_relation"] = "adapter" if data.base_model else None
    # PEFT turns the base model's name into a tag, even a local path.
    tags = [tag for tag in data.tags or [] if not tag.startswith("base_model:") or is_hub_id(tag.split(":", 2)[-1])]
    data.tags = [*tags, TAG] if TAG not in tags else tags
    entries = [entry for composition in compositions for entry in composition.provenance]
    data["upstream_adapters"] = [*dict.fromkeys(entry["path"] for entry in entries if is_on_hub(entry))] or None
    if data.license is None:
        data.license = _shared_license(entries)


def _hub_ids(names: str | list[str] | None) -> str | list[str] | None:
    """The names, if all of them are Hub ids."""
    listed = [names] if isinstance(names, str) else names or []
    return names if listed and all(map(is_hub_id, listed)) else None


def _shared_license(entries: Iterable[Provenance]) -> str | None:
    """The license that all adapters state, as an identifier that the Hub has accepted before."""
    entries = list(entries)
    stated = {entry.get("license") for entry in entries}
    shared = stated.pop() if len(stated) == 1 else None
    if shared is None or not _LICENSE_ID.fullmatch(shared):
        return None
    return shared if any(map(is_on_hub, entries)) else None
