"""Reads saved LoRA adapters, from the Hub or a folder, and turns them into checked, stacked factors per module.

Everything that can be wrong with an adapter is found here, before a model is changed. No torch modules live here.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import mmap
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache
from itertools import islice, repeat
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, cast

import torch
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
from peft import LoraConfig
from peft import __version__ as peft_version
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import compat, formats, misfits, pickled
from .base_names import original, without_owner
from .front_matter import stated_license
from .names import LORA_SUBFOLDER
from .patterns import PatternError, value_for
from .references import AdapterReference, Provenance, is_hub_id, is_local, looks_like_path
from .scalars import LARGEST_FLOAT32
from .schema import UNPRINTABLE, read_adapter_config, read_bytes
from .text import LONG, in_python, one_line, quoted, shown


# Initialisations after which the base model is the one that everybody has; the others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA) change its weights, so that the saved product is no update of the original model.
BASE_PRESERVING_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Fields of LoraConfig that change what the adapter computes and that PEFT does not mark as variants.
OTHER_VARIANTS = ("use_qalora", "layer_replication", "megatron_config", "enable_lora")
# How PEFT names its copy of the base weight, beside the factors of an embedding or of the output layer.
BASE_COPY = ".base_layer.weight"
# The modules that PEFT trains in full for a task type, and that are not composed therefore.
HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
PARALLEL_DOWNLOADS = 8
FILES_LOOKED_AT = 10_000
PARALLEL_HASHES = 2
# How much of the adapters is mapped at once while they are stacked, in bytes and in files.
MAPPED_BYTES = 32 << 20
MAPPED_FILES = 64
HASHED_AT_ONCE = 32 << 20
CHECKED_AT_ONCE = 1 << 22  # values
MAX_KEY = 1000  # characters of a tensor's name
# Values of these types lie in a safetensors file as PyTorch has them in memory; safetensors itself reads all others.
_MAPPED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
}
# Powers of two and pairs of values, with which others are scaled and packed.
_NO_NUMBERS = tuple(getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name))
logger = logging.getLogger(__name__)


class AdapterError(ValueError):
    """An upstream adapter cannot be composed; the message names the adapter, the module and the values."""

    def __init__(self, name: str, reason: str) -> None:
        reason = one_line(reason, LONG)  # whatever it quotes
        super().__init__(f"adapter {quoted(name)}: {reason}")
        self.adapter_name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[AdapterError], tuple[str, str]]:
        return type(self), (self.adapter_name, self.reason)


class _NoBar(tqdm):
    """In place of one bar per file: several at once garble a terminal, and there is one for all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


class NotCachedError(AdapterError):
    """The Hub cannot be asked, and the cache does not have the file."""


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
        return self.reference["name"]


@dataclass(frozen=True)
class LayerShape:
    """What the factors of a target module must look like.

    Attributes:
        kind: class name of the base layer, for messages.
        in_shape: shape of one row of A: (in,), or (in, *kernel) for a convolution.
        out_features: rows of B.
        is_embedding: whether the factors are those of an embedding.
        refusal: why this layer cannot be composed, if so.
        experts: how many matrices a parameter of three dimensions holds, each with factors of its own.
        is_transposed: whether these are stored as (in, out).
    """

    kind: str
    in_shape: tuple[int, ...]
    out_features: int
    is_embedding: bool = False
    refusal: str | None = None
    experts: int | None = None
    is_transposed: bool = False

    @property
    def rank_dim_of_A(self) -> int:
        return 0 if self.experts is None else 1

    @property
    def rank_dim_of_B(self) -> int:
        return self.rank_dim_of_A + 1

    def shape_of_A(self, rank: int) -> tuple[int, ...]:
        experts = () if self.experts is None else (self.experts,)
        return (*experts, rank, *self.in_shape)

    def shape_of_B(self, rank: int) -> tuple[int, ...]:
        if self.experts is not None:
            return (self.experts, self.out_features, rank)
        return (self.out_features, rank, *(1,) * (len(self.in_shape) - 1))

    def saved_shape_of_A(self, rank: int) -> tuple[int, ...]:
        """The shape in an adapter's file, where the experts come one below the other."""
        return self.shape_of_A(rank) if self.experts is None else (self.experts * rank, *self.in_shape)

    def saved_shape_of_B(self, rank: int) -> tuple[int, ...]:
        return self.shape_of_B(rank) if self.experts is None else (self.out_features, rank * self.experts)

    def unpack_A(self, saved: Tensor) -> Tensor:
        """A of an adapter's file in the shape in which it is stacked."""
        return saved if self.experts is None else saved.reshape(self.experts, -1, *self.in_shape)

    def unpack_B(self, saved: Tensor) -> Tensor:
        """B likewise; its columns go through the experts before the ranks."""
        if self.experts is None:
            return saved
        return saved.reshape(self.out_features, -1, self.experts).permute(2, 0, 1)


@dataclass
class Factors:
    """Keys of the factors of one module in an adapter's weights, and the scale s = alpha / r."""

    rank: int
    scale: float
    A: str
    B: str
    bias: str | None = None
    is_embedding: bool = False


@dataclass
class UpstreamAdapter:
    """One adapter, read and checked: its factors by the module names of its own checkpoint.

    Attributes:
        name: name in the composition.
        config: its `adapter_config.json`.
        weights: its tensors, read when asked for.
        modules: factors by module name, as spelled in the checkpoint.
        extras: entries that are not LoRA factors (heads, embeddings); they are not mixed.
        files: where it was found.
        sha256: the hash of its weights, perhaps not computed yet.
    """

    name: str
    config: dict[str, Any]
    weights: WeightsFile
    modules: dict[str, Factors]
    extras: list[str]
    files: AdapterFiles
    sha256: Future[str]

    @property
    def provenance(self) -> Provenance:
        """What is recorded of it; waits for the hash."""
        return Provenance(
            name=self.name,
            path=self.files.reference["path"],
            subfolder=self.files.reference.get("subfolder"),
            commit=self.files.commit,
            sha256=self.sha256.result(),
            base_model_name_or_path=self.config.get("base_model_name_or_path"),
            license=stated_license(self.files.card),
        )


@dataclass
class StackedFactors:
    """The factors of all adapters for one module, stacked: A (R, in), B (out, R) with scales, bias (N, out)."""

    ranks: list[int]
    A: Tensor
    B: Tensor
    bias: Tensor | None = None


class _Entry(NamedTuple):
    """One tensor of a weights file; `start` is its first byte, None where it cannot be taken from there."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    start: int | None
    dtype_name: str


class WeightsFile:
    """The tensors of a weights file, by key; shapes are known without reading the values.

    A safetensors file is checked by safetensors, then mapped into memory: with thousands of tensors its own reader
    takes most of the time that loading takes.
    """

    def __init__(self, name: str, path: Path) -> None:
        self._name = name
        self._path = path
        self._is_pickled = path.suffix != ".safetensors"
        self._pickled: dict[str, Tensor] | None = None
        self._entries: dict[str, _Entry] = {}
        self._mapping: mmap.mmap | None = None
        self._version: tuple[int, ...] | None = None
        try:
            self._version = _version(path.stat())
            placeholder = formats.placeholder(read_bytes(path, formats.ENOUGH_BYTES))
            if placeholder is not None:
                raise AdapterError(name, f"{path} {placeholder}")
            if self._is_pickled:
                self.nbytes = pickled.content_nbytes(path)
                self._entries = {
                    key: _Entry(*entry, None, str(entry[1])) for key, entry in pickled.index(path).items()
                }
            else:
                self.nbytes = path.stat().st_size
                self._entries = _entries(path)
        except pickled.UnreadablePickleError as error:
            raise AdapterError(name, f"{path} {error}") from error
        except (SafetensorError, OSError, MemoryError) as error:
            raise AdapterError(name, f"{path} is not a readable safetensors file: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key].shape

    def dtype(self, key: str) -> str:
        """The dtype by its name in PyTorch or, where that has none, in the file."""
        return self._entries[key].dtype_name

    def is_floating_point(self, key: str) -> bool:
        """Whether the values are real numbers, each with an element of its own."""
        dtype = self._entries[key].dtype
        return dtype is not None and dtype.is_floating_point and dtype not in _NO_NUMBERS

    def read(self, key: str) -> Tensor:
        """The values of one tensor: a view of the mapped file, a private one."""
        if self._is_pickled:
            return self._unpickled()[key]
        shape, dtype, start, _ = self._entries[key]
        try:
            if dtype is None or start is None or 0 in shape:
                with safe_open(self._path, framework="pt", device="cpu") as file:
                    return file.get_tensor(key)
            return torch.frombuffer(self._mapped(), dtype=dtype, count=math.prod(shape), offset=start).view(shape)
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            raise AdapterError(self._name, f"{self._path} cannot be read at {key!r}: {error}") from error

    def unmap(self) -> None:
        """Let go of the mapped file; the memory is free once the tensors that were read are gone, too."""
        self._mapping = None
        self._pickled = None

    def _unpickled(self) -> dict[str, Tensor]:
        if self._pickled is None:
            try:
                self._pickled = pickled.load(self._path)
            except (pickled.UnreadablePickleError, OSError) as error:
                raise AdapterError(self._name, f"{self._path} {error}") from error
        return self._pickled

    def _mapped(self) -> mmap.mmap:
        if self._mapping is None:
            with self._path.open("rb") as file:
                if _version(os.fstat(file.fileno())) != self._version:
                    raise OSError("another process has replaced it meanwhile; try again")
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._mapping


def _version(status: os.stat_result) -> tuple[int, ...]:
    """What is another once a file was replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _entries(path: Path) -> dict[str, _Entry]:
    """What a safetensors file holds, by key, in alphabetical order.

    Where a tensor starts follows from the sizes of those behind it: on opening, safetensors makes sure that they
    fill the file to its end without holes.
    """
    # Not as "pt": that asks for memory of the size of the file, which a sparse file of terabytes has, too.
    with safe_open(path, framework="numpy") as file:
        views = {key: file.get_slice(key) for key in file.offset_keys()}
    is_native = sys.byteorder == "little"
    end: int | None = path.stat().st_size
    entries: dict[str, _Entry] = {}
    for key, view in reversed(views.items()):
        stored = view.get_dtype()
        shape, dtype = tuple(view.get_shape()), _MAPPED_DTYPES.get(stored)
        end = None if end is None or dtype is None else end - math.prod(shape) * dtype.itemsize
        entries[key] = _Entry(shape, dtype, end if is_native else None, str(dtype or stored))
    return dict(sorted(entries.items()))


def locate(
    references: Sequence[AdapterReference], with_cards: bool = True, progress: bool = True
) -> list[AdapterFiles]:
    """Find the files of adapters, downloading those that are on the Hub, several at once.

    Args:
        references: where the adapters are; a `path` that is a folder here is local, any other is a Hub id. The Hub
            token comes from the usual places (`HF_TOKEN`, `hf auth login`); `HF_HUB_OFFLINE=1` or
            `local_files_only` use the cache alone.
        with_cards: whether the cards are wanted, too. One that cannot be had is left out.
        progress: whether to show a progress bar, if anything is on the Hub.

    Returns:
        The files, in the order of `references`.

    Raises:
        AdapterError: an adapter is not there, not reachable, or is no adapter.
    """
    remote = [reference for reference in references if not is_local(reference["path"])]
    if not remote:
        return [locate_one(reference, with_cards) for reference in references]
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        found = pool.map(locate_one, references, repeat(with_cards))
        bar = tqdm(found, total=len(references), desc="Fetching adapters", unit="adapter", disable=not progress)
        return list(bar)


def locate_one(reference: AdapterReference, with_card: bool = True) -> AdapterFiles:
    """As `locate`, one adapter and without a progress bar."""
    if is_local(reference["path"]):
        return _locate_in_folder(reference)
    if looks_like_path(reference["path"]):
        is_file = ": it is a file; give the folder that it is in" if os.path.isfile(reference["path"]) else ""
        raise AdapterError(reference["name"], f"there is no folder {reference['path']}{is_file}")
    path, at, revision = reference["path"].rpartition("@")
    if at and is_hub_id(path):
        wanted = f'{{"path": {in_python(path)}, "revision": {in_python(revision)}}}'
        raise AdapterError(
            reference["name"], f"it is no folder here, and a Hub id has no @; for a revision of it write {wanted}"
        )
    files = _locate_on_hub(reference)
    return replace(files, card=_download_card(reference, files.commit)) if with_card else files


def _locate_in_folder(reference: AdapterReference) -> AdapterFiles:
    folder = Path(reference["path"], reference.get("subfolder") or "")
    config = folder / CONFIG_NAME
    if not os.path.isfile(config):  # unlike Path, it takes names that no file can have
        raise AdapterError(reference["name"], _no_config(str(folder), _files_in(folder), folder))
    for filename in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if os.path.isfile(folder / filename):
            card = Path(reference["path"], constants.REPOCARD_NAME)
            return AdapterFiles(reference, config, folder / filename, None, card if os.path.isfile(card) else None)
    raise AdapterError(reference["name"], _no_weights(str(folder), _files_in(folder)))


def _no_config(where: str, names: Collection[str], folder: Path | None = None) -> str:
    """Why a folder or repository that has these files is no adapter; `folder` if they can be looked into."""
    found = formats.of_files(names)
    if folder is not None:
        files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
        found = next(filter(None, (formats.of_keys(_keys_of(folder / name)) for name in files)), found)
    return f"{where} is not an adapter: it has no {CONFIG_NAME}" + (f"; {found}" if found else "")


def _no_weights(where: str, names: Collection[str]) -> str:
    found = formats.of_files(names)
    missing = f"{where} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}"
    return missing + (f"; {found}" if found else "")


def _files_in(folder: Path) -> list[str]:
    """The names of the files in a folder, and the configs of adapters in its folders; empty if it cannot be read."""
    try:
        entries = [*islice(folder.iterdir(), FILES_LOOKED_AT)]
    except (OSError, ValueError):
        return []
    inner = [f"{entry.name}/{CONFIG_NAME}" for entry in entries if os.path.isfile(entry / CONFIG_NAME)]
    return sorted([*inner, *(entry.name for entry in entries if entry.is_file())])


def _files_on_hub(reference: AdapterReference, commit: str | None) -> list[str]:
    """As `_files_in`, of a repository; empty where the Hub cannot be asked."""
    if reference.get("local_files_only"):
        return []
    try:
        names = list_repo_files(reference["path"], revision=commit or reference.get("revision"))
    except Exception:  # it is only asked to explain an error, and its client has errors of its own
        return []
    inner = f"{reference['subfolder']}/" if reference.get("subfolder") else ""
    return [name.removeprefix(inner) for name in names if name.startswith(inner)]


def _keys_of(path: Path) -> list[str]:
    """The keys of a safetensors file; none if it cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return [*file.keys()]
    except (SafetensorError, OSError):
        return []


def _locate_on_hub(reference: AdapterReference) -> AdapterFiles:
    config = _download(reference, CONFIG_NAME, reference.get("revision"))
    if config is None:
        raise AdapterError(reference["name"], _no_config(reference["path"], _files_on_hub(reference, None)))
    commit = _commit_of(config)
    not_cached: NotCachedError | None = None
    for filename in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if _is_known_to_be_missing(reference, filename, commit):
            continue
        try:
            weights = _download(reference, filename, commit)
        except NotCachedError as error:  # without the Hub, the other file may still be in the cache
            not_cached = not_cached or error
            continue
        if weights is not None:
            return AdapterFiles(reference, config, weights, commit)
    if not_cached is not None:
        raise not_cached
    raise AdapterError(reference["name"], _no_weights(reference["path"], _files_on_hub(reference, commit)))


def _download_card(reference: AdapterReference, commit: str | None) -> Path | None:
    """The repository's card at the same commit; None where it has none or, unlike the weights, it cannot be had."""
    whole = AdapterReference(**{**reference, "subfolder": None})
    if _is_known_to_be_missing(whole, constants.REPOCARD_NAME, commit):
        return None
    try:
        return _download(whole, constants.REPOCARD_NAME, commit)
    except AdapterError:
        return None


def _is_known_to_be_missing(reference: AdapterReference, filename: str, commit: str | None) -> bool:
    """Whether the Hub has said before that this commit does not have the file."""
    if reference.get("subfolder"):
        filename = f"{reference['subfolder']}/{filename}"
    return try_to_load_from_cache(reference["path"], filename, revision=commit) is compat.CACHED_NO_EXIST


def _download(reference: AdapterReference, filename: str, revision: str | None) -> Path | None:
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
            f"{path}{at} is neither a folder here nor in the Hub cache, and the Hub could not be asked for {filename} "
            "(offline, or local_files_only)",
        ) from error
    except GatedRepoError as error:
        raise AdapterError(name, f"{path} is gated: accept its terms on the Hub and log in") from error
    except RepositoryNotFoundError as error:
        raise AdapterError(
            name,
            f"{path} is neither a folder here nor a repository on the Hub that you can read; a private one needs a "
            "token (hf auth login, or HF_TOKEN)",
        ) from error
    except RevisionNotFoundError as error:
        raise AdapterError(name, f"{path} has no revision {revision!r}") from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise AdapterError(name, f"{path!r} is neither a folder here nor a Hub id: {error}") from error
    except Exception as error:  # the HTTP client has errors of its own, in a package that changes with the version
        raise AdapterError(name, f"{path}{at} could not be fetched: {error}") from error


def _commit_of(cached: Path) -> str | None:
    """The commit from a path in the Hub cache, .../snapshots/<commit>/..."""
    for folder in cached.parents:
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.name
    return None


def read_adapters(
    files: Sequence[AdapterFiles], expected_sha256: Sequence[str | None], hashed: bool = True
) -> list[UpstreamAdapter]:
    """Read the configs and the tensor indices of adapters and check that they are plain LoRAs.

    Their weights are hashed in threads beside this and what comes after it, until the provenance is asked for.

    Args:
        files: where they are.
        expected_sha256: for each the hash that its weights must have, where one is recorded. That is found out before
            they are opened.
        hashed: whether the provenance will be asked for.

    Returns:
        The adapters, in the order of `files`; the values of their tensors are read later, in `stack`.

    Raises:
        AdapterError: one is no LoRA, a variant that is not a plain product, lacks a factor, or has another hash.
    """
    pool, refused = ThreadPoolExecutor(PARALLEL_HASHES), Event()
    hashes = [
        pool.submit(_sha256, file.weights, refused) if hashed or sha256 else _never()
        for file, sha256 in zip(files, expected_sha256)
    ]
    try:
        return [_read_adapter(*entry) for entry in zip(files, hashes, expected_sha256)]
    except BaseException:
        refused.set()
        pool.shutdown(cancel_futures=True)  # the rest need not be hashed
        raise
    finally:
        pool.shutdown(wait=False)


def _never() -> Future[str]:
    """The hash that nobody wants."""
    future: Future[str] = Future()
    future.cancel()
    return future


def _read_adapter(files: AdapterFiles, sha256: Future[str], expected_sha256: str | None) -> UpstreamAdapter:
    name = files.name
    config = read_config(files)
    if config["peft_type"] == "COMPOSITION":
        raise AdapterError(name, _of_composition(files))
    _require_plain_lora(name, config)
    if expected_sha256 is not None and sha256.result() != expected_sha256:
        raise AdapterError(
            name,
            f"its weights have changed: recorded sha256 {expected_sha256}, but {files.weights} has {sha256.result()}",
        )
    weights = WeightsFile(name, files.weights)
    modules, extras = _index(name, config, weights)
    return UpstreamAdapter(name, config, weights, modules, extras, files, sha256)


def _of_composition(files: AdapterFiles) -> str:
    """How to compose a composition: as the plain LoRA that it was exported to."""
    path, subfolder = files.reference["path"], files.reference.get("subfolder")
    exported = f"{subfolder}/{LORA_SUBFOLDER}" if subfolder else LORA_SUBFOLDER
    if is_local(path):
        is_there = (files.config.parent / LORA_SUBFOLDER / CONFIG_NAME).is_file()
        command = shlex.join(["peft-composition", "export", str(files.config.parent), "--out", "NEW_FOLDER"])
    else:
        inner = AdapterReference(**{**files.reference, "subfolder": exported})
        try:
            is_there = _download(inner, CONFIG_NAME, files.commit) is not None
        except AdapterError:
            is_there = False
        command = "load it (PeftModel.from_pretrained) and to_lora(model).save_pretrained(NEW_FOLDER)"
    if is_there:
        return (
            f"it is itself a composition. Its folder {LORA_SUBFOLDER!r} holds it as a plain LoRA, which can be "
            f'composed: {{"path": "{path}", "subfolder": "{exported}"}}'
        )
    return f"it is itself a composition. Export it as a plain LoRA, which can be composed: {command}"


def read_config(files: AdapterFiles) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter of any kind.

    Raises:
        AdapterError: it is damaged, describes no PEFT adapter, or has a field with a value that it cannot have.
    """
    try:
        return read_adapter_config(files.config)
    except ValueError as error:
        raise AdapterError(files.name, str(error)) from error


def _sha256(path: Path, stop: Event) -> str:
    """The hash of a file; of a part of it, once nobody wants it any more."""
    # One call per file, mostly: for each the thread must win the interpreter back from the one that reads adapters.
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, HASHED_AT_ONCE):
            if stop.is_set():
                break
            length = min(HASHED_AT_ONCE, size - start)
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) as content:
                digest.update(content)
    return digest.hexdigest()


def _require_plain_lora(name: str, config: Mapping[str, Any]) -> None:
    """Refuse what is not W0 + s B A on the original base model."""
    peft_type = config["peft_type"]
    if peft_type != "LORA":
        raise AdapterError(name, f"its peft_type is {peft_type}; only LORA adapters can be composed")
    if config.get("use_dora"):
        raise AdapterError(
            name,
            "it is a DoRA adapter, whose update is not the product B A; convert it first, with peft.convert_to_lora "
            "or by merging it and extracting a LoRA from the difference",
        )
    for variant in _variant_fields():
        if config.get(variant):
            raise AdapterError(
                name, f"{variant}={shown(config[variant])}: this LoRA variant is not a plain product B A"
            )
    for setting, value in config.items():
        if value and _may_be_a_variant(setting, value):
            raise AdapterError(
                name,
                f"{shown(setting)}={shown(value)}: this PEFT ({peft_version}) does not know what that is, and it may "
                "be a variant that is not a plain product B A; upgrade PEFT to the version that it was saved with",
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            name,
            f"bias={shown(config['bias'])}: it trained biases of the base model, which a mix of products cannot hold",
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in BASE_PRESERVING_INITS:
        raise AdapterError(
            name,
            f"init_lora_weights={shown(init)} changes the weights of the base model, so that the adapter does not fit "
            "the original; where PEFT offers it, save it converted, with "
            "save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    unknown = sorted(key for key, value in config.items() if key not in _known_fields() and value)
    if unknown:
        names = one_line(", ".join(map(one_line, unknown)), LONG)
        warnings.warn(
            f"adapter {quoted(name)} has settings that this PEFT does not know and that are ignored: {names}. "
            "It was saved by a newer PEFT; an upgrade may be needed to read it rightly.",
            stacklevel=2,
        )


@cache
def _known_fields() -> set[str]:
    return {config_field.name for config_field in fields(LoraConfig)} | {"runtime_config"}


@cache
def _variant_fields() -> list[str]:
    marked = [config_field.name for config_field in fields(LoraConfig) if config_field.metadata.get("is_lora_variant")]
    return [*dict.fromkeys([*marked, *OTHER_VARIANTS])]


def _may_be_a_variant(setting: str, value: Any) -> bool:
    """Whether a setting of a newer PEFT could mean another update than B A: by PEFT's way of naming its variants."""
    if setting == "use_rslora":
        return False
    is_unknown = setting not in _known_fields()
    return setting.startswith("use_") or (is_unknown and setting.endswith("_config") and isinstance(value, dict))


_FACTOR_KEY = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])"
    r"(?:\.(?P<label>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?$"
)
# What torch.compile, FSDP and activation checkpointing put into the names of what they wrap.
_WRAPPED = re.compile(r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")


class _Key(NamedTuple):
    """A key of an adapter's weights, taken apart; `part` is None where it is no LoRA factor."""

    plain: str
    module: str = ""
    part: str | None = None
    is_embedding: bool = False


@lru_cache(maxsize=1 << 16)  # adapters of one kind have their keys in common
def _parse_key(key: str) -> _Key:
    plain = _WRAPPED.sub("", key).removeprefix("module.").removeprefix("base_model.model.")
    match = _FACTOR_KEY.match(plain)
    if match is None or not (match["embedding"] or match["leaf"]):  # a name of an adapter is no tensor of a layer's
        return _Key(plain)
    part = match["factor"] + (".bias" if match["leaf"] == "bias" else "")
    return _Key(plain, match["module"], part, is_embedding=match["embedding"] is not None)


def _index(name: str, config: Mapping[str, Any], weights: WeightsFile) -> tuple[dict[str, Factors], list[str]]:
    """Sort the keys of an adapter into factors by module and the rest."""
    found: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    extras: list[str] = []
    for key in weights:
        if len(key) > MAX_KEY or UNPRINTABLE.search(key):
            raise AdapterError(
                name, f"the name of a tensor has {len(key)} characters, or some that do not print: {quoted(key)}"
            )
        plain, module, part, is_embedding = _parse_key(key)
        if part is None:
            if "lora_magnitude_vector" in plain:
                raise AdapterError(name, f"it is a DoRA adapter ({key}); convert it first, with peft.convert_to_lora")
            if ".lora_" in plain:
                raise AdapterError(
                    name, formats.of_keys(weights) or f"tensor {key!r} is not part of a plain product B A"
                )
            extras.append(plain)
            continue
        parts = found.setdefault(module, {})
        if part in parts:
            raise AdapterError(name, f"module {module!r} has two tensors {part}: {parts[part]!r} and {key!r}")
        parts[part] = key
        if is_embedding:
            embeddings.add(module)
    if not found:
        found, embeddings, extras = _cut_keys(weights)
    if not found:
        raise AdapterError(name, formats.without_factors([*weights]))
    modules = {
        module: _factors(name, config, weights, module, parts, module in embeddings) for module, parts in found.items()
    }
    return modules, [extra for extra in extras if extra.removesuffix(BASE_COPY) not in modules]


_CUT_KEY = re.compile(r"^(?P<module>.+)_(?P<factor>[AB])\.(?P<leaf>weight|bias)$")
_CUT_EMBEDDING_KEY = re.compile(r"^(?P<module>.+)_embedding_(?P<factor>[AB])$")


def _cut_keys(weights: WeightsFile) -> tuple[dict[str, dict[str, str]], set[str], list[str]]:
    """As in `_index`, of an adapter that old versions of PEFT saved under the name "lora".

    They removed the name of an adapter from its keys wherever it stood, and so made `q_proj_A.weight` of
    `q_proj.lora_A.lora.weight`. Factors are taken only in pairs whose ranks agree.
    """
    found: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    plain_names = {key: _parse_key(key).plain for key in weights}
    for key, plain in plain_names.items():
        match = _CUT_KEY.match(plain) or _CUT_EMBEDDING_KEY.match(plain)
        if match is None:
            continue
        is_bias = match.re is _CUT_KEY and match["leaf"] == "bias"
        found.setdefault(match["module"], {})[match["factor"] + (".bias" if is_bias else "")] = key
        if match.re is _CUT_EMBEDDING_KEY:
            embeddings.add(match["module"])

    def is_product(parts: Mapping[str, str]) -> bool:
        A, B = (weights.shape(parts[factor]) if factor in parts else () for factor in "AB")
        return len(A) > 1 and len(B) > 1 and A[0] == B[1]

    found = {module: parts for module, parts in found.items() if is_product(parts)}
    taken = {key for parts in found.values() for key in parts.values()}
    return found, embeddings & found.keys(), [plain for key, plain in plain_names.items() if key not in taken]


def _factors(
    name: str,
    config: Mapping[str, Any],
    weights: WeightsFile,
    module: str,
    parts: Mapping[str, str],
    is_embedding: bool,
) -> Factors:
    for factor, other in (("A", "B"), ("B", "A")):
        if factor not in parts:
            raise AdapterError(name, f"module {module!r} has lora_{other} but no lora_{factor}")
    if "A.bias" in parts:
        raise AdapterError(name, f"module {module!r} has a bias on lora_A, which is not part of a plain product B A")
    for key in parts.values():
        if not weights.is_floating_point(key):
            raise AdapterError(
                name,
                f"module {module!r}: tensor {key!r} has dtype {weights.dtype(key)}; LoRA factors are real floating-"
                "point numbers. Save them as float32, bfloat16 or float16 (quantized codes must be dequantized first)",
            )
    for factor in ("A", "B"):
        shape = weights.shape(parts[factor])
        if len(shape) < 2 or 0 in shape:
            reason = misfits.why_no_matrix(shape, [weights.shape(key) for key in weights])
            raise AdapterError(name, f"module {module!r}: lora_{factor} {reason}")
    rows = weights.shape(parts["A"])[0]
    factors = Factors(rows, math.nan, parts["A"], parts["B"], parts.get("B.bias"), is_embedding)
    if config.get("target_parameters") or ".base_layer" in module:
        # Whose factors these are, and so of what rank and alpha, depends on the model: see `wrapping.unwrap`.
        return replace(factors, scale=_scale(name, config, module, config.get("r") or rows))
    return ranked(name, config, weights, factors, module)


def ranked(
    name: str, config: Mapping[str, Any], weights: WeightsFile, factors: Factors, module: str, experts: int = 1
) -> Factors:
    """Factors with the rank and the scale that an adapter's config gives them.

    Args:
        name: of the adapter.
        config: its config.
        weights: its tensors.
        factors: of a module, their rank and scale yet unknown.
        module: its name, or that of a parameter, as the patterns of the config know it.
        experts: how many matrices share the rows of A.

    Raises:
        AdapterError: config and factors disagree.
    """
    rows = next(iter(weights.shape(factors.A)), 0)
    rank = rows // experts
    expected = _by_pattern(name, config, "rank_pattern", module, config.get("r"))
    if (expected is not None and rank != expected) or rows != rank * experts:
        of_experts = f" for {experts} experts" if experts > 1 else ""
        raise AdapterError(
            name,
            f"module {module!r}: its config says rank {expected}{of_experts} but lora_A has {rows} rows; the scale "
            "is unknown",
        )
    return replace(factors, rank=rank, scale=_scale(name, config, module, rank))


def _scale(name: str, config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = float(_by_pattern(name, config, "alpha_pattern", module, config.get("lora_alpha", 8)))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if rank else 0.0
    if abs(scale) > LARGEST_FLOAT32:
        raise AdapterError(name, f"module {quoted(module)}: lora_alpha is {alpha:g}, more than float32 holds")
    return scale


def _by_pattern(name: str, config: Mapping[str, Any], pattern: str, module: str, default: Any) -> Any:
    try:
        return value_for(config.get(pattern), module, default)
    except PatternError as error:
        raise AdapterError(name, f"{pattern}: {error}") from error


@dataclass
class CompositionPlan:
    """Which factors of which adapter go into which module of the model.

    Attributes:
        adapters: the adapters, in the order of the mixing weights.
        shapes: the composed modules, in the model's order.
        factors: for each composed module the factors of every adapter; None where it does not touch the module.
    """

    adapters: list[UpstreamAdapter]
    shapes: dict[str, LayerShape]
    factors: dict[str, list[Factors | None]] = field(default_factory=dict)

    def ranks(self, module: str) -> list[int]:
        return [entry.rank if entry is not None else 0 for entry in self.factors[module]]

    def is_biased(self, module: str) -> bool:
        return any(entry is not None and entry.bias is not None for entry in self.factors[module])


def match(
    adapters: Sequence[UpstreamAdapter],
    shape_of: Callable[[str], LayerShape | None],
    module_names: Iterable[str],
    current_name: Callable[[str], str],
    is_wanted: Callable[[str], bool],
) -> CompositionPlan:
    """Find the module of the model for all factors and check that they fit.

    Args:
        adapters: what `read_adapter` returned.
        shape_of: module name -> what its factors must look like; None where the model has no such module.
        module_names: all modules of the model, in its order.
        current_name: module name as an adapter spells it -> the model's (or the name itself).
        is_wanted: whether the config lets a module be composed (`target_modules` and the like).

    Returns:
        The plan.

    Raises:
        AdapterError: a module does not exist, cannot hold a composition, or has another shape.
        ValueError: nothing is left to compose.
    """
    by_module: dict[str, list[Factors | None]] = {}
    shapes: dict[str, LayerShape] = {}

    @cache  # adapters have most names in common
    def find(spelled: str) -> tuple[str, LayerShape | None, bool]:
        module = current_name(spelled)
        return module, shape_of(module), is_wanted(module)

    for number, adapter in enumerate(adapters):
        touched = 0
        for spelled, factors in adapter.modules.items():
            module, shape, is_composed = find(spelled)
            if not is_composed:
                continue
            if shape is None:
                foreign = formats.of_keys(adapter.weights)
                raise AdapterError(adapter.name, foreign or _unknown_module(spelled, module_names))
            _require_fit(adapter, module, factors, shape)
            row = by_module.setdefault(module, [None] * len(adapters))
            if row[number] is not None:
                raise AdapterError(
                    adapter.name, f"two of its modules are {module!r} in this model, one is {spelled!r}"
                )
            row[number] = factors
            shapes[module] = shape
            touched += 1
        if not touched:
            warnings.warn(
                f"adapter {adapter.name!r} touches none of the composed modules; its weight goes to nothing",
                stacklevel=2,
            )
    if not by_module:
        touched_names = sorted({module for adapter in adapters for module in adapter.modules})
        raise ValueError(
            "nothing to compose: target_modules, exclude_modules, layers_to_transform or modules_to_save leave out "
            f"every module that the adapters touch ({', '.join(touched_names[:4])}, ... {len(touched_names)} in all)"
        )
    in_model_order = [module for module in module_names if module in by_module]
    return CompositionPlan(
        list(adapters),
        {module: shapes[module] for module in in_model_order},
        {module: by_module[module] for module in in_model_order},
    )


def _unknown_module(module: str, module_names: Iterable[str]) -> str:
    similar = difflib.get_close_matches(module, list(module_names), n=1, cutoff=0.6)
    hint = f"; the nearest name is {similar[0]!r}" if similar else ""
    return (
        f"module {module!r} does not exist in the model{hint}. Was it trained on another base model? To leave the "
        "module out, name it in exclude_modules"
    )


def _require_fit(adapter: UpstreamAdapter, module: str, factors: Factors, shape: LayerShape) -> None:
    if shape.refusal is not None:
        raise AdapterError(adapter.name, f"module {module!r} ({shape.kind}) cannot be composed: {shape.refusal}")
    if factors.is_embedding != shape.is_embedding:
        kinds = ("an embedding", "a linear or convolutional layer")
        has, needs = kinds if factors.is_embedding else kinds[::-1]
        raise AdapterError(adapter.name, f"module {module!r} has the factors of {has}, but is {needs} in the model")
    expected = {factors.A: shape.saved_shape_of_A(factors.rank), factors.B: shape.saved_shape_of_B(factors.rank)}
    if factors.bias is not None:
        expected[factors.bias] = (shape.out_features,)
    for key, wanted in expected.items():
        actual = adapter.weights.shape(key)
        if actual != wanted:
            stored = misfits.Sizes(adapter.weights.shape(factors.A)[1:], adapter.weights.shape(factors.B)[0])
            wished = misfits.Sizes(shape.in_shape, shape.out_features)
            doubt = misfits.why_another_shape(module, shape.is_embedding, stored, wished)
            raise AdapterError(
                adapter.name,
                f"module {module!r}: tensor {key.rpartition(module)[2].lstrip('.') or key} has shape {actual}, but "
                f"{shape.kind} in the model needs {wanted}. {doubt}",
            )


def require_same_base(adapters: Iterable[UpstreamAdapter], model_name: str | None) -> None:
    """Refuse adapters that say they were trained on another model of the Hub.

    Only Hub ids are compared: folders move. Copies, such as `org/model-bnb-4bit`, count as the model itself.

    Args:
        adapters: the adapters.
        model_name: `name_or_path` of the model, if it has one.

    Raises:
        AdapterError: the names differ.
    """
    for adapter, trained_on in _otherwise_named(adapters, model_name):
        if original(trained_on) != original(str(model_name)):
            raise AdapterError(
                adapter.name,
                f"it was trained on {trained_on!r}, but the model is {model_name!r}. If these are the same weights "
                "under another name, leave names aside: CompositionConfig(check_base_model=False), or --no-check-base "
                "on the command line. Modules and shapes are compared in any case",
            )


def warn_about_other_names(adapters: Iterable[UpstreamAdapter], model_name: str | None) -> None:
    """Say once which adapters were trained on a copy of the model: its name says so, which is no proof."""
    copies: dict[str, list[str]] = {}
    for adapter, trained_on in _otherwise_named(adapters, model_name):
        copies.setdefault(trained_on, []).append(adapter.name)
    if copies:
        lists = "; ".join(f"{trained_on!r} ({', '.join(map(repr, names))})" for trained_on, names in copies.items())
        warnings.warn(
            f"Going by their names, these are copies of the base model {model_name!r} in another format, and the "
            f"adapters trained on them are composed on it as they are: {lists}.",
            stacklevel=2,
        )


def _otherwise_named(
    adapters: Iterable[UpstreamAdapter], model_name: str | None
) -> Iterator[tuple[UpstreamAdapter, str]]:
    """The adapters that were trained on a model of the Hub with another name, and that name."""
    if not model_name or is_local(model_name) or looks_like_path(model_name):
        return
    for adapter in adapters:
        trained_on = adapter.config.get("base_model_name_or_path")
        if not trained_on or is_local(trained_on) or looks_like_path(trained_on):
            continue
        if without_owner(trained_on) != without_owner(model_name):
            yield adapter, trained_on


def warn_about_extras(adapters: Iterable[UpstreamAdapter], is_trained_anew: Callable[[str], bool]) -> None:
    """Say once what is in the adapters and not mixed.

    Heads of other tasks are only logged: every classifier brings one, that it is left out is the method, and nobody
    could do anything about it. Retrained embeddings and the like are a warning, since such an adapter without them is
    not what its author trained: one may prefer another.

    Args:
        adapters: the adapters.
        is_trained_anew: whether the composition trains the module of this name in full itself.
    """
    heads: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    names = {name for names in HEADS.values() for name in names}
    for adapter in adapters:
        for key in adapter.extras:
            module = key.rpartition(".")[0]
            is_head = not names.isdisjoint(module.split(".")) or is_trained_anew(module)
            (heads if is_head else others).append((adapter.name, key))
    if heads:
        logger.info("The heads of the upstream adapters are not mixed: %s.", _listed_by_name(heads))
    if others:
        warnings.warn(
            "These entries of the upstream adapters are not LoRA factors and are not mixed: "
            f"{_listed_by_name(others)}. Without them such an adapter is not quite what was trained.",
            stacklevel=2,
        )


def _listed_by_name(entries: Iterable[tuple[str, str]]) -> str:
    keys: dict[str, list[str]] = {}
    for name, key in entries:
        keys.setdefault(name, []).append(key)
    return one_line("; ".join(f"{quoted(name)}: {', '.join(own)}" for name, own in keys.items()), LONG)


def stack(plan: CompositionPlan, dtypes: Mapping[str, torch.dtype]) -> dict[str, StackedFactors]:
    """Read the factors of all modules and stack them, with the scales folded into B.

    Args:
        plan: what `match` returned.
        dtypes: dtype of the result by module; scales are multiplied in float32 or wider before rounding.

    Returns:
        The stacked factors by module, on the CPU. Beside them only a few adapters are in memory at a time.

    Raises:
        AdapterError: a factor holds NaN or infinity, in the file or after rounding to its dtype.
    """
    stacked = {module: _allocate(plan, module, dtypes[module]) for module in plan.factors}
    filled = dict.fromkeys(plan.factors, 0)
    for batch in _batches(plan.adapters):
        for module, target in stacked.items():
            filled[module] += _stack_batch(plan, module, batch, target, filled[module])
        for number in batch:
            plan.adapters[number].weights.unmap()
    for module, target in stacked.items():
        if not all(_is_finite(tensor) for tensor in (target.A, target.B, target.bias) if tensor is not None):
            for adapter, factors in zip(plan.adapters, plan.factors[module]):
                if factors is not None:
                    _require_finite(adapter, module, factors, dtypes[module])
    return stacked


def require_finite(adapter: UpstreamAdapter, dtype: torch.dtype) -> None:
    """Raise AdapterError where a factor holds NaN or infinity, in the file or after rounding to `dtype`.

    Unlike in `stack`, only a part of one factor is in memory at a time.
    """
    for module, factors in adapter.modules.items():
        _require_finite(adapter, module, factors, dtype)
    adapter.weights.unmap()


def _allocate(plan: CompositionPlan, module: str, dtype: torch.dtype) -> StackedFactors:
    shape, ranks = plan.shapes[module], plan.ranks(module)
    A = torch.empty(shape.shape_of_A(sum(ranks)), dtype=dtype, device="cpu")
    B = torch.empty(shape.shape_of_B(sum(ranks)), dtype=dtype, device="cpu")
    bias = torch.zeros(len(ranks), shape.out_features, dtype=dtype, device="cpu") if plan.is_biased(module) else None
    return StackedFactors(ranks, A, B, bias)


def _batches(adapters: Sequence[UpstreamAdapter]) -> Iterator[range]:
    """The numbers of the adapters in turn, as many at once as may be mapped, at least one."""
    first, nbytes = 0, 0
    for number, adapter in enumerate(adapters):
        nbytes += adapter.weights.nbytes
        if number > first and (nbytes > MAPPED_BYTES or number - first >= MAPPED_FILES):
            yield range(first, number)
            first, nbytes = number, adapter.weights.nbytes
    yield range(first, len(adapters))


def _stack_batch(plan: CompositionPlan, module: str, batch: range, target: StackedFactors, start: int) -> int:
    """Write the factors that some adapters have for a module, from row `start` on; returns the number of rows."""
    numbers = [number for number in batch if plan.factors[module][number] is not None]
    entries = [(plan.adapters[number], cast(Factors, plan.factors[module][number])) for number in numbers]
    if not entries:
        return 0
    count = sum(factors.rank for _, factors in entries)
    shape = plan.shapes[module]
    A = target.A.narrow(shape.rank_dim_of_A, start, count)
    B = target.B.narrow(shape.rank_dim_of_B, start, count)
    _join([shape.unpack_A(adapter.weights.read(factors.A)) for adapter, factors in entries], shape.rank_dim_of_A, A)
    read = [shape.unpack_B(adapter.weights.read(factors.B)) for adapter, factors in entries]
    _join(read, shape.rank_dim_of_B, B, _scales(entries, B.dtype, B.dim() - 1 - shape.rank_dim_of_B))
    for number, (adapter, factors) in zip(numbers, entries):
        if factors.bias is not None and target.bias is not None:
            target.bias[number] = _scaled(adapter.weights.read(factors.bias), factors.scale, target.bias.dtype)
    return count


def _join(tensors: list[Tensor], dim: int, out: Tensor, scales: Tensor | None = None) -> None:
    """Concatenate into `out`, scaled in float32 or wider and rounded once."""
    if any(tensor.dtype != out.dtype for tensor in tensors):
        wide = torch.promote_types(out.dtype, torch.float32)
        tensors = [tensor.to(wide) for tensor in tensors]
    if scales is not None:
        torch.mul(torch.cat(tensors, dim), scales, out=out)
    elif tensors[0].dtype == out.dtype:
        torch.cat(tensors, dim, out=out)
    else:
        out.copy_(torch.cat(tensors, dim))


def _scales(entries: Sequence[tuple[UpstreamAdapter, Factors]], dtype: torch.dtype, dims_behind: int) -> Tensor | None:
    """The scale of every column of B, in a shape to multiply it with; None where all are 1."""
    scales = [factors.scale for _, factors in entries for _ in range(factors.rank)]
    if all(scale == 1 for scale in scales):
        return None
    wide = torch.promote_types(dtype, torch.float32)
    return torch.tensor(scales, dtype=wide, device="cpu").view(-1, *(1,) * dims_behind)


def _scaled(tensor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (tensor.to(torch.promote_types(dtype, torch.float32)) * scale).to(dtype)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite: what is not survives a sum; where that overflows, the extremes tell."""
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return math.isfinite(total.item()) or all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


def _require_finite(adapter: UpstreamAdapter, module: str, factors: Factors, dtype: torch.dtype) -> None:
    parts = {"lora_A": (factors.A, 1.0), "lora_B": (factors.B, factors.scale)}
    if factors.bias is not None:
        parts["lora_B bias"] = (factors.bias, factors.scale)
    for what, (key, scale) in parts.items():
        tensor = adapter.weights.read(key)
        bad = in_file = 0
        for part in tensor.flatten().split(CHECKED_AT_ONCE):
            scaled = _scaled(part, scale, dtype)
            if not _is_finite(scaled):
                bad += int((~torch.isfinite(scaled)).sum())
                in_file += int((~torch.isfinite(part)).sum())
        if bad:
            reason = f"{in_file} of {tensor.numel()} values are NaN or infinite"
            if not in_file:
                reason = f"{bad} values overflow in {dtype} once scaled by {scale:g}"
            raise AdapterError(adapter.name, f"module {quoted(module)}: {what}: {reason}")
