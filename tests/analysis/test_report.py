"""The weights as a table and a heatmap."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise, permutations
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy import stats

from peft_composition.analysis.correlation import rank_correlations
from peft_composition.analysis.report import WeightRow, plot_weights, plot_weights_and_similarity, weights_table

from .. import warm


WEIGHTS = {
    "encoder.layer.0.query": {"a": 0.25, "b": 0.75},
    "encoder.layer.0.value": {"a": 0.5, "b": 0.5},
    "encoder.layer.1.query": {"a": 1.0},
    "pooler": {"a": 0.125, "b": 0.875},
}


def many(adapters: int, blocks: int, modules: int) -> dict[str, dict[str, float]]:
    random = np.random.default_rng(0)
    names = [f"organisation/lora-{number}" for number in range(adapters)]
    return {
        f"model.layers.{block}.self_attn.m{module}_proj": dict(zip(names, random.dirichlet([1.0] * adapters).tolist()))
        for block in range(blocks)
        for module in range(modules)
    }


def pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]


def test_the_table_of_the_model() -> None:
    assert weights_table(WEIGHTS) == [
        WeightRow("all", "a", 4, (0.25 + 0.5 + 1 + 0.125) / 4, 0.125, 1.0),
        WeightRow("all", "b", 3, (0.75 + 0.5 + 0.875) / 3, 0.5, 0.875),
    ]


def test_the_table_of_the_blocks() -> None:
    assert weights_table(WEIGHTS, by="block") == [
        WeightRow("encoder.layer.0", "a", 2, 0.375, 0.25, 0.5),
        WeightRow("encoder.layer.0", "b", 2, 0.625, 0.5, 0.75),
        WeightRow("encoder.layer.1", "a", 1, 1.0, 1.0, 1.0),
        WeightRow("pooler", "a", 1, 0.125, 0.125, 0.125),
        WeightRow("pooler", "b", 1, 0.875, 0.875, 0.875),
    ]


def test_adapters_stand_in_the_given_order() -> None:
    weights = {"layer.0": {"b": 1.0}, "layer.1": {"a": 0.25, "b": 0.75}}
    assert [row.adapter for row in weights_table(weights)] == ["b", "a"]
    assert [row.adapter for row in weights_table(weights, adapters=["a", "b"])] == ["a", "b"]
    axes = plot_weights(weights, adapters=["a", "b", "nowhere"]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "nowhere"]
    np.testing.assert_array_equal(
        np.asarray(axes.images[0].get_array()), [[np.nan, 1.0, np.nan], [0.25, 0.75, np.nan]]
    )


def test_what_has_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="by must be one of 'model', 'block', 'module', got 'layer'"):
        weights_table(WEIGHTS, by="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no mixing weights"):
        plot_weights({})


def test_the_heatmap_shows_the_weights() -> None:
    axes, bar = plot_weights(WEIGHTS, title="Mix").axes
    (image,) = axes.images
    wanted = [[0.25, 0.75], [0.5, 0.5], [1.0, np.nan], [0.125, 0.875]]
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), wanted)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(WEIGHTS)
    assert [text.get_text() for text in axes.texts] == ["0.25", "0.75", "0.50", "0.50", "1.00", "0.12", "0.88"]
    assert bar.get_ylabel() == "mixing weight"
    assert axes.get_title() == "Mix"


@pytest.mark.parametrize(("adapters", "blocks", "modules"), [(2, 6, 1), (20, 12, 3), (64, 50, 4)])
def test_heatmaps_of_all_sizes_are_readable(adapters: int, blocks: int, modules: int) -> None:
    figure = plot_weights(many(adapters, blocks, modules))
    image = pixels(figure)
    assert len(np.unique(image.reshape(-1, 3).astype(int) @ (1 << 16, 1 << 8, 1))) > 50
    axes = figure.axes[0]
    canvas = figure.bbox
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert all(canvas.x0 <= box.x0 and box.x1 <= canvas.x1 for box in boxes)
        assert all(canvas.y0 <= box.y0 and box.y1 <= canvas.y1 for box in boxes)
    rows = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(above.y0 >= below.y1 - 1 for above, below in pairwise(rows))


def test_the_parts_that_all_names_share_are_in_the_axis_label() -> None:
    axes = plot_weights(many(2, 2, 1)).axes[0]
    assert axes.get_ylabel() == "module of model.layers"
    assert axes.get_yticklabels()[0].get_text() == "0.self_attn.m0_proj"


def test_negative_weights_have_zero_in_the_middle_of_the_colours() -> None:
    image = plot_weights({"m": {"a": 1.5, "b": -0.5}}).axes[0].images[0]
    assert isinstance(image.norm, Normalize)
    assert (image.norm.vmin, image.norm.vmax) == (-1.5, 1.5)


def test_uniform_weights_are_one_colour() -> None:
    image = plot_weights({"m": {"a": 0.5, "b": 0.5}, "n": {"a": 0.5, "b": 0.5 + 1e-12}}).axes[0].images[0]
    assert (image.norm.vmin, image.norm.vmax) == (0.0, pytest.approx(1.0))


def test_without_a_package_its_extra_is_named() -> None:
    code = (
        f"{warm.without('matplotlib', 'scipy')}\n"
        "from peft_composition.analysis import plot_weights, rank_correlations\n"
        "try: plot_weights({'m': {'a': 1.0}})\n"
        "except ImportError as error: print(error)\n"
        "try: rank_correlations({'m': {'a': 1, 'b': 2}}, {'m': {'a': 1, 'b': 2}})\n"
        "except ImportError as error: print(error)"
    )
    result = warm.run("-c", code)
    for extra in ("cli", "analysis"):
        assert f"pip install 'peft-composition[{extra}]'" in result.stdout, result.stderr


# Beside similarities

SIMILARITIES = {
    "pooler": {"b": 0.75, "a": 0.25, "c": 1.0},
    "encoder.layer.0.value": {"a": 0.5, "b": 0.52},
    "encoder.layer.0.query": {"a": 0.9, "b": 0.8},
    "encoder.layer.2.query": {"a": 0.0},
}


def values_of(figure: Figure, panel: int) -> np.ndarray:
    (image,) = figure.axes[panel].images
    return np.ma.filled(np.ma.asarray(image.get_array()), np.nan)


def test_similarities_stand_beside_the_weights_of_the_same_module_and_adapter() -> None:
    figure = plot_weights_and_similarity(WEIGHTS, SIMILARITIES, relative=False, title="Mix")
    left, right, *bars = figure.axes
    np.testing.assert_array_equal(values_of(figure, 0), [[0.25, 0.75], [0.5, 0.5], [1, np.nan], [0.125, 0.875]])
    np.testing.assert_array_equal(values_of(figure, 1), [[0.9, 0.8], [0.5, 0.52], [np.nan, np.nan], [0.25, 0.75]])
    assert [label.get_text() for label in left.get_yticklabels()] == list(WEIGHTS)
    assert right.get_ylim() == left.get_ylim()
    assert [[label.get_text() for label in axes.get_xticklabels()] for axes in (left, right)] == [["a", "b"]] * 2
    assert sorted(bar.get_ylabel() for bar in bars) == ["CKA", "mixing weight"]
    assert figure.get_suptitle() == "Mix"


def test_relative_similarities_are_signed_differences_from_their_row() -> None:
    figure = plot_weights_and_similarity(WEIGHTS, SIMILARITIES, by="block")
    # Means of the block: (0.9 + 0.5) / 2 and (0.8 + 0.52) / 2.
    wanted = [[0.02, -0.02], [np.nan, np.nan], [-0.25, 0.25]]
    np.testing.assert_allclose(values_of(figure, 1), wanted, atol=1e-12)
    assert [text.get_text() for text in figure.axes[1].texts] == ["+0.02", "-0.02", "-0.25", "+0.25"]
    norm = figure.axes[1].images[0].norm
    assert (norm.vmin, norm.vmax) == pytest.approx((-0.25, 0.25))
    close = plot_weights_and_similarity({"m": {"a": 0.4, "b": 0.6}}, {"m": {"a": 0.9990, "b": 0.9930}})
    assert [text.get_text() for text in close.axes[1].texts] == ["+0.003", "-0.003"]


def test_weights_of_other_adapters_than_the_similarities_are_refused() -> None:
    with pytest.raises(ValueError, match="no module and adapter in common"):
        plot_weights_and_similarity(WEIGHTS, {"pooler": {"c": 1.0}})


@pytest.mark.parametrize("adapters", [5, 20])
def test_both_panels_are_readable(adapters: int) -> None:
    weights = many(adapters, 12, 3)
    similarities = {module: {name: 1 - value for name, value in row.items()} for module, row in weights.items()}
    figure = plot_weights_and_similarity(weights, similarities)
    figure.canvas.draw()
    left, right, *bars = figure.axes
    for axes in (left, right):
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert all(before.x1 <= after.x0 + 1 for before, after in pairwise(boxes))
        assert all(figure.bbox.y0 <= box.y0 for box in boxes)
    rows = [label.get_window_extent() for label in left.get_yticklabels()]
    assert all(above.y0 >= below.y1 - 1 for above, below in pairwise(rows))
    assert left.get_window_extent().width == pytest.approx(right.get_window_extent().width, rel=0.02)
    between = [bar.get_tightbbox() for bar in bars if bar.get_ylabel() == "mixing weight"]
    assert all(left.get_window_extent().x1 < box.x0 < box.x1 < right.get_window_extent().x0 for box in between)


def rank_correlation_by_hand(weights: list[list[float]], similarities: list[list[float]]) -> tuple[float, float]:
    """The mean of Spearman's rho over rows, and the share of all orders of the columns that come as far, doubled."""

    def mean(order: tuple[int, ...]) -> float:
        rows = zip(weights, similarities)
        return fmean(stats.spearmanr(own, [other[i] for i in order]).statistic for own, other in rows)

    observed = mean(tuple(range(len(weights[0]))))
    every = [mean(order) for order in permutations(range(len(weights[0])))]
    above, below = (sum(sign * value >= sign * observed - 1e-9 for value in every) for sign in (1, -1))
    return observed, min(1.0, 2 * min(above, below) / len(every))


def test_rank_correlations_are_spearmans_with_the_p_value_of_all_permutations() -> None:
    random = np.random.default_rng(0)
    adapters, modules = "abcde", ["l.0.q", "l.0.v", "l.1.q"]
    W, S = random.random((2, 3, 5)).round(1).tolist()  # with ties
    weights = {module: dict(zip(adapters, row)) for module, row in zip(modules, W)}
    similarities = {module: dict(zip(adapters, row)) for module, row in zip(modules, S)}
    found = rank_correlations(weights, similarities)
    assert [entry.part for entry in found] == [*modules, "all"]
    for entry, rows in zip(found, [slice(0, 1), slice(1, 2), slice(2, 3), slice(0, 3)]):
        rho, p_value = rank_correlation_by_hand(W[rows], S[rows])
        assert entry.rho == pytest.approx(rho, abs=1e-12)
        assert entry.p_value == pytest.approx(p_value, abs=1e-12)
        assert entry.adapters == 5
    (whole,) = rank_correlations(weights, similarities, by="model")
    means = [np.mean(rows, axis=0).tolist() for rows in (W, S)]
    assert whole.rho == pytest.approx(stats.spearmanr(*means).statistic)


def test_levels_of_layers_are_no_agreement() -> None:
    weights = {f"l.{n}": {"a": 0.1 * n, "b": 0.1 * n + 0.01, "c": 0.1 * n + 0.02} for n in range(1, 4)}
    similarities = {f"l.{n}": {"a": 0.1 * n + 0.02, "b": 0.1 * n + 0.01, "c": 0.1 * n} for n in range(1, 4)}
    assert [entry.rho for entry in rank_correlations(weights, similarities)] == pytest.approx([-1] * 4)


def test_many_layers_of_noise_are_not_significant() -> None:
    """Layers that all show the same chance order: each pair of a layer and an adapter is no observation of its own."""
    weights = {f"l.{n}": {"a": 0.1, "b": 0.2, "c": 0.7} for n in range(50)}
    similarities = {f"l.{n}": {"a": 0.5, "b": 0.6, "c": 0.7} for n in range(50)}
    pooled = rank_correlations(weights, similarities)[-1]
    assert (pooled.rho, pooled.p_value) == pytest.approx((1, 1 / 3))


def test_for_many_adapters_the_p_value_is_estimated_and_repeatable() -> None:
    weights = many(12, 2, 1)
    similarities = {module: {name: -value for name, value in row.items()} for module, row in weights.items()}
    pooled = rank_correlations(weights, similarities)[-1]
    assert pooled.rho == pytest.approx(-1)
    assert pooled.p_value == pytest.approx(2 / 10_000)
    assert rank_correlations(weights, similarities)[-1] == pooled


def test_uniform_layers_have_no_ranks_and_do_not_count() -> None:
    weights = {"m": {"a": 0.5, "b": 0.5 + 1e-12}, "n": {"a": 0.4, "b": 0.6}}
    similarities = {"m": {"a": 0.1, "b": 0.9}, "n": {"a": 0.1, "b": 0.9}}
    uniform, ranked, pooled = rank_correlations(weights, similarities)
    assert np.isnan([uniform.rho, uniform.p_value]).all()
    assert (ranked.rho, pooled.rho, pooled.p_value) == pytest.approx((1, 1, 1))
    with pytest.raises(ValueError, match="in no part do both weights and similarities differ"):
        rank_correlations({"m": weights["m"]}, similarities)


def test_adapters_are_ranked_where_they_are() -> None:
    """Adapters target different modules, and `mixing_weights` lists only those that touch one."""
    random = np.random.default_rng(3)
    has = {"l.0.q": "abcd", "l.0.v": "abc", "l.1.q": "abce", "l.1.v": "d"}
    weights = {module: dict(zip(names, random.random(len(names)).tolist())) for module, names in has.items()}
    similarities = {module: dict(zip("abcde", random.random(5).tolist())) for module in has}
    del similarities["l.1.q"]["e"]
    ranked = rank_correlations(weights, similarities)
    assert [entry.part for entry in ranked] == [*has, "all"]
    assert [entry.adapters for entry in ranked] == [4, 3, 3, 1, 3]
    both = {"l.0.q": "abcd", "l.0.v": "abc", "l.1.q": "abc"}
    for entry, (module, names) in zip(ranked, both.items()):
        values = [[table[module][name] for name in names] for table in (weights, similarities)]
        assert entry.rho == pytest.approx(stats.spearmanr(*values).statistic)
    assert math.isnan(ranked[3].rho)
    W, S = ([[table[module][name] for name in "abc"] for module in both] for table in (weights, similarities))
    assert (ranked[-1].rho, ranked[-1].p_value) == pytest.approx(rank_correlation_by_hand(W, S))
    (whole,) = rank_correlations(weights, similarities, by="model")
    assert whole.adapters == 4
    apart = {"m": {"a": 0.2, "b": 0.8}, "n": {"c": 0.2, "d": 0.8}}
    assert [entry.rho for entry in rank_correlations(apart, apart)][:2] == pytest.approx([1, 1])
    assert math.isnan(rank_correlations(apart, apart)[-1].rho)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing to rank: .* module 'n', for example, has both only for 'a'"):
        rank_correlations({"n": {"a": 0.4, "b": 0.6}}, {"n": {"a": 0.5}})
    with pytest.raises(ValueError, match="no module and adapter in common"):
        rank_correlations({"n": {"a": 0.4, "b": 0.6}}, {"m": {"a": 0.5, "b": 0.5}})
    disjoint = {"m": {"a": 1.0}, "n": {"b": 1.0}}
    with pytest.raises(ValueError, match="no part has both weights and similarities of 2 adapters"):
        rank_correlations(disjoint, disjoint)
    with pytest.raises(ValueError, match="'a' is the only adapter"):
        rank_correlations({"n": {"a": 1.0}}, {"n": {"a": 0.5}})


def test_names_of_adapters_are_no_formulas(tmp_path: Path) -> None:
    """Dollar signs would be mathematics to matplotlib, and control characters no glyphs."""
    weights = {f"layer.$x_{n}$": {"$\\frac{1$": 0.25, "a\x1b[2J\ud800": 0.75} for n in (0, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_weights(weights, title="$\\nothing")
        figure.savefig(tmp_path / "heat.png")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["$\\frac{1$", r"a\x1b[2J\ud800"]
    assert axes.get_title() == "$\\nothing"
