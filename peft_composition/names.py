"""Names of modules: which block a module belongs to, and what composed parameters are called. No torch in here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


# Where a wrapper keeps its compositions: part of the keys of a checkpoint.
CONTAINER = "composed_parameters"


def name_in_base(path: str, wrappers: list[str]) -> str:
    """The name that a composed module or parameter has in the base model.

    Args:
        path: its path in the model.
        wrappers: paths of the wrappers there, outer before inner.
    """
    for wrapper in reversed(wrappers):
        for child in ("base_layer", CONTAINER):
            if path.startswith(f"{wrapper}.{child}."):
                path = wrapper + path.removeprefix(f"{wrapper}.{child}")
    return path


def name_in_checkpoint(path: str, composed: Mapping[str, Any]) -> str:
    """The same from a key of a checkpoint, without the model.

    Args:
        path: what a key says before `.composition_`.
        composed: the composed modules that the checkpoint records, by name.
    """
    if path in composed:
        return path
    return without_outer_adapters(path).replace(".base_layer.", ".").replace(f".{CONTAINER}.", ".")


def without_outer_adapters(path: str) -> str:
    """The path of a composed layer as if no adapter of another method lay around it."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


# As PEFT counts layers: the first numbered segment of a module's name ends its transformer block.
_BLOCK = re.compile(r"(?P<block>(?:.*?\.)?\d+)\.")


def block_of(module: str, layers_pattern: list[str] | str | None = None) -> str | None:
    """The transformer block that a module is in, by name; None for a module outside any block.

    Args:
        module: name of the module.
        layers_pattern: as in `CompositionConfig`.
    """
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for pattern in patterns or []:
        found = re.match(rf"(?P<block>(?:.*?\.)?{pattern}\.\d+)\.", module)
        if found:
            return found["block"]
    found = _BLOCK.match(module)
    return found["block"] if found else None


# Where a saved composition keeps its export as a plain LoRA.
LORA_SUBFOLDER = "lora"
