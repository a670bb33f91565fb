"""Which candidates go on to more examples, and how many. Pure functions on numbers; `rounds.py` does what they say."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from .trials import in_order


KEPT = 4  # one of so many goes on by its score
KEPT_BESIDE_STEEP, STEEP = 6, 8  # or, where there are slopes, one of so many by its score, and by its slope
LOOKED_AT = 0.7  # of the candidates pass one example of each class: the steepest
MOST_LOOKED_THROUGH = 0.25  # of all examples: where one of each class is more, nobody is dropped by these
PASSED_NEXT = 0.12  # of a pass of all candidates over all examples: what the best of these pass in the next round
MOST_KEPT = 1 / 3  # of all candidates
BESIDE_THESE = 50  # one of so many goes on by its slope


def looked_at(slopes: Mapping[int, float | None]) -> list[int]:
    """The candidates that pass one example of each class: the steepest 70%, and those whose slope is not known.

    Args:
        slopes: by number.
    """
    steepest = steepest_first(slopes, slopes)
    taken = {*steepest[: math.ceil(LOOKED_AT * len(steepest))]}
    return [own for own in slopes if own in taken or slopes[own] is None]


def kept_after_a_look(candidates: int, classes: int, following: int, examples: int, finalists: int) -> int:
    """How many go on after one example of each class, beside some of the steepest.

    Args:
        candidates: how many there are, with those that passed none.
        classes: how many examples were looked at.
        following: how many there are in the next round.
        examples: and in all.
        finalists: so many go on at least.
    """
    share = PASSED_NEXT * examples / (following - classes)
    return max(finalists, math.ceil(min(MOST_KEPT, share) * candidates))


def after_a_look(
    apart: Mapping[int, float],
    informations: Mapping[int, float | None],
    slopes: Mapping[int, float | None],
    count: int,
) -> tuple[list[int], list[int]]:
    """Who goes on after one example of each class, and who does not, the best first.

    One example of each class leaves none out. But it tells how far apart a candidate puts them, and what its own head
    makes of them: the order is by places in both. The steepest go on beside.

    Args:
        apart: how far the examples are from each other under the candidates that passed them.
        informations: what the heads tell of these.
        slopes: of all candidates.
        count: how many go on by the order.
    """
    order = in_order(apart, informations)
    going = order[:count]
    going += steepest_first(order[count:], slopes)[: math.ceil(len(slopes) / BESIDE_THESE)]
    return going, [own for own in order if own not in {*going}]


def those_who_go_on(order: Sequence[int], slopes: Mapping[int, float | None], finalists: int) -> list[int]:
    """The first ones, and the steepest ones of all; in their order.

    The few examples of a round may mislead. Slopes are of all examples, but tell what a small share of an adapter
    does: each finds what the other one overlooks.

    Args:
        order: the candidates of a round, the best first.
        slopes: by number; those that are not there are not known.
        finalists: so many at least.
    """
    steepest = steepest_first(order, slopes)
    going = {*order[: kept(len(order), finalists, bool(steepest))], *steepest[: math.ceil(len(order) / STEEP)]}
    return [own for own in order if own in going]


def kept(candidates: int, finalists: int, has_slopes: bool) -> int:
    """How many go on to the next round by their scores."""
    return max(finalists, math.ceil(candidates / (KEPT_BESIDE_STEEP if has_slopes else KEPT)))


def steepest_first(some: Collection[int], slopes: Mapping[int, float | None]) -> list[int]:
    """Those whose slope is known, the steepest first."""
    known = {own: slope for own in some if (slope := slopes.get(own)) is not None}
    return sorted(known, key=lambda own: (-known[own], own))
