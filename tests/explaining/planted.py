"""A tiny task with a known answer: classes that one adapter tells apart, and adapters that do nothing for it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .. import tiny


POINTS = torch.randn(24, 10, generator=torch.Generator().manual_seed(7))
NAMES = ("needed", "copy", "noise")


def adapters(folder: Path) -> list[str]:
    """An adapter, a copy of it and a small one of noise, for the MLP."""
    base, targets = tiny.build("mlp"), tiny.TINY["mlp"].targets
    needed = [tiny.save_lora(folder / name, base, targets, seed=1, r=4, lora_alpha=24) for name in ("needed", "copy")]
    noise = tiny.save_lora(folder / "noise", base, targets[:1], seed=2, r=2, lora_alpha=0.02)
    return [*map(str, needed), str(noise)]


def labels(folders: list[str]) -> Tensor:
    """The class of each point: on which side of the middle it is in the direction that the needed one stretches."""
    features = features_of(tiny.composed_by_hand(tiny.build("mlp"), folders[:1], [1.0]))
    centred = features - features.mean(0)
    first = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    side = centred @ first
    return (side > side.median()).long()


def features_of(model: nn.Module) -> Tensor:
    """What the head gets, in float64."""
    wide = model.double()
    return wide.lin1(wide.relu(wide.lin0(POINTS.double()))).detach()


def batches(folders: list[str]) -> list[dict[str, Tensor]]:
    """Three batches."""
    classes = labels(folders)
    return [{"x": POINTS[at : at + 8], "labels": classes[at : at + 8]} for at in range(0, 24, 8)]


def log_likelihoods_by_loop(features: Tensor, classes: Tensor) -> Tensor:
    """Of the class of each example, by the class means of the others, with the best of 13 betas."""
    count = len(classes)
    distances = torch.zeros(count, int(classes.max()) + 1, dtype=torch.float64)
    for i in range(count):
        others = torch.arange(count) != i
        for label in range(distances.shape[1]):
            mean = features[others & (classes == label)].mean(0)
            distances[i, label] = (features[i] - mean).square().sum()
    own = distances[torch.arange(count), classes]
    found = []
    for step in range(13):
        beta = 0.16 * (48 / 0.16) ** (step / 12)
        logits = -beta * distances / own.mean()
        found.append(logits[torch.arange(count), classes] - logits.exp().sum(1).log())
    return max(found, key=lambda values: float(values.sum()))
