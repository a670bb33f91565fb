"""Forward passes with a merged weight, with derivatives in bounded memory."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import without_autocast


Form = Literal["stacked", "tokens", "weight"]


def dense_is_smaller(rank: int, in_features: int, out_features: int) -> bool:
    """Whether a dense weight has no more numbers than the stacked factors, and so costs no more per token."""
    return in_features * out_features <= rank * (in_features + out_features)


def cheapest_form(
    tokens: int, rank: int, in_features: int, out_features: int, *, trains_input: bool, trains_weights: bool
) -> Form:
    """The way to compute a composed linear layer with the fewest multiplications in addition to the base layer's own.

    With T tokens, in = i, out = o, forward and backward:

        stacked  2 T R (i + o)              hidden states in rank space
        tokens   2 R i o + T R (i + o)      W merged twice; du from (g B) * (x A^T), summed over the tokens
        weight   3 R i o + T i o            W merged twice; du from the gradient of the weight, g^T x

    If the input needs no gradient, the backward pass merges nothing; if the weights need none, du is not computed.

    Args:
        tokens: rows of the input, T.
        rank: sum of the ranks, R.
        in_features: input features of the layer.
        out_features: output features of the layer.
        trains_input: whether the input needs a gradient.
        trains_weights: whether the mixing weights need a gradient.

    Returns:
        `"stacked"`, `"tokens"` or `"weight"`; for constant mixing weights `"tokens"` means the merged weight.
    """
    passes = 2 if trains_input else 1
    through_factors = tokens * rank * (in_features + out_features)
    merging = rank * in_features * out_features
    stacked, merged = passes * through_factors, passes * merging
    if not trains_weights:
        return "tokens" if merged < stacked else "stacked"
    if not trains_input:
        stacked += tokens * rank * out_features
    over_tokens = merged + through_factors
    over_weight = merged + merging + tokens * in_features * out_features
    if stacked <= min(over_tokens, over_weight):
        return "stacked"
    return "tokens" if over_tokens <= over_weight else "weight"


def merged_weight(weight: Tensor, A: Tensor, B: Tensor, u: Tensor | None = None) -> Tensor:
    """W0 + B diag(u) A in the dtype of its parts, for use in one forward or backward pass.

    Args:
        weight: W0, shape (out, in).
        A: stacked factors, shape (R, in).
        B: stacked scaled factors, shape (out, R).
        u: weights in rank space, shape (R,). None: they are folded into `B`.

    Returns:
        Shape (out, in).
    """
    return torch.addmm(weight, B if u is None else B * u.to(B.dtype), A)


def merged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    u: Tensor | None = None,
    form: Form = "tokens",
) -> Tensor:
    """Compute x (W0 + B diag(u) A)^T + bias with one product over the tokens, differentiable in x, bias and u.

    The merged weight is computed again for the backward pass, so that saved memory does not grow with N; if it is not
    larger than the factors, it is saved instead. A, B and the base weight get no gradients.

    Args:
        x: input, shape (..., in).
        weight: W0, shape (out, in), in float32 or wider, because in 16 bits a small update would be lost.
        bias: bias of the base layer, shape (out,), or None.
        A: stacked factors, shape (R, in), in the dtype of `weight`.
        B: stacked scaled factors, shape (out, R).
        u: weights in rank space, shape (R,). None: they are folded into `B`.
        form: how the gradient of u is computed, `"tokens"` or `"weight"`; see `cheapest_form`.

    Returns:
        Shape (..., out).
    """
    if u is not None:
        u = u.to(B.dtype)
    with torch.no_grad():
        merged = merged_weight(weight, A, B, u)
    if torch.is_grad_enabled() and (x.requires_grad or (u is not None and u.requires_grad)):
        keep = dense_is_smaller(A.shape[0], weight.shape[1], weight.shape[0])
        return _MergedLinear.apply(x, merged, weight, bias, A, B, u, form, keep)
    return F.linear(x, merged, bias)


class _MergedLinear(torch.autograd.Function):
    """`merged_linear`. Its backward pass is differentiable, so second derivatives are correct."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        merged: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        u: Tensor | None,
        form: Form,
        keep: bool,
    ) -> Tensor:
        return F.linear(x, merged, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, merged, weight, _, A, B, u, ctx.form, keep = inputs
        trains_weights = ctx.needs_input_grad[6]
        ctx.save_for_backward(x if trains_weights else None, merged if keep else None, weight, A, B, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, weight, A, B, u = ctx.saved_tensors
        grad_x = grad_bias = grad_u = None
        if ctx.needs_input_grad[0]:
            if merged is None or torch.is_grad_enabled():  # a saved weight is not differentiable in u
                merged = merged_weight(weight, A, B, u)
            grad_x = grad @ merged
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0)
        if ctx.needs_input_grad[6]:
            tokens = x.reshape(-1, x.shape[-1])
            if ctx.form == "tokens":
                grad_u = ((tokens @ A.t()) * (rows @ B)).sum(0)
            else:
                grad_u = ((B.t() @ (rows.t() @ tokens)) * A).sum(1)
        return grad_x, None, None, grad_bias, None, None, grad_u, None, None


def composed_parameter(
    weight: Tensor, A: Tensor, B: Tensor, u: Tensor | None = None, is_transposed: bool = False
) -> Tensor:
    """W0 + B diag(u) A for every expert, rounded once to the dtype of W0, differentiable in W0 and u.

    Only the factors themselves are saved for the backward pass.

    Args:
        weight: W0, shape (out, in) or (E, out, in).
        A: stacked factors, shape (R, in) or (E, R, in), in the dtype of `weight`.
        B: stacked scaled factors, shape (out, R) or (E, out, R).
        u: weights in rank space, shape (R,). None: they are folded into `B`.
        is_transposed: whether W0 has the shape (E, in, out) instead.

    Returns:
        Shape and dtype of `weight`.
    """
    return _ComposedParameter.apply(weight, A, B, None if u is None else u.to(B.dtype), is_transposed)


class _ComposedParameter(torch.autograd.Function):
    """`composed_parameter`. Its backward pass is differentiable, so second derivatives are correct."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, A: Tensor, B: Tensor, u: Tensor | None, is_transposed: bool) -> Tensor:
        scaled = B if u is None else B * u
        left, right = (A.mT, scaled.mT) if is_transposed else (scaled, A)
        with without_autocast(weight.device.type):
            if weight.dim() == 2:
                return torch.addmm(weight, left, right)
            return torch.baddbmm(weight, left, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, A, B, _, ctx.is_transposed = inputs
        ctx.save_for_backward(A, B)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_u = None
        if ctx.needs_input_grad[3]:
            A, B = ctx.saved_tensors
            of_delta = grad.mT if ctx.is_transposed else grad
            with without_autocast(grad.device.type):
                if A.shape[-1] <= B.shape[-2]:  # the smaller intermediate result
                    products, dim = (B.mT @ of_delta) * A, -1
                else:
                    products, dim = (of_delta @ A.mT) * B, -2
            grad_u = products.sum(dim)
            grad_u = grad_u if grad_u.dim() == 1 else grad_u.sum(0)
        return grad if ctx.needs_input_grad[0] else None, None, None, grad_u, None
