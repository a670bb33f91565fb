"""What each selector makes of a support set: an order of the candidates, and how many examples that took."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peft_composition.choosing.ladder import _levels
from peft_composition.choosing.risk import Gains
from peft_composition.choosing.select import FINALISTS, _kept, _plan
from peft_composition.evidence.scores import leave_one_out_distances, margins


FULL, HALVING = "evidence, all examples", "evidence, halving"
BLOCKS, WHOLE = "one backward pass, per block", "one backward pass, whole adapter"
SCREEN = "one backward pass, per block, then halving"
APART = "one of each class by distance, then all"
ACCURACY, RANDOM = "accuracy, all examples", "random"
SELECTORS = (FULL, HALVING, APART, SCREEN, BLOCKS, WHOLE, ACCURACY, RANDOM)
SCREENED = 2  # one of so many goes on after the backward pass
FAR_APART = 10  # and after one example of each class


@dataclass(frozen=True)
class Draw:
    """A support set, as candidates see it.

    Attributes:
        features: of the candidates, shape (N, n, d).
        base: of the base model, shape (n, d).
        labels: shape (n,).
        slopes: of the mean margin, by the share of each candidate in each block, shape (N, blocks).
        norms: of the candidates there, shape (N, blocks).
        seed: of the draw.
    """

    features: Tensor
    base: Tensor
    labels: Tensor
    slopes: Tensor
    norms: Tensor
    seed: int


@dataclass(frozen=True)
class Order:
    """What a selector says.

    Attributes:
        order: the candidates, the best first.
        passed: examples that went through the model, over all candidates.
        gains: over the base, in margins and in right answers; None for others than halving.
    """

    order: Tensor
    passed: int
    gains: tuple[Gains, Gains] | None = None


def orders(draw: Draw) -> dict[str, Order]:
    """By the name of the selector."""
    count, examples = draw.features.shape[:2]
    scores = _scores(draw.features, draw.labels)
    shuffled = torch.from_numpy(np.random.default_rng(draw.seed).permutation(count))
    right = (scores > 0).double().mean(1)[shuffled]
    # Of an adapter of norm 1: else the largest ones are first, whatever they have learned.
    by_block = draw.slopes.abs() / draw.norms.clamp_min(torch.finfo(draw.norms.dtype).tiny)
    blocks = by_block.sum(1).argsort(descending=True)
    found = {
        FULL: (scores.mean(1).argsort(descending=True), count * examples, None),
        HALVING: _halved(draw, torch.arange(count)),
        APART: _apart(draw),
        SCREEN: _halved(draw, blocks[: max(FINALISTS, -(-count // SCREENED))]),
        BLOCKS: (blocks, 0, None),
        WHOLE: (draw.slopes.sum(1).argsort(descending=True), 0, None),
        ACCURACY: (shuffled[right.argsort(descending=True, stable=True)], count * examples, None),
        RANDOM: (shuffled, 0, None),
    }
    rest = blocks[len(found[SCREEN][0]) :]
    found[SCREEN] = torch.cat([found[SCREEN][0], rest]), *found[SCREEN][1:]
    return {name: Order(*result) for name, result in found.items()}


def _halved(draw: Draw, alive: Tensor) -> tuple[Tensor, int, tuple[Gains, Gains]]:
    """What `select_adapters` does with these candidates: order, examples passed, gains."""
    levels = torch.tensor(_levels(draw.labels.tolist(), draw.seed))
    plan = _plan(len(alive), int(levels.max()) + 1, FINALISTS, True)
    passed, before = 0, 0
    behind: list[Tensor] = []
    begun, everyone = torch.empty(0), alive
    for place, (rung, _) in enumerate(plan):
        rows = levels <= rung
        own = _scores(draw.features[alive][:, rows], draw.labels[rows])
        gains = _gains(own, _scores(draw.base[None, rows], draw.labels[rows]))
        passed += len(alive) * (int(rows.sum()) - before)
        before = int(rows.sum())
        begun = begun if place else gains
        ranked = own.mean(1).argsort(descending=True)
        if place + 1 < len(plan):
            kept = _kept(len(alive), FINALISTS)
            behind.insert(0, alive[ranked[kept:]])
            ranked = ranked[:kept]
        alive, gains = alive[ranked], gains[:, ranked]
    places = torch.tensor([everyone.tolist().index(own) for own in alive.tolist()])
    both = Gains(begun[0], gains[0], places, 0), Gains(begun[1], gains[1], places, 0)
    return torch.cat([alive, *behind]), passed, both


def _gains(own: Tensor, base: Tensor) -> Tensor:
    """In margins and in right answers, shape (2, N, n)."""
    return torch.stack([own - base, (own > 0).double() - (base > 0).double()])


def _apart(draw: Draw) -> tuple[Tensor, int, None]:
    """By how far one example of each class is from those of the others, 1 - cosine; the first ones then by margins."""
    levels = torch.tensor(_levels(draw.labels.tolist(), draw.seed))
    first = [
        int((draw.labels == label).nonzero()[levels[draw.labels == label].argmin()]) for label in draw.labels.unique()
    ]
    own = torch.nn.functional.normalize(draw.features[:, first].double(), dim=2)
    order = (own @ own.mT).sum((1, 2)).argsort()
    kept = max(FINALISTS, -(-len(order) // FAR_APART))
    scores = _scores(draw.features[order[:kept]], draw.labels).mean(1)
    passed = len(order) * len(first) + kept * (len(draw.labels) - len(first))
    return torch.cat([order[:kept][scores.argsort(descending=True)], order[kept:]]), passed, None


def _scores(features: Tensor, labels: Tensor) -> Tensor:
    """The margin of every example under each candidate, shape (N, n)."""
    return torch.stack([margins(leave_one_out_distances(own, labels)) for own in features])
