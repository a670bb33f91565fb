"""The picture of an explanation for a model card: scores and costs with intervals above the weights by block."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, cast

from ..analysis.report import plot_weights
from ..evidence.table import AdapterScore
from ..text import one_line
from .findings import Findings
from .page import WHO


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 24
_MARK, _INK, _SOFT = "#a14a00", "#1d2330", "#9aa1ad"
_WIDTH = 9.0


def figure_of(found: Findings) -> Figure:
    """The picture; of many adapters those with the largest weights.

    Raises:
        ImportError: matplotlib is not installed.
    """
    largest = sorted(found.adapters, key=lambda facts: -abs(facts.mean))[:MOST_ROWS]
    names = {facts.name for facts in largest}
    weights = {module: {n: w for n, w in row.items() if n in names} for module, row in found.weights.items()}
    heat = plot_weights({module: row for module, row in weights.items() if row}, by="block")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = BytesIO()
    heat.savefig(drawn, dpi=150, format="png")
    wide, high = heat.get_size_inches()
    scale = min(1.0, _WIDTH / wide)
    scores = sorted((row for row in found.scores.rows if row.kind != "adapter" or row.name in names), key=_score)
    left = sorted((row for row in found.left_out if row.name in names), key=lambda row: -row.change.mean)
    top = 1.0 + 0.24 * max(len(scores), len(left))
    figure = Figure(figsize=(_WIDTH, top + high * scale), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = cast(Any, figure.subfigures(2, 1, height_ratios=[top, high * scale]))
    alone, without = above.subplots(1, 2)
    shown = [row.name if row.kind == "adapter" else f"({WHO[row.kind]})" for row in scores]
    _draw(alone, shown, [(row.low, row.score, row.high) for row in scores], f"alone: {found.scores.measure}")
    _draw(
        without,
        [row.name for row in left],
        [(row.change.low, row.change.mean, row.change.high) for row in left],
        "left out: change of log-likelihood",
    )
    place = below.subplots()
    place.imshow(_read(drawn), aspect="equal", interpolation="antialiased")
    place.set_axis_off()
    return figure


def _score(row: AdapterScore) -> float:
    return row.score


def _draw(axes: Axes, names: Sequence[str], intervals: Sequence[tuple[float, float, float]], label: str) -> None:
    for place, (low, mean, high) in enumerate(intervals):
        axes.plot([low, high], [place, place], color=_INK, linewidth=1.5, solid_capstyle="butt")
        axes.plot([mean], [place], marker="o", markersize=5, color=_MARK)
    axes.axvline(0, color=_SOFT, linewidth=1, linestyle=(0, (3, 2)))
    shown = [name if len(name) <= 28 else f"...{name[-25:]}" for name in map(one_line, names)]
    axes.set_yticks(range(len(names)), shown, fontsize=8, parse_math=False)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{label}, 95% interval", fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _read(drawn: BytesIO) -> object:
    from matplotlib.image import imread

    drawn.seek(0)
    return imread(drawn, format="png")
