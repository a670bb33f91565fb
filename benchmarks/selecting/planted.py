"""A pool of candidates for a tiny network, with adapters of the very task planted in it: selecting in seconds.

The class of a point says whether two of its ten coordinates have the same sign. Planted adapters learned that, longer
or shorter; others learned it of other coordinates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from . import pool
from .pool import RELATED


STEPS = (300, 100, 40)
SEEDS = 4


class Network(nn.Module):
    """Two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (..., 10) -> (..., 2)."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the head is given, (..., 10) -> (..., 16)."""
        return self.lin1(self.lin0(x).relu())


def network() -> Network:
    """The base model."""
    torch.manual_seed(0)
    return Network().eval()


def points(count: int, seed: int, of: tuple[int, int] = (0, 1)) -> tuple[Tensor, Tensor]:
    """Points and their classes."""
    x = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, of[0]] * x[:, of[1]] > 0).long()


def make_pool(folder: Path, size: int, steps: Sequence[int] = STEPS, seeds: int = SEEDS) -> list[Path]:
    """Train adapters of the task and of other coordinates, and fill the pool with what is made of these."""
    base, others = network(), folder / "others"
    for own in steps:
        for seed in range(seeds):
            _train(base, folder / f"{RELATED}-{own}-{seed}", seed, (0, 1), own)
    pairs = list(combinations(range(2, 10), 2))[: len(steps) * seeds]
    for number, pair in enumerate(pairs):
        _train(base, others / f"{number:02}", number, pair, steps[number % len(steps)])
    return pool.fill(folder, [], sorted(others.iterdir()), size)


def reading(x: Tensor) -> Callable[[Sequence[int]], Callable[[nn.Module], Tensor]]:
    """What computes features of some points, by their places."""
    return lambda rows: lambda network: network.features(x[list(rows)])  # type: ignore[operator]


def _train(base: nn.Module, folder: Path, seed: int, of: tuple[int, int], steps: int) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["lin0", "lin1"], modules_to_save=["head"])
    model = get_peft_model(copy.deepcopy(base), config)
    x, labels = points(4000, seed + 100, of)
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=1e-2)
    for step in range(steps):
        batch = torch.randint(len(x), (128,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), labels[batch]).backward()
        optimizer.step()
    model.save_pretrained(str(folder))
