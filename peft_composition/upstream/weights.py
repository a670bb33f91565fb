"""Opens the weights file of an adapter, gives shapes first and values later, and hashes it.

Values are views of a mapped file: with safetensors' own reader, composing 20 LoRAs of ViT-B took 50 ms in place of 38
(medians on two idle cores), and the `load` benchmark 1.3 to 1.4 times as long.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import formats, pickled
from .errors import AdapterError
from .schema import read_bytes


PARALLEL_HASHES = 2
HASHED_AT_ONCE = 32 << 20
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
# No real numbers each: powers of two and pairs of values, which scale and pack other tensors.
_NO_NUMBERS = tuple(getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name))


class Entry(NamedTuple):
    """One tensor of a weights file; `start` is its first byte, None where it cannot be taken from there."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    start: int | None
    dtype_name: str

    @property
    def is_floating_point(self) -> bool:
        """Whether each element is one real floating-point number."""
        return self.dtype is not None and self.dtype.is_floating_point and self.dtype not in _NO_NUMBERS


class WeightsFile:
    """The tensors of a weights file by key; their shapes are known before their values are read.

    safetensors checks a file; then it is mapped into memory.
    """

    def __init__(self, name: str, path: Path) -> None:
        self._name = name
        self._path = path
        self._is_pickled = path.suffix != ".safetensors"
        self._pickled: dict[str, Tensor] | None = None
        self._entries: dict[str, Entry] = {}
        self._mapping: mmap.mmap | None = None
        self._version: tuple[int, ...] | None = None
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe could block forever
                raise OSError("not a regular file")
            self._version = _version(status)
            if self._is_pickled:
                if placeholder := _placeholder(path):
                    raise AdapterError(name, f"{path} {placeholder}")
                self.nbytes = pickled.content_nbytes(path)
                self._entries = {key: Entry(*entry, None, str(entry[1])) for key, entry in pickled.index(path).items()}
            else:
                self.nbytes = status.st_size
                self._entries, _ = opened(path, lambda key: False)
        except pickled.UnreadablePickleError as error:
            raise AdapterError(name, f"{path} {error}") from error
        except (SafetensorError, OSError, MemoryError) as error:
            reason = _placeholder(path) or f"is not a readable safetensors file: {error}"
            raise AdapterError(name, f"{path} {reason}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._entries[key].shape

    def dtype(self, key: str) -> str:
        """The dtype by its name in PyTorch or, where that has none, in the file."""
        return self._entries[key].dtype_name

    def is_floating_point(self, key: str) -> bool:
        """Whether each element is one real floating-point number."""
        return self._entries[key].is_floating_point

    def read(self, key: str) -> Tensor:
        """The values of one tensor: a private view of the mapped file."""
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
        """Release the mapped file; its memory is freed once the tensors that were read are gone, too."""
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
                    raise OSError("another process replaced it meanwhile; try again")
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._mapping


def _placeholder(path: Path) -> str | None:
    """What a file that cannot be read was replaced by, such as a pointer of Git LFS."""
    try:
        return formats.placeholder(read_bytes(path, formats.ENOUGH_BYTES))
    except OSError:
        return None


def _version(status: os.stat_result) -> tuple[int, ...]:
    """Changes whenever the file is replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def opened(path: Path, is_read: Callable[[str], bool]) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """What the header of a safetensors file says, by key in alphabetical order, and the values of a few tensors.

    Where a tensor starts follows from the sizes of those behind it: on opening, safetensors makes sure that they
    fill the file to its end without holes.

    Args:
        path: the file.
        is_read: which tensors are read; they must have a dtype that NumPy has.

    Raises:
        SafetensorError, OSError, MemoryError: the file cannot be read.
        TypeError: NumPy does not have the dtype.
    """
    # Not as "pt": that asks for memory of the size of the file, which a sparse file of terabytes has, too.
    with safe_open(path, framework="numpy") as file:
        views = {key: file.get_slice(key) for key in file.offset_keys()}
        values = {key: torch.from_numpy(file.get_tensor(key)) for key in views if is_read(key)}
    is_native = sys.byteorder == "little"
    end: int | None = path.stat().st_size
    entries: dict[str, Entry] = {}
    for key, view in reversed(views.items()):
        stored = view.get_dtype()
        shape, dtype = tuple(view.get_shape()), _MAPPED_DTYPES.get(stored)
        end = None if end is None or dtype is None else end - math.prod(shape) * dtype.itemsize
        entries[key] = Entry(shape, dtype, end if is_native else None, str(dtype or stored))
    return dict(sorted(entries.items())), values


def keys_of(path: Path) -> list[str]:
    """The keys of a safetensors file; empty if it cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return [*file.keys()]
    except (SafetensorError, OSError):
        return []


def sha256_of(path: Path, stop: Event) -> str:
    """The SHA-256 of a file, as hexadecimal digits.

    Unlike `sha_fileobj` of huggingface_hub it can be stopped: a refused adapter may be a sparse file of terabytes.

    Args:
        path: the file.
        stop: once it is set, the rest of the file is skipped and the result is meaningless.
    """
    # Mostly one call per file: for each, the thread has to win the interpreter back from the one that reads adapters.
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
