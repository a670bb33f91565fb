"""Features of mixes without a pass through the model: training on them costs what a head costs, for many draws.

A stand-in, for choosing among recipes. What a recipe is worth is measured with the models themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .bench import BASE, UNIFORM


@dataclass(frozen=True)
class Corners:
    """Features of the mixes that were computed, each of shape (n, width).

    Attributes:
        adapters: of each adapter alone, shape (N, n, width).
        uniform: of their uniform mix.
        base: of the bare model.
    """

    adapters: Tensor
    uniform: Tensor
    base: Tensor

    @classmethod
    def of(cls, features: Mapping[str, Tensor], names: Sequence[str]) -> Corners:
        """From features by the names of the candidates."""
        return cls(torch.stack([features[name] for name in names]), features[UNIFORM], features[BASE])

    def mixed(self, weights: Tensor) -> Tensor:
        """About the features of a mix, shape (n, width): right at each adapter, the uniform mix and the base.

        Linear in the weights, but for one term: what the uniform mix has beside the mean of its adapters, by how much
        is mixed, (s^2 - sum w_n^2) / (1 - 1/N) with s the sum of the weights.

        Args:
            weights: shape (N,).
        """
        count, total = len(weights), weights.sum()
        found = torch.einsum("n,nij->ij", weights, self.adapters) + (1 - total) * self.base
        if count == 1:
            return found
        bend = (total**2 - (weights**2).sum()) / (1 - 1 / count)
        return found + bend * (self.uniform - self.adapters.mean(0))


@dataclass(frozen=True)
class Recipe:
    """How head and mixing weights are trained together.

    Args:
        steps: of AdamW, over shuffled batches; the rates fall to zero along a line.
        rate: of both.
        gain: of the mixing weights.
        warmup: steps in which the weights stay.
        base: whether the share of the base model trains, too; else its logit stays.
        free: whether weights are free numbers, in place of a softmax.
        decay: AdamW's weight decay of the mixing weights, which pulls them back to their start.
    """

    steps: int = 100
    rate: float = 1e-2
    gain: float = 40.0
    warmup: int = 0
    base: bool = False
    free: bool = False
    decay: float = 0.0


def train(
    corners: Corners, labels: Tensor, start: Tensor, classes: int, recipe: Recipe, batch_size: int, seed: int
) -> tuple[nn.Linear, Tensor]:
    """Train a fresh head and one vector of mixing weights on stand-ins for features.

    Args:
        corners: of the support set.
        labels: its classes.
        start: the weights at first, of sum 1 or less.
        classes: how many there are.
        recipe: how.
        batch_size: of a step.
        seed: of the head and of the order of the examples.

    Returns:
        The head, and the weights in the end.
    """
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(corners.base.shape[1], classes)
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    whole = torch.cat([start, (1 - start.sum(0, keepdim=True)).clamp_min(0)]).float()  # the base model's share is last
    theta = torch.zeros(len(whole) if recipe.base else len(start), requires_grad=True)
    groups: list[dict[str, Any]] = [{"params": head.parameters()}, {"params": [theta], "weight_decay": recipe.decay}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / recipe.steps)

    def weights() -> Tensor:
        if recipe.free:
            return start.float() + recipe.gain * theta
        moved = nn.functional.pad(recipe.gain * theta, (0, len(whole) - len(theta)))
        return (whole.log() + moved).softmax(0)[:-1]

    rows: list[Tensor] = []
    for step in range(recipe.steps):
        rows = rows or list(torch.randperm(len(labels), generator=generator).split(batch_size))
        batch = rows.pop(0)
        part = Corners(corners.adapters[:, batch], corners.uniform[batch], corners.base[batch])
        mix = weights() if step >= recipe.warmup else start.float()
        loss = nn.functional.cross_entropy(head(part.mixed(mix)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*head.parameters(), theta], 1.0)  # as the Trainer does by default
        optimizer.step()
        schedule.step()
    return head, weights().detach()
