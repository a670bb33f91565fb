"""Everything private or version-dependent of PyTorch, PEFT, transformers and huggingface_hub, under names of our own.

No other module of the package imports a name with an underscore from them, or a module that only some versions have.
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
    """Whether something waits for the calls of every module."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def default_store() -> dist.Store | None:
    """What the processes of the default group share; None for groups that have no store."""
    return cast("dist.Store | None", dist.distributed_c10d._get_default_store())


def key_renamer(model: PreTrainedModel, weights: dict[str, bool]) -> Callable[[str], str]:
    """From keys of checkpoints that older transformers wrote, or of the model with or without its head, to today's.

    Args:
        model: whose renamings count.
        weights: the keys that the model has, each with True.

    Returns:
        The function; it asks transformers for the renamings at its first call.
    """

    @cache
    def renamings() -> list[WeightRenaming]:
        return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]

    def renamed(key: str) -> str:
        # By position: the last two had other names in some versions.
        return rename_source_key(key, renamings(), [], model.base_model_prefix, weights)[0]

    return renamed
