"""Checks before a long run that its results can be written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..text import quoted


PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")


def require_writable(paths: Iterable[Path | None]) -> None:
    """Refuse files that could not be written, and pictures without matplotlib; nothing is left on disk.

    Args:
        paths: files, which may be there already; their folders may be missing. None is left aside.

    Raises:
        OSError: a file cannot be written.
        ImportError: matplotlib is needed and not installed.
    """
    for path in paths:
        if path is None:
            continue
        if path.suffix.lower() in PICTURES:
            _require_matplotlib(path)
        try:
            if path.is_file() or path.is_dir():
                path.open("ab").close()
            elif not path.exists():
                parent = next(each for each in path.absolute().parents if each.exists())
                tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            raise OSError(f"{quoted(path)} cannot be written: {error.strerror or error}; give another path") from error


def _require_matplotlib(path: Path) -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as missing:
        raise ImportError(
            f"{quoted(path)} needs matplotlib: pip install 'peft-composition[cli]' ({missing})"
        ) from missing
