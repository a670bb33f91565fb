"""peft-composition: mix trained LoRA adapters into one PEFT adapter. Importing it registers the method with PEFT.

What it offers is imported when it is first asked for: choosing, comparing and explaining cost nothing before.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__


if TYPE_CHECKING:
    from .checkpoint.card import write_model_card
    from .checkpoint.export import LoraExport, lora_from_checkpoint, to_lora
    from .checkpoint.push import CompositionCardMixin, add_to_checkpoint, push_to_hub
    from .choosing import search_adapters, select_adapters
    from .comparing import compare_methods
    from .config import CompositionConfig
    from .evidence import fit_mixing_weights, score_adapters
    from .explaining.explain import explain
    from .explaining.prune import prune_adapters
    from .training import (
        HeadWarmupCallback,
        MixingWeightsCallback,
        composition_optimizer,
        last_complete_checkpoint,
        parameter_groups,
    )
    from .tuner.layer import CompositionLayer
    from .tuner.mixing_weights import mixing_weights
    from .tuner.model import CompositionModel
    from .upstream.errors import AdapterError

__all__ = [
    "AdapterError",
    "CompositionCardMixin",
    "CompositionConfig",
    "CompositionLayer",
    "CompositionModel",
    "HeadWarmupCallback",
    "LoraExport",
    "MixingWeightsCallback",
    "add_to_checkpoint",
    "compare_methods",
    "composition_optimizer",
    "explain",
    "fit_mixing_weights",
    "last_complete_checkpoint",
    "lora_from_checkpoint",
    "mixing_weights",
    "parameter_groups",
    "prune_adapters",
    "push_to_hub",
    "score_adapters",
    "search_adapters",
    "select_adapters",
    "to_lora",
    "write_model_card",
    "__version__",
]

# Where each of these is; type checkers go by the imports above.
_HOMES = {
    "AdapterError": "upstream.errors",
    "CompositionCardMixin": "checkpoint.push",
    "CompositionConfig": "config",
    "CompositionLayer": "tuner.layer",
    "CompositionModel": "tuner.model",
    "HeadWarmupCallback": "training",
    "LoraExport": "checkpoint.export",
    "MixingWeightsCallback": "training",
    "add_to_checkpoint": "checkpoint.push",
    "compare_methods": "comparing",
    "composition_optimizer": "training",
    "explain": "explaining.explain",
    "fit_mixing_weights": "evidence",
    "last_complete_checkpoint": "training",
    "lora_from_checkpoint": "checkpoint.export",
    "mixing_weights": "tuner.mixing_weights",
    "parameter_groups": "training",
    "prune_adapters": "explaining.prune",
    "push_to_hub": "checkpoint.push",
    "score_adapters": "evidence",
    "search_adapters": "choosing",
    "select_adapters": "choosing",
    "to_lora": "checkpoint.export",
    "write_model_card": "checkpoint.card",
}
_WINGS = ("analysis", "checkpoint", "choosing", "comparing", "evidence", "explaining", "sharding", "training")


if not TYPE_CHECKING:  # or no wrong name would be reported

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            found = getattr(import_module(f".{_HOMES[name]}", __name__), name)
            globals()[name] = found
            return found
        if name in _WINGS:
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_WINGS})


def _is_looked_up_as_program() -> bool:
    """Whether Python is about to run `python -m peft_composition`: its help needs no torch, its commands import it."""
    return sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv) :][:1] == [__name__]


if not _is_looked_up_as_program():
    from . import plugin  # noqa: F401
