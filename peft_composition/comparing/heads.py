"""Trains linear heads on cached features: of all methods with a frozen body and all splits at once.

The same as training the head in the model, because nothing before it changes, at the price of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """How long and how fast every method trains; rates fall to zero along a line.

    Attributes:
        steps: of AdamW.
        batch_size: of a step; a smaller training set is its own batch.
        learning_rate: of the head and of mixing weights.
        lora_learning_rate: of the factors of a fresh LoRA, which are not usable at the rate of a head.
    """

    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 1e-2
    lora_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "lora_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}")


Heads = list[Tensor]
"""Weights (methods, splits, width, classes) and biases (methods, splits, classes)."""


def train_heads(
    features: Tensor, labels: Tensor, trained_on: Sequence[Tensor], classes: int, budget: Budget, seed: int
) -> Heads:
    """Train a fresh head for every method and split; all start equal and see the same batches.

    Args:
        features: shape (methods, splits, n, width), or (methods, 1, n, width) where splits share them.
        labels: shape (n,).
        trained_on: the rows of each split.
        classes: how many there are.
        budget: how long and how fast.
        seed: of the heads and of the order of the examples.
    """
    generator = torch.Generator().manual_seed(seed)
    methods, width, splits = features.shape[0], features.shape[-1], len(trained_on)
    weight = (torch.randn(width, classes, generator=generator) * 0.02).repeat(methods, splits, 1, 1)
    heads = [weight.requires_grad_(True), torch.zeros(methods, splits, classes, requires_grad=True)]
    features = features.expand(-1, splits, -1, -1)
    optimizer = torch.optim.AdamW(heads, lr=budget.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / budget.steps)
    for rows in batches(trained_on, budget, seed):
        places = rows[None, :, :, None].expand(methods, -1, -1, width)
        logits = predict(heads, features.gather(2, places))
        of_row = F.cross_entropy(logits.flatten(0, 2), labels[rows].expand(methods, -1, -1).flatten(), reduction="sum")
        optimizer.zero_grad()
        (of_row / rows.shape[1]).backward()
        _clip(heads)
        optimizer.step()
        schedule.step()
    return [part.detach() for part in heads]


def predict(heads: Heads, features: Tensor) -> Tensor:
    """Logits, shape (methods, splits, n, classes), of features of shape (methods, splits, n, width)."""
    return features @ heads[0] + heads[1][:, :, None]


def batches(trained_on: Sequence[Tensor], budget: Budget, seed: int) -> Tensor:
    """The rows of each step and split, shape (steps, splits, batch): shuffled passes, one after the other.

    Args:
        trained_on: the rows of each split.
        budget: how many steps of how many.
        seed: of the shuffling.
    """
    size = min(budget.batch_size, *(len(rows) for rows in trained_on))
    found = []
    for rows in trained_on:
        generator = torch.Generator().manual_seed(seed)
        passes = -(-budget.steps * size // len(rows))
        order = torch.cat([rows[torch.randperm(len(rows), generator=generator)] for _ in range(passes)])
        found.append(order[: budget.steps * size].view(budget.steps, size))
    return torch.stack(found, 1)


def _clip(heads: Heads) -> None:
    """Clip the gradient of every head to norm 1, as the Trainer does by default with the one that it trains."""
    weight, bias = heads[0].grad, heads[1].grad
    assert weight is not None
    assert bias is not None
    norms = (weight.square().sum((-1, -2)) + bias.square().sum(-1)).sqrt()
    factors = (1 / norms.clamp_min(1.0))[..., None]
    weight.mul_(factors[..., None])
    bias.mul_(factors)
