"""Leave-one-out scores of features: how well the class means of the other examples name the class of each example.

Pure functions on tensors. How features come out of a model is in `passes.py`, how scores become weights in
`weights.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


BETAS = torch.logspace(math.log10(0.16), math.log10(48.0), 13, dtype=torch.float64)
"""How sharp the predictions of class means may be: 13 values, equally far apart in their logarithm."""


class LeftOut(NamedTuple):
    """What is known of the examples that can be left out: those that are not the only one of their class.

    Attributes:
        distances: squared distance of each such example to every class mean, its own class's without the example
            itself, shape (m, C), float64.
        labels: which column is its own, shape (m,).
        rows: which examples they are, shape (m,).
    """

    distances: Tensor
    labels: Tensor
    rows: Tensor


def leave_one_out_distances(features: Tensor, labels: Tensor) -> LeftOut:
    """Squared distances to the class means, where no example has a part in the mean that it is compared with.

    With mu_y the mean of a class of k examples, x_i among them, the mean of the others lies k / (k - 1) times as far
    from x_i: its squared distance is (k / (k - 1))^2 |x_i - mu_y|^2. So one pass over the examples is enough.

    Args:
        features: shape (n, d), any real dtype; computed with in float64.
        labels: classes, shape (n,), any integers.

    Returns:
        Distances, columns in the order of the sorted labels.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, fewer than two classes, or no class with two
            examples.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features must have the shape (examples, width) and labels (examples,), got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}"
        )
    wide = _wide(features)
    classes, own, counts = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"there is one class among {len(labels)} examples: nothing can be told apart")
    if int(counts.max()) < 2:
        raise ValueError(f"each of the {len(classes)} classes has one example: nothing can be left out")
    own, counts = own.to(wide.device), counts.to(wide.device)
    sums = torch.zeros(len(classes), wide.shape[1], dtype=wide.dtype, device=wide.device).index_add_(0, own, wide)
    rows = (counts[own] > 1).nonzero().flatten()
    # Differences and not inner products: features that share a large mean would lose their digits.
    distances = torch.cdist(wide[rows], sums / counts[:, None], compute_mode="donot_use_mm_for_euclid_dist").square()
    labels_left, k = own[rows], counts[own[rows]].to(wide.dtype)
    place = torch.arange(len(rows), device=wide.device), labels_left
    distances[place] *= (k / (k - 1)).square()
    return LeftOut(distances, labels_left, rows)


def margins(left: LeftOut) -> Tensor:
    """How much nearer an example is to its own class than to the next: (o - g) / (o + g), between -1 and 1.

    g is the distance to the own class and o the least one to another; above 0 the class is named rightly. An example
    that is at no distance of both gets 0.

    Args:
        left: of `leave_one_out_distances`.

    Returns:
        Shape (m,), float64.
    """
    own = left.distances.gather(1, left.labels[:, None])[:, 0]
    other = left.distances.scatter(1, left.labels[:, None], torch.inf).amin(1)
    total = own + other
    return torch.where(total > 0, (other - own) / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)


def log_likelihoods(left: LeftOut, betas: Tensor = BETAS) -> Tensor:
    """Logarithm of the probability that class means give to the class of each example, for the best of the betas.

    p_ic is proportional to exp(-beta g_ic / s^2), with s^2 the mean distance to the own class, and beta the value
    with the largest likelihood of all examples that were left out.

    Args:
        left: of `leave_one_out_distances`.
        betas: to choose from.

    Returns:
        Shape (m,), float64.
    """
    own = left.distances.gather(1, left.labels[:, None])
    scale = own.mean().clamp_min(torch.finfo(own.dtype).tiny)
    logits = -betas.to(own.device)[:, None, None] * (left.distances / scale)  # (betas, m, C)
    chosen = logits.log_softmax(-1).gather(2, left.labels[None, :, None].expand(len(betas), -1, 1))[..., 0]
    return chosen[chosen.sum(1).argmax()]


def bayesian_bootstrap(examples: int, draws: int, seed: int) -> Tensor:
    """Weights of examples for `draws` bootstraps, Dirichlet(1, ..., 1) each (Rubin 1981).

    Args:
        examples: how many.
        draws: how many bootstraps.
        seed: the same seed gives the same weights on every device.

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
        bootstraps: shape (draws, m), of `bayesian_bootstrap`.
    """
    low, high = torch.quantile(bootstraps @ values.to("cpu", torch.float64), torch.tensor([0.025, 0.975]).double())
    return float(low), float(high)


def _wide(features: Tensor) -> Tensor:
    device = "cpu" if features.device.type == "mps" else features.device  # which knows no float64
    wide = features.detach().to(device, torch.float64)
    broken = int((~wide.isfinite()).sum())
    if broken:
        raise ValueError(f"{broken} of {wide.numel()} features are NaN or infinite")
    return wide
