"""The mixing weights of a composition by module and adapter, whatever way it came into the model."""

from __future__ import annotations

import os
from typing import cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..config import CompositionConfig
from ..text import quoted
from .factors import Factors
from .locating import composition_layers


def mixing_weights(model: nn.Module, adapter_name: str | None = None) -> dict[str, dict[str, float]]:
    """The normalised weight of every upstream adapter in every composed module that it touches.

        mixing_weights(model)["vit.layers.0.attention.q_proj"]  # {"lora-a": 0.61, "lora-b": 0.39}

    Args:
        model: a `PeftModel`, a transformers model after `add_adapter` or `load_adapter`, or any model that a
            composition was injected into.
        adapter_name: name of the composition. Default: the active one.

    Returns:
        `{module name: {upstream adapter name: weight}}`, in the model's order. An adapter that does not touch a module
        is not listed there: its weight multiplies nothing.

    Raises:
        ValueError: there is no composition, or none of that name, or several are active and none is named.
        TypeError: `model` is no model but the path of a saved one.
    """
    if isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"mixing_weights reads a model, got the path {quoted(os.fspath(model))}. Load the composition first "
            "(PeftModel.from_pretrained), or in a shell: peft-composition weights FOLDER"
        )
    base = getattr(model, "_orig_mod", model)  # inside torch.compile
    while isinstance(base, (PeftModel, BaseTuner)):
        base = base.base_model if isinstance(base, PeftModel) else base.model
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
            raise ValueError(f"The mixing weights of which composition? Say adapter_name=...; {state}.")
        adapter_name = active[0]
    if adapter_name not in configs:
        raise ValueError(f"There is no composition {adapter_name!r}; there are {sorted(configs)}.")
    names = configs[adapter_name].adapter_names
    found: dict[str, dict[str, float]] = {}
    for module, layer in layers.items():
        if adapter_name in layer.composition_mixing:
            ranks = cast(Factors, layer.composition_factors[adapter_name]).ranks
            row = zip(names, layer.mixing_weights(adapter_name).tolist(), ranks)
            found[module] = {name: weight for name, weight, rank in row if rank}
    return found
