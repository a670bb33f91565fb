"""The weights as a table and a heatmap."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from peft_composition.report import WeightRow, plot_weights, weights_table


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
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50
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


def test_without_matplotlib_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from peft_composition.report import plot_weights\n"
        "try: plot_weights({'m': {'a': 1.0}})\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert "pip install 'peft-composition[cli]'" in result.stdout, result.stderr
