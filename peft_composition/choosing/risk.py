"""The chance that the adapter which looks best of many is worse than the base model. Pure functions on tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chance_of_harm(pick: Tensor, screened: Tensor, are_left_out: bool) -> float:
    """The probability that the true gain of a pick is below zero, mindful that it was picked among many.

    The best of many on few examples owes part of its lead to chance. How much, all candidates tell together: their
    gains in the first round, before any was dropped, have a mean and a spread, and the spread beyond what chance
    explains is that of their true gains. The pick's own mean is drawn towards the mean of all by as much as it is
    uncertain (empirical Bayes with a normal prior; a posterior does not depend on how the pick was picked).

    Caution, not a guarantee: mean and spread count as known, and so does their independence of the pick's own errors,
    though the base's noise is in all gains. In simulated pools of weak candidates 0.02 was stated where 0.14 was true.

    Args:
        pick: gains of the pick over the base on all examples, paired by example, shape (m,).
        screened: gains of all candidates in the first round, shape (candidates, examples).
        are_left_out: whether each example was judged by what was learned from the others. Then scores go up and down
            together, and the variance of their mean is 1 / n + 1 / (n - 1) times theirs, not 1 / n (Nadeau and Bengio
            2003, with one example tested and n - 1 learned from).

    Returns:
        Between 0 and 1; 0.5 where one example or less tells.
    """
    own, all_of_them = pick.double(), screened.double()
    if len(own) < 2 or all_of_them.shape[1] < 2:
        return 0.5
    error = float(own.var()) * _share(len(own), are_left_out)
    share_of_one = _share(all_of_them.shape[1], are_left_out)
    means = all_of_them.mean(1)
    spread = 0.0
    if len(means) > 1:
        # What the examples have in common moves all candidates alike, and is no part of the spread between them.
        centred = all_of_them - all_of_them.mean(0)
        noise = float(centred.var(1).mean()) * share_of_one
        spread = max(0.0, float(means.var()) - noise)
    centre = float(means.mean())
    of_centre = float(all_of_them.mean(0).var()) * share_of_one
    share = 1.0  # of the only one nothing was picked
    if len(means) > 1:
        share = spread / (spread + error) if spread + error else 0.0
    mean = share * float(own.mean()) + (1 - share) * centre
    variance = share * error + (1 - share) ** 2 * of_centre
    if variance == 0:
        return 0.5 if mean == 0 else float(mean < 0)
    # Student's t for the few examples, by the normal distribution of the same spread.
    degrees = len(own) - 1
    wider = math.sqrt(degrees / (degrees - 2)) if degrees > 2 else math.sqrt(3)
    return float(torch.special.ndtr(torch.tensor(-mean / (wider * math.sqrt(variance)), dtype=torch.float64)))


def _share(examples: int, are_left_out: bool) -> float:
    """The variance of a mean over that of an example."""
    return 1 / examples + (1 / (examples - 1) if are_left_out else 0.0)
