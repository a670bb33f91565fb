"""Makes the method known to PEFT, once this module is imported; the package does so when it is imported itself."""

from __future__ import annotations

from pathlib import Path

from .registration import add_peft_type, register_method
from .versions import require_supported_versions, unknown_versions


require_supported_versions()
try:
    from . import compat  # noqa: F401  (everything that only some versions have)
except ImportError as error:
    raise unknown_versions(error) from error
add_peft_type()

from .config import CompositionConfig  # noqa: E402  (the config names PeftType.COMPOSITION)
from .tuner.fingerprint import require_weights_in  # noqa: E402
from .tuner.model import CompositionModel  # noqa: E402


def _complete_card(folder: Path) -> None:
    from .checkpoint.card import complete_card

    complete_card(folder)


register_method(CompositionConfig, CompositionModel)
# Modules that build on the config and take part in reading and writing it.
CompositionConfig.when_loaded = (require_weights_in,)
CompositionConfig.when_saved = (_complete_card,)
