"""Turns a composed update into factors of another rank: exact, padded, or truncated by an SVD of the factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def singular_values(A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """The singular values of B diag(u) A, flattened to a matrix, without forming it.

    Args:
        A: shape (R, in) or, for a convolution, (R, in, *kernel).
        B: shape (out, R) or (out, R, 1, ...).
        u: weights in rank space, shape (R,).

    Returns:
        Shape (min(R, out, in),), largest first, in float64.
    """
    _, R_A = torch.linalg.qr(A.double().flatten(1).t(), mode="r")
    _, R_B = torch.linalg.qr(B.double().flatten(1), mode="r")
    return torch.linalg.svdvals(_core(R_A, R_B, u))


def truncate(A: Tensor, B: Tensor, u: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of rank `rank` whose product is nearest to B diag(u) A, flattened to a matrix (Eckart-Young).

    With A^T = Q_A R_A and B = Q_B R_B the update is Q_B (R_B diag(u) R_A^T) Q_A^T. Its singular vectors follow from
    those of the core in brackets, which is at most R x R; the update itself is never formed.

    Args:
        A: shape (R, in) or, for a convolution, (R, in, *kernel).
        B: shape (out, R) or (out, R, 1, ...).
        u: weights in rank space, shape (R,).
        rank: 1 to min(R, out, in).

    Returns:
        A of shape (rank, in, *kernel), B of shape (out, rank, 1, ...) and all singular values of the update, largest
        first; in float64. A and B are each scaled by the square root of the singular values.
    """
    Q_A, R_A = torch.linalg.qr(A.double().flatten(1).t())
    Q_B, R_B = torch.linalg.qr(B.double().flatten(1))
    U, S, Vh = torch.linalg.svd(_core(R_A, R_B, u), full_matrices=False)
    root = S[:rank].sqrt()
    rows = (root[:, None] * Vh[:rank]) @ Q_A.t()
    columns = Q_B @ (U[:, :rank] * root)
    return rows.reshape(rank, *A.shape[1:]), columns.reshape(B.shape[0], rank, *B.shape[2:]), S


def _core(R_A: Tensor, R_B: Tensor, u: Tensor) -> Tensor:
    return (R_B * u.double()) @ R_A.t()


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """The smallest rank, at least 1, whose squared singular values reach a share of their total.

    Args:
        singular_values: largest first.
        energy: the share, above 0 and at most 1. With 1, only rounding errors are cut.

    Returns:
        The rank.
    """
    reached = singular_values.double().square().cumsum(0)
    return 1 + int((reached < energy * reached[-1]).sum())


def norm_of_delta(A: Tensor, B: Tensor, u: Tensor) -> float:
    """The Frobenius norm of B diag(u) A, from the R x R products of the factors with themselves.

    Args:
        A: shape (R, in) or, for a convolution, (R, in, *kernel).
        B: shape (out, R) or (out, R, 1, ...).
        u: weights in rank space, shape (R,).
    """
    rows, columns = A.double().flatten(1), B.double().flatten(1) * u.double()
    return math.sqrt(max(0.0, float(((rows @ rows.t()) * (columns.t() @ columns)).sum())))
