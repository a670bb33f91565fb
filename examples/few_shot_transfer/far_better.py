"""Tasks of a language model in which one adapter is far better than the uniform mix: what a way gains there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .gains import Gain, mean_gain
from .markdown import table
from .records import Record, by_task


MEASURES = {"accuracy": 1, "nll": 2}  # digits that are printed
SHOTS = (2, 5)


def far_better(records: Sequence[Record], points: float, of: str = "accuracy") -> list[tuple[str, str]]:
    """Scenario and target of the tasks in which a single adapter gains so many points on the uniform mix.

    Args:
        records: of `compare_answers`.
        points: the least gain.
        of: `accuracy` on the test questions, or `pool`, on those that support sets are drawn from.
    """
    found = []
    for task, own in by_task(records).items():
        singles, uniform = _still(own)
        if max(record[of] for record in singles) >= uniform[of] + points:
            found.append(task)
    return found


def far_better_table(records: Sequence[Record], points: float, way: str = "posterior") -> str:
    """What a way gains on the uniform mix where an adapter is far better, as Markdown: task by task, and the mean.

    The best adapter is the one with most right answers among the test questions; of several the one with less loss.
    Intervals are over draws. A task marked * passes by the questions of the pool, too.
    """
    by_pool = {
        task
        for task, own in by_task(records).items()
        if all("pool" in record for record in (*_still(own)[0], _still(own)[1])) and far_better(own, points, "pool")
    }
    rows, columns = [], list[list[Gain]]()
    tasks = far_better(records, points)
    for task in tasks:
        own = by_task(records)[task]
        singles, uniform = _still(own)
        best = max(singles, key=lambda record: (record["accuracy"], -record["nll"]))
        cells = []
        for measure in MEASURES:
            alone = best[measure] - uniform[measure]
            values = {(r["k"], r["seed"]): r[measure] for r in own if r["method"] == way}
            found = [Gain.of(values, dict.fromkeys(values, float(uniform[measure])), k) for k in SHOTS]
            cells += [Gain(alone, alone, alone), *(gain for gain in found if gain is not None)]
        if len(cells) < len(MEASURES) * (1 + len(SHOTS)):
            raise ValueError(f"{task[1]!r} has fewer than two draws of {way!r} at K = 2 or 5: run the command answers")
        columns.append(cells)
        star = "*" if task in by_pool else ""
        rows.append([f"{task[1]}{star}", best["adapter"], f"{uniform['accuracy']:.1f}", *_written(cells)])
    if len(tasks) > 1:
        means = [mean_gain(column) for column in zip(*columns)]
        rows.append([f"**mean of {len(tasks)} tasks**", "", "", *_written(means)])
    header = [f"{who}, {unit}" for unit in ("points", "nats") for who in ("that one", *(f"K = {k}" for k in SHOTS))]
    return table(["task", "best single", "uniform, %", *header], rows)


def _still(records: Sequence[Record]) -> tuple[list[Record], Record]:
    singles = [record for record in records if record["method"] == "single"]
    (uniform,) = (record for record in records if record["method"] == "uniform")
    return singles, uniform


def _written(cells: Sequence[Any]) -> list[str]:
    each = len(cells) // len(MEASURES)
    digits = [count for count in MEASURES.values() for _ in range(each)]
    return [
        f"{gain.mean:+.{count}f}"
        + (f" [{gain.low:+.{count}f}, {gain.high:+.{count}f}]" if gain.low < gain.high else "")
        for gain, count in zip(cells, digits)
    ]
