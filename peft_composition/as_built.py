"""Keeps the fields of a config as they were when a model was built from it, so that later edits are not saved."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

from .text import shown


# The fields that define what is composed and how.
DEFINING = (
    "adapters",
    "mixing",
    "weights",
    "normalization",
    "gain",
    "weight_sharing",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
_RECORD = ("composed_modules", "biased_modules", "layer_sizes", "lora_layout", "provenance", "_request")


class AsBuilt:
    """The values that a model was built with.

    Args:
        config: the config, at the end of building.
    """

    def __init__(self, config: object) -> None:
        # As a pickle, which is several times faster than a deep copy if the record has many modules.
        self._fields = pickle.dumps({name: getattr(config, name) for name in (*DEFINING, *_RECORD)})

    def restore(self, config: object) -> None:
        """Undo edits of a config, with a warning, because they did not change the model."""
        fields: dict[str, Any] = pickle.loads(self._fields)
        for name, built in fields.items():
            now = getattr(config, name)
            if now != built:
                vars(config)[name] = built
                warnings.warn(
                    f"{name} of the config was edited to {shown(now)} after a model was built with "
                    f"{shown(built)}; the edit is undone, because the model did not change. Build another model "
                    "from a new config: dataclasses.replace(config, composed_modules=None, ...)",
                    stacklevel=4,
                )
