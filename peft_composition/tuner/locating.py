"""Finds the composed layers in a model, and maps their names in older checkpoints to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..config import CompositionConfig
from ..names import name_in_base, name_in_checkpoint, without_outer_adapters
from .base_layer import is_tuner_layer
from .base_model import BaseModel
from .layer import CompositionLayer
from .parameters import ParameterWrapper


# The prefix that a `PeftModel` adds to the names of its base model; repeated for nested `PeftModel`s.
PEFT_PREFIX = "base_model.model."
# What FSDP1 and PyTorch's activation checkpointing insert into names.
_WRAPPERS = re.compile(r"\b_(fsdp|checkpoint)_wrapped_module\.")


def composition_layers(model: nn.Module) -> Iterator[tuple[str, CompositionLayer]]:
    """All composed modules and parameters of a model, with their names in the base model."""
    for name, _, layer in located_layers(model):
        yield name, layer


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, nn.DataParallel or torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def base_of(model: nn.Module) -> nn.Module:
    """The base model inside all `PeftModel`s around it."""
    while isinstance(model, PeftModel):
        model = model.get_base_model()
    return model


def composition_of(
    model: nn.Module, adapter_name: str | None
) -> tuple[str, CompositionConfig, dict[str, CompositionLayer]]:
    """The name, the config and all composed layers of a composition in a model.

    Args:
        model: a model that a composition was added to in any way, wrapped or not.
        adapter_name: name of the composition. Default: the active one.

    Raises:
        ValueError: there is no composition, or none with this name, or several are active and no name is given.
    """
    base = unwrapped(model)
    while isinstance(base, (PeftModel, BaseTuner)):
        base = cast(nn.Module, base.base_model if isinstance(base, PeftModel) else base.model)
    layers = dict(composition_layers(base))
    if not layers:
        raise ValueError(
            f"The model ({type(base).__name__}) holds no composition: it never did, or it was merged "
            "(merge_and_unload) or unloaded. Read the weights before that, or load the saved composition."
        )
    stated = getattr(base, "peft_config", None) or {}
    configs = {name: config for name, config in stated.items() if isinstance(config, CompositionConfig)}
    if adapter_name is None:
        held = {
            name for layer in layers.values() for name in layer.active_adapters if name in layer.composition_mixing
        }
        active = [name for name in configs if name in held]
        if len(active) != 1:
            state = f"{active} are active" if active else f"none is active of {sorted(configs)}"
            raise ValueError(f"It is unclear which composition is meant: {state}. Pass adapter_name=...")
        adapter_name = active[0]
    if adapter_name not in configs:
        raise ValueError(f"There is no composition {adapter_name!r}; there are {sorted(configs)}.")
    return adapter_name, configs[adapter_name], layers


def located_layers(model: nn.Module) -> Iterator[tuple[str, str, CompositionLayer]]:
    """The composed layers with their paths in this model, including wrappers."""
    wrappers: list[str] = []
    for inner_path, module in model.named_modules():
        if not (is_tuner_layer(module) or isinstance(module, ParameterWrapper)):
            continue
        path = _WRAPPERS.sub("", inner_path)
        if isinstance(module, CompositionLayer):
            yield name_in_base(f"{path}.", wrappers).rstrip("."), path, module
        else:
            wrappers.append(path)


def renamed_state_dict(
    base_model: nn.Module, paths: Mapping[str, str], config: CompositionConfig, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A checkpoint's weights with updated keys, after the modules in its record were updated.

    Args:
        base_model: the model, without any `PeftModel` around it.
        paths: the paths of its composed layers by name; see `located_layers`.
        config: the composition's config.
        state_dict: its weights by the keys of the checkpoint.
    """
    composed = config.composed_modules or {}
    prefix, separator = PEFT_PREFIX, ".composition_"
    paths = {name: without_outer_adapters(path) for name, path in paths.items()}
    found = dict.fromkeys(key.removeprefix(prefix).partition(separator)[0] for key in state_dict if separator in key)
    if found.keys() <= set(paths.values()):
        return state_dict
    names = {path: name_in_checkpoint(path, composed) for path in found}
    if not set(names.values()) <= set(composed):
        current_name = BaseModel(base_model).current_name
        names = {path: current_name(name) for path, name in names.items()}
    renamed = {}
    for key, tensor in state_dict.items():
        start = prefix if key.startswith(prefix) else ""
        path, is_ours, rest = key.removeprefix(prefix).partition(separator)
        if is_ours:
            key = f"{start}{paths.get(names[path], names[path])}{is_ours}{rest}"
        renamed[key] = tensor
    return renamed
