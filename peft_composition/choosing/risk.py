"""The chance that the adapter which looks best of many is worse than the base model. Pure functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .trials import Trial


PRIOR = 1.0
"""Squared differences added to those of right answers: without, ten equal answers would mean certainty."""


class Gains(NamedTuple):
    """What candidates gain on the base model, paired by example.

    Attributes:
        first: in the first round that gave scores, of all candidates that had any, shape (candidates, examples).
        last: of those that were scored on all examples, shape (finalists, all examples).
        places: the rows of `first` that these finalists are, shape (finalists,).
        pick: the row of `last` that is the pick.
    """

    first: Tensor
    last: Tensor
    places: Tensor
    pick: int


def risk_of(first: Mapping[int, Trial], last: Mapping[int, Trial], pick: int, are_left_out: bool) -> float:
    """The chance of harm of a pick.

    Args:
        first: what came out of the first round that gave scores, by candidate; number 0 is the base.
        last: of the last round.
        pick: its number.
        are_left_out: as for `chance_of_harm`.
    """
    all_of_them, finalists = sorted({*first} - {0}), sorted({*last} - {0})
    places = torch.tensor([all_of_them.index(own) for own in finalists])
    by_measure = []
    for measure in ("values", "is_right"):
        begun, ended = (
            torch.stack(
                [getattr(trials[own], measure).double() - getattr(trials[0], measure).double() for own in some]
            )
            for trials, some in ((first, all_of_them), (last, finalists))
        )
        by_measure.append(Gains(begun, ended, places, finalists.index(pick)))
    return chance_of_harm(by_measure[0], by_measure[1], are_left_out)


def chance_of_harm(scores: Gains, answers: Gains, are_left_out: bool) -> float:
    """The probability that a pick is truly worse than the base, mindful that it was picked among many.

    The best of many on few examples owes part of its lead to chance (the winner's curse). How much, all candidates
    tell together. Beside the mean of all candidates on the same examples, which takes away the base's own noise and
    what examples have in common, candidates spread by chance and by what they are worth; the pick's lead over that
    mean is drawn towards it by the share that is chance (empirical Bayes). In later rounds the mean of all is that of
    the finalists less their lead in the first round, drawn in the same way. A finalist that is left alone has no
    others to be compared with: its variance stands for that of its lead, and of what it led by by chance in the first
    round the share counts that these examples have of all.

    Candidates that were dropped without a score are not among these. What they were dropped by, slopes, one example of
    each class and their own heads, is no part of the scores: those that are left are a better pool, and judged as one.

    What is left is uncertain by the pick's own error on all examples, and no less than by what all candidates have in
    common, by Student's t: the pool tells by how much the pick is too high, and does not make it surer. Scores are not
    quite right answers, and right answers are coarse: the result is the mean of the chances by either. Docs have how
    often it comes true.

    Args:
        scores: gains in margins or log-likelihoods.
        answers: gains in right answers: -1, 0 or 1.
        are_left_out: whether each example was judged by what was learned from the others. Then scores go up and down
            together, and the variance of their mean is 1 / n + 1 / (n - 1) times theirs, not 1 / n (Nadeau and Bengio
            2003, with one example tested and n - 1 learned from).

    Returns:
        Between 0 and 1; 0.5 where one example or less tells.
    """
    if min(scores.first.shape[1], scores.last.shape[1]) < 2:
        return 0.5
    return (_chance(scores, 0.0, are_left_out) + _chance(answers, PRIOR, are_left_out)) / 2


def _chance(gains: Gains, prior: float, are_left_out: bool) -> float:
    first, last = gains.first.double(), gains.last.double()
    own, count, examples = last[gains.pick], len(first), last.shape[1]
    share, share_of_first = (_share(wide.shape[1], are_left_out) for wide in (last, first))
    mean, error = float(own.mean()), _variance(own, prior) * share
    if count > 1:
        error = max(error, _variance(last.mean(0), prior) * share)
        noise = float((first - first.mean(0)).var(1).sum()) / (count - 1) * share_of_first
        spread = max(0.0, float(first.mean(1).var()) - noise)
        lead = float(first.mean(1)[gains.places].mean() - first.mean())
        finalists, drawn = len(last), _part(spread, noise)
        beside = own - last.mean(0)
        of_pick = float(beside.var()) * share * finalists / max(finalists - 1, 1)
        if finalists == 1:
            # With no other beside it, all that it has may be chance; and a part of `last` is the first round's lead.
            of_pick = float(own.var()) * share
            drawn += (1 - drawn) * first.shape[1] / examples
        centre = float(last.mean()) - drawn * lead
        mean = centre + _part(spread, of_pick) * (mean - centre)
    if error == 0:
        return 0.5 if mean == 0 else float(mean < 0)
    return students_t(-mean / math.sqrt(error), examples - 1)


def students_t(value: float, degrees: int) -> float:
    """The cumulative distribution of Student's t for whole degrees of freedom.

    By its finite series (Abramowitz and Stegun, 26.7.3 and 26.7.4), for scipy is not needed to choose.
    """
    angle = math.atan(value / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total, at = (cosine, 0.0, 1) if degrees % 2 else (1.0, 0.0, 0)
    while at <= degrees - 2:
        total += term
        at += 2
        term *= cosine * cosine * (at - 1) / at
    inside = (angle + sine * total) * 2 / math.pi if degrees % 2 else sine * total
    return min(1.0, max(0.0, 0.5 + inside / 2))


def _part(spread: float, noise: float) -> float:
    """The share of a spread that is not noise."""
    return spread / (spread + noise) if spread > 0 else 0.0


def _variance(values: Tensor, prior: float) -> float:
    """The variance, with a prior as of one more example that differs by 1 from the mean."""
    degrees = len(values) - 1
    return (float(values.var()) * degrees + prior) / (degrees + prior)


def _share(examples: int, are_left_out: bool) -> float:
    """The variance of a mean over that of an example."""
    return 1 / examples + (1 / (examples - 1) if are_left_out else 0.0)
