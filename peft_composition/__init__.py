"""peft-composition: mix trained LoRA adapters into one PEFT adapter. Importing it registers the method with PEFT."""

from .registration import add_peft_type, register_method
from .version import __version__
from .versions import require_supported_versions, unknown_versions


require_supported_versions()
try:
    from . import compat  # noqa: F401  (everything that only some versions have)
except ImportError as error:
    raise unknown_versions(error) from error
add_peft_type()

from .checkpoint.card import complete_card, write_model_card  # noqa: E402
from .checkpoint.export import LoraExport, lora_from_checkpoint, to_lora  # noqa: E402
from .checkpoint.push import CompositionCardMixin, add_to_checkpoint, push_to_hub  # noqa: E402
from .choosing import search_adapters, select_adapters  # noqa: E402
from .comparing import compare_methods  # noqa: E402
from .config import CompositionConfig  # noqa: E402  (the config names PeftType.COMPOSITION)
from .evidence import fit_mixing_weights, score_adapters  # noqa: E402
from .explaining import explain, prune_adapters  # noqa: E402
from .training import (  # noqa: E402
    HeadWarmupCallback,
    MixingWeightsCallback,
    composition_optimizer,
    last_complete_checkpoint,
    parameter_groups,
)
from .tuner.fingerprint import require_weights_in  # noqa: E402
from .tuner.layer import CompositionLayer  # noqa: E402
from .tuner.mixing_weights import mixing_weights  # noqa: E402
from .tuner.model import CompositionModel  # noqa: E402
from .upstream.errors import AdapterError  # noqa: E402


register_method(CompositionConfig, CompositionModel)
# Modules that build on the config and take part in reading and writing it.
CompositionConfig.when_loaded = (require_weights_in,)
CompositionConfig.when_saved = (complete_card,)

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
