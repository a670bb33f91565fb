"""Candidates in rounds: a backward pass, one example of each class, more examples, and fewer candidates in each.

Who goes on is in `plan.py`; `trials.py` tries candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .plan import (
    BESIDE_THESE,
    LOOKED_AT,
    MOST_LOOKED_THROUGH,
    STEEP,
    after_a_look,
    kept,
    kept_after_a_look,
    looked_at,
    steepest_first,
    those_who_go_on,
)
from .trials import SLOPES, Trial, ranked


Run = Callable[[int, Sequence[int]], Mapping[int, Trial]]
"""Tries candidates on a rung, by its number, and gives what each did that could be tried, and the base."""


NOT_STEEP = "dropped before it passed an example: a small share of it would change the score less than that of others"
BEHIND = "dropped after one example of each class, which others, or the heads of others, tell apart better"


@dataclass
class Rounds:
    """What came out of all rounds.

    Attributes:
        order: the candidates that were scored on all examples, the best first.
        behind: those that were dropped before, the best first.
        trials: of each candidate the one on most examples, and that of the base model, which is number 0.
        first: of the first round that gave scores, with the base.
        last: of the last one.
        dropped: why those without a score have none.
    """

    order: list[int] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    trials: dict[int, Trial] = field(default_factory=dict)
    first: Mapping[int, Trial] = field(default_factory=dict)
    last: Mapping[int, Trial] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)


def in_rounds(run: Run, sizes: Sequence[int], first_scored: int, count: int, finalists: int, halving: bool) -> Rounds:
    """Let candidates 1 to `count` pass the examples of a ladder.

    Args:
        run: tries candidates on a rung.
        sizes: how many examples a rung has.
        first_scored: the first rung that gives scores.
        count: how many candidates there are.
        finalists: so many at least pass all examples.
        halving: whether others are dropped before.

    Returns:
        What came out. `order` is empty if no candidate could be scored.
    """
    found = Rounds()
    alive = list(range(1, count + 1))
    rungs = list(range(first_scored, len(sizes)))
    slopes: dict[int, float | None] = {}
    if not halving or count <= finalists:
        rungs = rungs[-1:]
    elif _has_a_look(sizes, first_scored):
        slopes = {number: own.slope for number, own in run(SLOPES, alive).items()}
        alive = list(slopes)
        if steepest_first(alive, slopes):  # else the model has no backward pass
            rungs = rungs[1:] or rungs
            count = kept_after_a_look(len(slopes), sizes[0], sizes[rungs[0]], sizes[-1], finalists)
            alive = _after_a_look(run, slopes, count, found)
            if count <= finalists:
                rungs = rungs[-1:]  # those that are left pass all
    while alive and rungs:
        scored = run(rungs.pop(0), alive)
        found.trials.update(scored)
        found.first, found.last = found.first or scored, scored
        alive = ranked({number: trial for number, trial in scored.items() if number})
        if rungs and alive:
            going = those_who_go_on(alive, slopes, finalists)
            found.behind[:0] = [own for own in alive if own not in {*going}]
            if kept(len(alive), finalists, bool(steepest_first(alive, slopes))) <= finalists:
                rungs = rungs[-1:]
            alive = going
    found.order = alive
    return found


def _after_a_look(run: Run, slopes: Mapping[int, float | None], count: int, found: Rounds) -> list[int]:
    """Who goes on after one example of each class; the others are put into `found`."""
    some = looked_at(slopes)
    looks = run(0, some)
    found.trials.update(looks)
    apart = {number: own.apart for number, own in looks.items() if own.apart is not None}
    going, others = after_a_look(apart, {number: looks[number].information for number in apart}, slopes, count)
    unseen = steepest_first({*slopes} - {*some}, slopes)
    found.behind = [*others, *unseen]
    found.dropped = {**dict.fromkeys(others, BEHIND), **dict.fromkeys(unseen, NOT_STEEP)}
    return going


def expected(sizes: Sequence[int], first_scored: int, count: int, finalists: int, halving: bool) -> list[int]:
    """How many candidates there are in each round, about: some cannot be scored, and some models have no slopes.

    Args:
        sizes: as for `in_rounds`, and so are the others.
        first_scored: likewise.
        count: likewise.
        finalists: likewise.
        halving: likewise.
    """
    rounds = [count]
    if not halving or count <= finalists:
        return rounds
    rungs, has_slopes = len(sizes) - first_scored, _has_a_look(sizes, first_scored)
    if has_slopes:
        rungs = max(1, rungs - 1)
        going = kept_after_a_look(count, sizes[0], sizes[-rungs], sizes[-1], finalists)
        rungs = 1 if going <= finalists else rungs
        rounds += [math.ceil(LOOKED_AT * count), going + math.ceil(count / BESIDE_THESE)]
    while rungs > 1:
        going = kept(rounds[-1], finalists, has_slopes)
        rungs = 1 if going <= finalists else rungs - 1
        rounds.append(min(rounds[-1], going + (math.ceil(rounds[-1] / STEEP) if has_slopes else 0)))
    return rounds


def _has_a_look(sizes: Sequence[int], first_scored: int) -> bool:
    return first_scored > 0 and sizes[0] <= MOST_LOOKED_THROUGH * sizes[-1]
