"""What each selector makes of a support set: an order of the candidates, and how many examples that took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peft_composition.choosing.ladder import _levels
from peft_composition.choosing.risk import risk_of
from peft_composition.choosing.rounds import Rounds, in_rounds
from peft_composition.choosing.select import FINALISTS
from peft_composition.choosing.slopes import COST
from peft_composition.choosing.trials import SLOPES, Trial, apartness, in_order
from peft_composition.evidence.own_heads import OwnHead, information
from peft_composition.evidence.scores import leave_one_out_distances, margins


FULL, ASKING = "evidence, all examples", "evidence and heads, all examples"
HALVING = "evidence and heads, halving"
WITHOUT_HEADS = "evidence, halving"
PLAIN = "evidence, halving without a backward pass"
BLOCKS, WHOLE = "one backward pass, per block", "one backward pass, whole adapter"
SCREEN = "one backward pass, per block, then halving without it"
APART = "one of each class by distance, then all"
ACCURACY, RANDOM = "accuracy, all examples", "random"
SELECTORS = (FULL, ASKING, HALVING, WITHOUT_HEADS, PLAIN, APART, SCREEN, BLOCKS, WHOLE, ACCURACY, RANDOM)
SAME_ORDER = {HALVING: ASKING}  # what a selector is compared with; others with the first one
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
        scales: root mean squares of the gradients there, shape (blocks,).
        seed: of the draw.
        heads: that the candidates were saved with, N of them, or none at all.
    """

    features: Tensor
    base: Tensor
    labels: Tensor
    slopes: Tensor
    norms: Tensor
    scales: Tensor
    seed: int
    heads: Sequence[OwnHead | None] = ()


@dataclass(frozen=True)
class Order:
    """What a selector says.

    Attributes:
        order: the candidates, the best first.
        passed: examples that went through the model, over all candidates.
        risk: the stated chance that the first one is worse than the base; None for others than halving.
    """

    order: Tensor
    passed: int
    risk: float | None = None


def orders(draw: Draw) -> dict[str, Order]:
    """By the name of the selector."""
    count, examples = draw.features.shape[:2]
    scores = _scores(draw.features, draw.labels)
    shuffled = torch.from_numpy(np.random.default_rng(draw.seed).permutation(count))
    right = (scores > 0).double().mean(1)[shuffled]
    steepness = _steepness(draw)
    blocks = steepness.argsort(descending=True)
    found = {
        FULL: (scores.mean(1).argsort(descending=True), count * examples, None),
        ASKING: (_in_order(draw, scores), count * examples, None),
        HALVING: _halved(draw, torch.arange(count), steepness, asks=True),
        WITHOUT_HEADS: _halved(draw, torch.arange(count), steepness),
        PLAIN: _halved(draw, torch.arange(count)),
        APART: _apart(draw),
        SCREEN: _halved(draw, blocks[: max(FINALISTS, -(-count // SCREENED))]),
        BLOCKS: (blocks, COST * examples, None),
        WHOLE: (draw.slopes.sum(1).argsort(descending=True), COST * examples, None),
        ACCURACY: (shuffled[right.argsort(descending=True, stable=True)], count * examples, None),
        RANDOM: (shuffled, 0, None),
    }
    order, passed, risk = found[SCREEN]
    found[SCREEN] = torch.cat([order, blocks[len(order) :]]), passed + COST * examples, risk
    return {name: Order(*result) for name, result in found.items()}


def _steepness(draw: Draw) -> Tensor:
    """As `Slopes` has it: of an adapter of norm 1, or else the largest ones are first, whatever they have learned."""
    steep = draw.slopes.abs() / draw.norms.clamp_min(torch.finfo(draw.norms.dtype).tiny)
    return steep.sum(1) / draw.scales.sum()


def _in_order(draw: Draw, scores: Tensor) -> Tensor:
    """By scores on all examples and by what heads tell of these, as the library has it."""
    told = {number: _told(draw, number, slice(None)) for number in range(len(scores))}
    return torch.tensor(in_order(dict(enumerate(scores.mean(1).tolist())), told))


def _told(draw: Draw, number: int, rows: Tensor | slice) -> float | None:
    head = draw.heads[number] if draw.heads else None
    told = None if head is None else information(draw.features[number, rows], draw.labels[rows], head)
    return None if told is None else told.nats


def _halved(
    draw: Draw, some: Tensor, steepness: Tensor | None = None, asks: bool = False
) -> tuple[Tensor, int, float]:
    """What `select_adapters` does with some candidates: order, examples passed, stated risk.

    Args:
        draw: the support set.
        some: the candidates.
        steepness: of all. Default: the model has no backward pass.
        asks: whether they have heads.
    """
    levels = torch.tensor(_levels(draw.labels.tolist(), draw.seed))
    sizes = [int((levels <= rung).sum()) for rung in range(int(levels.max()) + 1)]
    numbers = {number: int(place) for number, place in enumerate(some, start=1)}
    passed = 0 if steepness is None else COST * len(draw.labels)
    before = dict.fromkeys(numbers, 0)

    def run(rung: int, wanted: Sequence[int]) -> dict[int, Trial]:
        nonlocal passed
        if rung == SLOPES:
            slopes = [None if steepness is None else float(steepness[numbers[own]]) for own in wanted]
            nothing = torch.empty(0)
            return {own: Trial(nothing, nothing.bool(), slope) for own, slope in zip(wanted, slopes)}
        rows = (levels <= rung).nonzero()[:, 0]
        found = {} if rung == 0 else {0: _trial(draw.base[rows], draw.labels[rows], None)}
        for own in wanted:
            told = _told(draw, numbers[own], rows) if asks else None
            found[own] = _trial(draw.features[numbers[own], rows], draw.labels[rows], told)
            passed += len(rows) - before[own]
            before[own] = len(rows)
        return found

    found: Rounds = in_rounds(run, sizes, 1, len(numbers), FINALISTS, True)
    order = torch.tensor([numbers[own] for own in [*found.order, *found.behind]])
    return order, passed, risk_of(found.first, found.last, found.order[0], are_left_out=True)


def _trial(features: Tensor, labels: Tensor, told: float | None) -> Trial:
    if len(labels) == len(labels.unique()):
        nothing = torch.empty(0)
        return Trial(nothing, nothing.bool(), information=told, apart=apartness(features))
    values = margins(leave_one_out_distances(features, labels))
    return Trial(values, values > 0, information=told)


def _apart(draw: Draw) -> tuple[Tensor, int, None]:
    """By how far one example of each class is from those of the others, 1 - cosine; the first ones then by margins."""
    first = _first_of_each(draw)
    own = torch.nn.functional.normalize(draw.features[:, first].double(), dim=2)
    order = (own @ own.mT).sum((1, 2)).argsort()
    kept = max(FINALISTS, -(-len(order) // FAR_APART))
    scores = _scores(draw.features[order[:kept]], draw.labels).mean(1)
    passed = len(order) * len(first) + kept * (len(draw.labels) - len(first))
    return torch.cat([order[:kept][scores.argsort(descending=True)], order[kept:]]), passed, None


def _first_of_each(draw: Draw) -> list[int]:
    levels = torch.tensor(_levels(draw.labels.tolist(), draw.seed))
    return [
        int((draw.labels == label).nonzero()[levels[draw.labels == label].argmin()]) for label in draw.labels.unique()
    ]


def _scores(features: Tensor, labels: Tensor) -> Tensor:
    """The margin of every example under each candidate, shape (N, n)."""
    return torch.stack([margins(leave_one_out_distances(own, labels)) for own in features])
