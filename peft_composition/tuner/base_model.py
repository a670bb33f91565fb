"""`BaseModel`: the properties of a model that a composition needs, read once and passed as one object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from typing import Any, cast

import torch
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import compat
from ..names import CONTAINER, name_in_base
from ..upstream.shapes import LayerShape
from .base_layer import compute_dtype, is_tuner_layer, layer_shape
from .base_parameter import TargetParameter, find_parameter, parameter_shape
from .layer import CompositionLayer
from .parameters import ParameterWrapper


class BaseModel:
    """The layers of a base model by name, with or without compositions; the model is not changed.

    Args:
        model: the model; may be on the meta device.

    Attributes:
        model: the model.
        modules: all its modules, each once.
        composed: those that are composed.
        layers: its base layers by name; for a composed layer, the layer inside the wrapper.
        quantization_kwargs: arguments that PEFT needs for some kinds of quantization.

    Raises:
        ValueError: a layer has an adapter of another method.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = dict(model.named_modules())
        self.modules = [*named.values()]
        self.composed = [module for module in self.modules if isinstance(module, CompositionLayer)]
        self.layers = _target_layers(named)
        self.quantization_kwargs: dict[str, Any] = get_quantization_kwargs(model)
        self._dtype = _model_dtype(model)
        # Adapters have most names in common.
        self.shape_of = cache(self._shape_of)
        self.current_name = cache(self._current_name)

    @property
    def name(self) -> str | None:
        """The Hub id or folder that the model was loaded from."""
        return getattr(self.model, "name_or_path", None)

    @property
    def num_labels(self) -> int | None:
        """The number of classes of a transformers classifier; loading the composition needs the same number."""
        return self.number_of_labels(self.model)

    @staticmethod
    def number_of_labels(model: nn.Module) -> int | None:
        """The number of classes of a transformers classifier; None for other models."""
        if not isinstance(model, PreTrainedModel) or "Classification" not in type(model).__name__:
            return None
        return model.config.num_labels

    def parameter(self, name: str) -> TargetParameter | None:
        """The parameter with a composed name; None if the name is that of a layer, or unknown."""
        return find_parameter(self.layers, name)

    def parameters(self, composed: Iterable[str]) -> dict[str, dict[str, TargetParameter]]:
        """The parameters among composed names, by their module."""
        found: dict[str, dict[str, TargetParameter]] = {}
        for name in composed:
            parameter = self.parameter(name)
            if parameter is not None:
                found.setdefault(parameter.owner, {})[name] = parameter
        return found

    def _shape_of(self, name: str) -> LayerShape | None:
        """The shape of the factors of a module or parameter, by name; None if the model does not have it."""
        parameter = self.parameter(name)
        if parameter is not None:
            return parameter_shape(self.layers, parameter)
        return layer_shape(self.layers[name], **self.quantization_kwargs) if name in self.layers else None

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of the factors of a module or parameter: the dtype that it computes in."""
        parameter = self.parameter(name)
        if parameter is None:
            return compute_dtype(self.layers[name], self._dtype)
        return cast(Tensor, parameter.parameter).dtype

    @cached_property
    def _renamed_key(self) -> Callable[[str], str]:
        assert isinstance(self.model, PreTrainedModel)
        return compat.key_renamer(self.model, dict.fromkeys((f"{name}.weight" for name in self.layers), True))

    def _current_name(self, module: str) -> str:
        """The current name of a module that older transformers, or the model without its head, name differently."""
        if not isinstance(self.model, PreTrainedModel):
            return module
        if module in self.layers or self.parameter(module) is not None:
            return module
        renamed = self._renamed_key(f"{module}.weight").removesuffix(".weight")
        return renamed if renamed in self.layers else module


def _target_layers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Base layers by name; for a composed layer, only the layer inside the wrapper.

    Wrappers around parameters are ignored.

    Layers of another PEFT method are refused, because the composition would save and train them as its own.
    """
    targets: dict[str, nn.Module] = {}
    wrappers: list[str] = []
    wrapped: str | None = None
    for name, module in modules.items():
        if is_tuner_layer(module) and not isinstance(module, CompositionLayer):
            raise ValueError(
                f"Module {name!r} already has an adapter of another kind ({type(module).__module__}). Compose or load "
                "the composition first and add the other adapter afterwards; or merge that adapter first "
                "(merge_and_unload) or remove it (unload)."
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


def _model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first float parameter of at least 16 bits."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize >= 2:
            return parameter.dtype
    return torch.get_default_dtype()
