"""Drafts: hidden folders in which files are written completely before they replace older ones.

A draft is locked while its process lives. The next save can therefore remove drafts that a killed process left,
without touching those of another save that is still running.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG_DRAFT, CARD_DRAFT, LORA_DRAFT = _PREFIXES = ".adapter_config-", ".card-", ".lora-"
# Seconds after which a draft counts as abandoned if folders cannot be locked (Windows, some network file systems).
_LONGEST_SAVE = 24 * 60 * 60


@contextmanager
def draft_in(folder: Path, prefix: str) -> Iterator[Path]:
    """A new hidden folder that is removed at the end with its content; also removes drafts of killed processes.

    Args:
        folder: the parent folder; created if it does not exist.
        prefix: one of `CONFIG_DRAFT`, `CARD_DRAFT` and `LORA_DRAFT`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        _clear_away(folder)
        draft = Path(tempfile.mkdtemp(dir=folder, prefix=prefix))
        lock = _lock(draft, waits=False)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        _unlock(lock)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other saves from creating and publishing drafts in a folder, if it can be locked."""
    lock = _lock(folder, waits=True)
    try:
        yield
    finally:
        _unlock(lock)


def _clear_away(folder: Path) -> None:
    for draft in folder.iterdir():
        if draft.name.startswith(_PREFIXES) and draft.is_dir() and not draft.is_symlink():
            try:
                lock = _lock(draft, waits=False)
            except (BlockingIOError, FileNotFoundError):  # its process is alive, or has just removed it
                continue
            if lock is not None or _is_old(draft):
                shutil.rmtree(draft, ignore_errors=True)
            _unlock(lock)


def _is_old(draft: Path) -> bool:
    try:
        return time.time() - draft.stat().st_mtime > _LONGEST_SAVE
    except FileNotFoundError:
        return False


def take_place(draft: Path, target: Path) -> None:
    """Move a complete file from a draft to its place; a file that is replaced there leaves it its permissions."""
    with suppress(FileNotFoundError):
        if draft.stat().st_mode != target.stat().st_mode:
            shutil.copymode(target, draft)
    os.replace(draft, target)


def write_whole(path: Path, text: str) -> None:
    """Write text into a file; what is there before stays whole until the new text is complete, and so do permissions.

    Args:
        path: of the file; its folder is made. A device or a pipe, or a file alone in a folder that is not writable, is
            written to as it is.
        text: what is written.
    """
    if path.exists() and not (path.is_file() and os.access(path.resolve().parent, os.W_OK)):
        path.write_text(text, encoding="utf-8")
        return
    target = path.resolve()
    with draft_in(target.parent, CARD_DRAFT) as draft:
        (draft / target.name).write_text(text, encoding="utf-8")
        take_place(draft / target.name, target)


def _lock(folder: Path, waits: bool) -> int | None:
    """A lock on a folder, released when the process ends at the latest; None if folders cannot be locked.

    Raises:
        BlockingIOError: another process or thread holds it, and `waits` is False.
        FileNotFoundError: the folder does not exist.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
