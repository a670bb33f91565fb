"""Drops adapters of a composition in a model: their factors, their weights and their part of the record.

Softmax weights that are left grow in proportion to their old sum, so that the base model's share stays as it was. Free
weights stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..config import CompositionConfig
from ..text import one_line, quoted
from ..upstream.shapes import LayerShape
from ..upstream.stacking import StackedFactors
from .base_model import BaseModel
from .factors import Factors
from .forms import Embedding
from .layer import CompositionLayer
from .locating import unwrapped
from .mixing import Mixing
from .preparation import lora_layout_of


def drop_adapters(
    model: nn.Module,
    composition: str,
    config: CompositionConfig,
    layers: Mapping[str, CompositionLayer],
    dropped: Collection[int],
) -> None:
    """Drop adapters from a composition, in place. A module that only these touch is no longer composed.

    Args:
        model: the model.
        composition: name of the composition.
        config: its config, which describes what is left afterwards.
        layers: its composed modules and parameters by name, neither merged nor disabled.
        dropped: the numbers of the adapters.

    Raises:
        ValueError: no adapter would be left that has a weight and touches a module. The composition is as it was.
        RuntimeError: factors are sharded or offloaded. The composition is as it was.
    """
    kept = [number for number in range(len(config.adapter_names)) if number not in dropped]
    if not is_mix(config, kept):
        names = [config.adapter_names[number] for number in kept]
        raise ValueError(
            f"Nothing would be left to mix: without the others {one_line(names)} would have no weight, or touch no "
            "module."
        )
    _require_present(composition, layers)
    ranks = {module: [row[number] for number in kept] for module, row in (config.composed_modules or {}).items()}
    ranks = {module: row for module, row in ranks.items() if any(row)}
    described = _described(model, config, kept, ranks)
    mixings: dict[int, Mixing] = {}
    for module, layer in layers.items():
        if module not in ranks:
            layer.delete_adapter(composition)
            continue
        own, factors = cast(Mixing, layer.composition_mixing[composition]), layer.whole_factors(composition)
        if id(own) not in mixings:
            mixings[id(own)] = mixing_of(own, config, kept)
        layer.composition_factors[composition] = _factors_of(factors, kept, isinstance(layer, Embedding))
        layer.swap_mixing(composition, mixings[id(own)])
    config.become(described)


def mixing_of(mixing: Mixing, config: CompositionConfig, kept: Sequence[int]) -> Mixing:
    """The mixing weights that are left of some, as far as they were trained.

    Args:
        mixing: weights of all adapters.
        config: the composition's config.
        kept: the numbers of the adapters that stay.
    """
    adapters: list[Any] = [str(number) for number in kept]
    few = CompositionConfig(
        adapters=adapters,
        mixing=config.mixing,
        weights=weights_of(config, kept),
        normalization=config.normalization,
        gain=mixing.gain,
    )
    theta = mixing.weight
    if theta is None:
        return Mixing(few, torch.float32).train(mixing.training)
    left = Mixing(few, theta.dtype, theta.device)
    assert left.weight is not None
    with torch.no_grad():
        left.weight.copy_(theta[list(kept)])
        if mixing.start is not None and len(mixing.start) > mixing.count:  # the base model has a share
            start = torch.tensor(mixing.start[: mixing.count], dtype=torch.float64)
            now = start + mixing.gain * theta.to("cpu", torch.float64)
            left.weight.add_((_growth(now, kept) - _growth(start, kept)) / mixing.gain)
    left.weight.requires_grad_(theta.requires_grad)
    return left.train(mixing.training)


def weights_of(config: CompositionConfig, kept: Sequence[int]) -> list[float] | None:
    """The fixed or starting weights that are left; None where they are equal anyway."""
    count = len(config.adapter_names)
    if config.weights is None:
        return [1 / count] * len(kept) if (config.mixing, config.normalization) == ("learned", "none") else None
    left = [config.weights[number] for number in kept]
    if config.normalization == "none":
        return left
    grown = math.fsum(config.weights) / math.fsum(left)
    return [weight * grown for weight in left]


def _growth(logits: Tensor, kept: Sequence[int]) -> float:
    """The logarithm of the factor by which the weights that are left grow."""
    return float(logits.logsumexp(0) - logits[list(kept)].logsumexp(0))


def is_mix(config: CompositionConfig, kept: Collection[int]) -> bool:
    """Whether one of these adapters has a weight and touches a module."""
    touched = {number for row in (config.composed_modules or {}).values() for number, rank in enumerate(row) if rank}
    return any(number in touched and (config.weights is None or config.weights[number]) for number in kept)


def _require_present(composition: str, layers: Mapping[str, CompositionLayer]) -> None:
    for module, layer in layers.items():
        factors, mixing = layer.whole_factors(composition), cast(Mixing, layer.composition_mixing[composition])
        theta = mixing.weight
        if factors.A.is_meta or (theta is not None and (theta.is_meta or theta.shape != (mixing.count,))):
            raise RuntimeError(
                f"Module {quoted(module)}: the composition is offloaded or sharded, so no adapter of it can be "
                "dropped. Load the saved composition without device_map or sharding, and repeat this there."
            )


def _described(
    model: nn.Module, config: CompositionConfig, kept: Sequence[int], ranks: dict[str, list[int]]
) -> CompositionConfig:
    """A config of what is left."""
    base = unwrapped(model)
    while isinstance(base, (PeftModel, BaseTuner)):
        base = cast(nn.Module, base.base_model if isinstance(base, PeftModel) else base.model)
    sizes = config.layer_sizes
    return dataclasses.replace(
        config,
        adapters=[config.references[number] for number in kept],
        weights=weights_of(config, kept),
        target_modules=config.requested_target_modules,
        composed_modules=ranks,
        biased_modules=[module for module in config.biased_modules or () if module in ranks],
        layer_sizes=None if sizes is None else {module: sizes[module] for module in ranks},
        provenance=[(config.provenance or [])[number] for number in kept],
        lora_layout=lora_layout_of(ranks, BaseModel(base), config.lora_layout),
    )


def _factors_of(factors: Factors, kept: Sequence[int], is_embedding: bool) -> Factors:
    """Copies of the factors of some adapters."""
    dim = int(factors.has_experts)
    starts = [0, *accumulate(factors.ranks)]
    rows = [row for number in kept for row in range(starts[number], starts[number + 1])]
    index = torch.tensor(rows, device=factors.A.device)
    A, B = factors.A.detach().index_select(dim, index), factors.B.detach().index_select(dim + 1, index)
    bias = None if factors.bias is None else _rows_of(factors.bias.detach(), kept)
    ranks = [factors.ranks[number] for number in kept]
    experts = A.shape[0] if factors.has_experts else None
    shape = LayerShape("", tuple(A.shape[dim + 1 :]), B.shape[dim], is_embedding=is_embedding, experts=experts)
    left = Factors(ranks, shape, bias is not None, A.dtype, torch.device("meta"))
    left.fill(StackedFactors(ranks, A, B, bias), A.device)
    return left.train(factors.training)


def _rows_of(tensor: Tensor, rows: Iterable[int]) -> Tensor:
    return tensor[list(rows)].clone()
