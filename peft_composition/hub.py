"""Model cards of saved compositions, written from their files, and pushing both to the Hub.

PEFT writes the card before it saves the config, so `CompositionConfig.save_pretrained` completes it. transformers'
`model.push_to_hub` and `Trainer.create_model_card` write it once more afterwards: hence `push_to_hub` and
`CompositionCardMixin`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import RemoteEntryNotFoundError
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from .base_models import AUTO_CLASSES, class_to_load, stated_class
from .config import CompositionConfig
from .drafts import CARD_DRAFT, draft_in
from .export import add_to_checkpoint, lora_from_checkpoint
from .exported import Exported, export_in, remove_outdated_export, weights_file
from .kinds import why_no_composition
from .names import LORA_SUBFOLDER, block_of, name_in_checkpoint
from .public import publish
from .references import Provenance, is_hub_id
from .text import SHORT, in_code, in_markdown, in_python, one_line
from .tuner.fingerprint import checked_weights
from .tuner.mixing import Mixing
from .upstream.keys import BASE_COPY
from .upstream.weights import WeightsFile


if TYPE_CHECKING:
    from transformers import Trainer

    _TrainerBase = Trainer
else:
    _TrainerBase = object

TAG = "peft-composition"
TEMPLATE = "model_card_template.md"
NEW_TITLE = "# Composition of LoRA adapters"
ADAPTERS_PER_BLOCK_TABLE = 20
_BEGIN, _END = "<!-- peft-composition:begin", "<!-- peft-composition:end -->"
# A mark is a line of its own, which text from others never is. A begin mark whose end somebody deleted must not
# swallow the text up to the end mark of a later section.
_SECTION = re.compile(
    rf"^{_BEGIN}(?P<fields>[^>\n]*)-->[ \t]*$(?:(?!^{_BEGIN}).)*?^{_END}[ \t]*$", re.DOTALL | re.MULTILINE
)
_NOTE = "<!-- Replaced whenever the adapter is saved: write your own text above or below. -->"
_FIELD = re.compile(r"(\w+)=(\S+)")
_LICENSE_ID = re.compile(r"(?!other$|unknown$)[a-z0-9][a-z0-9.+-]*")


# What users call


def write_model_card(
    folder: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    repo_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write, or bring up to date, what the model card says of a saved composition.

    Only the part between the marks `<!-- peft-composition:begin -->` and `<!-- peft-composition:end -->` is replaced;
    all other text stays. The metadata gets the library, the base model where it is a Hub id, the tag, the upstream
    adapters and, where all of them state the same one and the card has none yet, the licence.

    Args:
        folder: where the card is, and the composition that `save_pretrained` wrote.
        subfolder: where in `folder` the composition is; PEFT saves an adapter that is not named "default" in a folder
            of its own. Default: in `folder` itself.
        repo_id: the repository that the folder is pushed to, for the loading code. Default: the one that the card
            names already, or else the folder itself.
        metrics: evaluation results of these weights, by name. Default: none are shown.

    Returns:
        The path of the card.

    Raises:
        ValueError: there is no saved composition.
    """
    root = Path(folder)
    subfolder = subfolder or None
    saved = _Saved(root, subfolder)
    if not saved.is_complete:
        raise ValueError(
            f"There is no saved composition in {saved.folder}: it needs {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}."
        )
    path = root / REPOCARD_NAME
    card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n\n---\n{NEW_TITLE}\n")
    repo_id = repo_id or _repository_of(card.text, subfolder)
    card.text = _with_section(card.text, _section(saved, repo_id, metrics or {}), subfolder)
    described = [_Saved(root, _subfolder_in(found)) for found in _SECTION.finditer(card.text)]
    _complete_metadata(cast(ModelCardData, card.data), [other for other in described if other.is_complete])
    with draft_in(root, CARD_DRAFT) as draft:
        card.save(draft / REPOCARD_NAME)
        os.replace(draft / REPOCARD_NAME, path)
    return path


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload composition",
    metrics: Mapping[str, float] | None = None,
    lora: bool = True,
) -> CommitInfo:
    """Push the compositions of a model to the Hub, with their model card and as plain LoRAs.

    Like `model.push_to_hub`, which pushes the same weights but replaces a new card by an empty one. What people wrote
    into the card on the Hub stays. Call it in one process only; a sharded model is pushed by the Trainer, see
    `CompositionCardMixin`.

    Args:
        model: the model.
        repo_id: the repository, made where it does not exist.
        private: whether a new repository is private. Default: as the Hub decides.
        token: Hub token. Default: the usual places (`HF_TOKEN`, `hf auth login`).
        revision: branch to push to, made where it does not exist. Default: the main branch.
        commit_message: first line of the commit.
        metrics: evaluation results for the card, by name.
        lora: also push the exact export, in the subfolder `lora`, for those who do not have this plugin; not for a
            composition with `save_adapters=False`, whose repository shall not carry the factors.

    Returns:
        The commit.

    Raises:
        ValueError: the model has no composition, or one with `save_adapters=False` has upstream adapters that are
            local folders, so that nobody else could load it; nothing is pushed.
    """
    configs = {name: c for name, c in model.peft_config.items() if isinstance(c, CompositionConfig)}
    if not configs:
        raise ValueError(f"The model has no composition to push; its adapters are {sorted(model.peft_config)}.")
    for config in configs.values():
        _require_public_sources(config)
    api = HfApi(token=token)
    exports = [_lora_folder(name) for name in configs]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name, config in configs.items():
            if lora and config.save_adapters:
                lora_from_checkpoint(_folder_of(folder, name)).save_beside(_folder_of(folder, name), LORA_SUBFOLDER)
        for name in configs:
            publish(_folder_of(folder, name))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        _fetch_card(api, repo_id, revision, Path(folder))  # in place of PEFT's, who would take people's tags away
        for name in configs:
            write_model_card(folder, subfolder=_subfolder_of(name), repo_id=repo_id, metrics=metrics)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=[f"{export}/*" for export in exports],  # those of an earlier push would no longer be true
        )


def saved_mixing_weights(folder: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """The mixing weights of a saved composition, from its files alone: no base model, no network.

    Args:
        folder: what `save_pretrained` wrote.

    Returns:
        `{module name: {upstream adapter name: weight}}`, in the model's order, as `mixing_weights(model)` gives
        them.

    Raises:
        ValueError: there is no saved composition, or its weights are not in it.
    """
    saved = _Saved(Path(folder), None)
    if not saved.is_complete:
        raise ValueError(f"{why_no_composition(saved.folder)}.")
    weights = saved.mixing_weights()
    if not weights:
        raise ValueError(f"The weights file in {saved.folder} does not hold the mixing weights of all its modules.")
    names = saved.config.adapter_names
    return {
        module: {name: weight for name, weight, rank in zip(names, weights[module], ranks) if rank}
        for module, ranks in saved.ranks.items()
    }


def saved_head(folder: str | os.PathLike[str]) -> tuple[list[str], bool]:
    """The modules beside the composition's own in a saved composition, and whether they are known to be untrained.

    Args:
        folder: what `save_pretrained` wrote.

    Raises:
        ValueError: there is no saved composition.
    """
    saved = _Saved(Path(folder), None)
    if not saved.is_complete:
        raise ValueError(f"{why_no_composition(saved.folder)}.")
    return saved.head_modules, saved.has_untrained_head


class CompositionCardMixin(_TrainerBase):
    """Completes the model card that a Trainer writes, and adds the plain LoRA, so that `push_to_hub` pushes both.

    The Trainer writes its card after saving and tells no callback; `create_model_card` is there to be overridden.

        class ComposedTrainer(CompositionCardMixin, Trainer):
            pass

    Works with every subclass of `Trainer`. Until the model is saved in `output_dir`, there is nothing to describe and
    the card stays as the Trainer wrote it.
    """

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's card, and into it what a composition's card says, with the evaluation results."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        folder = Path(cast(str, self.args.output_dir))
        for name, config in getattr(model, "peft_config", {}).items():
            subfolder = _subfolder_of(name)
            if isinstance(config, CompositionConfig) and _Saved(folder, subfolder).is_complete:
                if self.args.push_to_hub:
                    publish(_folder_of(folder, name))
                if self.args.push_to_hub and config.save_adapters:
                    add_to_checkpoint(_folder_of(folder, name))
                write_model_card(folder, subfolder=subfolder, repo_id=self.hub_model_id, metrics=_evaluation_of(self))


# What saving and pushing need


def complete_card(folder: Path) -> None:
    """Complete the card that PEFT wrote into the folder of a saved composition, or above that of a named one.

    An export that was made from other weights than the new ones is removed.
    """
    if remove_outdated_export(folder):
        warnings.warn(
            f"{folder / LORA_SUBFOLDER} held the plain LoRA of the weights that were saved before, and was removed. "
            f"For one of the new weights: peft_composition.add_to_checkpoint({str(folder)!r}).",
            stacklevel=2,
        )
    if (folder / REPOCARD_NAME).is_file():
        write_model_card(folder)
    else:
        write_model_card(folder.parent, subfolder=folder.name)


def _subfolder_of(adapter_name: str) -> str | None:
    return None if adapter_name == "default" else adapter_name


def _folder_of(folder: str | os.PathLike[str], adapter_name: str) -> Path:
    return Path(folder, _subfolder_of(adapter_name) or "")


def _lora_folder(adapter_name: str) -> str:
    return (Path(_subfolder_of(adapter_name) or "") / LORA_SUBFOLDER).as_posix()


def _require_public_sources(config: CompositionConfig) -> None:
    local = [entry["name"] for entry in config.provenance or () if entry["commit"] is None]
    if local and not config.save_adapters:
        raise ValueError(
            f"With save_adapters=False nobody else could load this composition: {', '.join(map(repr, local))} "
            "came from local folders. Push these adapters first and compose them from there, or set "
            "save_adapters=True."
        )


def _fetch_card(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> None:
    """Put the card that the repository has, if any, into a folder."""
    try:
        # Forced: a copy from the cache could lack what people wrote since.
        card = api.hf_hub_download(repo_id, REPOCARD_NAME, revision=revision, force_download=True)
    except RemoteEntryNotFoundError:
        return
    shutil.copyfile(card, folder / REPOCARD_NAME)


def _evaluation_of(trainer: Trainer) -> dict[str, float]:
    """The Trainer's evaluation results for the weights that it holds after training; empty where it has none."""
    state = trainer.state
    step = state.global_step
    if trainer.args.load_best_model_at_end and state.best_global_step:
        step = state.best_global_step
    about_speed = ("_runtime", "_per_second", "_time")
    return {
        key.removeprefix("eval_"): value
        for entry in state.log_history
        if entry["step"] == step
        for key, value in entry.items()
        if key.startswith("eval_") and not key.endswith(about_speed) and isinstance(value, (int, float))
    }


# A composition as it is on disk


def head_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the tensors of a checkpoint that are not the composition's own, to tell whether they have changed."""
    digest = hashlib.sha256()
    for key in sorted(key for key in tensors if not _is_of_composition(key)):
        content = tensors[key].detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(key.encode("utf-8", "surrogatepass"))
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()


def _is_of_composition(key: str) -> bool:
    """Whether a tensor belongs to the composed modules, as PEFT's copy of the base weight of one does."""
    return key.endswith(BASE_COPY) or any(part.startswith("composition_") for part in key.split("."))


@dataclass(frozen=True)
class _Saved:
    """A composition that `save_pretrained` wrote.

    Attributes:
        root: folder of the card.
        subfolder: where in it the composition is.
    """

    root: Path
    subfolder: str | None

    @property
    def folder(self) -> Path:
        return self.root / (self.subfolder or "")

    @property
    def weights_file(self) -> Path | None:
        return weights_file(self.folder)

    @property
    def is_complete(self) -> bool:
        config = self.folder / CONFIG_NAME
        if self.weights_file is None or not config.is_file():
            return False
        return json.loads(config.read_text(encoding="utf-8")).get("peft_type") == "COMPOSITION"

    @cached_property
    def lora(self) -> Exported | None:
        """The plain LoRA of these weights, where there is one."""
        return export_in(self.folder)

    @cached_property
    def config(self) -> CompositionConfig:
        config = CompositionConfig.from_pretrained(str(self.folder))
        assert isinstance(config, CompositionConfig)
        return config

    @property
    def ranks(self) -> dict[str, list[int]]:
        return self.config.composed_modules or {}

    @property
    def provenance(self) -> list[Provenance]:
        return self.config.provenance or []

    @property
    def base_model(self) -> str | None:
        name = self.config.base_model_name_or_path
        return name if is_hub_id(name) else None

    @cached_property
    def head(self) -> dict[str, Tensor]:
        """The tensors beside the composition's own: those of modules that are trained in full."""
        if self.weights_file is None:
            return {}
        file = WeightsFile(self.subfolder or "default", self.weights_file)
        return {key: file.read(key) for key in file if not _is_of_composition(key)}

    @property
    def head_modules(self) -> list[str]:
        return sorted({key.removeprefix("base_model.model.").rpartition(".")[0] for key in self.head})

    @property
    def has_untrained_head(self) -> bool:
        """Whether it is still the one that was recorded as untrained."""
        return self.config.untrained_head is not None and self.config.untrained_head == head_hash(self.head)

    def mixing_weights(self) -> dict[str, list[float]]:
        """The weight of every adapter in every composed module, from theta in the weights file; empty if not there."""
        mixing = Mixing(self.config, torch.float32)
        if mixing.weight is None:
            return dict.fromkeys(self.ranks, mixing().tolist())
        assert self.weights_file is not None
        file = WeightsFile(self.subfolder or "default", self.weights_file)
        weights = {}
        checked_weights(self.config, {key: file.read(key) for key in file})
        for key in file:
            path, found, _ = key.removeprefix("base_model.model.").partition(".composition_mixing.")
            if found:
                mixing.load_state_dict({"weight": file.read(key)})
                weights[name_in_checkpoint(path, self.ranks)] = mixing().tolist()
        if weights.keys() != self.ranks.keys():  # DeepSpeed, for one, can leave an empty file here and save elsewhere
            return {}
        return {module: weights[module] for module in self.ranks}


# Text and metadata of a card


def _with_section(text: str, section: str, subfolder: str | None) -> str:
    """A card's text with the section of one composition replaced or, where it has none yet, added.

    A first section goes before the first second-level heading, another one after the last section.
    """
    sections = [*_SECTION.finditer(text)]
    for found in sections:
        if _subfolder_in(found) == subfolder:
            return text[: found.start()] + section + text[found.end() :]
    boilerplate = "\n".join(ModelCard.from_template(ModelCardData()).text.splitlines())
    if text.startswith(boilerplate):  # what PEFT puts into a new folder: headings without content
        text = f"{NEW_TITLE}\n{text.removeprefix(boilerplate)}"
        place = len(NEW_TITLE) + 1
    else:
        place = sections[-1].end() if sections else _before_first_heading(text)
    return f"{text[:place].rstrip()}\n\n{section}\n\n{text[place:].lstrip()}".lstrip()


def _before_first_heading(text: str) -> int:
    """Where the first second-level heading begins, or the end; what is in code blocks does not count."""
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
    """What the begin mark of a section says."""
    found = _FIELD.findall(section["fields"])
    return {name: unquote(value, errors="surrogatepass") for name, value in found}


def _repository_of(text: str, subfolder: str | None) -> str | None:
    """The repository that a card names in the section of a composition."""
    for section in _SECTION.finditer(text):
        if _subfolder_in(section) == subfolder:
            return _fields_of(section).get("repository")
    return None


def _complete_metadata(data: ModelCardData, compositions: list[_Saved]) -> None:
    """Add what is known of the compositions; keep what is there already, unless the Hub would refuse it."""
    data.library_name = "peft"
    known = [composition.base_model for composition in compositions if composition.base_model]
    data.base_model = known[0] if known else _hub_ids(data.base_model)
    data["base_model_relation"] = "adapter" if data.base_model else None
    # PEFT makes a tag of the base model's name, local path or not.
    tags = [tag for tag in data.tags or [] if not tag.startswith("base_model:") or is_hub_id(tag.split(":", 2)[-1])]
    data.tags = [*tags, TAG] if TAG not in tags else tags
    entries = [entry for composition in compositions for entry in composition.provenance]
    data["upstream_adapters"] = [*dict.fromkeys(entry["path"] for entry in entries if _is_on_hub(entry))] or None
    if data.license is None:
        data.license = _shared_license(entries)


def _is_on_hub(entry: Provenance) -> bool:
    return entry["commit"] is not None and is_hub_id(entry["path"])


def _hub_ids(names: str | list[str] | None) -> str | list[str] | None:
    """The names where all of them are Hub ids."""
    listed = [names] if isinstance(names, str) else names or []
    return names if listed and all(map(is_hub_id, listed)) else None


def _shared_license(entries: Iterable[Provenance]) -> str | None:
    """The licence that all adapters state, as an identifier that the Hub has accepted before."""
    entries = list(entries)
    stated = {entry.get("license") for entry in entries}
    shared = stated.pop() if len(stated) == 1 else None
    if shared is None or not _LICENSE_ID.fullmatch(shared):
        return None
    return shared if any(map(_is_on_hub, entries)) else None


def _section(saved: _Saved, repo_id: str | None, metrics: Mapping[str, float]) -> str:
    """The text about one composition, between its marks."""
    weights = saved.mixing_weights()
    adapters = [_Row(saved, number, weights) for number in range(len(saved.config.references))]
    largest = sorted(adapters, key=lambda row: -abs(row.mean or 0))[:ADAPTERS_PER_BLOCK_TABLE]
    shown = [row for row in adapters if row in largest]
    blocks: dict[str, list[str]] = {}
    for module in weights:
        blocks.setdefault(block_of(module, saved.config.layers_pattern) or module, []).append(module)
    fields = {"subfolder": saved.subfolder, "repository": repo_id}
    lora_subfolder = f"{saved.subfolder}/{LORA_SUBFOLDER}" if saved.subfolder else LORA_SUBFOLDER
    text = _template().render(
        config=saved.config,
        base_link=_link(saved.base_model) if saved.base_model else None,
        code=_loading_code(
            saved, repo_id, saved.subfolder, "import peft_composition  # registers the method with PEFT"
        ),
        lora_code=_loading_code(saved, repo_id, lora_subfolder) if saved.lora else None,
        lora=saved.lora,
        lora_subfolder=lora_subfolder,
        head=saved.head_modules,
        is_untrained=saved.has_untrained_head,
        is_classifier="Classification" in str((saved.config.auto_mapping or {}).get("base_model_class")),
        modules=len(saved.ranks),
        different_weights=len({tuple(row) for row in weights.values()}),
        adapters=adapters,
        shown=shown,
        blocks={block: [row.mean_over(modules) for row in shown] for block, modules in blocks.items()},
        licenses=sorted({row.license for row in adapters}),
        metrics=metrics,
    )
    begin = " ".join([_BEGIN, *(f"{name}={_in_address(value)}" for name, value in fields.items() if value)])
    return f"{begin} -->\n{_NOTE}\n{text.strip()}\n{_END}"


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(cell=_cell, text=in_markdown, code=in_code)
    return environment.get_template(TEMPLATE)


def _cell(value: object) -> str:
    """A value as it stands in a table: numbers with few digits, and text as itself."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3f}"
    return in_markdown(value)


class _Row:
    """What the tables say of one upstream adapter."""

    def __init__(self, saved: _Saved, number: int, weights: dict[str, list[float]]) -> None:
        entry = saved.provenance[number]
        ranks = {module: row[number] for module, row in saved.ranks.items() if row[number]}
        base = entry["base_model_name_or_path"]
        self.name = in_code(entry["name"])
        self.source = "a local folder"
        self.is_local = entry["commit"] is None
        if _is_on_hub(entry):
            self.source = _link(entry["path"], entry["commit"], entry["subfolder"])
        self.ranks = ", ".join(map(str, sorted(set(ranks.values()))))
        self.base_model = _link(base) if base and is_hub_id(base) else "a local folder" if base else "not stated"
        self.license = entry.get("license") or "not stated"
        self.sha256 = entry["sha256"]
        self.modules = len(ranks)
        self._weights = {module: weights[module][number] for module in ranks if module in weights}
        self.mean = self.mean_over(self._weights)
        self.min = min(self._weights.values(), default=None)
        self.max = max(self._weights.values(), default=None)

    def mean_over(self, modules: Iterable[str]) -> float | None:
        """The mean weight in those of the modules that the adapter touches; None where it touches none."""
        touched = [self._weights[module] for module in modules if module in self._weights]
        return fmean(touched) if touched else None


def _link(repo_id: str, commit: str | None = None, subfolder: str | None = None) -> str:
    """A link to a repository on the Hub, at a commit."""
    address = f"https://huggingface.co/{_in_address(repo_id)}"
    if commit is None:
        return f"[{in_markdown(repo_id)}]({address})"
    place = f"/{subfolder}" if subfolder else ""
    at = in_code(commit[:12])
    return f"[{in_markdown(repo_id + place)}]({address}/tree/{_in_address(commit + place)}) at {at}"


def _in_address(path: str) -> str:
    return quote(path, errors="surrogatepass")


def _loading_code(saved: _Saved, repo_id: str | None, subfolder: str | None, *first_lines: str) -> str:
    """Python that loads the base model and the adapter, to be pasted."""
    where = [in_python(repo_id or ".")]
    if subfolder:
        where.append(f"subfolder={in_python(subfolder)}")
    note = "" if repo_id else "  # this folder, or the repository that it was pushed to"
    imported, base_model = _base_model_code(saved)
    lines = [*first_lines, "from peft import PeftModel", *imported, "", base_model]
    return "\n".join([*lines, f"model = PeftModel.from_pretrained(base_model, {', '.join(where)}){note}"])


def _base_model_code(saved: _Saved) -> tuple[list[str], str]:
    """The import and the line that load the base model, as far as the config tells."""
    config = saved.config
    mapping = config.auto_mapping or {}
    stated = str(mapping.get("base_model_class") or "")
    stated = stated if stated.isidentifier() and len(stated) <= SHORT else ""  # it becomes code that people run
    auto_class = next(iter(AUTO_CLASSES.get(config.task_type or "", ())), None)
    if stated_class({"auto_mapping": mapping}) is not None:
        auto_class = class_to_load(config.task_type, stated)
    name = config.base_model_name_or_path
    if not auto_class or not name or len(config.revision or "") > SHORT:
        kind = f", a {stated}" if stated else ""
        return [], f"base_model = ...  # the model that the adapters were trained on{kind}"
    note = ""
    if not is_hub_id(name):  # nobody else has this folder, and how it is called is nobody's business
        name, note = f"path/to/{one_line(Path(name).name)}", "  # your copy of the base model"
    arguments = [in_python(name)]
    if config.revision:
        arguments.append(f"revision={in_python(config.revision)}")
    if config.num_labels is not None and saved.head:
        arguments.append(f"num_labels={int(config.num_labels)}")
    line = f"base_model = {auto_class}.from_pretrained({', '.join(arguments)}){note}"
    return [f"from transformers import {auto_class}"], line
