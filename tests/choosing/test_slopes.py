"""Slopes: the gradient behind them, those of an adapter by hand, and models that have none."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from peft_composition.choosing import select_adapters, slopes, trials
from peft_composition.choosing.slopes import Slopes, gradients, mean_margin
from peft_composition.evidence.passes import Examples, read_examples, read_features
from peft_composition.evidence.scores import leave_one_out_distances, margins
from peft_composition.evidence.streamed import read_in_turn

from .. import tiny
from . import candidates


STEP = 1e-5


def score(model: nn.Module, examples: Examples) -> float:
    """What candidates are ranked by, in the precision of the model."""
    assert examples.labels is not None
    with torch.no_grad():
        return float(margins(leave_one_out_distances(read_features(model, examples, "no"), examples.labels)).mean())


def difference(model: nn.Module, examples: Examples, weight: Tensor, along: Tensor) -> float:
    """The derivative of the score, by finite differences in float64."""
    found = []
    with torch.no_grad():
        for step in (STEP, -2 * STEP, STEP):
            weight += step * along
            found.append(score(model, examples))
    return (found[0] - found[1]) / (2 * STEP)


def example_set(model: nn.Module, count: int = 11, batch_size: int = 4) -> Examples:
    return read_examples(model, candidates.rows(count), None, None, batch_size)


def test_gradients_are_those_of_finite_differences() -> None:
    model = candidates.base().double()
    examples = example_set(model)
    layers = {name: own for name, own in model.bert.named_modules() if isinstance(own, nn.Linear)}
    found = gradients(model, layers, examples, "no")
    assert set(found) == set(layers)
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        assert isinstance(layer.weight, Tensor)
        along = torch.randn(layer.weight.shape, generator=generator).double()
        expected = difference(model, examples, layer.weight.data, along)
        assert float((found[name] * along).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in model.modules())


def test_a_class_of_one_is_left_out_and_others_count_by_their_number() -> None:
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([4, 4, 7, 4, 7, 9, 4, 7])
    expected = float(margins(leave_one_out_distances(features, labels)).mean())
    assert float(mean_margin(features, labels)) == pytest.approx(expected, abs=1e-12)


def of_each(model: nn.Module, examples: Examples, pool: list[str]) -> list[float | None]:
    found = Slopes(model, examples, "no")
    result: list[float | None] = []
    for alone in read_in_turn(model, pool)[:-1]:
        with alone.switch(), torch.no_grad():
            result.append(found.of_what_is_on())
    return result


def test_an_adapters_slope_by_hand(tmp_path: Path) -> None:
    """The second adapter has modules that the first one has not: there is another backward pass."""
    model = candidates.base()
    pool = [
        str(tiny.save_lora(tmp_path / "a", model, ["query"], seed=1, r=2, lora_alpha=6)),
        str(tiny.save_lora(tmp_path / "b", model, ["query", "value", "word_embeddings"], seed=2, r=3, lora_alpha=3)),
    ]
    before = {name: own.clone() for name, own in model.state_dict().items()}
    model.train()
    found = of_each(model, example_set(model), pool)
    assert model.training
    assert all(torch.equal(model.state_dict()[name], own) for name, own in before.items())
    wide = copy.deepcopy(model).double().eval()
    for folder, own in zip(pool, found, strict=True):
        tensors = {
            name: value.double() for name, value in load_file(Path(folder, "adapter_model.safetensors")).items()
        }
        steep, random = [], []
        for name, A in tensors.items():
            if not name.endswith("lora_A.weight"):
                continue
            name = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = wide.get_parameter(f"{name}.weight")
            product = tensors[f"base_model.model.{name}.lora_B.weight"] @ A
            along = gradients(wide, {name: wide.get_submodule(name)}, example_set(wide), "no")[name]
            found_there = abs(difference(wide, example_set(wide), weight.data, product / product.norm()))
            steep.append(found_there)
            random.append(float(along.square().mean().sqrt()))
        assert own == pytest.approx(sum(steep) / sum(random), rel=1e-3)


def test_quantized_weights_have_the_slopes_of_what_they_stand_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=60, **sizes)).eval()
    pool = [str(tiny.save_lora(tmp_path / str(n), model, ["query", "value"], seed=n, r=2)) for n in range(3)]
    quantized = copy.deepcopy(model)
    for number in range(len(model.bert.encoder.layer)):
        for name in ("query", "value"):
            plain = model.bert.encoder.layer[number].attention.self.get_submodule(name)
            own = bnb.nn.Linear4bit(plain.in_features, plain.out_features, compute_dtype=torch.float32)
            own.load_state_dict(plain.state_dict())
            own = own.to("cpu")
            setattr(quantized.bert.encoder.layer[number].attention.self, name, own)
            plain.weight.data = bnb.functional.dequantize_4bit(own.weight.data, own.weight.quant_state).to(
                plain.weight
            )
    found, expected = (of_each(own, example_set(own), pool) for own in (quantized, model))
    assert found == pytest.approx(expected, rel=1e-3)
    assert min(own or 0 for own in found) > 0


class NoBackward(nn.Module):
    """A tiny BERT behind a step without a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = candidates.base()
        self.config = self.inner.config

    def forward(self, **given: Any) -> Any:
        with torch.no_grad():
            return self.inner(**given)


@pytest.mark.parametrize("why", ["no backward", "too large"])
def test_without_slopes_the_best_quarter_goes_on(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base: nn.Module = candidates.base()
    pool = candidates.save_pool(tmp_path / "pool", 40, broken=False)
    if why == "too large":
        monkeypatch.setattr(slopes, "MOST_BYTES", 100)
    else:
        base = NoBackward().eval()
        for number, own in enumerate(pool):  # for its names
            config = json.loads(Path(own, "adapter_config.json").read_text())
            path = tmp_path / f"{number:03}"
            path.mkdir()
            (path / "adapter_config.json").write_text(json.dumps(config))
            tensors = load_file(Path(own, "adapter_model.safetensors"))
            save_file(
                {f"base_model.model.inner.{key.removeprefix('base_model.model.')}": v for key, v in tensors.items()},
                path / "adapter_model.safetensors",
            )
            pool[number] = str(path)
    log = tmp_path / "log.jsonl"
    read: list[str] = []

    def reading(model: nn.Module, adapters: Any) -> Any:
        read.append(adapters[0]["name"])
        return read_in_turn(model, adapters)

    monkeypatch.setattr(trials, "read_in_turn", reading)
    found = select_adapters(base, pool, candidates.rows(40), most=1, log=log, progress=False)
    assert len(read) == 1 + 40 + 10 + 8  # the first one tells that there are no slopes
    assert sorted(own.examples for own in found.ranking) == [6] * 30 + [18] * 2 + [40] * 8
    lines = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    assert {line["slope"] for line in lines if line["rung"] == -1} == {None}
    assert {line["rung"] for line in lines} == {-1, 1, 2, 3}
    assert found.passed == 41 * 6 + 11 * 12 + 9 * 22


def test_an_adapter_without_a_linear_layer_has_no_slope(tmp_path: Path) -> None:
    model = candidates.base()
    pool = [str(tiny.save_lora(tmp_path / "a", model, ["word_embeddings"], seed=1, r=2))]
    assert of_each(model, example_set(model), pool) == [None]


def test_slopes_of_random_changes_are_alike_whatever_their_layers_are(tmp_path: Path) -> None:
    """Else those on many layers, or on layers whose weights matter more, would go on before others."""
    model = candidates.base()
    means = []
    for targets in (["query"], ["value"], ["query", "key", "value", "dense"]):
        pool = [
            str(tiny.save_lora(tmp_path / f"{''.join(targets)}{seed}", model, targets, seed=seed, r=2))
            for seed in range(40)
        ]
        own = [slope or 0.0 for slope in of_each(model, example_set(model), pool)]
        means.append((np.mean(own), np.std(own, ddof=1) / math.sqrt(len(own))))
    for mean, error in means:
        assert abs(mean - math.sqrt(2 / math.pi)) < 4 * error  # the mean of |x| of a normal x


class WithSpare(BertForSequenceClassification):
    """It has a linear layer that no example runs through."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert.encoder.layer[0].attention.self.spare = nn.Linear(16, 16)


def with_spare() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 2}
    return WithSpare(BertConfig(vocab_size=60, hidden_size=16, **sizes)).eval()


@pytest.mark.parametrize("first", [["spare"], ["query", "spare"]], ids=["alone", "beside"])
def test_layers_that_no_example_runs_through_count_as_flat(first: list[str], tmp_path: Path) -> None:
    """Neither their adapter is broken, nor do those after it lose their slopes."""
    model = with_spare()
    pool = [str(tiny.save_lora(tmp_path / "a", model, first, seed=1, r=2))]
    pool += [str(tiny.save_lora(tmp_path / f"b{seed}", model, ["query"], seed=seed, r=2)) for seed in (1, 2)]
    examples = example_set(model)
    found = of_each(model, examples, pool)
    alone = [of_each(model, examples, [folder])[0] for folder in pool]
    assert found == pytest.approx(alone)
    assert found[0] is None if first == ["spare"] else found[0] is not None and found[0] > 0
    assert all(own is not None and own > 0 for own in found[1:])


def test_an_adapter_that_is_too_large_does_not_take_the_slopes_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = candidates.base()
    pool = [
        str(tiny.save_lora(tmp_path / str(number), model, targets, seed=number, r=2))
        for number, targets in enumerate((["query"], ["query", "dense"], ["query"]))
    ]
    examples = example_set(model)
    expected = of_each(model, examples, pool)
    size = sum(4 * own.weight.numel() for name, own in model.named_modules() if name.endswith("query"))
    monkeypatch.setattr(slopes, "MOST_BYTES", size)
    assert of_each(model, examples, pool) == [expected[0], None, expected[2]]
