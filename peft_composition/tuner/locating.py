"""Finds the composed layers in a model, and carries their names over to it from older checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import CompositionConfig
from ..names import name_in_base, name_in_checkpoint, without_outer_adapters
from .base_model import BaseModel
from .layer import CompositionLayer
from .parameters import ParameterWrapper


# What a `PeftModel` puts before the names of its base model; once more around another `PeftModel`.
PEFT_PREFIX = "base_model.model."
# What FSDP1 and PyTorch's activation checkpointing insert into names.
_WRAPPERS = re.compile(r"\b_(fsdp|checkpoint)_wrapped_module\.")


def composition_layers(model: nn.Module) -> Iterator[tuple[str, CompositionLayer]]:
    """All composed modules and parameters of a model, with their names in the base model without any wrappers."""
    for name, _, layer in located_layers(model):
        yield name, layer


def located_layers(model: nn.Module) -> Iterator[tuple[str, str, CompositionLayer]]:
    """The same with their paths in this model, where a wrapper may lie between."""
    wrappers: list[str] = []
    for inner_path, module in model.named_modules():
        path = _WRAPPERS.sub("", inner_path)
        if isinstance(module, CompositionLayer):
            yield name_in_base(f"{path}.", wrappers).rstrip("."), path, module
        elif isinstance(module, (ParameterWrapper, BaseTunerLayer)):
            wrappers.append(path)


def renamed_state_dict(
    model: nn.Module, config: CompositionConfig, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The same renaming for the keys of its weights."""
    composed = config.composed_modules or {}
    prefix, separator = PEFT_PREFIX, ".composition_"
    base_model = model
    while isinstance(base_model, PeftModel):
        base_model = base_model.get_base_model()
    paths = {name: without_outer_adapters(path) for name, path, _ in located_layers(base_model)}
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
