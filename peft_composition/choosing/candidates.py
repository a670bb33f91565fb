"""Names of candidates: from a file that `search` wrote, a list in a text file, or a folder of adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..drafts import write_whole
from ..references import read_reference
from ..text import one_line, quoted, shown
from .search import FoundAdapter


FORMAT = "peft-composition candidates 1"


def write_candidates(path: str | os.PathLike[str], base: str, found: Sequence[FoundAdapter]) -> None:
    """Write what `search_adapters` found into a file that `read_candidates` reads.

    Args:
        path: of the file; its folder is made.
        base: that was searched for.
        found: the adapters.
    """
    rows = [{**asdict(own), "composable": own.is_composable} for own in found]
    text = json.dumps({"format": FORMAT, "base": base, "adapters": rows}, indent=2)
    write_whole(Path(path), f"{text}\n")


def read_candidates(path: str | os.PathLike[str]) -> list[Any]:
    """The candidates that a file lists.

    Args:
        path: what `search --out` wrote, of which those that can be composed count, at the commits that were looked at;
            or a text file with a folder or Hub id on each line (`id/folder` for a folder within the repository,
            `id@revision` for a revision), where `#` begins a comment.

    Returns:
        Entries as `CompositionConfig` takes them.

    Raises:
        ValueError: the file cannot be read or lists none.
    """
    where = one_line(os.fspath(path))
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} could not be read: {one_line(error)}") from error
    found: list[Any] = []
    if text.lstrip().startswith("{"):
        found += _of_search(text, where)
    else:
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        found += [_entry(line) for line in lines if line]
    if not found:
        raise ValueError(f"{where} lists no candidate that can be composed")
    return found


def _entry(line: str) -> Any:
    """A line as it is, unless it says more than a path."""
    found = read_reference(line)
    return line if found == {"path": line} else found


def _of_search(text: str, where: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    rows = content.get("adapters")
    if content.get("format") != FORMAT or not isinstance(rows, list):
        raise ValueError(
            f"{where} is not a file of candidates of this version: its format is {shown(content.get('format'))}, not "
            f"{FORMAT!r}; write it again with peft-composition search --out"
        )
    found = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not isinstance(row.get("id"), str):
            raise ValueError(f"{where}: entry {number} of its adapters has no id: {shown(row)}")
        if row.get("composable", True):
            commit = row.get("commit")
            found.append({"path": row["id"], **({"revision": commit} if isinstance(commit, str) else {})})
    return found


def adapters_in(folder: str | os.PathLike[str]) -> list[str]:
    """The adapters in a folder's subfolders, by name; the folder itself if it is an adapter.

    Args:
        folder: with an adapter in each subfolder; subfolders without one are left out.

    Returns:
        Their folders.

    Raises:
        ValueError: there is none.
    """
    path = Path(folder)
    if (path / CONFIG_NAME).is_file():
        return [os.fspath(folder)]
    found = sorted(os.fspath(entry) for entry in path.iterdir() if (entry / CONFIG_NAME).is_file())
    if not found:
        raise ValueError(f"the folder {quoted(os.fspath(folder))} is no adapter and has none in its subfolders")
    return found
