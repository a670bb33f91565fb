"""Finds the files of adapters in a folder, in the cache or on the Hub. Their contents are read elsewhere."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, list_repo_files, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .. import compat
from ..references import AdapterReference, is_hidden, is_hub_id, is_local, looks_like_path, place_of, within_hub
from ..text import in_python
from . import formats
from .errors import AdapterError, NotCachedError
from .weights import keys_of


PARALLEL_DOWNLOADS = 8
FILES_LOOKED_AT = 10_000


class _NoBar(tqdm):
    """Hides the bars of single files: several at once garble a terminal, and one bar covers all adapters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


@dataclass(frozen=True)
class AdapterFiles:
    """The files of one adapter on this machine; `card` is its README.md, where there is one."""

    reference: AdapterReference
    config: Path
    weights: Path
    commit: str | None
    card: Path | None = None

    @property
    def name(self) -> str:
        """The name of the adapter."""
        return self.reference["name"]


def locate(
    references: Sequence[AdapterReference], with_cards: bool = True, progress: bool = True
) -> list[AdapterFiles]:
    """Find the files of adapters; those on the Hub are downloaded, several at a time.

    Args:
        references: where the adapters are; a `path` that is a folder here is local, any other is a Hub id. The Hub
            token comes from the usual places (`HF_TOKEN`, `hf auth login`); `HF_HUB_OFFLINE=1` or
            `local_files_only` use the cache alone.
        with_cards: whether to find the cards, too. A card that cannot be downloaded is left out.
        progress: whether to show a progress bar; there is none if all adapters are local.

    Returns:
        The files, in the order of `references`.

    Raises:
        AdapterError: an adapter does not exist, cannot be downloaded, or is not an adapter.
    """
    remote = [reference for reference in references if not is_local(reference["path"])]
    if not remote:
        return [locate_one(reference, with_cards) for reference in references]
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        found = pool.map(locate_one, references, repeat(with_cards))
        bar = tqdm(found, total=len(references), desc="Fetching adapters", unit="adapter", disable=not progress)
        return list(bar)


def locate_one(reference: AdapterReference, with_card: bool = True) -> AdapterFiles:
    """Like `locate`, for one adapter and without a progress bar."""
    if is_local(reference["path"]):
        return _locate_in_folder(reference)
    if looks_like_path(reference["path"]):
        is_file = ": it is a file; give the folder that holds it" if os.path.isfile(reference["path"]) else ""
        found = within_hub(reference["path"])
        on_hub = f"; for a folder of a Hub repository, write {_as_dict(*found)}" if found is not None else ""
        hidden = "" if is_file else _hiding(reference["path"])
        raise AdapterError(reference["name"], f"there is no folder {reference['path']}{is_file}{on_hub}{hidden}")
    path, at, revision = reference["path"].rpartition("@")
    if at and is_hub_id(path):
        wanted = f'{{"path": {in_python(path)}, "revision": {in_python(revision)}}}'
        raise AdapterError(
            reference["name"], f"it is not a local folder, and a Hub id has no @; to give a revision, write {wanted}"
        )
    files = _locate_on_hub(reference)
    return replace(files, card=_download_card(reference, files.commit)) if with_card else files


def _as_dict(path: str, subfolder: str) -> str:
    return f'{{"path": {in_python(path)}, "subfolder": {in_python(subfolder)}}}'


def _locate_in_folder(reference: AdapterReference) -> AdapterFiles:
    folder = Path(reference["path"], reference.get("subfolder") or "")
    config = folder / CONFIG_NAME
    if not os.path.isfile(config):  # unlike Path, it takes names that no file can have
        raise AdapterError(reference["name"], _no_config(reference, _files_in(folder), folder))
    for filename in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if os.path.isfile(folder / filename):
            card = Path(reference["path"], constants.REPOCARD_NAME)
            return AdapterFiles(reference, config, folder / filename, None, card if os.path.isfile(card) else None)
    raise AdapterError(reference["name"], _no_weights(reference, _files_in(folder)))


def _no_config(reference: AdapterReference, names: Collection[str], folder: Path | None = None) -> str:
    """Why a folder or repository with these files is not an adapter; `folder` if the files can be opened."""
    found = _format_of(reference, names)
    if folder is not None:
        files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
        found = next(filter(None, (formats.of_keys(keys_of(folder / name)) for name in files)), found)
    hint = _hiding(reference["path"]) if folder is not None and not found else ""
    return f"{place_of(reference)} is not an adapter: it has no {CONFIG_NAME}" + (f"; {found}" if found else hint)


def _format_of(reference: AdapterReference, names: Collection[str]) -> str | None:
    subfolder = reference.get("subfolder")
    return formats.of_files(names, (reference["path"], subfolder) if subfolder else None)


def _hiding(path: str) -> str:
    """Says that a name was taken for a folder, where the Hub may have an adapter of this name."""
    if not is_hidden(path):
        return ""
    first = path.partition("/")[0]
    return f"; {first} is a folder here, so the Hub was not asked: for the Hub's {path} run this in another folder"


def _no_weights(reference: AdapterReference, names: Collection[str]) -> str:
    found = _format_of(reference, names)
    missing = f"{place_of(reference)} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}"
    return missing + (f"; {found}" if found else "")


def _files_in(folder: Path) -> list[str]:
    """The names of the files in a folder, and of adapter configs in its subfolders; empty if it cannot be read."""
    try:
        entries = [*islice(folder.iterdir(), FILES_LOOKED_AT)]
    except (OSError, ValueError):
        return []
    inner = [f"{entry.name}/{CONFIG_NAME}" for entry in entries if os.path.isfile(entry / CONFIG_NAME)]
    return sorted([*inner, *(entry.name for entry in entries if entry.is_file())])


def _files_on_hub(reference: AdapterReference, commit: str | None) -> list[str]:
    """Like `_files_in`, for a repository; empty if the Hub cannot be reached."""
    if reference.get("local_files_only"):
        return []
    try:
        names = list_repo_files(reference["path"], revision=commit or reference.get("revision"))
    except Exception:  # the list only explains another error, and the HTTP client has errors of its own
        return []
    inner = f"{reference['subfolder']}/" if reference.get("subfolder") else ""
    return [name.removeprefix(inner) for name in names if name.startswith(inner)]


def _locate_on_hub(reference: AdapterReference) -> AdapterFiles:
    config = download_files(reference, CONFIG_NAME, reference.get("revision"))
    if config is None:
        raise AdapterError(reference["name"], _no_config(reference, _files_on_hub(reference, None)))
    commit = commit_of(config)
    not_cached: NotCachedError | None = None
    for filename in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if _is_known_to_be_missing(reference, filename, commit):
            continue
        try:
            weights = download_files(reference, filename, commit)
        except NotCachedError as error:  # even offline, the other file may be in the cache
            not_cached = not_cached or error
            continue
        if weights is not None:
            return AdapterFiles(reference, config, weights, commit)
    if not_cached is not None:
        raise not_cached
    raise AdapterError(reference["name"], _no_weights(reference, _files_on_hub(reference, commit)))


def _download_card(reference: AdapterReference, commit: str | None) -> Path | None:
    """The repository's card at the same commit; None if it has none or the download fails."""
    whole = AdapterReference(**{**reference, "subfolder": None})
    if _is_known_to_be_missing(whole, constants.REPOCARD_NAME, commit):
        return None
    try:
        return download_files(whole, constants.REPOCARD_NAME, commit)
    except AdapterError:
        return None


def _is_known_to_be_missing(reference: AdapterReference, filename: str, commit: str | None) -> bool:
    """Whether the Hub has said before that this commit does not have the file."""
    if reference.get("subfolder"):
        filename = f"{reference['subfolder']}/{filename}"
    return try_to_load_from_cache(reference["path"], filename, revision=commit) is compat.CACHED_NO_EXIST


def download_files(reference: AdapterReference, filename: str, revision: str | None) -> Path | None:
    """The file in the cache; None where the repository does not have it."""
    name, path = reference["name"], reference["path"]
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(
            hf_hub_download(
                path,
                filename,
                subfolder=reference.get("subfolder"),
                revision=revision,
                local_files_only=reference.get("local_files_only", False),
                tqdm_class=_NoBar,
            )
        )
    except LocalEntryNotFoundError as error:
        raise NotCachedError(
            name,
            f"{path}{at} is neither a local folder{_beside(path)} nor in the Hub cache, and {filename} could not be "
            "downloaded (offline, or local_files_only)",
        ) from error
    except GatedRepoError as error:
        raise AdapterError(name, f"{path} is gated: accept its terms on the Hub and log in (hf auth login)") from error
    except RepositoryNotFoundError as error:
        raise AdapterError(
            name,
            f"{path} is neither a local folder{_beside(path)} nor a Hub repository that you can read; for a private "
            "one, log in (hf auth login) or set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise AdapterError(name, f"{path} has no revision {revision!r}") from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise AdapterError(name, f"{path!r} is neither a local folder nor a Hub id: {error}") from error
    except Exception as error:  # the HTTP client has errors of its own, in a package that changes with the version
        raise AdapterError(name, f"{path}{at} could not be downloaded: {error}") from error


def _beside(path: str) -> str:
    """Says that the folder around a missing one is there, so that its name may have a typing error."""
    folder, _, name = path.rpartition("/")
    return f" ({folder} is one, without {name})" if folder and is_local(folder) else ""


def commit_of(cached: Path) -> str | None:
    """The commit from a path in the Hub cache, .../snapshots/<commit>/..."""
    for folder in cached.parents:
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.name
    return None
