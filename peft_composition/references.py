"""How users refer to an upstream adapter, and what is recorded about it and its base model; no file is read here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .text import shown


def is_local(path: str) -> bool:
    """Whether a folder with this path exists."""
    return os.path.isdir(path)


def looks_like_path(path: str) -> bool:
    """Whether a text looks like a path rather than a Hub id."""
    return (
        os.path.isabs(path)
        or path.startswith((".", "~"))
        or path.count("/") > 1
        or "\\" in path
        or os.path.exists(path)
    )


def is_hub_id(name: str | None) -> bool:
    """Whether a name is a Hub id and not a folder, as far as can be told without asking the Hub."""
    if not name or name != name.strip() or is_local(name) or looks_like_path(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def within_hub(name: str) -> tuple[str, str] | None:
    """The Hub id and the folder within it of a name like `org/repo/folder`; None if it is no such name.

    If its first part is a folder here, it is a path here.
    """
    parts = name.split("/")
    if is_local(parts[0]) or any(part in ("", ".", "..") for part in parts[2:]) or len(parts) < 3:
        return None
    repository = "/".join(parts[:2])
    return (repository, "/".join(parts[2:])) if is_hub_id(repository) else None


def is_hidden(path: str) -> bool:
    """Whether a folder here has the name of an organisation or repository, so that a path like a Hub id stays here."""
    parts = path.split("/")
    if len(parts) < 2 or any(part in ("", ".", "..") or part.startswith("~") for part in parts):
        return False
    return is_local(parts[0])


class AdapterReference(TypedDict, total=False):
    """The location and the name of one upstream adapter.

    Attributes:
        path: Hub id or local folder. Required.
        name: its name in the composition. Default: the shortest suffix of its path that distinguishes it from others.
        revision: branch, tag or commit on the Hub. Default: the main branch.
        subfolder: folder of the adapter within the repository or folder. Default: the root.
        local_files_only: whether to use the cache only and not ask the Hub. Default: False.
    """

    path: str
    name: str
    revision: str | None
    subfolder: str | None
    local_files_only: bool


class Provenance(TypedDict):
    """What is recorded about one upstream adapter when it is read."""

    name: str
    path: str
    subfolder: str | None
    commit: str | None
    sha256: str
    base_model_name_or_path: str | None
    license: str | None


class _LayoutOfLayers(TypedDict):
    target_modules: list[str] | str
    embeddings: list[str]
    fan_in_fan_out: bool


class LoraLayout(_LayoutOfLayers, total=False):
    """Properties of the base model that a plain LoRA must state because its factors do not show them.

    `target_modules` selects exactly the composed modules, by PEFT's rules. `embeddings` lists the embeddings among
    them. `fan_in_fan_out` is True if any of them is transformers' `Conv1D`. Two more are optional: `attentions` lists
    the modules that are `nn.MultiheadAttention`; `target_parameters` selects the composed parameters, and `parameters`
    lists them by their module, in its order.
    """

    attentions: list[str]
    target_parameters: list[str]
    parameters: dict[str, list[str]]


def read_reference(text: str) -> AdapterReference:
    """An adapter as it is written in a shell or a file of candidates.

    Args:
        text: a folder, or a Hub id, with `/folder` for a folder within the repository and `@revision` for a revision.
    """
    if is_local(text):
        return AdapterReference(path=text)
    path, at, revision = text.rpartition("@")
    location = path if at else text
    found = within_hub(location)
    if found is None and not (at and is_hub_id(location)):
        return AdapterReference(path=text)
    own = AdapterReference(path=location) if found is None else AdapterReference(path=found[0], subfolder=found[1])
    return AdapterReference(**own, revision=revision) if at else own


def place_of(reference: AdapterReference) -> str:
    """The folder or Hub id of an adapter, with its subfolder."""
    subfolder = reference.get("subfolder")
    return reference["path"] + (f"/{subfolder}" if subfolder else "")


def location_of(reference: AdapterReference) -> str:
    """Where an adapter is, as `read_reference` reads it."""
    revision = reference.get("revision")
    return place_of(reference) + (f"@{revision}" if revision else "")


def named_references(adapters: object) -> list[Any]:
    """Every entry as a dict with all keys and a unique name."""
    if isinstance(adapters, (str, Path, Mapping)):
        raise ValueError(f"adapters must be a list, got a single adapter: {adapters!r}")
    if not isinstance(adapters, Sequence) or not adapters:
        raise ValueError("adapters must name at least one trained LoRA adapter (a Hub id, a local folder or a dict)")
    references = [_reference(entry) for entry in adapters]
    _fill_in_names(references)
    seen: dict[str, AdapterReference] = {}
    for reference in references:
        other = seen.setdefault(reference["name"], reference)
        if other is not reference:
            raise ValueError(
                f"two adapters are named {reference['name']!r}: {location_of(other)} and {location_of(reference)}; "
                'give each a name of its own: {"path": ..., "name": ...}'
            )
    return references


def _reference(entry: object) -> AdapterReference:
    if isinstance(entry, (str, os.PathLike)):
        entry = {"path": entry}
    if not isinstance(entry, Mapping):
        raise ValueError(f"an adapter is a Hub id, a local folder or a dict with 'path', got {shown(entry)}")
    unknown = set(entry) - set(AdapterReference.__annotations__)
    if unknown:
        raise ValueError(
            f"an adapter's dict has unknown keys {sorted(map(str, unknown))}; it may have "
            f"{', '.join(map(repr, AdapterReference.__annotations__))}"
        )
    if not entry.get("path"):
        raise ValueError(f"an adapter's dict needs a 'path', got {shown(dict(entry))}")
    for key in ("path", "revision", "subfolder", "name"):
        value = entry.get(key)
        if key in ("path", "subfolder") and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"the {key!r} in an adapter's dict must be text, got {shown(value)}")
    reference = AdapterReference(
        path=os.fspath(entry["path"]),
        revision=entry.get("revision"),
        subfolder=os.fspath(entry["subfolder"]) if entry.get("subfolder") else None,
    )
    if entry.get("name"):
        reference["name"] = entry["name"]
    if entry.get("local_files_only"):
        reference["local_files_only"] = True
    return reference


def _parts(reference: AdapterReference) -> tuple[str, ...]:
    """The parts of a location; for "." and "..", which are no names, the parts of the full path."""
    parts = Path(location_of(reference)).parts
    if parts and parts[-1] != "..":
        return parts
    return Path(os.path.abspath(location_of(reference))).parts


def _fill_in_names(references: list[AdapterReference]) -> None:
    """Name the adapters without a name by the shortest suffixes of their paths that distinguish them."""
    unnamed = [reference for reference in references if "name" not in reference]
    taken = {reference["name"] for reference in references if "name" in reference}
    parts = [_parts(reference) for reference in unnamed]
    for reference, own in zip(unnamed, parts):
        for length in range(1, len(own) + 1):
            name = "/".join(own[-length:])
            if name not in taken and sum(other[-length:] == own[-length:] for other in parts) == 1:
                break
        reference["name"] = name
