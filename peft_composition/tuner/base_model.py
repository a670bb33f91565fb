"""What a composition has to know of the base model: its layers, their shapes, dtypes and current names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import compat
from ..names import CONTAINER, name_in_base
from ..upstream.shapes import LayerShape
from .base_layer import compute_dtype, layer_shape
from .base_parameter import TargetParameter, find_parameter, parameter_shape
from .layer import CompositionLayer
from .parameters import ParameterWrapper


def shape_reader(
    targets: Mapping[str, nn.Module], quantization_kwargs: dict[str, Any]
) -> Callable[[str], LayerShape | None]:
    """What factors must look like, by the name of a module or parameter; None where the model has no such."""

    @cache
    def shape_of(name: str) -> LayerShape | None:
        parameter = find_parameter(targets, name)
        if parameter is not None:
            return parameter_shape(targets, parameter)
        return layer_shape(targets[name], **quantization_kwargs) if name in targets else None

    return shape_of


def dtype_of(name: str, targets: Mapping[str, nn.Module], model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the factors of a module or parameter: that in which it computes."""
    parameter = find_parameter(targets, name)
    return compute_dtype(targets[name], model_dtype) if parameter is None else cast(Tensor, parameter.parameter).dtype


def composed_parameters(
    composed: Iterable[str], targets: Mapping[str, nn.Module]
) -> dict[str, dict[str, TargetParameter]]:
    """The composed parameters among the composed names, by the module they belong to."""
    found: dict[str, dict[str, TargetParameter]] = {}
    for name in composed:
        parameter = find_parameter(targets, name)
        if parameter is not None:
            found.setdefault(parameter.owner, {})[name] = parameter
    return found


def num_labels(model: nn.Module) -> int | None:
    """How many classes a classifier of transformers has; who loads the composition must build the same head."""
    if not isinstance(model, PreTrainedModel) or "Classification" not in type(model).__name__:
        return None
    return model.config.num_labels


def target_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Base layers by name; inside a layer that a composition already wraps only the wrapped one counts.

    Wrappers around parameters are looked through.

    A composition beside layers of another PEFT method would save and train them with its own: it is refused.
    """
    targets: dict[str, nn.Module] = {}
    wrappers: list[str] = []
    wrapped: str | None = None
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, CompositionLayer):
            raise ValueError(
                f"Module {name!r} already carries an adapter of another kind ({type(module).__module__}). Compose, or "
                "load the composition, first, and put the other adapter on afterwards; or merge that one "
                "(merge_and_unload) or take it off (unload) before."
            )
        if wrapped is not None and name.startswith(wrapped):  # what is inside comes right after it
            continue
        if isinstance(module, ParameterWrapper):
            wrappers.append(name)
            continue
        if isinstance(module, CompositionLayer):
            wrapped = f"{name}."
            module = module.get_base_layer()
        elif any(name == f"{wrapper}.{CONTAINER}" for wrapper in wrappers):
            wrapped = f"{name}."
            continue
        if name:
            targets[name_in_base(f"{name}.", wrappers).rstrip(".")] = module
    return targets


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first float parameter of at least 16 bits."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize >= 2:
            return parameter.dtype
    return torch.get_default_dtype()


def module_renamer(model: nn.Module, targets: dict[str, nn.Module]) -> Callable[[str], str]:
    """From module names of older transformers, or of the model with or without its head, to those in `targets`."""
    if not isinstance(model, PreTrainedModel):
        return lambda module: module
    renamed_key = compat.key_renamer(model, dict.fromkeys((f"{name}.weight" for name in targets), True))

    @cache  # adapters have most names in common
    def current_name(module: str) -> str:
        if module in targets or find_parameter(targets, module) is not None:
            return module
        renamed = renamed_key(f"{module}.weight").removesuffix(".weight")
        return renamed if renamed in targets else module

    return current_name
