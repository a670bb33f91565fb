"""Chooses the ranks of a plain LoRA and factorizes each module, exactly or truncated."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..references import LoraLayout
from ..tuner import functional
from ..tuner.wrapping import target_of
from . import lowrank


# The values that vLLM accepts as `max_lora_rank`.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export, checked."""

    rank: int | None
    energy: float | None
    round_rank: bool
    one_rank: bool
    include_head: bool | Literal["separate"]
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise ValueError(
                f"give rank=... or energy=..., not both: got rank={self.rank!r} and energy={self.energy!r}"
            )
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        if self.energy is not None and not (isinstance(self.energy, (int, float)) and 0 < self.energy <= 1):
            raise ValueError(f"energy must be a share above 0 and at most 1, got {self.energy!r}")
        if self.round_rank and not self.one_rank:
            raise ValueError("round_rank gives all modules one rank: do not use it with one_rank=False")
        if self.include_head not in (True, False, "separate"):
            raise ValueError(f'include_head must be True, False or "separate", got {self.include_head!r}')
        if self.dtype is not None and not (self.dtype.is_floating_point and self.dtype.itemsize >= 2):
            raise ValueError(f"dtype must be a floating point dtype of at least 16 bits, got {self.dtype}")

    @property
    def is_truncating(self) -> bool:
        """Whether the export is truncated."""
        return self.rank is not None or self.energy is not None


@dataclass
class ExportedModule:
    """The update B diag(u) A of one composed module and its mixed bias, on the CPU.

    A parameter of several matrices has one update per matrix: A is (E, R, in) and B (E, out, R).
    """

    A: Tensor
    B: Tensor
    u: Tensor
    bias: Tensor | None
    has_experts: bool = False

    @property
    def stacked_rank(self) -> int:
        """The sum of the ranks of the adapters."""
        return len(self.u)

    @property
    def largest_rank(self) -> int:
        """The largest rank that the update can have."""
        A, B = self.experts[0]
        return min(self.stacked_rank, B.shape[0], A[0].numel())

    @property
    def experts(self) -> list[tuple[Tensor, Tensor]]:
        """The factors of every single matrix."""
        return list(zip(self.A, self.B)) if self.has_experts else [(self.A, self.B)]

    def singular_values(self) -> Tensor:
        """The singular values, largest first; for several matrices, the root of the sum of squares by position."""
        values = [lowrank.singular_values(A, B, self.u) for A, B in self.experts]
        return torch.stack(values).square().sum(0).sqrt()


ExportedModules = Mapping[str, Callable[[], ExportedModule]]  # read on demand: the factors of a model are large


def mixed_modules(
    A: Tensor, B: Tensor, bias: Tensor | None, ranks: list[int], weights: Tensor, has_experts: bool
) -> ExportedModule:
    """The updates of one module, from its stacked factors and its mixing weights of shape (N,)."""
    A, B, weights = A.detach().cpu(), B.detach().cpu(), weights.detach().cpu()
    u = weights.repeat_interleave(torch.tensor(ranks))
    mixed_bias = None if bias is None else functional.delta_bias(bias.detach().cpu().double(), weights)
    return ExportedModule(A, B, u, mixed_bias, has_experts)


def choose_ranks(modules: ExportedModules, layout: LoraLayout, options: ExportOptions) -> dict[str, int]:
    """The rank of every module; it reads all factors, so values that are not finite are found here."""
    ranks: dict[str, int] = {}
    for name, read in modules.items():
        module = read()
        for what, tensor in (("lora_A", module.A), ("lora_B", module.B), ("mixing weights", module.u)):
            if not tensor.isfinite().all():
                raise ValueError(f"module {name!r}: {what}: not all values are finite")
        if options.rank is not None and options.rank < module.stacked_rank:
            ranks[name] = min(options.rank, module.largest_rank)
        elif options.energy is not None:
            ranks[name] = lowrank.rank_for_energy(module.singular_values(), options.energy)
        else:
            ranks[name] = module.stacked_rank
    shared: dict[str, int] = {}  # in PEFT, both projections of an attention have the same rank
    for name, chosen in ranks.items():
        shared[target_of(name, layout)] = max(chosen, shared.get(target_of(name, layout), 0))
    ranks = {name: shared[target_of(name, layout)] for name in ranks}
    highest = max(ranks.values())
    if options.one_rank:
        return dict.fromkeys(ranks, _served_rank(highest) if options.round_rank else highest)
    if min(ranks.values()) < highest:
        warnings.warn(
            f"The modules of this LoRA have ranks {min(ranks.values())} to {highest}, each with a separate alpha. "
            "PEFT and vLLM scale them correctly; llama.cpp and diffusers divide one alpha by the rank of each tensor, "
            "which is wrong for smaller ranks. For those programs export with one_rank=True.",
            stacklevel=4,
        )
    return ranks


def _served_rank(rank: int) -> int:
    for served in SERVED_RANKS:
        if served >= rank:
            return served
    raise ValueError(
        f"the largest rank is {rank}, but servers accept {SERVED_RANKS[-1]} at most; truncate with rank=... or "
        "energy=... (1.0 cuts only zeros)"
    )


def factorize(module: ExportedModule, rank: int, is_measured: bool) -> tuple[Tensor, Tensor, float, float]:
    """A and B of the given rank, the norm of the truncated part, and the norm of the update (0 unless measured).

    For a parameter of several matrices A is (E r, in), and the columns of B run over the matrices first, then the
    ranks.
    """
    parts = [_factorize_one(A, B, module, rank, is_measured) for A, B in module.experts]
    if not module.has_experts:
        return parts[0]
    A = torch.cat([part[0] for part in parts])
    B = torch.stack([part[1] for part in parts], dim=-1).flatten(1)
    return A, B, math.hypot(*(part[2] for part in parts)), math.hypot(*(part[3] for part in parts))


def _factorize_one(
    A: Tensor, B: Tensor, module: ExportedModule, rank: int, is_measured: bool
) -> tuple[Tensor, Tensor, float, float]:
    if rank >= module.stacked_rank:
        lost = 0.0
        norm = lowrank.norm_of_delta(A, B, module.u) if is_measured else 0.0
        A, B = functional.fold_evenly(A, B, module.u)
    else:
        kept = min(rank, module.largest_rank)
        A, B, S = lowrank.truncate(A, B, module.u, kept)
        lost, norm = float(S[kept:].norm()), float(S.norm())
    return _padded(A, 0, rank), _padded(B, 1, rank), lost, norm


def _padded(factor: Tensor, dim: int, rank: int) -> Tensor:
    zeros = factor.new_zeros(*factor.shape[:dim], rank - factor.shape[dim], *factor.shape[dim + 1 :])
    return torch.cat([factor, zeros], dim)


def ratio_of(lost: float, norm: float) -> float:
    """The share lost / norm; 0 if nothing is lost, also for an update of zero."""
    return lost / norm if lost else 0.0
