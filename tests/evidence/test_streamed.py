"""Adapters scored from their files, one after the other: the same scores, and a base model that is as before."""

from __future__ import annotations

import warnings

import pytest
import torch

from peft_composition import AdapterError, score_adapters

from .. import tiny
from .test_fit import points, questions


@pytest.mark.parametrize(("name", "data"), [("mlp", points()), ("llama", questions("llama"))])
def test_scores_are_those_of_the_composition(name, data, pair) -> None:
    composed = score_adapters(tiny.compose(name, pair(name)), data)
    streamed = score_adapters(tiny.build(name), data, adapters=pair(name))
    assert [row.name for row in streamed] == ["first", "second", "base"]
    for row in streamed:
        other = composed[row.name]
        found, expected = (row.score, row.low, row.high), (other.score, other.low, other.high)
        assert found == pytest.approx(expected, abs=1e-6)
        assert row.accuracy == other.accuracy


def test_the_base_model_is_as_before(pair) -> None:
    base = tiny.build("mlp").train()
    base.lin0.weight.requires_grad_(False)
    attributes, keys = set(base.__dict__), list(base.state_dict())
    trains = [parameter.requires_grad for parameter in base.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_adapters(base, points(), adapters=pair("mlp"))
    assert (set(base.__dict__), list(base.state_dict())) == (attributes, keys)
    assert [parameter.requires_grad for parameter in base.parameters()] == trains
    assert all(module.training for module in base.modules())


def test_one_adapter_is_in_memory_at_a_time(pair) -> None:
    base, seen = tiny.build("mlp"), []
    base.register_forward_pre_hook(
        lambda model, *_: seen.append(sum(part.numel() for name, part in model.named_parameters() if ".A" in name))
    )
    first, second = pair("mlp")
    score_adapters(base, points(), adapters=[{"path": first, "name": str(n)} for n in range(3)] + [second])
    assert seen == [2 * (10 + 20)] * 6 + [3 * 20] * 2 + [0] * 2  # on two batches each: ranks 2, 2, 2, 3, and the base


def test_an_adapter_that_cannot_be_read_leaves_the_model_as_it_was(pair, tmp_path) -> None:
    base = tiny.build("mlp")
    before = tiny.output(base, "mlp")
    with pytest.raises(AdapterError, match="nowhere"):
        score_adapters(base, points(), adapters=[*pair("mlp"), str(tmp_path / "nowhere")])
    assert torch.equal(tiny.output(base, "mlp"), before)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_models_that_have_adapters_are_refused(pair) -> None:
    model = tiny.compose("mlp", pair("mlp"))
    for own in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="already has adapters"):
            score_adapters(own, points(), adapters=pair("mlp"))
