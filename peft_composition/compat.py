"""Collects everything private or version-dependent of PyTorch, PEFT, transformers and huggingface_hub.

No other module of the package imports private names from them, or modules that only some versions have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import torch.distributed as dist
from huggingface_hub import _CACHED_NO_EXIST as CACHED_NO_EXIST
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule
from peft.tuners.tuners_utils import _find_minimal_target_modules as find_minimal_target_modules
from peft.tuners.tuners_utils import _get_in_out_features as get_in_out_features
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as maybe_include_all_linear_layers
from torch.nn.modules import module as _module
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key


__all__ = [
    "CACHED_NO_EXIST",
    "ExcludedModule",
    "default_store",
    "find_minimal_target_modules",
    "get_in_out_features",
    "has_global_hooks",
    "key_renamer",
    "maybe_include_all_linear_layers",
]


def has_global_hooks() -> bool:
    """Whether global hooks for the calls of all modules are registered."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def default_store() -> dist.Store | None:
    """The store that the processes of the default group share; None for groups without a store."""
    return cast("dist.Store | None", dist.distributed_c10d._get_default_store())


def key_renamer(model: PreTrainedModel, weights: dict[str, bool]) -> Callable[[str], str]:
    """A function that maps keys of older transformers, or of the model with or without its head, to the model's keys.

    Args:
        model: the model.
        weights: the model's keys, each with True.

    Returns:
        The function; it gets the renamings from transformers when it is first called.
    """

    @cache
    def renamings() -> list[WeightRenaming]:
        return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]

    def renamed(key: str) -> str:
        # By position: in some versions the last two had other names.
        return rename_source_key(key, renamings(), [], model.base_model_prefix, weights)[0]

    return renamed
