"""Tables of gains over the uniform mix, paired by draw: task by task, and their means over tasks, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from .records import Record


NOT_MIXED = "validation pick"
BEST = "best single (by test)"
CONTROLS = (BEST, NOT_MIXED, "base")


def gains(records: Sequence[Record], methods: Sequence[str]) -> str:
    """Points of accuracy against the uniform mix, paired by draw, with 95% intervals, as Markdown."""
    tasks = dict.fromkeys((record["scenario"], record["target"]) for record in records)
    shots = sorted({record["k"] for record in records})
    rows = [*CONTROLS, *methods]
    lines = []
    for task in tasks:
        own = [record for record in records if (record["scenario"], record["target"]) == task]
        uniform = {(r["k"], r["seed"]): r["accuracy"] for r in own if r["method"] == "uniform"}
        lines += [
            "",
            f"| `{task[0]}`, {task[1]} | " + " | ".join(f"K = {k}" for k in shots) + " |",
            "| --- |" + " ---: |" * len(shots),
            "| uniform, % | " + " | ".join(_mean(uniform, k) for k in shots) + " |",
        ]
        for row in rows:
            values = values_of(own, row)
            cells = [_difference(values, uniform, k) for k in shots]
            if any(cell != "-" for cell in cells):
                lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


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


def _mean(values: Mapping[tuple[int, int], float], k: int) -> str:
    found = [value for (own, _), value in values.items() if own == k]
    return f"{float(np.mean(found)):.1f}" if found else "-"


def _difference(values: Mapping[tuple[int, int], float], uniform: Mapping[tuple[int, int], float], k: int) -> str:
    pairs = [value - uniform[key] for key, value in values.items() if key[0] == k and key in uniform]
    if len(pairs) < 2:
        return "-"
    mean, error = float(np.mean(pairs)), float(stats.sem(pairs))
    if error == 0:
        return f"{mean:+.1f}"
    low, high = stats.t.interval(0.95, len(pairs) - 1, mean, error)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def means(records: Sequence[Record], methods: Sequence[str]) -> str:
    """Gains averaged over tasks, each with as many draws as it has, and how many tasks lie wholly below uniform.

    In brackets: tasks whose 95% interval over draws is wholly below, and wholly above.
    """
    shots = sorted({record["k"] for record in records})
    tasks = dict.fromkeys((record["scenario"], record["target"]) for record in records)
    lines = [
        "| mean over tasks | " + " | ".join(f"K = {k}" for k in shots) + " |",
        "| --- |" + " ---: |" * len(shots),
    ]
    for row in (*CONTROLS, *methods):
        cells = []
        for k in shots:
            found = []
            for task in tasks:
                own = [r for r in records if (r["scenario"], r["target"], r["k"]) == (*task, k)]
                uniform = {(r["k"], r["seed"]): r["accuracy"] for r in own if r["method"] == "uniform"}
                values = values_of(own, row)
                pairs = [value - uniform[key] for key, value in values.items() if key in uniform]
                if len(pairs) > 1:
                    found.append(pairs)
            cells.append(_over_tasks(found))
        if any(cell != "-" for cell in cells):
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _over_tasks(found: Sequence[Sequence[float]]) -> str:
    if not found:
        return "-"
    centers = [float(np.mean(pairs)) for pairs in found]
    low, high = zip(*(_interval(pairs) for pairs in found))
    signs = f"{sum(end < 0 for end in high)} below, {sum(end > 0 for end in low)} above of {len(found)}"
    return f"{float(np.mean(centers)):+.1f} ({signs})"


def _interval(pairs: Sequence[float]) -> tuple[float, float]:
    mean, error = float(np.mean(pairs)), float(stats.sem(pairs))
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(0.95, len(pairs) - 1, mean, error)
    return float(low), float(high)
