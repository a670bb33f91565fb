"""From scores to mixing weights: stacking of predictions, and a vote of bootstraps. Pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


FLOOR = 1e-4
"""The least weight that evidence gives an adapter: a learned weight of zero could never grow."""
GAP = 1e-6  # of the mean log-likelihood to the best there is
MOST_ROUNDS = 50_000


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


def vote(values: Tensor, bootstraps: Tensor) -> Tensor:
    """The share of bootstraps in which each candidate has the largest mean value; ties share a bootstrap.

    Args:
        values: margins or log-likelihoods of the left-out examples, shape (examples, candidates).
        bootstraps: weights of the examples, shape (draws, examples).

    Returns:
        Shares, shape (candidates,), float64, sum 1.
    """
    means = bootstraps.double() @ values.detach().to("cpu", torch.float64)
    wins = (means == means.amax(1, keepdim=True)).double()
    return (wins / wins.sum(1, keepdim=True)).mean(0)


def spread_uniform(shares: Tensor, floor: float = FLOOR) -> Tensor:
    """Mixing weights from the shares of N adapters and, last, of their uniform mix, which N adapters get evenly.

    Args:
        shares: shape (N + 1,), sum 1.
        floor: the least weight.

    Returns:
        Shape (N,), float64, sum 1.
    """
    adapters = shares[:-1].double()
    return floored(adapters + shares[-1].double() / len(adapters), floor)


def floored(weights: Tensor, floor: float = FLOOR) -> Tensor:
    """Weights that are at least `floor` before they are scaled to the sum 1 again."""
    raised = weights.double().clamp_min(floor)
    return raised / raised.sum()
