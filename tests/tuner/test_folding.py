"""What a layer keeps folded is never older than its weights: also with optimizers that leave no trace, and on a GPU.

`test_forms.py` has what is kept at all, and the changes that version counters show.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_composition import CompositionConfig
from peft_composition.tuner.folding import STEPS, Folded, Source
from peft_composition.tuner.locating import composition_layers

from ..reference import relative_error
from . import test_forms
from .test_forms import FEW, LONG, MANY, compose, expected_output, layer_of, move_theta, theta_of, tokens


upstream = test_forms.upstream
folds = test_forms.folds
Upstream = Callable[..., tuple[nn.Module, list[str]]]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are compared on the CPU alone, where it waits for no device."""
    by_counters = Source.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Source], module: nn.Module, name: str, by_value: bool = False) -> Source | None:
        return by_counters(cls, module, name)

    monkeypatch.setattr(Source, "of", classmethod(of))


class Untraceable:
    """An optimizer that PyTorch knows nothing of, and that moves no version counter."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)

    def step(self) -> None:
        for parameter in self.parameters:
            assert parameter.grad is not None
            before = parameter._version
            parameter.data -= 0.1 * parameter.grad.sign()
            assert parameter._version == before

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Any]] = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
    "untraceable": Untraceable,
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
each_size = pytest.mark.parametrize("ranks", [FEW, MANY])
each_mode = pytest.mark.parametrize("training", [True, False])


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def step(model: PeftModel, optimizer: Any, between: Callable[[], object]) -> None:
    """A training step, with something else going on after each of its parts."""
    loss = model(tokens(LONG)).square().sum()
    between()
    loss.backward()
    between()
    optimizer.step()


@each_mode
@each_size
@each_optimizer
def test_a_pass_without_gradient_within_a_step_leaves_nothing_old_behind(
    name: str, ranks: tuple[int, ...], training: bool, upstream: Upstream
) -> None:
    base, folders = upstream("linear", ranks)
    model, x = compose(base, folders).train(training), tokens(2)
    optimizer = OPTIMIZERS[name]([theta_of(model)])
    before = output(model, x)

    for _ in range(3):
        step(model, optimizer, between=lambda: output(model, x))
        after = output(model, x)
        assert relative_error(after, expected_output(base, folders, model, x)) < 1e-12
        assert relative_error(after, before) > 1e-4
        before = after
        optimizer.zero_grad()
        assert torch.equal(output(model, x), after)


@each_size
@each_optimizer
def test_an_evaluation_within_a_step_leaves_nothing_old_behind(
    name: str, ranks: tuple[int, ...], upstream: Upstream
) -> None:
    base, folders = upstream("linear", ranks)
    model, x = compose(base, folders).train(), tokens(2)
    optimizer = OPTIMIZERS[name]([theta_of(model)])
    model(tokens(LONG)).square().sum().backward()
    model.eval()
    before = output(model, x)

    optimizer.step()

    after = output(model, x)
    assert relative_error(after, expected_output(base, folders, model, x)) < 1e-12
    assert relative_error(after, before) > 1e-4


@each_optimizer
def test_after_a_step_the_weights_are_folded_once_for_all_calls(
    name: str, upstream: Upstream, folds: list[str]
) -> None:
    """Also where a loop leaves its gradients behind, unless nothing tells that the step was taken."""
    model = compose(*upstream("linear", FEW)).train()
    optimizer = OPTIMIZERS[name]([theta_of(model)])
    step(model, optimizer, between=lambda: None)
    if name == "untraceable":
        optimizer.zero_grad()
    model.eval()
    folds.clear()

    for _ in range(5):
        output(model, tokens(2))

    assert folds == ["fold"]


@each_mode
def test_a_base_weight_that_trains_is_never_kept_merged(training: bool, upstream: Upstream) -> None:
    base, folders = upstream("linear", MANY)
    model, x = compose(base, folders, mixing="uniform").train(training), tokens(2)
    weight = layer_of(model).get_base_layer().weight.requires_grad_()
    optimizer = Untraceable([weight])
    started = output(model, x)

    step(model, optimizer, between=lambda: output(model, x))

    moved = weight.detach() - base.layer.weight
    assert relative_error(output(model, x) - started, x @ moved.T) < 1e-10


@each_size
def test_steps_of_others_leave_constant_weights_folded(
    ranks: tuple[int, ...], upstream: Upstream, folds: list[str]
) -> None:
    model = compose(*upstream("linear", ranks), mixing="uniform").train()
    head = nn.Linear(16, 2).double()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, fused=True)

    for _ in range(3):
        head(model(tokens(2))).sum().backward()
        optimizer.step()

    assert folds == ["fold"]


@each_size
def test_frozen_weights_stay_folded_while_a_head_trains(
    ranks: tuple[int, ...], upstream: Upstream, folds: list[str]
) -> None:
    model = compose(*upstream("linear", ranks)).train()
    theta_of(model).requires_grad_(False)
    head = nn.Linear(16, 2).double()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, fused=True)

    for _ in range(3):
        head(model(tokens(2))).sum().backward()
        optimizer.step()

    assert folds == ["fold"]


@each_size
def test_a_write_from_another_thread_during_folding_makes_the_result_an_old_one(
    ranks: tuple[int, ...], upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders = upstream("linear", ranks)
    model, x = compose(base, folders).eval(), tokens(2)
    layer = layer_of(model)
    fold = layer._fold

    def interrupted(adapter_name: str, into_base: bool) -> Folded:
        folded = fold(adapter_name, into_base)
        writer = threading.Thread(target=move_theta, args=(model,))
        writer.start()
        writer.join()
        return folded

    with monkeypatch.context() as patch:
        patch.setattr(layer, "_fold", interrupted)
        output(model, x)

    assert relative_error(output(model, x), expected_output(base, folders, model, x)) < 1e-12


def test_what_was_folded_while_another_thread_changed_the_mode_is_not_kept(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folders = upstream("linear", FEW)
    model, x = compose(base, folders).eval(), tokens(2)
    layer = layer_of(model)
    fold = layer._fold

    def interrupted(adapter_name: str, into_base: bool) -> Folded:
        folded = fold(adapter_name, into_base)
        optimizer = Untraceable([theta_of(model)])
        worker = threading.Thread(target=step, args=(model.train(), optimizer, lambda: None))
        worker.start()
        worker.join()
        optimizer.zero_grad()
        model.eval()
        return folded

    with monkeypatch.context() as patch:
        patch.setattr(layer, "_fold", interrupted)
        output(model, x)

    assert relative_error(output(model, x), expected_output(base, folders, model, x)) < 1e-12


# Memory


def kept(model: nn.Module) -> list[str]:
    return [name for _, layer in composition_layers(model) for name in layer._folds._kept]


@each_size
def test_reentrant_checkpointing_keeps_nothing_until_the_backward_pass(
    ranks: tuple[int, ...], upstream: Upstream
) -> None:
    model = compose(*upstream("linear", ranks)).train()
    optimizer = torch.optim.AdamW([theta_of(model)], lr=0.1)
    for _ in range(2):
        loss = checkpoint(model, tokens(LONG, requires_grad=True), use_reentrant=True).square().sum()
        assert kept(model) == []
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@each_size
def test_a_deleted_composition_leaves_nothing_behind(ranks: tuple[int, ...], upstream: Upstream) -> None:
    model = compose(*upstream("linear", ranks)).eval()
    adapters = model.peft_config["default"].adapters
    model.add_adapter("other", CompositionConfig(adapters=adapters, mixing="uniform"))
    model.set_adapter("other")
    output(model, tokens(2))
    layer = layer_of(model)
    folded = layer.folded("other", into_base=layer.composition_factors["other"].merged_is_kept)
    (made,) = [tensor for tensor in (folded.B, folded.merged) if tensor is not None]
    alive = [weakref.ref(made), weakref.ref(layer.composition_factors["other"].A)]
    del folded, made

    model.delete_adapter("other")

    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_a_base_in_eval_mode_is_composed_in_eval_mode(upstream: Upstream) -> None:
    base, folders = upstream("linear", FEW)
    for training in (True, False):
        model = compose(base.train(training), folders)
        assert layer_of(model).training is training
        output(model, tokens(2))
        assert kept(model) == ([] if training else ["default"])
    base.train()


# Compiled steps


def test_a_compiled_optimizer_step_is_noticed_and_compiled_once(upstream: Upstream) -> None:
    torch.compiler.reset()
    base, folders = upstream("linear", FEW)
    model, x = compose(base, folders).eval(), tokens(2)
    optimizer = torch.optim.AdamW([theta_of(model)], lr=0.1, fused=True)
    compiled = torch.compile(optimizer.step, backend="eager")
    for number in range(4):
        model(tokens(LONG)).square().sum().backward()
        output(model, x)
        last = STEPS.last
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            compiled()
        assert STEPS.last is not last
        assert relative_error(output(model, x), expected_output(base, folders, model, x)) < 1e-12
