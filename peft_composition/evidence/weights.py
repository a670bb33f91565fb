"""From scores to mixing weights: stacking of predictions, and a vote of bootstraps. Pure functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor


FLOOR = 1e-4
"""The least weight that evidence gives an adapter: a learned weight of zero could never grow."""
GAP = 1e-6  # of the mean log-likelihood to the best there is
MOST_ROUNDS = 50_000
CAUTION = 0.5
"""By how many standard errors a candidate must be ahead of the uniform mix; chosen on seven tasks of the study."""
CAUTION_OF_BASE = 8.0
"""By how many more than `CAUTION` the base model must be, over the number of examples: it lies far from the adapters'
mixes. Chosen on four tasks of the study."""
LEAST_BASE = 0.01
"""A smaller share of the base model is given to the adapters."""
STEEPNESS = 4.0
"""The power of what an adapter's own head tells, with one example of each class; chosen on six tasks of the study."""
ALIKE = 0.5
"""Heads that tell about as much as the others count alike: within so much of the mean logarithm, a factor of 1.65.
Where no adapter is related to the task, small differences are chance, and equal weights do better."""
ERRORS = 2.0
"""Heads count alike within so many standard errors, too: an adapter must tell more of most classes, not of one."""
MOST_CERTAIN = 1 - 1e-12
"""The most probable that a class can be in a vote; what is as good as impossible would decide alone."""
LEAST_NATS = 1e-3
"""What a head tells at least; less is the noise of heads that tell nothing."""
LEAST_SHARE = 0.03
"""With one example of each class, where heads decide alone, they tell at least this share of log C, for C classes.
Chosen on 29 tasks of the study."""


def stack(log_likelihoods: Tensor) -> Tensor:
    """The mixture of predictions that makes left-out examples most likely: argmax_w sum_i log sum_c w_c p_c(y_i).

    Stacking of predictive distributions (Yao et al. 2018). The goal is concave; expectation maximisation from equal
    weights climbs it without a step size, and leaves candidates that predict alike with equal shares. It stops when
    the mean log-likelihood is at most 1e-6 below the best.

    Args:
        log_likelihoods: log p_c(y_i), shape (examples, candidates); -inf for a class that was held impossible.

    Returns:
        Weights, shape (candidates,), float64, non-negative, sum 1.

    Raises:
        ValueError: there is no example or no candidate, or a value is NaN or positive infinity.
    """
    if log_likelihoods.dim() != 2 or not log_likelihoods.numel():
        raise ValueError(f"log-likelihoods must have the shape (examples, candidates), got {log_likelihoods.shape}")
    wide = log_likelihoods.detach().to("cpu", torch.float64)
    if bool((wide.isnan() | (wide == torch.inf)).any()):
        raise ValueError("log-likelihoods must be finite, or -inf")
    wide = wide[wide.amax(1) > -torch.inf]  # what every candidate holds impossible does not tell them apart
    weights = torch.full((log_likelihoods.shape[1],), 1 / log_likelihoods.shape[1], dtype=torch.float64)
    if not len(wide):
        return weights
    likelihoods = (wide - wide.amax(1, keepdim=True)).exp()
    for _ in range(MOST_ROUNDS):
        # d_c, the derivative by w_c, over n. The best mean log-likelihood is at most log max_c d_c above this one.
        slope = (likelihoods / (likelihoods @ weights)[:, None]).mean(0)
        if float(slope.max()) - 1 <= GAP:
            break
        weights = weights * slope
        weights = weights / weights.sum()
    return weights


def vote(
    values: Tensor, bootstraps: Tensor, reference: int | None = None, caution: float | Tensor = CAUTION
) -> Tensor:
    """The share of bootstraps in which each candidate has the largest mean value; ties share a bootstrap.

    With a reference the others must be ahead of it by some standard errors of the difference, paired by example: what
    the examples do not tell apart stays with the reference, and so does a bootstrap in which others are level with it.

    Args:
        values: margins or log-likelihoods of the left-out examples, shape (examples, candidates).
        bootstraps: weights of the examples, shape (draws, examples).
        reference: a candidate. Default: none.
        caution: how many standard errors; of each candidate, shape (candidates,), or of all.

    Returns:
        Shares, shape (candidates,), float64, sum 1.
    """
    wide = values.detach().to("cpu", torch.float64)
    means = bootstraps.double() @ wide
    if reference is not None and len(wide) > 1:
        ahead = wide - wide[:, [reference]]
        means = bootstraps.double() @ ahead - caution * ahead.std(0) / len(wide) ** 0.5
    return _winners(means, reference)


def cautions(examples: int, candidates: int) -> Tensor:
    """By how many standard errors each candidate must be ahead of the uniform mix: more for the base model, the last.

    Returns:
        Shape (candidates,), float64.
    """
    needed = torch.full((candidates,), CAUTION, dtype=torch.float64)
    needed[-1] += CAUTION_OF_BASE / examples
    return needed


def vote_of_classes(log_probabilities: Tensor, labels: Tensor, bootstraps: Tensor) -> Tensor:
    """The mean of the classes' votes, by their examples: each asks who tells it best from all other classes.

    An adapter may know some of the classes and spoil others. In a vote of all examples the difference of means decides
    between such adapters, and the larger one takes all; classes that vote by themselves leave each its share. What
    counts for class y is the mean log-probability of y on its examples and that of not being y on all others, half
    and half: to make y likely everywhere is no use. A candidate must be ahead of the uniform mix by half a standard
    error. What K examples of a class say counts for (K - 1) / K, the part that is left when one is left out; the rest
    of the vote is the uniform mix's. The share of the base model is decided by all examples together, by the
    log-probabilities of their own classes.

    Args:
        log_probabilities: of each class for the left-out examples, shape (examples, classes, candidates); the uniform
            mix is the last but one candidate, the base model the last.
        labels: the class of each, an index, shape (examples,).
        bootstraps: weights of the examples, shape (draws, examples).

    Returns:
        Shares, shape (candidates,), float64, sum 1.
    """
    logs, labels = log_probabilities.detach().to("cpu", torch.float64), labels.cpu()
    examples, _, candidates = logs.shape
    own = logs[torch.arange(examples), labels]
    base = vote(own, bootstraps, candidates - 2, cautions(examples, candidates))[-1:]
    others = torch.log(-torch.expm1(logs[..., :-1].clamp_max(math.log(MOST_CERTAIN))))
    shares = torch.zeros(candidates - 1, dtype=torch.float64)
    for label in labels.unique():
        inside = labels == label
        count = int(inside.sum())
        sides = [(logs[inside, label, :-1], bootstraps[:, inside]), (others[~inside, label], bootstraps[:, ~inside])]
        part = (count - 1) / count
        shares += _vote_by_sides([side for side in sides if len(side[0])]) * (part * count / examples)
        shares[-1] += (1 - part) * count / examples
    return torch.cat([shares * (1 - base), base])


def _vote_by_sides(sides: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """As `vote`, of the mean of the sides' means; the uniform mix, the last candidate, is the reference."""
    means, variances = [], []
    for values, bootstraps in sides:
        ahead = values - values[:, [-1]]
        weights = bootstraps.double() / bootstraps.double().sum(1, keepdim=True)
        means.append(weights @ ahead)
        variances.append(ahead.var(0) / len(ahead) if len(ahead) > 1 else torch.zeros(ahead.shape[1]).double())
    error = torch.stack(variances).sum(0).sqrt() / len(sides)
    return _winners(torch.stack(means).mean(0) - CAUTION * error, -1)


def _winners(means: Tensor, reference: int | None = None) -> Tensor:
    """Ties share a bootstrap; who is level with the reference is not ahead of it."""
    wins = (means == means.amax(1, keepdim=True)).double()
    if reference is not None:
        level = wins[:, reference] > 0
        wins[level] = 0
        wins[level, reference] = 1
    return (wins / wins.sum(1, keepdim=True)).mean(0)


def spread_uniform(shares: Tensor, floor: float = FLOOR) -> Tensor:
    """Mixing weights from the shares of N adapters, of their uniform mix and of the base model.

    What the uniform mix won is given to all adapters evenly. What the base model won is missing in their sum, if it is
    more than 1%.

    Args:
        shares: shape (N + 2,), sum 1.
        floor: the least weight.

    Returns:
        Shape (N,), float64, sum 1 or less.
    """
    adapters, uniform, base = shares[:-2].double(), float(shares[-2]), float(shares[-1])
    total = 1 - base if base > LEAST_BASE else 1.0
    return floored(adapters + uniform / len(adapters), floor, total)


class Information(NamedTuple):
    """What an adapter's own head tells of the classes of some examples.

    Attributes:
        nats: of all of them.
        without: of all but one, for each class in the order of the labels.
    """

    nats: float
    without: tuple[float, ...]


def are_known(informations: Sequence[float | Information | None]) -> bool:
    """Whether the heads of at least two adapters could be asked: one alone cannot be compared."""
    return sum(own is not None for own in informations) >= 2


def nats(informations: Sequence[Information | None]) -> list[float | None]:
    """What each head tells of all classes; None where one is not known."""
    return [None if own is None else own.nats for own in informations]


def ahead_of_mean(informations: Sequence[float | None], least: float = LEAST_NATS) -> list[float]:
    """By how much the logarithm of what each head tells is above their mean; 0 where it is not known.

    Args:
        informations: of the adapters' heads, in nats. With fewer than two that are known all are 0.
        least: what a head tells at least, in nats.
    """
    if not are_known(informations):
        return [0.0] * len(informations)
    logs = [None if own is None else math.log(max(own, least)) for own in informations]
    mean = fmean(own for own in logs if own is not None)
    return [0.0 if own is None else own - mean for own in logs]


def errors_of_ahead(informations: Sequence[Information | None], least: float = LEAST_NATS) -> list[float]:
    """The standard errors of `ahead_of_mean`, by a jackknife that leaves out one class after another.

    Args:
        informations: of the adapters' heads. With two classes, of which one alone tells nothing, all errors are 0, as
            they are where fewer than two heads are known.
        least: as of `ahead_of_mean`.
    """
    known = [own for own in informations if own is not None]
    classes = len(known[0].without) if are_known(informations) else 0
    if classes < 3:
        return [0.0] * len(informations)
    left = torch.tensor(
        [
            ahead_of_mean([None if own is None else own.without[place] for own in informations], least)
            for place in range(classes)
        ],
        dtype=torch.float64,
    )
    return ((classes - 1) / classes * (left - left.mean(0)).square().sum(0)).sqrt().tolist()


def informed(
    weights: Tensor, informations: Sequence[Information | None], labels: Tensor, floor: float = FLOOR
) -> Tensor:
    """Mixing weights times what the adapters' own heads tell of the examples, compared with each other.

    With I_n what head n tells, in nats, and d_n the part of log I_n - mean log I that exceeds both +-0.5 and two
    standard errors, the factor is exp(4 d_n / sqrt(K)). K is the number of examples of each class: with few of them
    leaving one out says little, and the heads were trained on many; as K grows, the examples count for more. At K = 1,
    where nothing else corrects them, I_n is at least 3% of log C, for C classes: below that heads differ by chance.

    Args:
        weights: by other evidence, or uniform ones, shape (N,).
        informations: of the adapters' heads; None where one is not known, which counts as the mean of the others.
            Where fewer than two are known, the weights stay.
        labels: of the examples, shape (n,).
        floor: the least weight.

    Returns:
        Shape (N,), float64, with the same sum.
    """
    if not are_known(informations):
        return weights.double()
    classes = len(labels.unique())
    per_class = len(labels) / classes
    least = max(LEAST_NATS, LEAST_SHARE * math.log(classes)) if per_class == 1 else LEAST_NATS
    ahead = torch.tensor(ahead_of_mean(nats(informations), least), dtype=torch.float64)
    alike = (ERRORS * torch.tensor(errors_of_ahead(informations, least), dtype=torch.float64)).clamp_min(ALIKE)
    exceeding = ahead.sign() * (ahead.abs() - alike).clamp_min(0)
    factors = (exceeding * STEEPNESS / per_class**0.5).exp()
    return floored(weights.double() * factors, floor, float(weights.sum()))


def floored(weights: Tensor, floor: float = FLOOR, total: float = 1.0) -> Tensor:
    """Weights that are scaled to the sum `total`, and then raised to `floor` and scaled again."""
    weights = weights.double()
    raised = (weights * (total / weights.sum().clamp_min(floor))).clamp_min(floor)
    return raised * (max(total, floor * len(weights)) / raised.sum())
