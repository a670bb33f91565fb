"""Weights under softmax that sum to less than 1: the base model has the rest, like an adapter without an update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from peft_composition import CompositionConfig, mixing_weights
from peft_composition.tuner.mixing import Mixing

from .. import tiny


START = [0.3, 0.2]  # half is the base model's


def softmax_by_hand(theta: list[float], gain: float, start: list[float]) -> Tensor:
    """Weights of the adapters, in float64, where the base is one more adapter with a logit that stays."""
    grown = torch.tensor(start, dtype=torch.float64) * (gain * torch.tensor(theta, dtype=torch.float64)).exp()
    return grown / (grown.sum() + 1 - sum(start))


def in_the_model(model: Any) -> list[float]:
    (row,) = {tuple(own.values()) for own in mixing_weights(model).values() if len(own) == 2}
    return list(row)


@pytest.mark.parametrize("mixing", ["fixed", "learned"])
@pytest.mark.parametrize("name", ["mlp", "llama", "conv"])
def test_the_model_is_that_of_the_weights_themselves(name: str, mixing: str, pair) -> None:
    model = tiny.compose(name, pair(name), mixing=mixing, weights=START).eval()
    by_hand = tiny.composed_by_hand(tiny.build(name), pair(name), START).eval()
    torch.testing.assert_close(tiny.output(model, name), tiny.output(by_hand, name), rtol=1e-4, atol=1e-5)
    assert in_the_model(model) == pytest.approx(START, abs=1e-6)


def test_learned_weights_grow_and_shrink_with_the_share_of_the_base() -> None:
    config = CompositionConfig(adapters=["a", "b"], weights=START, gain=3.0)
    mixing = Mixing(config, torch.float32)
    assert mixing.weight is not None
    assert mixing.weight.shape == (2,)
    seen = []
    for theta in ([0.0, 0.0], [0.5, 0.5], [-2.0, -2.0], [1.0, -0.3]):
        with torch.no_grad():
            mixing.weight.copy_(torch.tensor(theta))
        found, expected = mixing(), softmax_by_hand(theta, 3.0, START)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
        seen.append(float(found.sum().detach()))
    assert seen[0] == pytest.approx(0.5)
    assert seen[1] > 0.8
    assert seen[2] < 0.01


def test_gradients_are_those_of_the_formula_in_float64() -> None:
    config = CompositionConfig(adapters=["a", "b"], weights=START, gain=3.0)
    mixing = Mixing(config, torch.float64)
    assert mixing.weight is not None
    direction = torch.tensor([0.7, -1.1], dtype=torch.float64)
    (mixing() @ direction).backward()
    # d w_n / d v_m = w_n (delta_nm - w_m), also beside a base whose logit stays
    w = torch.tensor(START, dtype=torch.float64)
    by_hand = 3.0 * ((torch.diag(w) - torch.outer(w, w)) @ direction)
    torch.testing.assert_close(mixing.weight.grad, by_hand, rtol=1e-12, atol=1e-14)


def test_a_checkpoint_keeps_the_share(pair, tmp_path: Path) -> None:
    model = tiny.compose("mlp", pair("mlp"), weights=START, weight_sharing="model").eval()
    with torch.no_grad():
        for name, theta in model.named_parameters():
            if "mixing" in name:
                theta.copy_(torch.tensor([0.02, -0.03]))
    expected = softmax_by_hand([0.02, -0.03], 40.0, START).tolist()
    assert in_the_model(model) == pytest.approx(expected, rel=1e-5)
    model.save_pretrained(str(tmp_path))
    assert "the base model's share" in (tmp_path / "README.md").read_text(encoding="utf-8")
    loaded = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path)).eval()
    assert in_the_model(loaded) == in_the_model(model)
    assert torch.equal(tiny.output(loaded, "mlp"), tiny.output(model, "mlp"))
    merged = loaded.merge_and_unload()
    by_hand = tiny.composed_by_hand(tiny.build("mlp"), pair("mlp"), expected)
    torch.testing.assert_close(tiny.output(merged, "mlp"), tiny.output(by_hand, "mlp"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharing", ["module", "model"])
def test_a_step_of_training_moves_weights_by_the_formula(sharing: str, pair) -> None:
    model = tiny.compose("mlp", pair("mlp"), weights=START, weight_sharing=sharing)
    thetas = [theta for name, theta in model.named_parameters() if "mixing" in name]
    assert len(thetas) == (1 if sharing == "model" else len(mixing_weights(model)))
    optimizer = torch.optim.AdamW(thetas, lr=1e-2, weight_decay=0.0)
    model(x=torch.randn(5, 10, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step()
    assert all(float(theta.detach().abs().min()) > 5e-3 for theta in thetas)
    for found, theta in zip(mixing_weights(model).values(), thetas * (1 if sharing == "module" else 2)):
        expected = dict(zip(("first", "second"), softmax_by_hand(theta.tolist(), 40.0, START).tolist()))
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.7, 0.4], r"weights sum to 1\.1.*at 1 \(or below: the rest is the base model's\)"),
        ([0.0, 0.0], "all weights are zero"),
        ([0.5, -0.1], "is -0.1"),
    ],
)
@pytest.mark.parametrize("mixing", ["fixed", "learned"])
def test_refused(weights: list[float], message: str, mixing: Any) -> None:
    with pytest.raises(ValueError, match=message):
        CompositionConfig(adapters=["a", "b"], mixing=mixing, weights=weights)


def test_nearly_one_is_one() -> None:
    assert CompositionConfig(adapters=["a", "b", "c"], weights=[0.333] * 3).weights == pytest.approx([1 / 3] * 3)
    mixing = Mixing(CompositionConfig(adapters=["a", "b", "c"], weights=[0.1, 0.2, 0.7]), torch.float32)
    assert len(mixing.start or ()) == 3  # no share that rounding left
