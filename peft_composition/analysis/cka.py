"""Linear CKA of feature matrices, as a whole or in batches; pure functions on tensors."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


Estimator = Literal["biased", "unbiased"]
# With two examples every biased CKA is 1; the unbiased formula divides by n - 3.
FEWEST_EXAMPLES = {"biased": 3, "unbiased": 4}
# Relative to the size of the summands in float64: smaller values count as rounding errors.
ROUNDING = 1e-12


def linear_hsic(X: Tensor, Y: Tensor, estimator: Estimator = "unbiased") -> float:
    """The Hilbert-Schmidt independence criterion with linear kernels: the squared covariance of two sets of features.

    `"biased"` is tr(K H L H) / (n - 1)^2 with K = X X^T and L = Y Y^T (Gretton et al. 2005). `"unbiased"` is HSIC_1 of
    Song et al. 2012, whose expectation over samples is the population's value; it can be negative. Both are computed
    in float64 from centred features, with Gram matrices or feature products, whichever is cheaper.

    Args:
        X: shape (n, p), any real dtype.
        Y: shape (n, q), rows of the same examples.
        estimator: `"biased"` (n at least 3) or `"unbiased"` (default; n at least 4).

    Returns:
        The estimate.

    Raises:
        ValueError: shapes do not fit, there are too few examples, values are not finite, or the estimator is unknown.
    """
    return hsic(Features(X, "X"), Features(Y, "Y"), estimator)


def linear_cka(X: Tensor, Y: Tensor, estimator: Estimator = "biased") -> float:
    """Linear centred kernel alignment, HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) (Kornblith et al. 2019).

    It does not change when X or Y is shifted, rotated or scaled as a whole. The biased value is between 0 and 1 and
    approaches 1 for any features if there are fewer examples than features. The unbiased value (Nguyen et al. 2020)
    does not: it is around 0 for unrelated features. It can be negative, and can slightly exceed 1.

    Args:
        X: shape (n, p), any real dtype.
        Y: shape (n, q), rows of the same examples.
        estimator: estimator of the three HSIC, `"biased"` (default; the paper's formula) or `"unbiased"`.

    Returns:
        The similarity.

    Raises:
        ValueError: as `linear_hsic`; or X or Y has no variation.

    Example:
        >>> linear_cka(X, 3 * X)
        1.0
    """
    x, y = Features(X, "X"), Features(Y, "Y")
    return alignment(hsic(x, y, estimator), x.own_hsic(estimator), y.own_hsic(estimator), ("X", "Y"))


class MinibatchCKA:
    """Linear CKA from batches, which are not kept: the three unbiased HSIC are averaged over the batches.

    Unlike averages of the biased HSIC, these averages do not depend on the batch size, except for noise (Nguyen et al.
    2020).

    Example:
        >>> cka = MinibatchCKA()
        >>> for X, Y in batches:
        ...     cka.update(X, Y)
        >>> cka.value()
    """

    def __init__(self) -> None:
        self.batches = 0
        self._sums = 0.0, 0.0, 0.0
        self._names = "X", "Y"

    def update(self, X: Tensor, Y: Tensor) -> None:
        """Add one batch.

        Args:
            X: shape (n, p), n at least 4.
            Y: shape (n, q), rows of the same examples.

        Raises:
            ValueError: as `linear_hsic`.
        """
        self._add(Features(X, "X"), Features(Y, "Y"))

    def value(self) -> float:
        """The similarity over all batches so far.

        Raises:
            ValueError: there was no batch, or X or Y has no variation in any batch.
        """
        if not self.batches:
            raise ValueError("there was no batch to compare")
        return alignment(*self._sums, self._names)

    def _add(self, x: Features, y: Features) -> None:
        terms = hsic(x, y, "unbiased"), x.own_hsic("unbiased"), y.own_hsic("unbiased")
        xy, xx, yy = (before + term for before, term in zip(self._sums, terms))
        self._sums, self._names = (xy, xx, yy), (x.name, y.name)
        self.batches += 1


class Features:
    """Centred features of n examples in float64, with cached intermediate results.

    Args:
        X: shape (n, p).
        name: name of the features in errors.
    """

    def __init__(self, X: Tensor, name: str) -> None:
        if X.dim() != 2 or X.numel() == 0 or X.is_complex():
            raise ValueError(
                f"{name} must be real, of the shape (examples, features) with at least one of each, got "
                f"{tuple(X.shape)} of {X.dtype}"
            )
        device = "cpu" if X.device.type == "mps" else X.device  # which knows no float64
        wide = X.detach().to(device, torch.float64)
        broken = int((~wide.isfinite()).sum())
        if broken:
            raise ValueError(f"{name} has {broken} values (of {wide.numel()}) that are NaN or infinite")
        self.name = name
        self.centred = wide - wide.mean(0)  # (n, p)
        if self.centred.abs().max() <= ROUNDING * wide.abs().max():
            self.centred = torch.zeros_like(wide)
        self.norms = self.centred.square().sum(1)  # (n,), the diagonal of the Gram matrix
        self._own_hsic: dict[str, float] = {}

    @cached_property
    def gram(self) -> Tensor:
        """The Gram matrix, shape (n, n)."""
        return self.centred @ self.centred.t()

    def own_hsic(self, estimator: Estimator) -> float:
        """HSIC(X, X); zero if it is only rounding errors."""
        if estimator not in self._own_hsic:
            value = hsic(self, self, estimator)
            self._own_hsic[estimator] = value if value > ROUNDING * float(self.norms.mean()) ** 2 else 0.0
        return self._own_hsic[estimator]


def hsic(x: Features, y: Features, estimator: Estimator) -> float:
    """HSIC of centred features; centring changes neither estimator, except for rounding.

    Centring also shortens HSIC_1. Its kernels have an empty diagonal, K' = K - diag(k) with k the squared norms of the
    rows, and the rows of K sum to zero, so that K' 1 = -k:

        tr(K' L') = tr(K L) - k.l      1^T K' 1 = -sum(k)      1^T K' L' 1 = k.l
    """
    n = len(x.norms)
    if len(y.norms) != n:
        raise ValueError(f"{x.name} and {y.name} must have rows of the same examples, got {n} and {len(y.norms)}")
    if estimator not in FEWEST_EXAMPLES:
        raise ValueError(f"estimator must be 'biased' or 'unbiased', got {estimator!r}")
    if n < FEWEST_EXAMPLES[estimator]:
        raise ValueError(f"the {estimator} estimator needs {FEWEST_EXAMPLES[estimator]} examples, {x.name} has {n}")
    cross = _trace_of_product(x, y)
    if estimator == "biased":
        return cross / (n - 1) ** 2
    diagonals = float(x.norms @ y.norms)
    totals = float(x.norms.sum()) * float(y.norms.sum())
    return (cross - diagonals * n / (n - 2) + totals / ((n - 1) * (n - 2))) / (n * (n - 3))


def _trace_of_product(x: Features, y: Features) -> float:
    """tr(K L), which is |X^T Y|^2 in the Frobenius norm."""
    (n, p), q = x.centred.shape, y.centred.shape[1]
    # Multiplications divided by n, including HSIC(X, X) and HSIC(Y, Y): Gram matrices are computed once for all three.
    if n * (p + q) <= p * p + p * q + q * q:
        return float((x.gram * y.gram).sum())
    return float((x.centred.t() @ y.centred).square().sum())


def alignment(xy: float, xx: float, yy: float, names: tuple[str, str]) -> float:
    """HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) of the three values; an error names features without variation."""
    for name, own in zip(names, (xx, yy)):
        if own <= 0:
            raise ValueError(
                f"{name} has no variation to compare: all examples have the same features (or, for the unbiased "
                "estimator, are equally far from each other), and CKA would divide by zero"
            )
    return xy / (math.sqrt(xx) * math.sqrt(yy))
