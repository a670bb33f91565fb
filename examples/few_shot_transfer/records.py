"""The results file: one JSON object a line, appended whole and flushed to disk, so that a killed study goes on."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


Record = dict[str, Any]
ID = "id"
OUTCOME = "outcome"  # what runs have in common that give the same result


def identity(settings: Mapping[str, Any]) -> str:
    """A name for a run: 16 hexadecimal digits that depend on all of its settings and on nothing else.

    Args:
        settings: everything that decides the outcome, as JSON holds it; the order of the keys does not matter.
    """
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def read(path: Path, key: str = ID) -> list[Record]:
    """Reads the finished runs of a results file; none if there is no file.

    A last line without its newline is what a killed process left: it does not count.

    Args:
        path: the file.
        key: what every run has.

    Raises:
        ValueError: if any other line is not a JSON object with the key; the message names file and line.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [_parsed(line, f"{path}:{number}", key) for number, line in enumerate(lines, start=1)]


def write_line(path: Path, text: str) -> None:
    """Adds one line; when this returns, it is on disk."""
    with path.open("ab", buffering=0) as file:
        _write_all(file, f"{text}\n".encode())
        os.fsync(file.fileno())


def cut_torn_line(path: Path) -> None:
    """Takes off what a killed process left of its last line, so that the next one stands by itself."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            file.flush()
            os.fsync(file.fileno())


def by_task(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """Records by scenario and target, in the order in which these first occur."""
    tasks: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        tasks.setdefault((record["scenario"], record["target"]), []).append(record)
    return tasks


class Results:
    """The finished runs of one scenario, and their file.

    Args:
        path: the file; its folder is made where it does not exist. A torn last line is cut off.
        writes: whether this process writes the file; one of several does, the others keep what it would write.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.writes = path, writes
        self.by_id: dict[str, Record] = {}
        self.by_outcome: dict[str, Record] = {}
        for record in read(path):
            self._keep(record)
        if writes:
            cut_torn_line(path)

    def __contains__(self, run: str) -> bool:
        return run in self.by_id

    def __len__(self) -> int:
        return len(self.by_id)

    def __getitem__(self, run: str) -> Record:
        return self.by_id[run]

    def append(self, record: Record) -> None:
        """Adds one finished run; when this returns, the line is on disk.

        Raises:
            ValueError: if a run with this id is there already.
        """
        if record[ID] in self.by_id:
            raise ValueError(f"run {record[ID]} is already in {self.path}")
        line = json.dumps(record, allow_nan=False)
        if self.writes:
            write_line(self.path, line)
        self._keep(json.loads(line))  # the same whether it was read or run

    def _keep(self, record: Record) -> None:
        self.by_id[record[ID]] = record
        if OUTCOME in record:
            self.by_outcome[record[OUTCOME]] = record


def _parsed(line: bytes, where: str, key: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); remove the line to run it again") from error
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f"{where}: not a run, which is an object with {key!r}")
    return record


def _write_all(file: io.FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
