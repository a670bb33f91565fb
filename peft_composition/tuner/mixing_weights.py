"""Reads the mixing weights of a composition, by module and adapter."""

from __future__ import annotations

import os
from typing import cast

from torch import nn

from ..text import quoted
from .factors import Factors
from .locating import composition_of


def mixing_weights(model: nn.Module, adapter_name: str | None = None) -> dict[str, dict[str, float]]:
    """The normalised weight of every upstream adapter in every composed module that it touches.

    Args:
        model: a `PeftModel`, a transformers model after `add_adapter` or `load_adapter`, or any model that a
            composition was injected into.
        adapter_name: name of the composition. Default: the active one.

    Returns:
        `{module name: {upstream adapter name: weight}}`, in the model's order. An adapter is not listed for a module
        that it does not touch.

    Raises:
        ValueError: there is no composition, or none with this name, or several are active and no name is given.
        TypeError: `model` is the path of a saved model.

    Example:
        >>> mixing_weights(model)["vit.layers.0.attention.q_proj"]
        {'lora-a': 0.61, 'lora-b': 0.39}
    """
    if isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"mixing_weights reads a model, got the path {quoted(os.fspath(model))}. Load the composition first "
            "(PeftModel.from_pretrained), or in a shell: peft-composition weights FOLDER"
        )
    adapter_name, config, layers = composition_of(model, adapter_name)
    names = config.adapter_names
    found: dict[str, dict[str, float]] = {}
    for module, layer in layers.items():
        if adapter_name in layer.composition_mixing:
            ranks = cast(Factors, layer.composition_factors[adapter_name]).ranks
            row = zip(names, layer.mixing_weights(adapter_name).tolist(), ranks)
            found[module] = {name: weight for name, weight, rank in row if rank}
    return found
