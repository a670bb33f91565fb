"""How large and how alike the updates of the adapters are, and what each is of the mix; from the factors alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..evidence.passes import Composition
from ..tuner.factors import Factors


@dataclass(frozen=True)
class Updates:
    """The weight updates `s_n B_n A_n` of N adapters, over all composed modules; biases are left out.

    Attributes:
        norms: of each adapter's update, at weight 1.
        cosines: of each pair of adapters, N rows of N: 1 the same direction, 0 unrelated, -1 opposite. 0 for an update
            that is zero.
        shares: which part of the mix's update is each adapter's, by its projection; they sum to 1.
    """

    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...]


def updates_in(composition: Composition) -> Updates:
    """The updates of a composition's adapters.

    Raises:
        RuntimeError: the factors are sharded or offloaded.
    """
    count = len(composition.config.adapter_names)
    inner = torch.zeros(count, count, dtype=torch.float64)
    mixed = torch.zeros(count, count, dtype=torch.float64)
    for layer in composition.layers.values():
        with layer.onloaded([composition.name]):
            products = inner_products(layer.whole_factors(composition.name), count)
        weights = layer.mixing_weights(composition.name).detach().to("cpu", torch.float64)
        inner += products
        mixed += products * weights[:, None] * weights[None, :]
    norms = inner.diagonal().clamp_min(0).sqrt()
    scale = norms[:, None] * norms[None, :]
    cosines = torch.where(scale > 0, inner / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0).clamp(-1, 1)
    total = float(mixed.sum())
    shares = mixed.sum(1) / total if total > 0 else torch.zeros(count)
    rows = cast(Sequence[Sequence[float]], cosines.tolist())
    return Updates(tuple(norms.tolist()), tuple(tuple(row) for row in rows), tuple(shares.tolist()))


def inner_products(factors: Factors, count: int) -> Tensor:
    """<s_i B_i A_i, s_j B_j A_j> of the adapters in one module, shape (N, N), float64, without forming any product.

    Args:
        factors: stacked, A (R, in, ...) and B (out, R, ...), or with experts before them.
        count: N.
    """
    wide = torch.promote_types(factors.A.dtype, torch.float32)
    A, B = factors.A.detach().to(wide), factors.B.detach().to(wide)
    if not factors.has_experts:
        A, B = A.flatten(1)[None], B.flatten(1)[None]
    # tr(A_i' B_i' B_j A_j), summed over the ranks of i and j, and over experts
    of_ranks = ((A @ A.mT).double() * (B.mT @ B).double()).sum(0).cpu()  # (R, R)
    owner = torch.repeat_interleave(torch.arange(count), torch.tensor(factors.ranks))
    rows = torch.zeros(count, of_ranks.shape[1], dtype=torch.float64).index_add_(0, owner, of_ranks)
    return torch.zeros(count, count, dtype=torch.float64).index_add_(1, owner, rows)
