"""Views of a model with a single active adapter, whose representations are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..tuner.factors import Factors
from ..tuner.locating import composition_layers
from ..tuner.model import CompositionModel
from ..tuner.single import mixed_by


@dataclass(frozen=True)
class View:
    """A model with only one of its adapters.

    Attributes:
        model: the model; the views of all its adapters share it.
        switch: returns a context in which only this adapter is active; afterwards the model is as before.
        modules: the modules that the adapter touches, by their names in the base model and in its order.
    """

    model: nn.Module
    switch: Callable[[], AbstractContextManager[None]]
    modules: tuple[str, ...]


def single_adapters(model: PeftModel, composition: str | None = None) -> dict[str, View]:
    """Views of a model with each of its adapters alone.

    For a composition these are its upstream adapters: one has weight 1 and all others 0, so that the model is
    W0 + s_n B_n A_n; nothing is read again or trained. For any other PEFT model they are its adapters.

    Args:
        model: a PEFT model, neither merged nor disabled.
        composition: name of the composition, if the model has several. Default: the active one.

    Returns:
        `{adapter name: view}`, in the order of the composition, or in the order in which the adapters were added.

    Raises:
        ValueError: the model is not a PEFT model with such adapters, or has no composition of that name.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, BaseTuner):
        raise ValueError(f"model must be a PEFT model whose layers have adapters, got {type(model).__name__}")
    if isinstance(tuner, CompositionModel):
        return _upstream_views(model, tuner, composition)
    if composition is not None:
        raise ValueError(f"there is no composition {composition!r}: {type(tuner).__name__} holds plain adapters")
    return {
        name: View(model, partial(_only_active, model, name), touched_modules(tuner.model, [name]))
        for name in tuner.peft_config
    }


def touched_modules(base: nn.Module, adapters: list[str] | None) -> tuple[str, ...]:
    """Names of the layers with weights of one of these adapters; None: of the active ones."""
    return tuple(
        name
        for name, layer in base.named_modules()
        if isinstance(layer, BaseTunerLayer)
        and any(
            adapter in getattr(layer, container)
            for adapter in (layer.active_adapters if adapters is None else adapters)
            for container in layer.adapter_layer_names
        )
    )


def _upstream_views(model: PeftModel, tuner: CompositionModel, composition: str | None) -> dict[str, View]:
    if composition is None:
        if len(tuner.active_adapters) != 1:
            raise ValueError(
                f"the compositions {tuner.active_adapters} are active: pass composition=... to choose one"
            )
        (composition,) = tuner.active_adapters
    if composition not in tuner.peft_config:
        raise ValueError(f"there is no composition {composition!r}; there are {sorted(tuner.peft_config)}")
    config = tuner.peft_config[composition]
    views = {}
    for number, name in enumerate(config.adapter_names):
        one_hot = [float(other == number) for other in range(len(config.adapter_names))]
        touched = [
            module
            for module, layer in composition_layers(tuner.model)
            if composition in layer.composition_factors
            and cast(Factors, layer.composition_factors[composition]).ranks[number]
        ]
        views[name] = View(model, partial(_only_mixed_by, model, composition, one_hot), tuple(touched))
    return views


@contextmanager
def _only_mixed_by(model: PeftModel, composition: str, weights: list[float]) -> Iterator[None]:
    """A context in which only one composition is active, with other mixing weights in all its modules."""
    layers = [layer for _, layer in composition_layers(model)]
    with _only_active(model, composition), mixed_by(layers, composition, weights):
        yield


@contextmanager
def _only_active(model: PeftModel, adapter: str) -> Iterator[None]:
    """A context in which one adapter is active; afterwards requires_grad is as before."""
    tuner = cast(BaseTuner, model.base_model)
    if tuner.active_adapters == [adapter]:
        yield
        return
    active = tuner.active_adapter
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        tuner.set_adapter(adapter, inference_mode=True)
        yield
    finally:
        tuner.set_adapter(active)
        for parameter, required in trains:
            parameter.requires_grad = required
