"""Opens the weights file of an adapter, gives shapes first and values later, and hashes it.

safetensors reads its own files: a reader of ours over `mmap` loaded 20 and 64 adapters no faster (medians within 2 %).
"""

from __future__ import annotations

import hashlib
import mmap
import os
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
# Dtypes whose elements are one real number each, as safetensors names them. F8_E8M0 and F4 are missing: they hold
# powers of two and pairs of values, which scale and pack other tensors.
_REAL_NUMBERS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
# The same two in PyTorch, as far as this version has them.
_NOT_REAL = tuple(getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name))


class Entry(NamedTuple):
    """What is known of a tensor before its values are read."""

    shape: tuple[int, ...]
    dtype: str
    is_floating_point: bool


class WeightsFile:
    """The tensors of a weights file by key; their shapes are known before their values are read."""

    def __init__(self, name: str, path: Path) -> None:
        self._name = name
        self._path = path
        self._is_pickled = path.suffix != ".safetensors"
        self._pickled: dict[str, Tensor] | None = None
        self._entries: dict[str, Entry] = {}
        self._opened: safe_open | None = None
        self._version: tuple[int, ...] | None = None
        try:
            self._version = _version(path.stat())
            placeholder = formats.placeholder(read_bytes(path, formats.ENOUGH_BYTES))
            if placeholder is not None:
                raise AdapterError(name, f"{path} {placeholder}")
            if self._is_pickled:
                self.nbytes = pickled.content_nbytes(path)
                self._entries = {
                    key: Entry(shape, str(dtype), dtype.is_floating_point and dtype not in _NOT_REAL)
                    for key, (shape, dtype) in pickled.index(path).items()
                }
            else:
                self.nbytes = path.stat().st_size
                self._entries, _ = opened(path, lambda key: False)
        except pickled.UnreadablePickleError as error:
            raise AdapterError(name, f"{path} {error}") from error
        except (SafetensorError, OSError, MemoryError) as error:
            raise AdapterError(name, f"{path} is not a readable safetensors file: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._entries[key].shape

    def dtype(self, key: str) -> str:
        """The dtype as the file names it: "F32" in safetensors, "torch.float32" in a pickle."""
        return self._entries[key].dtype

    def is_floating_point(self, key: str) -> bool:
        """Whether each element is one real floating-point number."""
        return self._entries[key].is_floating_point

    def read(self, key: str) -> Tensor:
        """The values of one tensor: a private view of the mapped file."""
        if self._is_pickled:
            return self._unpickled()[key]
        try:
            if self._opened is None:
                self._opened = safe_open(self._path, framework="pt", device="cpu")
                if _version(self._path.stat()) != self._version:
                    raise OSError("another process replaced it meanwhile; try again")
            return self._opened.get_tensor(key)
        except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
            raise AdapterError(self._name, f"{self._path} cannot be read at {key!r}: {error}") from error

    def unmap(self) -> None:
        """Release the mapped file; its memory is freed once the tensors that were read are gone, too."""
        self._opened = None
        self._pickled = None

    def _unpickled(self) -> dict[str, Tensor]:
        if self._pickled is None:
            try:
                self._pickled = pickled.load(self._path)
            except (pickled.UnreadablePickleError, OSError) as error:
                raise AdapterError(self._name, f"{self._path} {error}") from error
        return self._pickled


def _version(status: os.stat_result) -> tuple[int, ...]:
    """Changes whenever the file is replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def opened(path: Path, is_read: Callable[[str], bool]) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """What the header of a safetensors file says, by key in alphabetical order, and the values of a few tensors.

    Args:
        path: the file.
        is_read: which tensors are read; they must have a dtype that NumPy has.

    Raises:
        SafetensorError, OSError, MemoryError: the file cannot be read.
        TypeError: NumPy does not have the dtype.
    """
    # Not as "pt": that asks for memory of the size of the file, which a sparse file of terabytes has, too.
    with safe_open(path, framework="numpy") as file:
        views = {key: file.get_slice(key) for key in sorted(file.keys())}
        values = {key: torch.from_numpy(file.get_tensor(key)) for key in views if is_read(key)}
    entries = {
        key: Entry(tuple(view.get_shape()), view.get_dtype(), view.get_dtype() in _REAL_NUMBERS)
        for key, view in views.items()
    }
    return entries, values


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
