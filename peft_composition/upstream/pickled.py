"""Reads state dicts saved with `torch.save`, without running code from them and with bounded memory.

It knows nothing of adapters and modules: errors say what is wrong with the file.
"""

from __future__ import annotations

import mmap
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


# How many times larger than the file its content may be, because of compression or of storages that several keys
# share. PyTorch does not compress, and shared storages are tied weights.
EXPANSION = 8
SLACK = 1 << 20
# The largest pickle without its tensors: one with a hundred thousand tensors has about this size.
LARGEST_PICKLE = 16 << 20
_ZIP_MAGIC = b"PK\x03\x04"


class UnreadablePickleError(ValueError):
    """A pickle is not a readable state dict; the message continues a sentence that begins with the file's name."""


def index(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes by key; the values are not read if the file is a zip archive, as PyTorch writes since 1.6.

    Raises:
        UnreadablePickleError: the file is damaged, or holds anything but plain tensors.
    """
    records = _records(path)
    try:
        state = _torch_load(path, "meta", records) if records is not None else None
    except UnreadablePickleError:
        state = None  # some kinds of tensors cannot exist without values; the error is raised below
    tensors = _plain_tensors(state if state is not None else _torch_load(path, "cpu", records))
    _require_bounded(tensors, path, records)
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def load(path: Path) -> dict[str, Tensor]:
    """The tensors by key, on the CPU and without gradients.

    The file is never mapped into memory: PyTorch reads the bytes of a mapped file even if they are compressed or cut
    off.

    Raises:
        UnreadablePickleError: the file is damaged, or holds anything but plain tensors.
    """
    records = _records(path)
    if records is not None:
        _require_checksums(path)
    tensors = _plain_tensors(_torch_load(path, "cpu", records))
    _require_bounded(tensors, path, records)
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise UnreadablePickleError(f"holds no values for {key!r}: it was saved from a model on the meta device")
    if records is not None:
        _require_whole_storages(tensors, records)
    return {key: tensor.detach() for key, tensor in tensors.items()}


def content_nbytes(path: Path) -> int:
    """The approximate size of the tensors in bytes."""
    records = _records(path)
    return path.stat().st_size if records is None else sum(records.values())


def _records(path: Path) -> dict[str, int] | None:
    """The sizes of the records of a zip archive; None for the format before PyTorch 1.6, which is not an archive."""
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:  # the same check as PyTorch's
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            records = {entry.filename: entry.file_size for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise _damaged(error) from error
    content, size = sum(records.values()), path.stat().st_size
    if content > EXPANSION * size + SLACK:
        raise UnreadablePickleError(f"is not loaded: its {size} bytes unpack to {content}")
    for name, nbytes in records.items():
        if name.endswith(".pkl") and nbytes > LARGEST_PICKLE:
            raise UnreadablePickleError(f"is not loaded: its {name} has {nbytes} bytes, more than tensors need")
    return records


def _require_checksums(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _damaged(error) from error
    if broken is not None:
        raise UnreadablePickleError(
            f"is damaged: the checksum of its record {broken!r} is wrong. Download or copy it again. (If it was saved "
            "with torch.serialization.set_crc32_options(False), save it as safetensors on a machine that trusts it)"
        )


def _torch_load(path: Path, device: str, records: Mapping[str, int] | None) -> Any:
    _require_no_allocations(path, records)
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=False)
    except Exception as error:  # on damaged bytes the restricted unpickler raises whatever it trips over
        raise _damaged(error) from error


def _require_no_allocations(path: Path, records: Mapping[str, int] | None) -> None:
    """Refuse bytearray(N), which PyTorch's restricted unpickler allows: a few bytes could allocate any memory."""
    if records is None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            allocates = content.find(b"bytearray") >= 0
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in records if name.endswith(".pkl")]
                allocates = any(b"bytearray" in archive.read(name) for name in names)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise _damaged(error) from error
    if allocates:
        raise UnreadablePickleError(
            "is a pickle that creates a bytearray, which no state dict needs, and is not loaded. Save the adapter as "
            "safetensors on a machine that trusts it"
        )


def _damaged(error: Exception) -> UnreadablePickleError:
    # PyTorch's message advises unsafe loading; the cause follows a fixed phrase.
    cause = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
    return UnreadablePickleError(
        f"is a pickle that holds more than tensors or is damaged, and is not loaded: {cause.rstrip('. ')}. Save the "
        "adapter as safetensors on a machine that trusts it"
    )


def _plain_tensors(state: object) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise UnreadablePickleError(f"is not a state dict of tensors, but a {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str):
            raise UnreadablePickleError(f"is not a state dict of tensors: its key {key!r} is not a string")
        if isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values()):
            raise UnreadablePickleError(
                f"is not a state dict of tensors: they are one level below, under {key!r}, as in the checkpoint of a "
                f"training script. Save torch.load(...)[{key!r}] alone, best as safetensors"
            )
        if not isinstance(value, Tensor):
            raise UnreadablePickleError(f"is not a state dict of tensors: {key!r} is of type {type(value).__name__}")
        kind = _unusual_kind(value)
        if kind is not None:
            raise UnreadablePickleError(f"holds {kind} under {key!r}, and only plain tensors can be composed")
    return dict(state)


def _unusual_kind(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}"
    return f"a quantized tensor ({tensor.dtype})" if tensor.is_quantized else None


def _require_bounded(tensors: Mapping[str, Tensor], path: Path, records: Mapping[str, int] | None) -> None:
    """Refuse views that are larger than their storage: a few bytes of a file can claim any amount of memory."""
    whole = path.stat().st_size
    largest = whole if records is None else max(records.values(), default=0)
    for key, tensor in tensors.items():
        stored = min(tensor.untyped_storage().nbytes(), largest)
        if tensor.nbytes > stored:
            raise UnreadablePickleError(
                f"is not loaded: {key!r} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, {tensor.nbytes} "
                f"bytes, but only {stored} are stored for it (an expanded tensor?). Save it with .contiguous()"
            )
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > EXPANSION * (whole if records is None else sum(records.values())) + SLACK:
        raise UnreadablePickleError(f"is not loaded: tensors of {total} bytes in all share its {whole} bytes")


def _require_whole_storages(tensors: Mapping[str, Tensor], records: Mapping[str, int]) -> None:
    """Check that every tensor has a record of its size; not every version of PyTorch does that."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    storages.pop(0, None)  # the empty ones
    missing = Counter(storages.values()) - Counter(records.values())
    if missing:
        raise UnreadablePickleError(f"is damaged: it lacks records of {', '.join(map(str, sorted(missing)))} bytes")
