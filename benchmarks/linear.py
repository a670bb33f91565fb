"""The table `linear`: single linear layers without gradient, from one token up, relative to the base layer's time.

Layers are called one after the other from a stack too large for the processor's cache, as in a model: a single layer
called again and again would stay in the cache, and a forward pass on one token is limited by reading the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from peft import PeftModel
from torch import Tensor, nn

from . import arithmetic
from .cells import build_peers, in_order, require_same
from .measure import race
from .models import RANK, Architecture, Workbench
from .peers import BASE, COMPOSITION, MERGED
from .results import Cell
from .settings import LIMIT, Settings, Table


# (inputs, outputs) of the layers that LoRA targets in each model.
SHAPES = {"vit": ((768, 768),), "t5": ((512, 512),), "llama": ((2048, 2048), (2048, 512)), "tiny-vit": ((32, 32),)}
TOKENS = (1, 8, 64, 512)
STACK_BYTES = 96 * 2**20
MOST_LAYERS = 48
# Multiply-accumulates of one timed pass over layers of the stack, at least: some hundredths of a second.
WORK = {"cpu": 2e9, "cuda": 1e12}


class Stack(nn.Module):
    """Linear layers of one shape, enough to fill `STACK_BYTES` in float32, `MOST_LAYERS` at most."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(stack_size(inputs, outputs)))


def stack_size(inputs: int, outputs: int) -> int:
    """How many layers a stack has."""
    return min(MOST_LAYERS, STACK_BYTES // (4 * inputs * outputs))


def architecture(inputs: int, outputs: int) -> Architecture:
    """A stack as something that LoRA adapters can be made for."""
    return Architecture(
        name=f"linear layers, {inputs} to {outputs}",
        size="one sequence",
        build=lambda: Stack(inputs, outputs),
        targets=tuple(f"layers.{number}" for number in range(stack_size(inputs, outputs))),
        head=(),
        task_type=None,
        batch_size=1,
        inputs=lambda count: {"x": torch.randn(1, count, inputs)},
        labels=lambda count: {},
    )


def run(settings: Settings) -> Iterator[Cell]:
    """Measure every shape, N and number of tokens."""
    for key in settings.models:
        for inputs, outputs in SHAPES[key]:
            bench = settings.new_workbench(architecture(inputs, outputs), f"{inputs}-{outputs}")
            for count in settings.adapters:
                yield from _cells(settings, key, bench, inputs, outputs, count)


def _cells(settings: Settings, key: str, bench: Workbench, inputs: int, outputs: int, count: int) -> Iterator[Cell]:
    models, _ = build_peers(settings.peers, bench, count)
    stacks = {peer.title: _layers(model) for peer, model in models.items()}
    reference = settings.peers[0].title
    for tokens in TOKENS:
        x = bench.batch(tokens)["x"]
        work = arithmetic.LinearCall(inputs, outputs, tokens)
        number = min(len(stacks[reference]), 1 + int(WORK[settings.device.type] / work.forward))
        calls = {title: _pass(layers[:number], x) for title, layers in stacks.items()}
        if bench.dtype == torch.float32:
            require_same({title: call() for title, call in calls.items() if title != reference})
        label = f"linear {inputs} to {outputs} N={count} T={tokens}"
        measured = race(calls, reference, settings.rounds[key], settings.device, label, settings.rare, units=number)
        longer = arithmetic.factor([work], RANK * count, arithmetic.least_extra_forward, work.forward)
        measured[LIMIT] = measured[reference].lengthened(longer)
        case = f"{inputs} to {outputs}, {tokens} token{'s' * (tokens > 1)}"
        yield Cell(key, count, reference, in_order(settings.peers, measured), case)


def _layers(model: nn.Module) -> list[nn.Module]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, Stack)
    return list(base.eval().layers)


def _pass(layers: list[nn.Module], x: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        for layer in layers:
            y = layer(x)
        return y

    return call


TABLE = Table(
    peers=(BASE, COMPOSITION, MERGED),
    models=("vit", "llama"),
    adapters=(1, 5, 20, 64),
    rounds={"vit": 11, "t5": 11, "llama": 11, "tiny-vit": 3},
    describe=lambda model: f"target layers of {model.name}",
    run=run,
)
