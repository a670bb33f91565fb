"""What each selector makes of a support set: an order of the candidates, and how many examples that took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peft_composition.choosing.ladder import STEEP, _levels
from peft_composition.choosing.risk import Gains
from peft_composition.choosing.select import FINALISTS, _kept, _plan, _those_who_go_on
from peft_composition.choosing.slopes import COST
from peft_composition.choosing.trials import in_order
from peft_composition.evidence.own_heads import OwnHead, information
from peft_composition.evidence.scores import leave_one_out_distances, margins


FULL, ASKING = "evidence, all examples", "evidence and heads, all examples"
HALVING = "evidence and heads or one backward pass, halving"
STEEP_ONES = "evidence or one backward pass, halving"
PLAIN = "evidence alone, halving"
BLOCKS, WHOLE = "one backward pass, per block", "one backward pass, whole adapter"
SCREEN = "one backward pass, per block, then halving"
APART = "one of each class by distance, then all"
CHEAP = "one of each class by distance or one backward pass, then all"
ACCURACY, RANDOM = "accuracy, all examples", "random"
SELECTORS = (FULL, ASKING, HALVING, STEEP_ONES, PLAIN, CHEAP, APART, SCREEN, BLOCKS, WHOLE, ACCURACY, RANDOM)
SCREENED = 2  # one of so many goes on after the backward pass
FAR_APART = 10  # and after one example of each class
LOOKED_AT, FAR, STEEPEST = 0.73, 0.12, 0.05  # of the candidates: one example of each class; then all, by either


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
        heads: that the candidates were saved with, N of them, or none at all.
    """

    features: Tensor
    base: Tensor
    labels: Tensor
    slopes: Tensor
    norms: Tensor
    seed: int
    heads: Sequence[OwnHead | None] = ()


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
    steepness = _steepness(draw)
    blocks = steepness.argsort(descending=True)
    found = {
        FULL: (scores.mean(1).argsort(descending=True), count * examples, None),
        ASKING: (_in_order(draw, torch.arange(count), scores, torch.arange(examples)), count * examples, None),
        HALVING: _halved(draw, torch.arange(count), steepness, asks=True),
        STEEP_ONES: _halved(draw, torch.arange(count), steepness),
        PLAIN: _halved(draw, torch.arange(count)),
        CHEAP: _cheap(draw, blocks),
        APART: _apart(draw),
        SCREEN: _halved(draw, blocks[: max(FINALISTS, -(-count // SCREENED))]),
        BLOCKS: (blocks, COST * examples, None),
        WHOLE: (draw.slopes.sum(1).argsort(descending=True), COST * examples, None),
        ACCURACY: (shuffled[right.argsort(descending=True, stable=True)], count * examples, None),
        RANDOM: (shuffled, 0, None),
    }
    rest = blocks[len(found[SCREEN][0]) :]
    order, passed, gains = found[SCREEN]
    found[SCREEN] = torch.cat([order, rest]), passed + COST * examples, gains
    return {name: Order(*result) for name, result in found.items()}


def _steepness(draw: Draw) -> Tensor:
    """Of an adapter of norm 1: else the largest ones are first, whatever they have learned."""
    return (draw.slopes.abs() / draw.norms.clamp_min(torch.finfo(draw.norms.dtype).tiny)).sum(1)


def _in_order(draw: Draw, alive: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
    """By scores on some examples and by what heads tell of these, as the library has it; places in `alive`."""
    told: dict[int, float | None] = {}
    for place, number in enumerate(alive.tolist() if draw.heads else []):
        head = draw.heads[number]
        told[place] = None if head is None else information(draw.features[number, rows], draw.labels[rows], head)
    return torch.tensor(in_order(dict(enumerate(scores.mean(1).tolist())), told))


def _halved(
    draw: Draw, alive: Tensor, steepness: Tensor | None = None, asks: bool = False
) -> tuple[Tensor, int, tuple[Gains, Gains]]:
    """What `select_adapters` does with these candidates: order, examples passed, gains. Without slopes: what it does
    where there is no backward pass; without asking heads: where there are none."""
    levels = torch.tensor(_levels(draw.labels.tolist(), draw.seed))
    plan = _plan(len(alive), int(levels.max()) + 1, FINALISTS, True, None if steepness is None else STEEP)
    passed, before = 0 if steepness is None else COST * len(draw.labels), 0
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
        if asks:
            ranked = _in_order(draw, alive, own, rows.nonzero()[:, 0])
        if place + 1 < len(plan):
            going = ranked[: _kept(len(alive), FINALISTS, False)]
            if steepness is not None:
                slopes = dict(enumerate(steepness[alive].tolist()))
                going = torch.tensor(_those_who_go_on(ranked.tolist(), slopes, FINALISTS))
            behind.insert(0, alive[ranked[~torch.isin(ranked, going)]])
            ranked = going
        alive, gains = alive[ranked], gains[:, ranked]
    places = torch.tensor([everyone.tolist().index(own) for own in alive.tolist()])
    both = Gains(begun[0], gains[0], places, 0), Gains(begun[1], gains[1], places, 0)
    return torch.cat([alive, *behind]), passed, both


def _gains(own: Tensor, base: Tensor) -> Tensor:
    """In margins and in right answers, shape (2, N, n)."""
    return torch.stack([own - base, (own > 0).double() - (base > 0).double()])


def _apart(draw: Draw) -> tuple[Tensor, int, None]:
    """By how far one example of each class is from those of the others, 1 - cosine; the first ones then by margins."""
    first = _first_of_each(draw)
    own = torch.nn.functional.normalize(draw.features[:, first].double(), dim=2)
    order = (own @ own.mT).sum((1, 2)).argsort()
    kept = max(FINALISTS, -(-len(order) // FAR_APART))
    scores = _scores(draw.features[order[:kept]], draw.labels).mean(1)
    passed = len(order) * len(first) + kept * (len(draw.labels) - len(first))
    return torch.cat([order[:kept][scores.argsort(descending=True)], order[kept:]]), passed, None


def _cheap(draw: Draw, blocks: Tensor) -> tuple[Tensor, int, None]:
    """One backward pass drops some; of the others the farthest apart, and the steepest of all, get all examples."""
    count = len(blocks)
    looked, far, steep = (round(share * count) for share in (LOOKED_AT, FAR, STEEPEST))
    first = _first_of_each(draw)
    own = torch.nn.functional.normalize(draw.features[blocks[:looked]][:, first].double(), dim=2)
    apart = blocks[:looked][(own @ own.mT).sum((1, 2)).argsort()]
    others = blocks[~torch.isin(blocks, apart[:far])]
    kept = torch.cat([apart[:far], others[:steep]])
    scores = _scores(draw.features[kept], draw.labels).mean(1)
    passed = COST * len(draw.labels) + looked * len(first) + len(kept) * (len(draw.labels) - len(first))
    return torch.cat([kept[scores.argsort(descending=True)], blocks[~torch.isin(blocks, kept)]]), passed, None


def _first_of_each(draw: Draw) -> list[int]:
    levels = torch.tensor(_levels(draw.labels.tolist(), draw.seed))
    return [
        int((draw.labels == label).nonzero()[levels[draw.labels == label].argmin()]) for label in draw.labels.unique()
    ]


def _scores(features: Tensor, labels: Tensor) -> Tensor:
    """The margin of every example under each candidate, shape (N, n)."""
    return torch.stack([margins(leave_one_out_distances(own, labels)) for own in features])
