"""Keeps what candidates download within a budget: of those that were not there before, the oldest go first."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from ..references import AdapterReference, is_local


class Downloads:
    """The repositories that a selection downloaded.

    Args:
        most_bytes: that they may take.
    """

    def __init__(self, most_bytes: float) -> None:
        self._most = most_bytes
        self._sizes: dict[Path, int] = {}

    @contextmanager
    def of(self, reference: AdapterReference) -> Iterator[None]:
        """A context in which an adapter is used; behind it the budget holds."""
        folder = Path(constants.HF_HUB_CACHE, f"models--{reference['path'].replace('/', '--')}")
        is_ours = not is_local(reference["path"]) and (folder in self._sizes or not folder.exists())
        try:
            yield
        finally:
            if is_ours and folder.is_dir():
                self._sizes.pop(folder, None)
                self._sizes[folder] = sum(file.stat().st_size for file in folder.rglob("*") if not file.is_symlink())
            while self._sizes and sum(self._sizes.values()) > self._most:
                oldest = next(iter(self._sizes))
                del self._sizes[oldest]
                shutil.rmtree(oldest, ignore_errors=True)
