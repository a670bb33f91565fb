"""The arithmetic limit: the time a composition would take if its extra multiplications ran at the base's speed.

Counted in multiply-accumulates. A linear layer of i inputs and o outputs on T tokens costs T i o in forward and again
T i o for the gradient of its input. A composition of total rank R adds the least of what these ways add:

    stacked       x A^T, then its product with B^T; both again for the gradient of x          2 T R (i + o)
    token path    W = W0 + B diag(u) A first; gradients of u from A x and B^T g by token      R i o + T R (i + o)
    weight path   W likewise; gradients of u from g^T x, times B, times A row by row          2 R i o + T i o

with W kept for backward (computing it again there would add another R i o). In forward alone: T R (i + o) stacked,
R i o with W. Written down from scratch, knowing nothing of what the library does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class LinearCall:
    """A linear layer of `inputs` and `outputs` features at work on `tokens` tokens."""

    inputs: int
    outputs: int
    tokens: int

    @property
    def forward(self) -> int:
        """Multiply-accumulates of its forward pass."""
        return self.tokens * self.inputs * self.outputs


def least_extra_training(layer: LinearCall, rank: int) -> int:
    """Least multiply-accumulates that a learned composition of total rank `rank` adds to a training step."""
    both = layer.inputs + layer.outputs
    product = rank * layer.inputs * layer.outputs
    return min(
        2 * layer.tokens * rank * both,
        product + layer.tokens * rank * both,
        2 * product + layer.forward,
    )


def least_extra_forward(layer: LinearCall, rank: int) -> int:
    """Least multiply-accumulates that a composition of total rank `rank` adds to a forward pass."""
    return min(layer.tokens * rank * (layer.inputs + layer.outputs), rank * layer.inputs * layer.outputs)


def factor(
    layers: Sequence[LinearCall], rank: int, least_extra: Callable[[LinearCall, int], int], total: int
) -> float:
    """By how much the composition of all `layers` lengthens what takes `total` multiply-accumulates without it."""
    return 1 + sum(least_extra(layer, rank) for layer in layers) / total


def count(call: Callable[[], object]) -> int:
    """Multiply-accumulates of all matrix products, convolutions and attentions in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2
