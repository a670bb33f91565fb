"""Gains over the uniform mix, paired by draw: task by task, and their means over tasks, as Markdown or for a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from .markdown import table
from .records import Record, by_task


NOT_MIXED = "validation pick"
BEST = "best single (by test)"
CONTROLS = (BEST, NOT_MIXED, "base")


Draws = Mapping[tuple[int, int], float]  # accuracies by K and seed


class Gain(NamedTuple):
    """A mean difference in points, with the ends of its 95% interval over draws (t)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Draws, uniform: Draws, k: int) -> Gain | None:
        """What one method gains on the uniform mix, paired by draw; None with fewer than two draws."""
        pairs = [value - uniform[key] for key, value in values.items() if key[0] == k and key in uniform]
        if len(pairs) < 2:
            return None
        mean, error = float(np.mean(pairs)), float(stats.sem(pairs))
        if error == 0:
            return cls(mean, mean, mean)
        low, high = stats.t.interval(0.95, len(pairs) - 1, mean, error)
        return cls(mean, float(low), float(high))

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + (f" [{self.low:+.1f}, {self.high:+.1f}]" if self.low < self.high else "")


def gains(records: Sequence[Record], methods: Sequence[str]) -> str:
    """Points of accuracy against the uniform mix, paired by draw, with 95% intervals, as Markdown."""
    shots = _shots(records)

    def of_task(task: tuple[str, str], own: Sequence[Record]) -> str:
        uniform = values_of(own, "uniform")
        rows = _rows(methods, shots, lambda row, k: str(Gain.of(values_of(own, row), uniform, k) or "-"))
        first = ["uniform, %", *(_mean(uniform, k) for k in shots)]
        return table([f"`{task[0]}`, {task[1]}", *(f"K = {k}" for k in shots)], [first, *rows])

    return "\n\n".join(of_task(task, own) for task, own in by_task(records).items())


def of_tasks(records: Sequence[Record], methods: Sequence[str]) -> dict[str, dict[str, dict[int, Gain]]]:
    """What `gains` prints, by task, method and K; after several tasks the mean over those that have that K.

    The interval of that mean is over draws, not over tasks: it says how well these tasks are known.
    """
    shots = _shots(records)
    found: dict[str, dict[str, dict[int, Gain]]] = {}
    for task, own in by_task(records).items():
        uniform = values_of(own, "uniform")
        rows = {name: {k: Gain.of(values_of(own, name), uniform, k) for k in shots} for name in methods}
        found[": ".join(task)] = {name: {k: gain for k, gain in row.items() if gain} for name, row in rows.items()}
    if len(found) == 1:
        return found
    whole: dict[str, dict[int, Gain]] = {name: {} for name in methods}
    for name in methods:
        for k in shots:
            of_k = [rows[name][k] for rows in found.values() if k in rows[name]]
            if of_k:
                whole[name][k] = mean_gain(of_k)
    return {**found, f"mean of {len(found)} tasks": whole}


def mean_gain(found: Sequence[Gain]) -> Gain:
    """The mean over tasks; its interval is over draws."""
    mean = float(np.mean([own.mean for own in found]))
    margin = float(np.linalg.norm([(own.high - own.low) / 2 for own in found])) / len(found)
    return Gain(mean, mean - margin, mean + margin)


def means(records: Sequence[Record], methods: Sequence[str]) -> str:
    """Gains averaged over tasks, each with as many draws as it has, and how many tasks lie wholly below uniform.

    In brackets: tasks whose 95% interval over draws is wholly below, and wholly above.
    """
    tasks, shots = by_task(records), _shots(records)

    def cell(row: str, k: int) -> str:
        found = [Gain.of(values_of(own, row), values_of(own, "uniform"), k) for own in tasks.values()]
        return _over_tasks([gain for gain in found if gain is not None])

    return table(["mean over tasks", *(f"K = {k}" for k in shots)], _rows(methods, shots, cell))


def values_of(records: Sequence[Record], row: str) -> dict[tuple[int, int], float]:
    if row != BEST:
        return {(r["k"], r["seed"]): r["accuracy"] for r in records if r["method"] == row}
    singles = [record for record in records if record["method"] == "single"]
    best = {}
    for k in {record["k"] for record in singles}:  # the adapter that is best on average over the draws
        of_adapter: dict[str, list[float]] = {}
        for record in singles:
            if record["k"] == k:
                of_adapter.setdefault(record["adapter"], []).append(record["accuracy"])
        best[k] = max(of_adapter, key=lambda name: float(np.mean(of_adapter[name])))
    return {(r["k"], r["seed"]): r["accuracy"] for r in singles if r["adapter"] == best[r["k"]]}


def _shots(records: Sequence[Record]) -> list[int]:
    return sorted({record["k"] for record in records})


def _rows(methods: Sequence[str], shots: Sequence[int], cell: Callable[[str, int], str]) -> list[list[str]]:
    """The rows that have a figure."""
    rows = [[row, *(cell(row, k) for k in shots)] for row in (*CONTROLS, *methods)]
    return [row for row in rows if any(own != "-" for own in row[1:])]


def _mean(values: Draws, k: int) -> str:
    found = [value for (own, _), value in values.items() if own == k]
    return f"{float(np.mean(found)):.1f}" if found else "-"


def _over_tasks(found: Sequence[Gain]) -> str:
    if not found:
        return "-"
    signs = f"{sum(own.high < 0 for own in found)} below, {sum(own.low > 0 for own in found)} above of {len(found)}"
    return f"{float(np.mean([own.mean for own in found])):+.1f} ({signs})"
