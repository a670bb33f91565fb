"""The plot of a training table: time and saved bytes against the number of adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from .results import Cell, Measurement, Results


# Colours of Okabe and Ito, told apart by colour-blind readers; markers and dashes tell them apart in grey.
STYLES: dict[str, tuple[str, str, str]] = {
    "composition": ("#D55E00", "o", "-"),
    "LoRA": ("#000000", "s", "-"),
    "PEFT, N active": ("#0072B2", "^", "-"),
    "PEFT, N trained": ("#56B4E9", "v", "--"),
    "plain loop": ("#009E73", "D", "--"),
    "X-LoRA": ("#CC79A7", "P", "-"),
    "frozen base": ("#999999", "x", ":"),
    "arithmetic limit": ("#E69F00", "", ":"),
}


def plot_training(results: Results, model: str, path: Path) -> Path:
    """Draw time relative to the reference, and bytes saved for backward, against N.

    Args:
        results: of the table `train`.
        model: which of its models.
        path: of the PNG.

    Returns:
        `path`.
    """
    cells = sorted((cell for cell in results.cells if cell.model == model), key=lambda cell: cell.adapters)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    _draw(left, cells, lambda entry: None if entry.ratio is None else entry.ratio.median)
    _draw(right, cells, lambda entry: None if entry.saved_bytes is None else entry.saved_bytes / 1e9)
    left.set_ylabel(f"training step / {cells[0].reference}'s")
    right.set_ylabel("saved for backward (GB)")
    for axes in (left, right):
        axes.set_xlabel("adapters N")
    figure.suptitle(f"{results.models[model]}; {results.device.upper()}, {results.dtype}", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw(axes: Axes, cells: list[Cell], value: Callable[[Measurement], float | None]) -> None:
    for title, (colour, marker, line) in STYLES.items():
        found = [(cell.adapters, value(cell.peers[title])) for cell in cells if title in cell.peers]
        points = [(count, number) for count, number in found if number is not None]
        if points:
            axes.plot(*zip(*points), label=title, color=colour, marker=marker, linestyle=line, markersize=5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    counts = [cell.adapters for cell in cells]
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    plain = FuncFormatter(lambda number, _: f"{number:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(plain)
    axes.grid(alpha=0.3)
