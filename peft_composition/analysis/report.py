"""Shows mixing weights as a table, as a heatmap, and beside the similarity of the adapters. Pure functions; no files.

The weights have the form of `model.mixing_weights()`, the similarities that of `similarity.layerwise_cka`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from ..names import block_of
from ..text import one_line


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


Weights = Mapping[str, Mapping[str, float]]
Similarities = Mapping[str, Mapping[str, float]]
Part = Literal["model", "block", "module"]
PARTS = ("model", "block", "module")
WHOLE_MODEL = "all"
# Inches. Text of 8 points needs about 0.16 from line to line.
ROW_HEIGHT, COLUMN_WIDTH, CHARACTER_WIDTH = 0.17, 0.18, 0.075
NUMBER_WIDTH = 0.42
SMALLEST_PLOT = 2.0
BAR_WIDTH, BAR_HEIGHT = 0.15, 4.0  # width and maximal height of the colour bar
NUMBERED_CELLS = 150  # with at most this many cells, the cells show their values


@dataclass(frozen=True)
class WeightRow:
    """The weights of one adapter in one part of the model.

    Attributes:
        part: name of the block or module, or "all".
        adapter: name of the upstream adapter.
        modules: number of modules in this part that have a weight for the adapter.
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
    """Mean, smallest and largest mixing weight of every adapter.

    Args:
        weights: `{module: {adapter: weight}}`; an adapter may be missing in a module.
        by: over the whole "model" (default), or for each "block" or "module".
        adapters: the order of the adapters. Default: as they appear in `weights`.

    Returns:
        Rows in the order of the parts, then of the adapters; there is no row for an adapter that a part does not have.

    Raises:
        ValueError: `by` is invalid, or there are no weights.
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
    """A heatmap of the mixing weights, parts of the model by adapters (arXiv 2402.15414, figures 7 and 8).

    The colours run from the smallest to the largest weight (colour map cividis, which suits colour-blind readers). If
    weights are negative, they run from green over white (zero) to brown. Cells of modules that an adapter does not
    touch are hatched.

    Args:
        weights: `{module: {adapter: weight}}`; an adapter may be missing in a module.
        by: one row per "module" (default), per "block" (mean of its modules), or for the whole "model".
        title: title above the plot. Default: none.
        adapters: the order of the adapters. Default: as they appear in `weights`.

    Returns:
        The figure; `figure.savefig(path)` saves it. It belongs to no pyplot window.

    Raises:
        ValueError: `by` is invalid, or there are no weights.
        ImportError: matplotlib is not installed.
    """
    figure = _figure()
    parts, columns = rows_and_columns(weights, by)
    names = [*(adapters or columns)]
    axes = _lay_out(figure, parts, names, [_Panel(grid_of(weights, by, parts, names), "mixing weight")], by)
    if title:
        axes[0].set_title(one_line(title), fontsize=10, wrap=True, parse_math=False)
    return figure


def plot_weights_and_similarity(
    weights: Weights,
    similarities: Similarities,
    by: Part = "module",
    relative: bool = True,
    title: str | None = None,
) -> Figure:
    """The heatmaps of the mixing weights and of the similarities side by side, with the same rows and columns.

    This is the layout of figures 7 and 8 of arXiv 2402.15414, where "the CKA values are normalized across the
    upstreams"; the paper does not say how. Here, `relative` subtracts the mean of its row from every value. This shows
    differences between adapters even if layers differ more, and a row of equal similarities stays pale.

    Args:
        weights: `{module: {adapter: weight}}`, learned.
        similarities: `{module: {adapter: similarity}}` of the upstream adapters to the target, by the same names.
            Modules that have no weights are left out; a cell without a similarity is hatched.
        by: one row per "module" (default), per "block" (mean of its modules), or for the whole "model".
        relative: whether to subtract the mean of the row from similarities (default: True).
        title: title above the plot. Default: none.

    Returns:
        The figure, as from `plot_weights`.

    Raises:
        ValueError: as for `plot_weights`; or weights and similarities have no module and adapter in common.
        ImportError: matplotlib is not installed.
    """
    figure = _figure()
    parts, adapters = rows_and_columns(weights, by)
    left = grid_of(weights, by, parts, adapters)
    right = grid_of(_of_weights(similarities, weights), by, parts, adapters)
    label = "CKA"
    if relative:
        label = "CKA minus the mean of the row"
        right = [[value - _mean_of(row) for value in row] for row in right]
    panels = [_Panel(left, "mixing weight"), _Panel(right, label, is_signed=relative)]
    _lay_out(figure, parts, adapters, panels, by)
    if title:
        figure.suptitle(one_line(title), fontsize=10, wrap=True, parse_math=False)
    return figure


@dataclass(frozen=True)
class _Panel:
    """One heatmap of a figure: values by part and adapter, and their meaning."""

    grid: list[list[float]]
    label: str
    is_signed: bool = False


def _figure() -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The heatmap needs matplotlib: pip install 'peft-composition[cli]'") from error
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _lay_out(figure: Figure, parts: list[str], adapters: list[str], panels: list[_Panel], by: str) -> list[Axes]:
    """Draw panels with shared rows side by side; the size of the figure follows from its labels."""
    labels, common = short_labels(parts)
    labels = [one_line(label) for label in labels]
    names = [_clipped(one_line(name)) for name in adapters]
    is_numbered = len(parts) * len(adapters) <= NUMBERED_CELLS
    width = max(SMALLEST_PLOT, (NUMBER_WIDTH if is_numbered else COLUMN_WIDTH) * len(adapters))
    height = max(SMALLEST_PLOT, ROW_HEIGHT * len(parts))
    margin = CHARACTER_WIDTH * max(map(len, labels)) + 0.8
    figure.set_size_inches(
        (width + 0.8) * len(panels) + margin,  # 0.8 for a colour bar
        height + CHARACTER_WIDTH * max(map(len, names)) + 0.9,
    )
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(every, panels):
        image = _draw(axes, panel.grid)
        if is_numbered:
            _write_numbers(axes, panel, image)
        _add_color_bar(figure, axes, image, panel.label, width, height)
        rotation = 90 if len(adapters) > 4 else 30
        axes.set_xticks(range(len(adapters)), names, rotation=rotation, fontsize=8, parse_math=False)
        if len(adapters) <= 4:
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
        axes.set_xlabel("upstream adapter")
    every[0].set_yticks(range(len(parts)), labels, fontsize=8, parse_math=False)
    every[0].set_ylabel(f"{by} of {one_line(common)}" if common else by, parse_math=False)
    return list(every)


def _add_color_bar(figure: Figure, axes: Axes, image: AxesImage, label: str, width: float, height: float) -> None:
    length = min(height, BAR_HEIGHT)
    bar = figure.colorbar(
        image,
        ax=axes,
        label=label,
        fraction=BAR_WIDTH / (width + BAR_WIDTH),
        pad=0.1 / width,
        shrink=length / height,
        aspect=length / BAR_WIDTH,
        anchor=(0.0, 1.0),
    )
    bar.ax.tick_params(labelsize=8)


def _draw(axes: Axes, grid: list[list[float]]) -> AxesImage:
    values = [value for row in grid for value in row if not math.isnan(value)]
    low, high = min(values), max(values)
    colors = "cividis"
    if low < 0:
        low, high, colors = -max(map(abs, values)), max(map(abs, values)), "BrBG_r"
    elif high - low < 1e-9:  # uniform weights: do not stretch rounding errors over all colours
        low, high = 0.0, max(2 * high, 1e-9)
    axes.set_facecolor("0.92")
    axes.patch.set(hatch="////", edgecolor="0.7")
    axes.tick_params(length=0)
    return axes.imshow(grid, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")


def _write_numbers(axes: Axes, panel: _Panel, image: AxesImage) -> None:
    colors = image.to_rgba(image.get_array())  # type: ignore[arg-type]  # never None: imshow has set it
    sign = "+" if panel.is_signed else ""
    largest = max(abs(value) for row in panel.grid for value in row if not math.isnan(value))
    digits = 3 if panel.is_signed and largest < 0.1 else 2
    for y, row in enumerate(panel.grid):
        for x, value in enumerate(row):
            if math.isnan(value):
                continue
            red, green, blue, _ = colors[y, x]
            is_bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            color = "black" if is_bright else "white"
            text = f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no minus before a zero
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color=color)


def rows_and_columns(weights: Weights, by: Part) -> tuple[list[str], list[str]]:
    """The parts of the model and the adapters in the weights, in their order."""
    rows = weights_table(weights, by)
    return [*dict.fromkeys(row.part for row in rows)], _adapters(weights)


def grid_of(values: Weights, by: Part, parts: list[str], adapters: list[str]) -> list[list[float]]:
    """The mean value of every adapter in every part; NaN if a part has none."""
    found = {(row.part, row.adapter): row.mean for row in weights_table(values, by)}
    return [[found.get((part, adapter), math.nan) for adapter in adapters] for part in parts]


def _of_weights(similarities: Similarities, weights: Weights) -> dict[str, dict[str, float]]:
    """The similarities of modules and adapters that have weights."""
    names = set(_adapters(weights))
    found = {
        module: {name: value for name, value in similarities[module].items() if name in names}
        for module, row in weights.items()
        if row and module in similarities
    }
    if not any(found.values()):
        raise ValueError("weights and similarities have no module and adapter in common")
    return found


def _mean_of(row: list[float]) -> float:
    known = [value for value in row if not math.isnan(value)]
    return fmean(known) if known else math.nan


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


def short_labels(names: list[str]) -> tuple[list[str], str]:
    """Names without their common dotted prefix, and this prefix."""
    split = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(len(own) > common + 1 and own[common] == split[0][common] for own in split):
        common += 1
    return [".".join(own[common:]) for own in split], ".".join(split[0][:common])


def _clipped(name: str, length: int = 32) -> str:
    return name if len(name) <= length else f"...{name[3 - length :]}"
