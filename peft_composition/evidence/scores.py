"""Leave-one-out scores of features: how well the class means of the other examples predict the class of each example.

Pure functions on tensors. Features are computed in `passes.py`; `weights.py` turns scores into weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


BETAS = torch.logspace(math.log10(0.16), math.log10(48.0), 13, dtype=torch.float64)
"""Possible sharpness of the predictions of class means: 13 values, equally spaced on a logarithmic scale."""


class NotFiniteError(ValueError):
    """A model's features or likelihoods are NaN or infinite."""


class LeftOut(NamedTuple):
    """Distances of the examples that can be left out, because they are not the only ones of their class.

    Attributes:
        distances: squared distance of each example to every class mean, for its own class without the example itself,
            shape (m, C), float64.
        labels: the column of each example's own class, shape (m,).
        rows: the indices of the examples, shape (m,).
    """

    distances: Tensor
    labels: Tensor
    rows: Tensor


def require_classes(labels: Tensor) -> None:
    """Refuse examples of one class."""
    if len(labels.unique()) < 2:
        raise ValueError(f"all {len(labels)} examples have the same class; give examples of at least two classes")


def leave_one_out_distances(features: Tensor, labels: Tensor) -> LeftOut:
    """Squared distances to the class means, where the mean of an example's own class excludes the example.

    Let mu_y be the mean of a class of k examples that contains x_i. The mean of the others is k / (k - 1) times as far
    from x_i: its squared distance is (k / (k - 1))^2 |x_i - mu_y|^2. One pass over the examples is therefore enough.

    Args:
        features: shape (n, d), any real dtype; the computation is in float64.
        labels: classes, shape (n,), any integers.

    Returns:
        The distances, with columns in the order of the sorted labels.

    Raises:
        ValueError: shapes do not fit, values are not finite, there are fewer than two classes, or no class has two
            examples.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features must have the shape (examples, width) and labels (examples,), got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}"
        )
    wide = _wide(features)
    classes, own, counts = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
    require_classes(labels)
    if int(counts.max()) < 2:
        raise ValueError(f"each of the {len(classes)} classes has only one example; give at least two of one class")
    own, counts = own.to(wide.device), counts.to(wide.device)
    sums = torch.zeros(len(classes), wide.shape[1], dtype=wide.dtype, device=wide.device).index_add_(0, own, wide)
    rows = (counts[own] > 1).nonzero().flatten()
    # Differences, not inner products, which would lose digits for features with a large common mean.
    distances = torch.cdist(wide[rows], sums / counts[:, None], compute_mode="donot_use_mm_for_euclid_dist").square()
    labels_left, k = own[rows], counts[own[rows]].to(wide.dtype)
    place = torch.arange(len(rows), device=wide.device), labels_left
    distances[place] *= (k / (k - 1)).square()
    return LeftOut(distances, labels_left, rows)


def has_pairs(labels: Tensor) -> bool:
    """Whether a class has two examples, so that one can be left out."""
    return len(labels) > len(labels.unique())


def nothing_left_out(features: Tensor, labels: Tensor) -> LeftOut:
    """The distances of no example, where each is the only one of its class.

    Args:
        features: shape (n, d).
        labels: shape (n,).

    Raises:
        NotFiniteError: as `leave_one_out_distances`.
    """
    wide = _wide(features)
    none = torch.zeros(0, dtype=torch.long)
    return LeftOut(wide.new_zeros(0, len(labels.unique())), none, none)


def margins(left: LeftOut) -> Tensor:
    """How much nearer an example is to its own class than to the nearest other class: (o - g) / (o + g), in -1 to 1.

    g is the distance to the own class and o the smallest distance to another class; above 0 the prediction is correct.
    If both distances are 0, the result is 0.

    Args:
        left: the result of `leave_one_out_distances`.

    Returns:
        Shape (m,), float64.
    """
    own = left.distances.gather(1, left.labels[:, None])[:, 0]
    other = left.distances.scatter(1, left.labels[:, None], torch.inf).amin(1)
    total = own + other
    return torch.where(total > 0, (other - own) / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)


def log_likelihoods(left: LeftOut, betas: Tensor = BETAS) -> Tensor:
    """Log-probability that class means assign to the class of each example, with the best beta.

    Args:
        left: the result of `leave_one_out_distances`.
        betas: the values of beta to choose from.

    Returns:
        Shape (m,), float64.
    """
    return log_probabilities(left, betas).gather(1, left.labels[:, None])[:, 0]


def log_probabilities(left: LeftOut, betas: Tensor = BETAS) -> Tensor:
    """Log-probability that class means assign to each class of each example, with the best beta.

    p_ic is proportional to exp(-beta g_ic / s^2), where s^2 is the mean distance to the own class and beta is the
    value with the largest likelihood over all left-out examples.

    Args:
        left: the result of `leave_one_out_distances`.
        betas: the values of beta to choose from.

    Returns:
        Shape (m, C), float64.
    """
    own = left.distances.gather(1, left.labels[:, None])
    scale = own.mean().clamp_min(torch.finfo(own.dtype).tiny)
    logits = -betas.to(own.device)[:, None, None] * (left.distances / scale)  # (betas, m, C)
    logs = logits.log_softmax(-1)
    chosen = logs.gather(2, left.labels[None, :, None].expand(len(betas), -1, 1))[..., 0]
    return logs[chosen.sum(1).argmax()]


def bayesian_bootstrap(examples: int, draws: int, seed: int) -> Tensor:
    """Weights of examples for `draws` bootstraps, each from Dirichlet(1, ..., 1) (Rubin 1981).

    Args:
        examples: number of examples.
        draws: number of bootstraps.
        seed: the random seed; it gives the same weights on every device.

    Returns:
        Shape (draws, examples), float64, on the CPU; rows sum to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    waits = torch.empty(draws, examples, dtype=torch.float64).exponential_(generator=generator)
    return waits / waits.sum(1, keepdim=True)


def interval(values: Tensor, bootstraps: Tensor) -> tuple[float, float]:
    """The middle 95% of a mean over bootstraps of the examples.

    Args:
        values: shape (m,).
        bootstraps: the result of `bayesian_bootstrap`, shape (draws, m).
    """
    low, high = torch.quantile(bootstraps @ values.to("cpu", torch.float64), torch.tensor([0.025, 0.975]).double())
    return float(low), float(high)


def _wide(features: Tensor) -> Tensor:
    device = "cpu" if features.device.type == "mps" else features.device  # which knows no float64
    wide = features.detach().to(device, torch.float64)
    broken = int((~wide.isfinite()).sum())
    if broken:
        raise NotFiniteError(f"{broken} of {wide.numel()} features are NaN or infinite")
    return wide
