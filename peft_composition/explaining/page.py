"""Renders an explanation as one HTML page: no scripts, and nothing from elsewhere; all text of others is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..analysis.report import Part, grid_of, rows_and_columns, short_labels
from ..evidence.table import MEANING
from ..text import LONG, one_line, plural
from .classes import ClassTable
from .findings import Findings


TEMPLATE = "page_template.html"
MOST_COLUMNS = 24  # adapters in a table with a column for each
MOST_CLASSES = 24  # in a table of what is taken for what
MOST_MISTAKES = 10
MOST_MODULES = 600  # rows of the table of single modules
WHO = {"mix": "the mix", "uniform": "uniform mix", "base": "base model"}


@dataclass(frozen=True)
class Span:
    """An interval as a line in a picture 100 wide: the ends, the value and zero; zero is None where it is outside."""

    low: float
    mean: float
    high: float
    zero: float | None


@dataclass(frozen=True)
class Cell:
    """A cell of a heatmap: what it says, how strong its colour is (0 to 1), and whether it is below zero."""

    text: str
    strength: float
    is_negative: bool


def page_of(found: Findings) -> str:
    """The page."""
    order = {facts.name: number for number, facts in enumerate(found.adapters, 1)}
    largest = sorted(found.adapters, key=lambda facts: -abs(facts.mean))[:MOST_COLUMNS]
    shown = [facts.name for facts in found.adapters if facts in largest]
    scores = sorted(found.scores.rows, key=lambda row: -row.score)
    left = sorted(found.left_out, key=lambda row: row.change.mean)
    _, columns = rows_and_columns(found.weights, "model")
    columns = [name for name in shown if name in columns]
    places = [number - 1 for number in map(order.__getitem__, shown)]
    by_module = len(found.weights) <= MOST_MODULES
    return _template().render(
        found=found,
        order=order,
        shown=shown,
        scores=list(zip(scores, spans([(row.low, row.score, row.high) for row in scores]))),
        left=list(zip(left, spans([(row.change.low, row.change.mean, row.change.high) for row in left]))),
        meaning=MEANING[found.scores.measure],
        who=WHO,
        columns=columns,
        blocks=heatmap(found.weights, "block", columns),
        modules=heatmap(found.weights, "module", columns) if by_module else None,
        alike=[[_cell(found.updates.cosines[a][b], 1.0, 2) for b in places] for a in places],
        similar=similar_blocks(found, columns),
        shares=[f"{round(100 * share, 1) + 0.0:.1f}" for share in found.updates.shares],
        norms=cells(found.updates.norms),
        classes=class_rows(found.classes) if found.classes else None,
        tables=[
            (name, table, confusion_rows(table), table.mistakes[:MOST_MISTAKES])
            for name, table in (
                ("Leave-one-out predictions on the examples", found.classes),
                ("Its own head on the test data", found.tested.classes if found.tested else None),
            )
            if table
        ],
    )


def spans(intervals: Sequence[tuple[float, float, float]]) -> list[Span]:
    """Intervals (low, value, high) on one scale."""
    least, most = min(low for low, _, _ in intervals), max(high for _, _, high in intervals)
    if least > 0 or most < 0:  # zero is worth showing where it is near
        least, most = (min(least, 0), most) if least < most - least else (least, max(most, 0))
    room = max(most - least, 1e-9)

    def place(value: float) -> float:
        return 3 + 94 * (value - least) / room

    zero = place(0) if least <= 0 <= most else None
    return [Span(place(low), place(mean), place(high), zero) for low, mean, high in intervals]


def heatmap(
    values: Mapping[str, Mapping[str, float]], by: Part, columns: Sequence[str], signed: bool = False
) -> dict[str, Any]:
    """A table of parts of the model by adapters, with the rest that softmax weights leave to the base model."""
    parts, _ = rows_and_columns(values, by)
    grid = grid_of(values, by, parts, list(columns))
    labels, common = short_labels(parts)
    largest = max((abs(value) for row in grid for value in row if not math.isnan(value)), default=0)
    rows = [[_cell(value, largest, 3 if signed else 2) for value in row] for row in grid]
    return {"common": one_line(common), "rows": list(zip(map(one_line, labels), rows))}


def similar_blocks(found: Findings, columns: Sequence[str]) -> dict[str, Any] | None:
    """Similarities by block, for modules and adapters that have weights, less the mean of the row."""
    if found.similarities is None:
        return None
    known = {
        module: {name: value for name, value in row.items() if name in columns and name in found.weights[module]}
        for module, row in found.similarities.items()
        if module in found.weights
    }
    return heatmap(known, "block", columns, signed=True) if any(known.values()) else None


def cells(values: Iterable[float]) -> list[Cell]:
    """Cells on one scale."""
    listed = list(values)
    return [_cell(value, max(map(abs, listed), default=0), 2) for value in listed]


def class_rows(table: ClassTable) -> list[tuple[str, int, list[tuple[str, float]], float]]:
    """For each class its name, its examples, the share that each mix names rightly, and the gain over the better."""
    rows = []
    for number, (name, count) in enumerate(zip(table.names, table.examples)):
        shares = {mix: right[number] / count if count else math.nan for mix, right in table.right.items()}
        told = [(f"{table.right[mix][number]} of {count}", share) for mix, share in shares.items()]
        gain = shares["mix"] - max(shares.get("uniform", -1.0), shares["base"])
        rows.append((name, count, told, gain))
    return rows


def confusion_rows(table: ClassTable) -> list[list[Cell]] | None:
    """Cells of true classes by what they are taken for; None where there are too many."""
    if len(table.names) > MOST_CLASSES:
        return None
    largest = max(max(row) for row in table.confusion)
    return [
        [Cell(str(count), count / max(largest, 1), is_negative=at != row) for at, count in enumerate(counts)]
        for row, counts in enumerate(table.confusion)
    ]


def signed(value: float) -> str:
    """A number with its sign; zero has none."""
    return f"{value:+.3f}" if round(value, 3) else "0.000"


def _cell(value: float, largest: float, digits: int) -> Cell:
    if math.isnan(value):
        return Cell("\N{EN DASH}", 0.0, False)
    strength = min(abs(value) / largest, 1.0) if largest > 0 else 0.0
    return Cell(f"{round(value, digits) + 0.0:.{digits}f}", strength, value < 0)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(line=one_line, plural=plural, signed=signed, whole=lambda text: one_line(text, LONG))
    return environment.get_template(TEMPLATE)
