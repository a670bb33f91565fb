"""What was scored, as JSON lines on disk: a selection that was killed goes on from there."""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..text import one_line


KIND = "peft-composition selection"
FORMAT = f"{KIND} 2"


class Journal:
    """Lines of one selection. Every process writes a file of its own, and reads those of all.

    A line that is damaged is as one that is not there.

    Args:
        path: of the first process's file; that of process 2 ends with `.2`. None: nothing is kept.
        key: of what is selected; a file with another key is refused.
        rank: of this process.
        sizes: how many values lines of a rung have.

    Raises:
        ValueError: a file is of another selection or of something else, or cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str, rank: int, sizes: Mapping[int, int]) -> None:
        self._path = None if path is None else Path(f"{os.fspath(path)}{f'.{rank + 1}' if rank else ''}")
        self._head = _line({"format": FORMAT, "key": key})
        self._sizes = sizes
        self.found: dict[tuple[int, int], dict[str, Any]] = {}
        if path is None or self._path is None:
            return
        first = Path(path)
        others = [own for own in first.parent.glob(f"{glob.escape(first.name)}.*") if own.suffix[1:].isdigit()]
        file = first
        try:
            for file in [first, *others]:
                if file.is_file():
                    self._read(file)
            file = self._path
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a+b"):
                pass  # better now than after the first candidate
        except OSError as error:
            raise ValueError(
                f"the log {one_line(file)} cannot be used: {one_line(error)}; give another file"
            ) from error

    @property
    def is_kept(self) -> bool:
        """Whether there is a file."""
        return self._path is not None

    def add(self, rung: int, number: int, line: dict[str, Any]) -> None:
        """Write a line, which is on disk afterwards."""
        self.found[rung, number] = line
        if self._path is None:
            return
        with open(self._path, "a+b") as file:
            file.seek(0)
            start = file.read(len(self._head))
            if start != self._head:  # empty, or killed while it began
                file.truncate(0)
                file.write(self._head)
            else:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the line before was cut off
                    file.write(b"\n")
            file.write(_line({"rung": rung, "candidate": number, **line}))

    def _read(self, file: Path) -> None:
        content = file.read_bytes()
        if content.startswith(self._head):
            for line in _lines(content[len(self._head) :]):
                if self._is_whole(line):
                    place = line.pop("rung"), line.pop("candidate")
                    self.found[place] = line
        elif not self._head.startswith(content):
            head = next(_lines(content.partition(b"\n")[0]), {})
            if str(head.get("format", "")).startswith(KIND):
                raise ValueError(
                    f"{one_line(file)} belongs to another selection: other candidates, examples, weights of the base "
                    "model, settings or version. Give another file, or remove it"
                )
            raise ValueError(
                f"{one_line(file)} does not begin as the log of a selection: it is damaged or something else. Give "
                "another file, or remove it"
            )

    def _is_whole(self, line: dict[str, Any]) -> bool:
        rung, number = line.get("rung"), line.get("candidate")
        values, right = line.get("values"), line.get("right")
        return (
            type(rung) is int
            and type(number) is int
            and rung in self._sizes
            and number >= 0
            and isinstance(values, list)
            and isinstance(right, list)
            and len(values) == len(right) == self._sizes[rung]
            and all(map(_is_finite, values))
            and all(type(own) is bool for own in right)
            and all(line.get(key) is None or _is_finite(line[key]) for key in ("slope", "head", "apart"))
        )


def _is_finite(value: object) -> bool:
    return type(value) is float and math.isfinite(value)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _lines(content: bytes) -> Iterator[dict[str, Any]]:
    """The lines that are whole."""
    for line in content.split(b"\n"):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # cut off
            continue
        if isinstance(found, dict):
            yield found
