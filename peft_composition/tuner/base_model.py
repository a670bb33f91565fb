"""`BaseModel`: what a composition has to know of the model that it is put into, read once and handed around whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    """The layers of a base model by name, with or without compositions beside them; nothing of it is changed.

    Args:
        model: the model; may be on the meta device.

    Attributes:
        model: the model.
        layers: its base layers by name; of a layer that a composition wraps the wrapped one.
        quantization_kwargs: what PEFT needs besides for some kinds of quantization.

    Raises:
        ValueError: a layer carries an adapter of another method.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = _target_layers(model)
        self.quantization_kwargs: dict[str, Any] = get_quantization_kwargs(model)
        self._dtype = _model_dtype(model)
        # Adapters have most names in common.
        self.shape_of = cache(self._shape_of)
        self.current_name = cache(self._current_name)

    @property
    def name(self) -> str | None:
        """The Hub id or folder that it was loaded from."""
        return getattr(self.model, "name_or_path", None)

    @property
    def num_labels(self) -> int | None:
        """How many classes a classifier of transformers has; who loads the composition must build the same head."""
        if not isinstance(self.model, PreTrainedModel) or "Classification" not in type(self.model).__name__:
            return None
        return self.model.config.num_labels

    def parameter(self, name: str) -> TargetParameter | None:
        """The parameter that a composed name stands for; None where it is the name of a layer, or of nothing."""
        return find_parameter(self.layers, name)

    def parameters(self, composed: Iterable[str]) -> dict[str, dict[str, TargetParameter]]:
        """The parameters among composed names, by the module they belong to."""
        found: dict[str, dict[str, TargetParameter]] = {}
        for name in composed:
            parameter = self.parameter(name)
            if parameter is not None:
                found.setdefault(parameter.owner, {})[name] = parameter
        return found

    def _shape_of(self, name: str) -> LayerShape | None:
        """What factors must look like, by the name of a module or parameter; None where the model has no such."""
        parameter = self.parameter(name)
        if parameter is not None:
            return parameter_shape(self.layers, parameter)
        return layer_shape(self.layers[name], **self.quantization_kwargs) if name in self.layers else None

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of the factors of a module or parameter: that in which it computes."""
        parameter = self.parameter(name)
        if parameter is None:
            return compute_dtype(self.layers[name], self._dtype)
        return cast(Tensor, parameter.parameter).dtype

    @cached_property
    def _renamed_key(self) -> Callable[[str], str]:
        assert isinstance(self.model, PreTrainedModel)
        return compat.key_renamer(self.model, dict.fromkeys((f"{name}.weight" for name in self.layers), True))

    def _current_name(self, module: str) -> str:
        """Today's name for one of older transformers, or of the model with or without its head."""
        if not isinstance(self.model, PreTrainedModel):
            return module
        if module in self.layers or self.parameter(module) is not None:
            return module
        renamed = self._renamed_key(f"{module}.weight").removesuffix(".weight")
        return renamed if renamed in self.layers else module


def _target_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Base layers by name; inside a layer that a composition already wraps only the wrapped one counts.

    Wrappers around parameters are looked through.

    A composition beside layers of another PEFT method would save and train them with its own: it is refused.
    """
    targets: dict[str, nn.Module] = {}
    wrappers: list[str] = []
    wrapped: str | None = None
    for name, module in model.named_modules():
        if is_tuner_layer(module) and not isinstance(module, CompositionLayer):
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


def _model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first float parameter of at least 16 bits."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize >= 2:
            return parameter.dtype
    return torch.get_default_dtype()
