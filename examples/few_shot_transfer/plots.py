"""The figures of the study, as matplotlib draws them; each function returns a figure that belongs to no window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .analysis import BEST_SINGLE, Difference, Scores, Shots
from .gains import Gain


# Colours of Okabe and Ito, which colour-blind readers can tell apart; markers and dashes say the same once more.
STYLES: dict[str, dict[str, Any]] = {
    "zero-shot": {"color": "#999999", "marker": "x", "linestyle": ":"},
    "classifier": {"color": "#000000", "marker": "v", "linestyle": ":"},
    "full": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "lora": {"color": "#009E73", "marker": "^", "linestyle": "-"},
    "uniform": {"color": "#E69F00", "marker": "D", "linestyle": "-"},
    "learned": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "learned-free": {"color": "#56B4E9", "marker": "o", "linestyle": "--"},
    BEST_SINGLE: {"color": "#CC79A7", "marker": "P", "linestyle": "--"},
    "random-uniform": {"color": "#999999", "marker": "D", "linestyle": "--"},
    "random-learned": {"color": "#999999", "marker": "o", "linestyle": "--"},
    "lorahub": {"color": "#F0E442", "marker": "h", "linestyle": "--"},
    "evidence": {"color": "#882255", "marker": "*", "linestyle": "-"},
    "cold": {"color": "#332288", "marker": "<", "linestyle": "--"},
    "cold-block": {"color": "#332288", "marker": "2", "linestyle": ":"},
    "cold-model": {"color": "#332288", "marker": "3", "linestyle": "-."},
    "evidence-learned": {"color": "#882255", "marker": ">", "linestyle": ":"},
    "fresh-member": {"color": "#44AA99", "marker": "d", "linestyle": "--"},
    "lambda-lora": {"color": "#009E73", "marker": "1", "linestyle": ":"},
}
MAIN = ("classifier", "full", "lora", "uniform", "learned")  # the paper's


def over_shots(title: str, scores: Scores) -> Figure:
    """Accuracy over K with standard deviations (figures 3 and 4)."""
    shots = list(dict.fromkeys(k for _, k in scores))
    figure, axes = _figure(7.0, 4.2)
    methods = [method for method in STYLES if any((method, k) in scores for k in shots)]
    for offset, method in zip(np.linspace(-0.12, 0.12, len(methods)), methods):
        at = [x for x, k in enumerate(shots) if (method, k) in scores]
        means, deviations = zip(*(mean_and_deviation(scores[method, shots[x]]) for x in at))
        axes.errorbar(np.array(at) + offset, means, deviations, label=method, **_line(method))
    axes.set_xticks(range(len(shots)), [str(k) for k in shots])
    _label(axes, title, "examples per class, K", "accuracy (%)")
    return _with_legend(figure, axes)


def over_adapters(title: str, by_count: Mapping[int, Sequence[Scores]], k: Shots) -> Figure:
    """Accuracy over the number of adapters (figures 5 and 6): each set of adapters a dot, the line their mean.

    Args:
        title: above the plot.
        by_count: for every number of adapters the scores of all settings with so many.
        k: the shots.
    """
    figure, axes = _figure(6.0, 4.0)
    step = 0.015 * (max(by_count) - min(by_count))  # side by side, so that no bar hides another
    for position, method in enumerate((*MAIN, BEST_SINGLE)):
        counts = [count for count in sorted(by_count) if any((method, k) in own for own in by_count[count])]
        if not counts:
            continue
        means = [[mean_and_deviation(own[method, k])[0] for own in by_count[count]] for count in counts]
        spread = [_spread(by_count[count], method, k) for count in counts]
        x = np.array(counts) + step * (position - 2.5)
        axes.errorbar(x, [np.mean(values) for values in means], spread, label=method, **_line(method))
        if any(len(values) > 1 for values in means):
            at = [place for place, values in zip(x, means) for _ in values]
            dots = [value for values in means for value in values]
            axes.scatter(at, dots, s=9, alpha=0.4, color=str(STYLES[method]["color"]))
    axes.set_xticks(sorted(by_count))
    _label(axes, title, "number of upstream adapters, N", "accuracy (%)")
    return _with_legend(figure, axes)


def gain_over_classifier(title: str, by_target: Mapping[str, Scores], k: Shots) -> Figure:
    """What each method gains over classifier tuning on every downstream task (figure 1)."""
    methods = [m for m in (*MAIN[1:], BEST_SINGLE, "random-learned") if any((m, k) in s for s in by_target.values())]
    figure, axes = _figure(max(5.0, 1.4 * len(by_target) + 2.5), 4.0)
    width = 0.8 / max(1, len(methods))
    for position, method in enumerate(methods):
        for x, scores in enumerate(by_target.values()):
            if (method, k) in scores and ("classifier", k) in scores:
                by_seed = (scores[method, k] - scores["classifier", k]).mean(axis=1)
                deviation = by_seed.std(ddof=1) if len(by_seed) > 1 else 0.0
                axes.bar(
                    x - 0.4 + width * (position + 0.5),
                    by_seed.mean(),
                    width,
                    yerr=deviation,
                    capsize=2,
                    color=str(STYLES[method]["color"]),
                    edgecolor="black",
                    linewidth=0.4,
                    label=method if x == 0 else None,
                )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(by_target)), list(by_target))
    _label(axes, title, "downstream task", "points above classifier tuning")
    return _with_legend(figure, axes)


def differences(panels: Mapping[str, Mapping[Shots, Sequence[tuple[str, Difference]]]]) -> Figure:
    """Differences between two methods over K, a panel for each pair: a dot and its 95% interval for every case.

    Args:
        panels: by title, then by K, the name of the case's scenario and the difference.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure((3.4 * columns + 1.6, 2.7 * rows), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    every = figure.subplots(rows, columns, squeeze=False)
    names = list(dict.fromkeys(name for by_k in panels.values() for own in by_k.values() for name, _ in own))
    for axes, (title, by_k) in zip(every.flat, panels.items()):
        axes.axhline(0, color="black", linewidth=0.8)
        for x, own in enumerate(by_k.values()):
            for offset, (name, found) in zip(np.linspace(-0.3, 0.3, len(own)) if len(own) > 1 else [0.0], own):
                interval = [[found.mean - found.low], [found.high - found.mean]]
                axes.errorbar(x + offset, found.mean, interval, **_case_style(names.index(name)))
        axes.set_xticks(range(len(by_k)), [str(k) for k in by_k])
        _label(axes, title, "K", "points")
        axes.title.set_fontsize(8)
    for axes in list(every.flat)[len(panels) :]:
        axes.set_axis_off()
    handles = [every[0, 0].errorbar([], [], [], label=name, **_case_style(i)) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside right upper", fontsize=7, frameon=False)
    return figure


def gain_over_shots(panels: Mapping[str, Mapping[str, Mapping[int, Gain]]]) -> Figure:
    """Points gained on the uniform mix over K, with 95% intervals, a panel for each task.

    Args:
        panels: by title, then by method and K, as `gains.of_tasks` gives them.
    """
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure((2.9 * columns + 1.7, 2.5 * rows), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    every = figure.subplots(rows, columns, squeeze=False)
    methods = list(dict.fromkeys(name for of_task in panels.values() for name in of_task))
    shots = sorted({k for of_task in panels.values() for row in of_task.values() for k in row})
    for axes, (title, of_task) in zip(every.flat, panels.items()):
        axes.axhline(0, color="black", linewidth=0.8)
        for offset, (number, name) in zip(np.linspace(-0.18, 0.18, len(methods)), enumerate(methods)):
            row = of_task.get(name, {})
            if row:
                at = [shots.index(k) + offset for k in row]
                ends = [[own.mean - own.low for own in row.values()], [own.high - own.mean for own in row.values()]]
                axes.errorbar(at, [own.mean for own in row.values()], ends, **_gain_style(number))
        axes.set_xticks(range(len(shots)), [str(k) for k in shots])
        _label(axes, title, "K", "points")
        axes.title.set_fontsize(8)
    for axes in list(every.flat)[len(panels) :]:
        axes.set_axis_off()
    handles = [every[0, 0].errorbar([], [], [], label=name, **_gain_style(i)) for i, name in enumerate(methods)]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def mean_and_deviation(scores: np.ndarray) -> tuple[float, float]:
    """Mean accuracy over the seeds and its standard deviation (0 with one seed), from scores (seeds, examples)."""
    by_seed = scores.mean(axis=1)
    return float(by_seed.mean()), float(by_seed.std(ddof=1)) if len(by_seed) > 1 else 0.0


def _spread(settings: Sequence[Scores], method: str, k: Shots) -> float:
    """Of several sets of adapters the deviation of their means, of a single one that of its seeds."""
    pairs = [mean_and_deviation(own[method, k]) for own in settings]
    return pairs[0][1] if len(pairs) == 1 else float(np.std([mean for mean, _ in pairs], ddof=1))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _gain_style(number: int) -> dict[str, Any]:
    colors = ("#CC79A7", "#999999", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#000000")
    marker, dashes = "PxDo^sv*"[number % 8], ("--", ":", "-.", "-")[number % 4]
    style = {"color": colors[number % len(colors)], "marker": marker, "linestyle": dashes}
    return {**style, "capsize": 2, "markersize": 4, "linewidth": 1.2, "elinewidth": 0.8}


def _case_style(number: int) -> dict[str, Any]:
    colors = [
        style["color"] for name, style in STYLES.items() if name not in ("zero-shot", "lorahub", "random-uniform")
    ]
    markers = "osD^vPXh*<>d"
    return {
        "color": colors[number % len(colors)],
        "marker": markers[number % len(markers)],
        "linestyle": "none",
        "markersize": 4,
        "elinewidth": 0.8,
    }


def _line(method: str) -> dict[str, Any]:
    return {**STYLES[method], "capsize": 2, "markersize": 5, "linewidth": 1.4, "elinewidth": 0.8}


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure
