"""Draws a comparison: scores with intervals, best first, and the verdict below."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from ..text import one_line
from .table import Comparison


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"adapters": "#0072b2", "alternative": "#e69f00", "control": "#999999"}
MEANINGS = {"adapters": "reuses adapters", "alternative": "without adapters", "control": "random LoRAs"}


def plot_comparison(result: Comparison, title: str | None = None) -> Figure:
    """Scores of all methods with their 95% intervals, and the verdict.

    Args:
        result: what `compare_methods` returned.
        title: title above the plot. Default: how it was measured.

    Returns:
        The figure; `figure.savefig(path)` saves it. It belongs to no pyplot window.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = sorted(result.rows, key=lambda row: row.score)
    figure = Figure(figsize=(7.0, 1.7 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        ends = [[100 * (row.score - row.low)], [100 * (row.high - row.score)]]
        axes.errorbar(
            [100 * row.score], [place], xerr=ends, fmt="o", markersize=6, capsize=3, color=COLOURS[row.kind],
            label=MEANINGS[row.kind],
        )  # fmt: skip
        axes.annotate(
            f"{100 * row.score:.1f}", (100 * row.score, place), (0, 5), textcoords="offset points", ha="center", size=7
        )
    axes.set_yticks(range(len(rows)), [one_line(row.name) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.2)
    axes.set_xlabel(f"{result.measure} in percent, with 95% intervals")
    axes.grid(axis="x", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(*zip(*dict(zip(labels, zip(handles, labels))).values()), fontsize=8, loc="best")
    axes.set_title(one_line(title or result.setting), fontsize=9, parse_math=False)
    figure.supxlabel("\n".join(textwrap.wrap(one_line(str(result.verdict), 600), 95)), fontsize=8, parse_math=False)
    return figure
