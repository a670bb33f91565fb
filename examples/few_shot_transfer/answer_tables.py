"""Tables of what ways to choose a language model's weights gain on the uniform mix, paired by draw, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from .answers import TRAINED, WAYS
from .gains import BEST, Gain, mean_gain
from .markdown import table
from .records import Record


HOW = {
    "accuracy": ("accuracy", "%", 1),
    "exact": ("exact match of what is generated", "%", 1),
    "nll": ("NLL of the answer among the options", "nats", 2),
    "nll_token": ("NLL of a token of the answer over the whole vocabulary", "nats", 2),
}


def answer_gains(records: Sequence[Record], measure: str) -> str:
    """One table for all tasks: their uniform mix, the best adapter by test, what each way gains; and means over tasks.

    Args:
        records: of `compare_answers`.
        measure: one of `HOW`.
    """
    name, unit, digits = HOW[measure]
    shots = sorted({record["k"] for record in records if record["k"] is not None})
    tasks = list(dict.fromkeys((record["scenario"], record["target"]) for record in records))
    rows, of_ways = [], dict[str, list[list[Gain | None]]]()
    for scenario, target in tasks:
        own = [record for record in records if (record["scenario"], record["target"]) == (scenario, target)]
        still = _still(own, measure)
        uniform = still["uniform"]
        rows.append([f"**{target}**: uniform, {unit}", *[f"{uniform:.{digits}f}"] * len(shots)])
        for control in ("base", BEST):
            rows.append([control, *[f"{still[control] - uniform:+.{digits}f}"] * len(shots)])
        for way in (*WAYS, *TRAINED):
            found = {(r["k"], r["seed"]): r[measure] for r in own if r["method"] == way}
            if found:
                cells = [Gain.of(found, dict.fromkeys(found, uniform), k) for k in shots]
                rows.append([_counted(way, found), *(_written(cell, digits) for cell in cells)])
                of_ways.setdefault(way, []).append(cells)
    if len(tasks) > 1:
        rows.append([f"**mean of {len(tasks)} tasks**", *[""] * len(shots)])
        for way, parts in of_ways.items():
            means = [_mean(column) if len(parts) == len(tasks) else None for column in zip(*parts)]
            rows.append([way, *(_written(cell, digits) for cell in means)])
    return table([f"{name}", *(f"K = {k}" for k in shots)], rows)


def answer_overview(records: Sequence[Record], way: str = "posterior") -> str:
    """One row for each task: by each measure its uniform mix, what the best adapter gains on it, and what a way does.

    The gains of the way are means over draws, at K = 2 and at K = 5.
    """
    tasks = list(dict.fromkeys((record["scenario"], record["target"]) for record in records))
    rows, gained = [], []
    for scenario, target in tasks:
        own = [record for record in records if (record["scenario"], record["target"]) == (scenario, target)]
        row = [target]
        for measure, (_, _, digits) in HOW.items():
            still = _still(own, measure)
            uniform = still["uniform"]
            found = {(r["k"], r["seed"]): r[measure] - uniform for r in own if r["method"] == way}
            means = [
                fmean(found[key] for key in found if key[0] == k) for k in (2, 5) if any(k == q for q, _ in found)
            ]
            gained.append([still[BEST] - uniform, *means])
            row.append(f"{uniform:.{digits}f}: {' / '.join(f'{gain:+.{digits}f}' for gain in gained[-1])}")
        rows.append(row)
    if len(tasks) > 1:
        columns = zip(HOW.values(), [gained[place :: len(HOW)] for place in range(len(HOW))])
        cells = [
            " / ".join(f"{fmean(part):+.{digits}f}" for part in zip(*(own for own in column if len(own) == 3)))
            for (_, _, digits), column in columns
        ]
        rows.append([f"**mean of {sum(len(own) == 3 for own in gained[:: len(HOW)])} tasks**", *cells])
    return table(["uniform: best single / K = 2 / K = 5", *(name for name, _, _ in HOW.values())], rows)


def _mean(found: Sequence[Gain | None]) -> Gain | None:
    whole = [gain for gain in found if gain is not None]
    return mean_gain(whole) if len(whole) == len(found) else None


def _still(records: Sequence[Record], measure: str) -> dict[str, float]:
    """What does not depend on a draw; the best adapter is the best by this measure."""
    found = {record["method"]: record[measure] for record in records if record["k"] is None}
    best = min if measure.startswith("nll") else max
    found[BEST] = best(record[measure] for record in records if record["method"] == "single")
    return found


def _counted(way: str, found: Mapping[tuple[int, int], float]) -> str:
    draws = {k: sum(own == k for own, _ in found) for k, _ in found}
    return f"{way} ({min(draws.values())} draws)" if way in TRAINED else way


def _written(gain: Gain | None, digits: int) -> str:
    if gain is None:
        return "-"
    between = f" [{gain.low:+.{digits}f}, {gain.high:+.{digits}f}]" if gain.low < gain.high else ""
    return f"{gain.mean:+.{digits}f}{between}"
