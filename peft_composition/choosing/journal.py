"""What was scored, as JSON lines on disk: a selection that was killed goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..text import one_line


FORMAT = "peft-composition selection 1"


class Journal:
    """Lines of one selection. Every process writes a file of its own, and reads those of all.

    Args:
        path: of the first process's file; that of process 2 ends with `.2`. None: nothing is kept.
        key: of what is selected; a file with another key is refused.
        rank: of this process.

    Raises:
        ValueError: a file is of another selection.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str, rank: int) -> None:
        self._path = None if path is None else Path(f"{os.fspath(path)}{f'.{rank + 1}' if rank else ''}")
        self._key = key
        self.found: dict[tuple[int, int], dict[str, Any]] = {}
        if path is not None:
            first = Path(path)
            others = [own for own in first.parent.glob(f"{first.name}.*") if own.suffix[1:].isdigit()]
            for file in [first, *others]:
                if file.is_file():
                    self._read(file)

    def add(self, rung: int, number: int, line: dict[str, Any]) -> None:
        """Write a line, which is on disk afterwards."""
        self.found[rung, number] = line
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self._path.is_file() or not self._path.stat().st_size
        with open(self._path, "a+b") as file:
            if is_new:
                file.write(_line({"format": FORMAT, "key": self._key}))
            else:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the line before was cut off
                    file.write(b"\n")
            file.write(_line({"rung": rung, "candidate": number, **line}))

    def _read(self, file: Path) -> None:
        lines = list(_lines(file))
        if not lines:
            return
        head = lines[0]
        if head.get("format") != FORMAT or head.get("key") != self._key:
            raise ValueError(
                f"{one_line(file)} belongs to another selection: other candidates, examples, base model or seed. Give "
                "another file, or remove it"
            )
        for line in lines[1:]:
            if {"rung", "candidate", "values", "right"} <= line.keys():
                self.found[line["rung"], line["candidate"]] = {"values": line["values"], "right": line["right"]}


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file."""
    for line in file.read_bytes().splitlines():
        try:
            found = json.loads(line)
        except ValueError:  # cut off
            continue
        if isinstance(found, dict):
            yield found
