"""Names of modules: the block that a module belongs to, and the names of composed parameters. No torch in here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


# The part of a checkpoint's keys where a wrapper stores its compositions.
CONTAINER = "composed_parameters"


def name_in_base(path: str, wrappers: list[str]) -> str:
    """The name of a composed module or parameter in the base model.

    Args:
        path: its path in the model.
        wrappers: the paths of its wrappers in the model, outer before inner.
    """
    for wrapper in reversed(wrappers):
        for child in ("base_layer", CONTAINER):
            if path.startswith(f"{wrapper}.{child}."):
                path = wrapper + path.removeprefix(f"{wrapper}.{child}")
    return path


def name_in_checkpoint(path: str, composed: Mapping[str, Any]) -> str:
    """The name of a composed module or parameter in the base model, from a key of a checkpoint.

    Args:
        path: the part of the key before `.composition_`.
        composed: the names of the composed modules that the checkpoint records.
    """
    if path in composed:
        return path
    return without_outer_adapters(path).replace(".base_layer.", ".").replace(f".{CONTAINER}.", ".")


def without_outer_adapters(path: str) -> str:
    """The path of a composed layer without the wrappers of other adapter methods."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


# As PEFT counts layers: the first numbered segment of a module's name ends its transformer block.
_BLOCK = re.compile(r"(?P<block>(?:.*?\.)?\d+)\.")


def block_of(module: str, layers_pattern: list[str] | str | None = None) -> str | None:
    """The name of the transformer block that a module is in; None for a module outside all blocks.

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


# The folder of a saved composition that holds its export as a plain LoRA.
LORA_SUBFOLDER = "lora"
