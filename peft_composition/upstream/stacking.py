"""Reads the matched factors and stacks them, module by module, with the scales folded in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..text import quoted
from .adapter import UpstreamAdapter
from .errors import AdapterError
from .keys import FactorKeys
from .matching import CompositionPlan


# The most bytes and files of adapters that are mapped at the same time while they are stacked.
MAPPED_BYTES = 32 << 20
MAPPED_FILES = 64
CHECKED_AT_ONCE = 1 << 22  # values


@dataclass
class StackedFactors:
    """The stacked factors of all adapters for one module: A (R, in), scaled B (out, R), bias (N, out)."""

    ranks: list[int]
    A: Tensor
    B: Tensor
    bias: Tensor | None = None


def stack(plan: CompositionPlan, dtypes: Mapping[str, torch.dtype]) -> dict[str, StackedFactors]:
    """Read the factors of all modules and stack them, with the scales folded into B.

    Args:
        plan: the result of `match`.
        dtypes: dtype of the result by module. Scales are multiplied in float32 or wider, before rounding.

    Returns:
        The stacked factors by module, on the CPU. Apart from them, only a few adapters are in memory at a time.

    Raises:
        AdapterError: a factor holds NaN or infinity, in the file or after rounding to its dtype, or the update of two
            factors overflows.
    """
    stacked = {module: _allocate(plan, module, dtypes[module]) for module in plan.factors}
    filled = dict.fromkeys(plan.factors, 0)
    for batch in _batches(plan.adapters):
        for module, target in stacked.items():
            filled[module] += _stack_batch(plan, module, batch, target, filled[module])
        for number in batch:
            plan.adapters[number].weights.unmap()
    for module, target in stacked.items():
        if not _is_surely_finite(target):
            for adapter, factors in zip(plan.adapters, plan.factors[module]):
                if factors is not None:
                    _require_finite(adapter, module, factors, dtypes[module])
    return stacked


def require_finite(adapter: UpstreamAdapter, dtype: torch.dtype) -> None:
    """Raise AdapterError if a factor holds NaN or infinity, in the file or after rounding to `dtype`, or overflows.

    Unlike `stack`, this keeps only a part of one factor in memory at a time.
    """
    for module, factors in adapter.modules.items():
        _require_finite(adapter, module, factors, dtype)
    adapter.weights.unmap()


def _allocate(plan: CompositionPlan, module: str, dtype: torch.dtype) -> StackedFactors:
    shape, ranks = plan.shapes[module], plan.ranks(module)
    A = torch.empty(shape.shape_of_A(sum(ranks)), dtype=dtype, device="cpu")
    B = torch.empty(shape.shape_of_B(sum(ranks)), dtype=dtype, device="cpu")
    bias = torch.zeros(len(ranks), shape.out_features, dtype=dtype, device="cpu") if plan.is_biased(module) else None
    return StackedFactors(ranks, A, B, bias)


def _batches(adapters: Sequence[UpstreamAdapter]) -> Iterator[range]:
    """The numbers of the adapters in batches: as many as may be mapped at the same time, at least one."""
    first, nbytes = 0, 0
    for number, adapter in enumerate(adapters):
        nbytes += adapter.weights.nbytes
        if number > first and (nbytes > MAPPED_BYTES or number - first >= MAPPED_FILES):
            yield range(first, number)
            first, nbytes = number, adapter.weights.nbytes
    yield range(first, len(adapters))


def _stack_batch(plan: CompositionPlan, module: str, batch: range, target: StackedFactors, start: int) -> int:
    """Write the factors of some adapters for a module, starting at row `start`; returns the number of rows."""
    numbers = [number for number in batch if plan.factors[module][number] is not None]
    entries = [(plan.adapters[number], cast(FactorKeys, plan.factors[module][number])) for number in numbers]
    if not entries:
        return 0
    count = sum(factors.rank for _, factors in entries)
    shape = plan.shapes[module]
    A = target.A.narrow(shape.rank_dim_of_A, start, count)
    B = target.B.narrow(shape.rank_dim_of_B, start, count)
    _join([shape.unpack_A(adapter.weights.read(factors.A)) for adapter, factors in entries], shape.rank_dim_of_A, A)
    read = [shape.unpack_B(adapter.weights.read(factors.B)) for adapter, factors in entries]
    _join(read, shape.rank_dim_of_B, B, _scales(entries, B.dtype, B.dim() - 1 - shape.rank_dim_of_B))
    for number, (adapter, factors) in zip(numbers, entries):
        if factors.bias is not None and target.bias is not None:
            target.bias[number] = _scaled(adapter.weights.read(factors.bias), factors.scale, target.bias.dtype)
    return count


def _join(tensors: list[Tensor], dim: int, out: Tensor, scales: Tensor | None = None) -> None:
    """Concatenate into `out`, scaled in float32 or wider, and rounded once."""
    if any(tensor.dtype != out.dtype for tensor in tensors):
        wide = torch.promote_types(out.dtype, torch.float32)
        tensors = [tensor.to(wide) for tensor in tensors]
    if scales is not None:
        torch.mul(torch.cat(tensors, dim), scales, out=out)
    elif tensors[0].dtype == out.dtype:
        torch.cat(tensors, dim, out=out)
    else:
        out.copy_(torch.cat(tensors, dim))


def _scales(
    entries: Sequence[tuple[UpstreamAdapter, FactorKeys]], dtype: torch.dtype, dims_behind: int
) -> Tensor | None:
    """The scale of every column of B, in a shape that broadcasts; None if all are 1."""
    scales = [factors.scale for _, factors in entries for _ in range(factors.rank)]
    if all(scale == 1 for scale in scales):
        return None
    wide = torch.promote_types(dtype, torch.float32)
    return torch.tensor(scales, dtype=wide, device="cpu").view(-1, *(1,) * dims_behind)


def _scaled(tensor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (tensor.to(torch.promote_types(dtype, torch.float32)) * scale).to(dtype)


def _is_surely_finite(stacked: StackedFactors) -> bool:
    """Whether all values and their products are finite: no entry of B A exceeds the product of the norms.

    False if a norm overflows, which does not prove that a value does.
    """
    norms = [torch.linalg.vector_norm(t).item() for t in (stacked.A, stacked.B, stacked.bias) if t is not None]
    return all(map(math.isfinite, norms)) and norms[0] * norms[1] < torch.finfo(torch.float32).max


def _require_finite(adapter: UpstreamAdapter, module: str, factors: FactorKeys, dtype: torch.dtype) -> None:
    parts = {"lora_A": (factors.A, 1.0), "lora_B": (factors.B, factors.scale)}
    if factors.bias is not None:
        parts["lora_B bias"] = (factors.bias, factors.scale)
    largest: dict[str, float] = {}
    for what, (key, scale) in parts.items():
        tensor = adapter.weights.read(key)
        largest[what] = 0.0
        bad = in_file = 0
        for part in tensor.flatten().split(CHECKED_AT_ONCE):
            scaled = _scaled(part, scale, dtype)
            extremes = [abs(extreme.item()) for extreme in scaled.aminmax()]
            largest[what] = max(largest[what], *extremes)
            if not all(map(math.isfinite, extremes)):
                bad += int((~torch.isfinite(scaled)).sum())
                in_file += int((~torch.isfinite(part)).sum())
        if bad:
            reason = f"{in_file} of {tensor.numel()} values are NaN or infinite"
            if not in_file:
                reason = f"{bad} values overflow in {dtype} once scaled by {scale:g}"
            raise AdapterError(adapter.name, f"module {quoted(module)}: {what}: {reason}")
    A, B = largest["lora_A"], largest["lora_B"]
    if A * B * factors.rank > torch.finfo(torch.promote_types(dtype, torch.float32)).max:
        raise AdapterError(
            adapter.name,
            f"module {quoted(module)}: values up to {A:.2g} in lora_A and {B:.2g} in lora_B (scaled) can overflow in "
            f"their product of rank {factors.rank}: no training produces such factors",
        )
