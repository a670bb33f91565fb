"""`prune_adapters`: what leaving adapters out costs, computed by loops, and which of them go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_composition import mixing_weights
from peft_composition.explaining import prune_adapters

from .. import tiny
from ..evidence.test_fit import CLASSES, points, questions
from . import planted


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(x=planted.POINTS)


@pytest.mark.parametrize(
    ("fields", "mixes"),
    [
        ({"mixing": "uniform"}, [[1 / 3] * 3, [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]),
        (
            {"mixing": "fixed", "weights": [0.3, 0.2, 0.1]},
            [[0.3, 0.2, 0.1], [0, 0.4, 0.2], [0.45, 0, 0.15], [0.36, 0.24, 0]],  # 0.4 of the base model in each
        ),
    ],
)
def test_each_row_is_the_mix_without_one(fields: dict[str, Any], mixes: list[list[float]], tmp_path: Path) -> None:
    folders = planted.adapters(tmp_path)
    classes = planted.labels(folders)
    model = tiny.compose("mlp", folders, **fields)
    before = outputs(model)
    report = prune_adapters(model, planted.batches(folders), tolerance=0.0)
    whole, *others = (
        planted.log_likelihoods_by_loop(
            planted.features_of(tiny.composed_by_hand(tiny.build("mlp"), folders, mix)), classes
        )
        for mix in mixes
    )
    for row, values in zip(report.rows, others):
        change = row.change
        assert change.mean == pytest.approx(float((values - whole).mean()), abs=2e-5)
        assert change.low <= change.mean <= change.high
    assert report.measure == "margin"
    assert [row.name for row in report.rows] == list(planted.NAMES)
    assert [row.modules for row in report.rows] == [2, 2, 1]
    if not report.dropped:
        torch.testing.assert_close(outputs(model), before, atol=0, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [{}, {"mixing": "uniform"}, {"mixing": "fixed", "weights": [0.3, 0.3, 0.1]}],
    ids=["learned", "uniform", "fixed"],
)
def test_what_is_there_twice_goes_and_what_is_needed_stays(fields: dict[str, Any], tmp_path: Path) -> None:
    folders = planted.adapters(tmp_path)
    model = tiny.compose("mlp", folders, **fields)
    model.save_pretrained(str(tmp_path / "whole"))
    report = prune_adapters(model, planted.batches(folders), tolerance=0.02)
    assert set(report.dropped) >= {"noise"}
    assert len(report.dropped) == 2
    assert len({"needed", "copy"} & set(report.kept)) == 1
    assert report.change.low >= -0.02
    assert report.accuracy_after >= report.accuracy_before
    assert report.parameters_after * 2 < report.parameters_before
    assert {name for row in mixing_weights(model).values() for name in row} == set(report.kept)
    text = str(report)
    assert "2 of 3 adapters dropped on 24 examples" in text
    assert text.count("  dropped") == 2

    model.save_pretrained(str(tmp_path / "pruned"))
    again = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path / "pruned")).eval()
    torch.testing.assert_close(outputs(again), outputs(model), atol=0, rtol=0)
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("pruned", "whole")]
    assert sizes[0] < sizes[1]
    config = json.loads((tmp_path / "pruned" / "adapter_config.json").read_text())
    assert [entry["name"] for entry in config["adapters"]] == list(report.kept)


def test_what_costs_stays(tmp_path: Path) -> None:
    """Of two adapters of which one is needed, that one; and the last one whatever it does."""
    folders = planted.adapters(tmp_path)
    model = tiny.compose("mlp", [folders[0], folders[2]], mixing="fixed", weights=[1.0, 0.0])
    report = prune_adapters(model, planted.batches(folders), tolerance=100.0)
    assert (report.kept, report.dropped) == (("needed",), ("noise",))  # without it nothing would have a weight
    assert report.rows[0].change.mean < -0.05
    again = prune_adapters(model, planted.batches(folders), tolerance=100.0)
    assert (again.kept, again.dropped) == (("needed",), ())
    assert again.change.mean == 0
    assert again.rows[0].change.mean == pytest.approx(
        report.rows[0].change.mean, abs=1e-6
    )  # both times the base model


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_answers_of_language_models(name: str, pair) -> None:
    model = tiny.compose(name, pair(name))
    report = prune_adapters(model, questions(name), tolerance=0.0)
    whole, without_first, without_second = (
        _losses(tiny.composed_by_hand(tiny.build(name), pair(name), mix).eval(), questions(name))
        for mix in ([0.5, 0.5], [0.0, 1.0], [1.0, 0.0])
    )
    for row, losses in zip(report.rows, (without_first, without_second)):
        assert row.change.mean == pytest.approx(float((whole - losses).mean()), abs=1e-5)
    assert report.measure == "log-likelihood"
    assert report.examples == 6


def _losses(model: Any, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.tensor(
        [
            model(input_ids=batch["input_ids"][i : i + 1], labels=batch["labels"][i : i + 1]).loss.item()
            for batch in data
            for i in range(len(batch["labels"]))
        ],
        dtype=torch.float64,
    )


def test_the_model_is_as_before_where_nothing_goes(pair) -> None:
    model = tiny.compose("mlp", pair("mlp")).train()
    modes = [module.training for module in model.modules()]
    parameters = dict(model.named_parameters())
    report = prune_adapters(model, points(), tolerance=0.0)
    if report.dropped:
        pytest.fail(f"this needs adapters that cost: {report}")
    assert "Each stays: without it an example might lose more than 0 " in str(report)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf"), "much"])
def test_a_tolerance_that_is_none(tolerance: Any, pair) -> None:
    with pytest.raises(ValueError, match="tolerance must be a number of zero or more"):
        prune_adapters(tiny.compose("mlp", pair("mlp")), points(), tolerance=tolerance)


def test_what_is_refused(pair) -> None:
    merged = tiny.compose("mlp", pair("mlp"))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged into"):
        prune_adapters(merged, points())
    single = [{"x": points()[0]["x"][:2], "labels": CLASSES[:2]}]
    with pytest.raises(ValueError, match="one example of each of 2 classes"):
        prune_adapters(tiny.compose("mlp", pair("mlp")), single)
    with pytest.raises(ValueError, match="no composition"):
        prune_adapters(tiny.build("mlp"), points())
