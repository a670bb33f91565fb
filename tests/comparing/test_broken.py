"""Adapters that are broken are left out with a reason, and seconds are what a method takes by itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_composition import compare_methods
from peft_composition.comparing import bodies
from peft_composition.comparing import methods as module

from .. import tiny
from .test_compare import QUICK, points, questions


@pytest.fixture
def pool(tmp_path: Path, pair: Any) -> list[str]:
    """Two adapters, and one whose file is empty, one of another shape and one that is no adapter."""
    base = tiny.build("mlp")
    empty = tiny.save_lora(tmp_path / "empty", base, ["lin0"], seed=1)
    (empty / "adapter_model.safetensors").write_bytes(b"")
    wide = torch.nn.ModuleDict({"lin0": torch.nn.Linear(11, 20)})
    shape = tiny.save_lora(tmp_path / "shape", wide, ["lin0"], seed=1)
    (tmp_path / "nothing").mkdir()
    first, second = pair("mlp")
    return [str(empty), first, str(shape), second, str(tmp_path / "nothing")]


def test_broken_adapters_are_left_out(pool: list[str], pair: Any) -> None:
    base = tiny.build("mlp")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    result = compare_methods(base, pool, points(), **QUICK)
    assert [own.adapter for own in result.broken] == ["empty", "shape", "nothing"]
    for own, reason in zip(result.broken, ("is empty", "module 'lin0'", "no adapter_config.json")):
        assert reason in own.reason
    expected = compare_methods(base, pair("mlp"), points(), **QUICK)
    assert [(row.name, row.score, row.loss) for row in result] == [(r.name, r.score, r.loss) for r in expected]
    assert result.verdict == expected.verdict
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_all_are_broken(pool: list[str]) -> None:
    with pytest.raises(ValueError, match=r"none of 2 adapters can be composed and scored; of 'empty': .* is empty"):
        compare_methods(tiny.build("mlp"), [pool[0], pool[2]], points(), **QUICK)


def test_seconds_of_a_method_are_its_own(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts forward passes: 5 folds of 5 steps, and a pass over all examples is one batch."""
    base = tiny.build("mlp")
    passes = [0.0]
    base.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: passes[0]))
    result = compare_methods(base, pair("mlp"), points(), **QUICK)
    seconds = {row.name: row.seconds for row in result}
    mixed = seconds.pop("evidence") - 4
    assert 0 <= mixed <= 5  # a pass for every fold whose weights are not uniform
    assert seconds == {
        "head only": 1,
        "uniform": 1,
        "random LoRAs": 1,
        "best single": 2,
        "fresh LoRA": 5 * (5 + 1),
        "fresh LoRA x 0.5": 5 * (5 + 1),
        "evidence, learned": 4 + 5 * (5 + 1),
    }


def test_an_adapter_may_be_called_as_a_method(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pass is not counted as one of the method's."""
    base, (first, second) = tiny.build("mlp"), pair("mlp")
    passes = [0.0]
    base.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: passes[0]))
    adapters = [{"path": first, "name": "evidence"}, {"path": second, "name": "random LoRAs"}]
    found = compare_methods(base, adapters, points(), **QUICK)
    expected = compare_methods(base, [first, second], points(), **QUICK)
    assert [(row.name, row.seconds) for row in found] == [(row.name, row.seconds) for row in expected]


def test_a_control_that_is_not_finite_is_no_fault_of_an_adapter_of_its_name(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pair("llama")
    monkeypatch.setattr(bodies, "_randomize", lambda A, B, *_: B.fill_(torch.nan))
    adapters = [first, {"path": second, "name": "random LoRAs"}]
    with pytest.raises(ValueError, match="Scoring 'random LoRAs': 8 of 8 answers") as error:
        compare_methods(tiny.build("llama"), adapters, questions(), judged="uniform", **QUICK)
    assert not isinstance(error.value, module.NotFiniteAdapterError)
