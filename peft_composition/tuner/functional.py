"""The mathematics of a composition as pure functions on tensors: mixing weights, forward passes, weight deltas.

The factors of a module come stacked. With N upstream adapters of ranks r_1..r_N and R = sum of the ranks,

    A = [A_1; ...; A_N]              (R, in)
    B = [s_1 B_1, ..., s_N B_N]      (out, R), the LoRA scale s_n folded in
    W = W0 + B diag(u) A             u in R^R repeats w_n over the r_n rows of adapter n

so that sum_n w_n s_n B_n A_n costs two matrix products for any N, without cross terms B_i A_j. A linear layer can
compute the same output and gradients in three ways, whose costs `cheapest_form` compares: with stacked products beside
the base layer, or with the merged weight W, where the gradient of u is taken over the tokens or through the gradient
of W.

A parameter that its module uses without calling a layer (the fused experts of a mixture, the projections of
`nn.MultiheadAttention`) is always merged. With E experts the factors are A (E, R, in) and B (E, out, R).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


LEAST_SHARE = 1e-6  # less is what rounding leaves of the sum 1


def starting_logits(weights: Sequence[float], normalization: str) -> list[float]:
    """The initial logits v0 of a training, for which `normalize(v0)` equals `weights`.

    Args:
        weights: one starting weight per adapter. For `"softmax"` non-negative with a sum of at most 1; a zero gives
            the logit -inf, whose gradient is zero: such an adapter is left out and stays out.
        normalization: `"softmax"` or `"none"`.

    Returns:
        N floats; one more, the base model's, where the weights of `"softmax"` leave it a share.
    """
    if normalization == "none":
        return list(weights)
    rest = 1 - math.fsum(weights)
    base = [math.log(rest)] if rest > LEAST_SHARE else []
    return [math.log(weight) if weight > 0 else -math.inf for weight in weights] + base


def normalize(logits: Tensor, normalization: str, base: Tensor | None = None) -> Tensor:
    """Mixing weights w from logits v: `softmax(v)`, or `v` itself for `"none"`.

    The base model is an adapter whose update is zero. Where it has a share, its logit is a constant: N logits that
    move against it reach all shares that there are.

    Args:
        logits: shape (N,).
        normalization: `"softmax"` or `"none"`.
        base: for `"softmax"`, the base model's logit, shape (1,), or (0,) where it has no share. Default: none.

    Returns:
        Shape (N,), in float32 or wider.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if normalization == "none":
        return logits
    if base is None or not base.numel():
        return torch.softmax(logits, dim=-1)
    return torch.softmax(torch.cat([logits, base.to(logits.dtype)]), dim=-1)[:-1]


def places_of_ranks(ranks: Sequence[int]) -> tuple[int, list[int] | None]:
    """The positions of the stacked rows for `spread`, if every adapter gets as many rows as the largest one.

    Args:
        ranks: rank of every adapter.

    Returns:
        The largest rank, and the position of each stacked row; None instead of positions if all ranks are equal.
    """
    widest = max(ranks)
    if min(ranks) == widest:
        return widest, None
    return widest, [number * widest + row for number, rank in enumerate(ranks) for row in range(rank)]


def spread(weights: Tensor, widest: int, places: Tensor | None) -> Tensor:
    """Repeat the weight of every adapter over its rows in the stacked rank dimension.

    No position is read twice, so that the gradient of a weight is a sum in a fixed order. It is bit-reproducible even
    on a GPU, where the derivative of repeated indexing adds in any order.

    Args:
        weights: mixing weights, shape (N,).
        widest: the largest rank.
        places: the position of each stacked row in (N, widest), int64 of shape (R,); None if all ranks are equal. See
            `places_of_ranks`.

    Returns:
        u, shape (R,).
    """
    room = weights[:, None].expand(-1, widest).reshape(-1)
    return room if places is None else room.index_select(0, places)


def fold(A: Tensor, B: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """A and B diag(u): folds constant mixing weights, so that forward passes need not multiply by them.

    With many adapters, small weights could make entries of B underflow in float16. There, A takes a part of the
    weights; see `fold_evenly`.

    Args:
        A: stacked factors, shape (R, in) or (R, in, *kernel).
        B: stacked scaled factors, shape (out, R) or (out, R, 1, ...).
        u: weights in rank space, shape (R,).

    Returns:
        `A` (in float16 a new tensor), and a new tensor like `B`, multiplied in float32 or wider and rounded once.
    """
    wide = torch.promote_types(B.dtype, torch.float32)
    if B.dtype == torch.float16:
        rows, columns = fold_evenly(A, B, u, wide)
        return rows.to(A.dtype), columns.to(B.dtype)
    return A, (B.to(wide) * u.to(wide).reshape(-1, *(1,) * (B.dim() - 2))).to(B.dtype)


def fold_evenly(A: Tensor, B: Tensor, u: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Factors whose plain product is B diag(u) A, balanced for float16.

    The weights are multiplied into B. Every row of A and its column of B are then scaled against each other by a power
    of two, until their largest entries have about the same size. Otherwise weights, LoRA scales and trained factors
    would accumulate in B, whose entries could underflow in float16. A power of two only changes exponents: A keeps its
    digits, and B is rounded once.

    Args:
        A: shape (R, in) or, for a convolution, (R, in, *kernel).
        B: shape (out, R) or (out, R, 1, ...).
        u: weights in rank space, shape (R,).
        dtype: dtype of the computation.

    Returns:
        A and B in their original shapes, in `dtype`.
    """
    rows, columns = A.to(dtype).flatten(1), B.to(dtype).flatten(1) * u.to(dtype)
    largest = rows.abs().amax(1), columns.abs().amax(0)
    ratio = torch.where((largest[0] > 0) & (largest[1] > 0), largest[1] / largest[0], 1.0)
    shift = torch.exp2(torch.log2(ratio).div(2).round())
    return (rows * shift[:, None]).reshape(A.shape), (columns / shift).reshape(B.shape)


def resolved(delta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight update rounded to a dtype, and the factor for its output.

    With many adapters, an update can underflow in float16. There it is stored multiplied by a power of two, with
    entries below 2^-4 like those of weights, so that its output overflows no sooner than that of a weight.

    Args:
        delta: any shape, float32 or wider.
        dtype: dtype of the result.

    Returns:
        The update, and a power of two without dimensions; None if that is 1.
    """
    if dtype != torch.float16:
        return delta.to(dtype), None
    shift = torch.exp2((-4 - torch.log2(delta.abs().amax())).floor().clamp(0, 24))  # float16 ends at 2^-24
    return (delta * shift).to(dtype), (1 / shift).to(dtype)


def linear_delta_output(x: Tensor, A: Tensor, B: Tensor, u: Tensor | None = None) -> Tensor:
    """Compute x (B diag(u) A)^T without forming the product.

    Args:
        x: input, shape (..., in).
        A: stacked factors, shape (R, in).
        B: stacked scaled factors, shape (out, R).
        u: weights in rank space, shape (R,). None: they are folded into `B`.

    Returns:
        Shape (..., out), to be added to the output of the base layer.
    """
    hidden = F.linear(x, A)
    return F.linear(hidden if u is None else hidden * u.to(hidden.dtype), B)


def conv_delta_output(
    x: Tensor, A: Tensor, B: Tensor, u: Tensor | None, convolve: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The convolution of x with the kernel B diag(u) A, as a convolution with A and a 1x1 convolution with B.

    Args:
        x: input, shape (batch, in, *space).
        A: stacked kernels, shape (R, in, *kernel).
        B: stacked scaled factors, shape (out, R, 1, ...).
        u: weights in rank space, shape (R,). None: they are folded into `B`.
        convolve: (input, kernel) -> output, with the stride, padding and dilation of the base layer.

    Returns:
        Shape (batch, out, *space').
    """
    hidden = convolve(x, A)
    if u is not None:
        hidden = hidden * u.to(hidden.dtype).reshape(-1, *(1,) * (A.dim() - 2))
    pointwise = (F.conv1d, F.conv2d, F.conv3d)[A.dim() - 3]
    return pointwise(hidden, B)


def embedding_delta_output(tokens: Tensor, A: Tensor, B: Tensor, u: Tensor | None = None) -> Tensor:
    """Rows of (B diag(u) A)^T selected by token.

    Args:
        tokens: int64, any shape (...).
        A: stacked factors, shape (R, vocabulary).
        B: stacked scaled factors, shape (dim, R).
        u: weights in rank space, shape (R,). None: they are folded into `B`.

    Returns:
        Shape (..., dim).
    """
    hidden = F.embedding(tokens, A.t())
    return F.linear(hidden if u is None else hidden * u.to(hidden.dtype), B)


def delta_weight(A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """The weight update B diag(u) A, accumulated in float32 or wider.

    Args:
        A: shape (R, in) or, for a convolution, (R, in, *kernel).
        B: shape (out, R) or (out, R, 1, ...).
        u: weights in rank space, shape (R,).

    Returns:
        Shape (out, in) or (out, in, *kernel), in float32 or float64.
    """
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    with without_autocast(A.device.type):
        product = (B.flatten(1).to(dtype) * u.to(dtype)) @ A.flatten(1).to(dtype)
    return product.reshape(B.shape[0], *A.shape[1:])


def parameter_delta(A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """The update B diag(u) A of a parameter, for every expert, accumulated in float32 or wider.

    Args:
        A: shape (R, in) or (E, R, in).
        B: shape (out, R) or (E, out, R).
        u: weights in rank space, shape (R,).

    Returns:
        Shape (out, in) or (E, out, in), in float32 or float64.
    """
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    with without_autocast(A.device.type):
        return (B.to(dtype) * u.to(dtype)) @ A.to(dtype)


def delta_bias(bias: Tensor, weights: Tensor) -> Tensor:
    """sum_n w_n s_n b_n for adapters trained with `lora_bias`.

    Args:
        bias: scaled biases, zero rows for adapters without one, shape (N, out).
        weights: mixing weights, shape (N,).

    Returns:
        Shape (out,), in the dtype of `bias`.
    """
    wide = torch.promote_types(bias.dtype, torch.float32)
    products = weights.to(wide)[:, None] * bias.to(wide)  # not a matrix product, which autocast would round
    return products.sum(0).to(bias.dtype)


def add_delta(base: Tensor, delta: Tensor, sign: int = 1) -> Tensor:
    """Add sign * delta to `base`, summed in the wider of the two dtypes and rounded once to the dtype of `base`.

    Args:
        base: weight of the base layer, any float dtype.
        delta: the update, same shape.
        sign: 1 to merge, -1 to unmerge.

    Returns:
        A new tensor like `base`.
    """
    dtype = torch.promote_types(base.dtype, delta.dtype)
    return torch.add(base.to(dtype), delta.to(device=base.device, dtype=dtype), alpha=sign).to(base.dtype)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Disable autocast, which would round merged weights; some devices ("meta") do not have it."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
