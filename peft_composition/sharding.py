"""FSDP2 for composed models: which modules become groups of their own. DDP, FSDP1 and DeepSpeed need none of this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .tuner.layer import CompositionLayer
from .tuner.mixing import Mixing


def shard(model: nn.Module, blocks: Collection[str] | None = None, **options: Any) -> nn.Module:
    """Shard a composed model with FSDP2: each transformer block, the mixing weights where need be, and the rest.

    Mixing weights belong to their block, and cost no communication of their own. They are a group apart where modules
    share them, since FSDP2 refuses parameters of two groups, and where a mixed precision would round them: they stay
    in float32.

    Args:
        model: with one or more compositions; sharded in place.
        blocks: class names of the modules that are gathered and freed together. Default: what the model says itself
            (`_no_split_modules` in transformers).
        **options: for `torch.distributed.fsdp.fully_shard`: `mesh`, `mp_policy`, `reshard_after_forward`,
            `offload_policy`.

    Returns:
        `model`.

    Raises:
        ValueError: the model has none of the blocks.

    Example:
        >>> shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    """
    from torch.distributed.fsdp import fully_shard

    names = set((getattr(model, "_no_split_modules", None) or ()) if blocks is None else blocks)
    units = [module for module in model.modules() if type(module).__name__ in names]
    if not units:
        raise ValueError(
            f"The model has no module of the classes {sorted(names)} to shard by; name those of its transformer "
            "blocks: blocks=[...]."
        )
    apart = {**options, "reshard_after_forward": False}
    policy = apart.pop("mp_policy", None)
    is_rounded = policy is not None and policy.param_dtype not in (None, torch.float32)
    for mixing, uses in _mixings(model).items():
        if mixing.weight is not None and (uses > 1 or is_rounded):
            fully_shard(mixing, **apart)
    for unit in reversed(units):  # a block within a block first
        fully_shard(unit, **options)
    fully_shard(model, **options)
    return model


def _mixings(model: nn.Module) -> Counter[Mixing]:
    """The mixing weights of all compositions, with the number of modules that use each."""
    return Counter(
        mixing
        for layer in model.modules()
        if isinstance(layer, CompositionLayer)
        for mixing in layer.composition_mixing.values()
        if isinstance(mixing, Mixing)
    )
