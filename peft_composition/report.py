"""Mixing weights as a table and as a heatmap, from what `model.mixing_weights()` returns. Pure functions; no files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from .model import block_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Weights = Mapping[str, Mapping[str, float]]
Part = Literal["model", "block", "module"]
PARTS = ("model", "block", "module")
WHOLE_MODEL = "all"
# Inches. Text of 8 points needs about 0.16 from line to line.
ROW_HEIGHT, COLUMN_WIDTH, CHARACTER_WIDTH = 0.17, 0.18, 0.075
NUMBER_WIDTH = 0.42
SMALLEST_PLOT = 2.0
BAR_WIDTH, BAR_HEIGHT = 0.15, 4.0  # of the colour bar; the height at most
NUMBERED_CELLS = 150  # up to here the values stand in the cells


@dataclass(frozen=True)
class WeightRow:
    """The weights of one adapter in one part of the model.

    Attributes:
        part: name of the block or module, or "all".
        adapter: name of the upstream adapter.
        modules: number of modules there that have a weight for it.
        mean: mean weight over these modules.
        min: smallest weight.
        max: largest weight.
    """

    part: str
    adapter: str
    modules: int
    mean: float
    min: float
    max: float


def weights_table(weights: Weights, by: Part = "model", adapters: Sequence[str] | None = None) -> list[WeightRow]:
    """Mean, least and largest mixing weight of every adapter.

    Args:
        weights: `{module: {adapter: weight}}`; an adapter may be missing in a module.
        by: over the whole "model" (default), or for each "block" or "module".
        adapters: their order. Default: as they appear in `weights`.

    Returns:
        Rows in the order of the parts, then of the adapters; none for an adapter that a part does not have.

    Raises:
        ValueError: `by` is none of these, or there are no weights.
    """
    rows = []
    for part, members in _parts(weights, by).items():
        for adapter in adapters or _adapters(weights):
            values = [weights[module][adapter] for module in members if adapter in weights[module]]
            if values:
                rows.append(WeightRow(part, adapter, len(values), fmean(values), min(values), max(values)))
    return rows


def plot_weights(
    weights: Weights, by: Part = "module", title: str | None = None, adapters: Sequence[str] | None = None
) -> Figure:
    """A heatmap of the mixing weights: parts of the model down, adapters across (arXiv 2402.15414, figures 7 and 8).

    The colours run from the least to the largest weight (map cividis, which colour-blind readers see alike); where
    weights are negative, from green over white at zero to brown. Cells of modules that an adapter does not touch are
    hatched.

    Args:
        weights: `{module: {adapter: weight}}`; an adapter may be missing in a module.
        by: one row per "module" (default), per "block" (mean of its modules), or for the whole "model".
        title: above the plot. Default: none.
        adapters: their order. Default: as they appear in `weights`.

    Returns:
        The figure; `figure.savefig(path)` writes it. It belongs to no pyplot window.

    Raises:
        ValueError: `by` is none of these, or there are no weights.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The heatmap needs matplotlib: pip install 'peft-composition[cli]'") from error
    adapters = [*(adapters or _adapters(weights))]
    rows = weights_table(weights, by, adapters)
    parts = [*dict.fromkeys(row.part for row in rows)]
    grid = [[math.nan] * len(adapters) for _ in parts]
    for row in rows:
        grid[parts.index(row.part)][adapters.index(row.adapter)] = row.mean
    labels, common = _short_labels(parts)
    names = [_clipped(name) for name in adapters]
    is_numbered = len(rows) <= NUMBERED_CELLS
    width = max(SMALLEST_PLOT, (NUMBER_WIDTH if is_numbered else COLUMN_WIDTH) * len(adapters))
    height = max(SMALLEST_PLOT, ROW_HEIGHT * len(parts))
    margin = CHARACTER_WIDTH * max(map(len, labels)) + 1.6  # for the colour bar, too
    figure = Figure((width + margin, height + CHARACTER_WIDTH * max(map(len, names)) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = _draw(axes, grid)
    if is_numbered:
        _write_numbers(axes, grid, image)
    length = min(height, BAR_HEIGHT)
    bar = figure.colorbar(
        image,
        label="mixing weight",
        fraction=BAR_WIDTH / (width + BAR_WIDTH),
        pad=0.1 / width,
        shrink=length / height,
        aspect=length / BAR_WIDTH,
        anchor=(0.0, 1.0),
    )
    bar.ax.tick_params(labelsize=8)
    axes.set_xticks(range(len(adapters)), names, rotation=90 if len(adapters) > 4 else 30, fontsize=8)
    if len(adapters) <= 4:
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.set_yticks(range(len(parts)), labels, fontsize=8)
    axes.set_xlabel("upstream adapter")
    axes.set_ylabel(f"{by} of {common}" if common else by)
    if title:
        axes.set_title(title, fontsize=10, wrap=True)
    return figure


def _draw(axes: Axes, grid: list[list[float]]) -> AxesImage:
    values = [value for row in grid for value in row if not math.isnan(value)]
    low, high = min(values), max(values)
    colors = "cividis"
    if low < 0:
        low, high, colors = -max(map(abs, values)), max(map(abs, values)), "BrBG_r"
    elif high - low < 1e-9:  # uniform weights are no noise to be stretched over all colours
        low, high = 0.0, max(2 * high, 1e-9)
    axes.set_facecolor("0.92")
    axes.patch.set(hatch="////", edgecolor="0.7")
    axes.tick_params(length=0)
    return axes.imshow(grid, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")


def _write_numbers(axes: Axes, grid: list[list[float]], image: AxesImage) -> None:
    colors = image.to_rgba(image.get_array())  # type: ignore[arg-type]  # never None: imshow has set it
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if math.isnan(value):
                continue
            red, green, blue, _ = colors[y, x]
            is_bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            color = "black" if is_bright else "white"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)


def _adapters(weights: Weights) -> list[str]:
    return [*dict.fromkeys(adapter for row in weights.values() for adapter in row)]


def _parts(weights: Weights, by: str) -> dict[str, list[str]]:
    """The modules of every part."""
    if by not in PARTS:
        raise ValueError(f"by must be one of {', '.join(map(repr, PARTS))}, got {by!r}")
    if not any(weights.values()):
        raise ValueError("there are no mixing weights")
    parts: dict[str, list[str]] = {}
    for module in weights:
        part = {"model": WHOLE_MODEL, "module": module}.get(by) or block_of(module) or module
        parts.setdefault(part, []).append(module)
    return parts


def _short_labels(names: list[str]) -> tuple[list[str], str]:
    """Names without the dotted parts that all of them begin with, and these parts."""
    split = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(len(own) > common + 1 and own[common] == split[0][common] for own in split):
        common += 1
    return [".".join(own[common:]) for own in split], ".".join(split[0][:common])


def _clipped(name: str, length: int = 32) -> str:
    return name if len(name) <= length else f"...{name[3 - length :]}"
