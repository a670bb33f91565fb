"""FSDP2 for composed models: decides which modules become groups. DDP, FSDP1 and DeepSpeed do not need this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .tuner.layer import CompositionLayer
from .tuner.mixing import Mixing


def shard(model: nn.Module, blocks: Collection[str] | None = None, **options: Any) -> nn.Module:
    """Shard a composed model with FSDP2: each transformer block, the mixing weights if necessary, and the rest.

    Mixing weights belong to the group of their block and need no communication of their own. They become a separate
    group if several modules share them, because FSDP2 refuses parameters of two groups, and if mixed precision would
    round them, because they stay in float32.

    Args:
        model: a model with one or more compositions; it is sharded in place.
        blocks: class names of the modules that are gathered and freed together. Default: the model's own
            (`_no_split_modules` in transformers).
        **options: for `torch.distributed.fsdp.fully_shard`: `mesh`, `mp_policy`, `reshard_after_forward`,
            `offload_policy`.

    Returns:
        `model`.

    Raises:
        ValueError: the model has no module of these classes.

    Example:
        >>> shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    """
    from torch.distributed.fsdp import fully_shard

    names = set((getattr(model, "_no_split_modules", None) or ()) if blocks is None else blocks)
    units = [module for module in model.modules() if type(module).__name__ in names]
    if not units:
        raise ValueError(
            f"The model has no module of the classes {sorted(names)}, by which it would be sharded. Pass the classes "
            "of its transformer blocks: blocks=[...]."
        )
    apart = {**options, "reshard_after_forward": False}
    policy = apart.pop("mp_policy", None)
    is_rounded = policy is not None and policy.param_dtype not in (None, torch.float32)
    for mixing, uses in _mixings(model).items():
        if mixing.weight is not None and (uses > 1 or is_rounded):
            fully_shard(mixing, **apart)
    for unit in reversed(units):  # inner blocks first
        fully_shard(unit, **options)
    fully_shard(model, **options)
    return model


def _mixings(model: nn.Module) -> Counter[Mixing]:
    """The mixing weights of all compositions, each with the number of modules that use it."""
    return Counter(
        mixing
        for layer in model.modules()
        if isinstance(layer, CompositionLayer)
        for mixing in layer.composition_mixing.values()
        if isinstance(mixing, Mixing)
    )
