"""What a benchmark found, as dataclasses and as JSON. Knows nothing of torch, so that a report is made in a moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


# Of the machine's description: what may differ between runs whose results stand in one table.
MAY_DIFFER = ("date", "commit", "load_before")


class UsageError(Exception):
    """Something the user can put right; the command line shows the message alone."""


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of repeated measurements.

    Attributes:
        median: the median.
        low: the first quartile.
        high: the third quartile.
        count: how many measurements.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        low, median, high = np.percentile(values, [25, 50, 75])
        return cls(float(median), float(low), float(high), len(values))

    def scaled(self, factor: float) -> Summary:
        return Summary(self.median * factor, self.low * factor, self.high * factor, self.count)


@dataclass
class Measurement:
    """What was measured of one peer in one cell.

    Attributes:
        seconds: of one call.
        ratio: this peer's seconds over the reference's, round by round.
        saved_bytes: what the forward pass keeps for backward, parameters not counted.
        peak_bytes: the most that tensors take at one time: parameters, optimizer state and all of a step.
        computed: the seconds come from a formula, not from a clock.
        skipped: why there is no measurement.
    """

    seconds: Summary | None = None
    ratio: Summary | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    computed: bool = False
    skipped: str | None = None

    def lengthened(self, factor: float) -> Measurement:
        """What would be measured if a call took `factor` times as long; computed, and so without memory."""
        return Measurement(
            seconds=self.seconds and self.seconds.scaled(factor),
            ratio=self.ratio and self.ratio.scaled(factor),
            computed=True,
        )


@dataclass
class Cell:
    """The peers measured together, in the same rounds.

    Attributes:
        model: key of the model (or the shape of the layer).
        adapters: N.
        case: what else distinguishes the cell, such as the number of tokens; empty where nothing does.
        reference: the peer that ratios refer to.
        peers: measurements by the peer's title.
    """

    model: str
    adapters: int
    reference: str
    peers: dict[str, Measurement]
    case: str = ""


@dataclass
class Results:
    """All cells of one table with what is needed to read and to repeat them.

    Attributes:
        table: its name on the command line.
        device: "cpu" or "cuda".
        dtype: of the base models.
        command: what was run.
        machine: hardware and versions, without names of hosts or folders.
        models: descriptions of the models by key.
        peers: what each peer is, by title.
        cells: the measurements.
    """

    table: str
    device: str
    dtype: str
    command: str
    machine: dict[str, Any]
    models: dict[str, str] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    def continued_by(self, other: Results) -> Results:
        """These cells under a further run of the same table, which says what was run for which of them.

        Raises:
            UsageError: the other run is on another machine, or with other versions, so that the two do not compare.
        """
        differing = [
            key for key, value in other.machine.items() if key not in MAY_DIFFER and self.machine[key] != value
        ]
        if differing or self.dtype != other.dtype:
            raise UsageError(f"nothing can be added to the results of {self.table}: other {', '.join(differing)}")
        return Results(
            table=self.table,
            device=self.device,
            dtype=self.dtype,
            command=f"{self.command}; {other.command}",
            machine=other.machine,
            models={**self.models, **other.models},
            peers={**self.peers, **other.peers},
            cells=list(self.cells),
        )

    def put(self, cell: Cell) -> None:
        """Add a cell, in the place of one for the same case."""
        cases = [(known.model, known.adapters, known.case) for known in self.cells]
        if (cell.model, cell.adapters, cell.case) in cases:
            self.cells[cases.index((cell.model, cell.adapters, cell.case))] = cell
        else:
            self.cells.append(cell)

    def path_in(self, folder: Path) -> Path:
        return folder / f"{self.table}-{self.device}.json"

    def write(self, folder: Path) -> Path:
        """Write `<table>-<device>.json`; an interrupted write leaves the earlier file whole."""
        folder.mkdir(parents=True, exist_ok=True)
        path = self.path_in(folder)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(_without_none(asdict(self)), indent=1) + "\n")
        os.replace(draft, path)
        return path

    @classmethod
    def read(cls, path: Path) -> Results:
        data = json.loads(path.read_text())
        cells = [
            Cell(**{**cell, "peers": {title: _measurement(entry) for title, entry in cell["peers"].items()}})
            for cell in data.pop("cells")
        ]
        return cls(**data, cells=cells)


def read_all(folder: Path, order: Iterable[str]) -> list[Results]:
    """The results in a folder, by table in the given order, CPU before GPU.

    Raises:
        UsageError: there are none.
    """
    found = [folder / f"{table}-{device}.json" for table in order for device in ("cpu", "cuda")]
    results = [Results.read(path) for path in found if path.is_file()]
    if not results:
        raise UsageError(f"no results in {folder}; run a table first, such as: python -m benchmarks train")
    return results


def _measurement(entry: dict[str, Any]) -> Measurement:
    for key in {"seconds", "ratio"} & set(entry):
        entry[key] = Summary(**entry[key])
    return Measurement(**entry)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value
