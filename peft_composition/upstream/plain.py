"""Decides which adapters are plain LoRAs; variants that compute more than the product of their factors are refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from peft import LoraConfig
from peft import __version__ as peft_version

from ..text import LONG, one_line, quoted, shown
from .errors import AdapterError


# Initialisations that leave the base model unchanged; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change its
# weights, so that the saved product is not an update of the original model.
BASE_PRESERVING_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Fields of LoraConfig that change what the adapter computes and that PEFT does not mark as variants.
OTHER_VARIANTS = ("use_qalora", "layer_replication", "megatron_config", "enable_lora")


def require_plain_lora(name: str, config: Mapping[str, Any]) -> None:
    """Refuse adapters that are not W0 + s B A on the original base model."""
    peft_type = config["peft_type"]
    if peft_type != "LORA":
        raise AdapterError(name, f"its peft_type is {peft_type}; only LORA adapters can be composed")
    if config.get("use_dora"):
        raise AdapterError(
            name,
            "it is a DoRA adapter, whose update is not the product B A; convert it first with peft.convert_to_lora, "
            "or merge it and extract a LoRA from the difference",
        )
    for variant in _variant_fields():
        if config.get(variant):
            raise AdapterError(
                name, f"{variant}={shown(config[variant])}: this LoRA variant is not a plain product B A"
            )
    for setting, value in config.items():
        if value and _may_be_a_variant(setting, value):
            raise AdapterError(
                name,
                f"{shown(setting)}={shown(value)}: this PEFT ({peft_version}) does not know this setting, and it may "
                "be a variant that is not a plain product B A; upgrade PEFT to the version that saved the adapter",
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            name,
            f"bias={shown(config['bias'])}: it trained biases of the base model, which a composition cannot hold",
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in BASE_PRESERVING_INITS:
        raise AdapterError(
            name,
            f"init_lora_weights={shown(init)} changes the weights of the base model, so that the adapter does not fit "
            "the original; if PEFT supports it, convert the adapter with "
            "save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    unknown = sorted(key for key, value in config.items() if key not in _known_fields() and value)
    if unknown:
        names = one_line(", ".join(map(one_line, unknown)), LONG)
        warnings.warn(
            f"adapter {quoted(name)} has settings that this PEFT does not know and ignores: {names}. A newer PEFT "
            "saved it; upgrade PEFT if the adapter does not behave as expected.",
            stacklevel=2,
        )


@cache
def _known_fields() -> set[str]:
    return {config_field.name for config_field in fields(LoraConfig)} | {"runtime_config"}


@cache
def _variant_fields() -> list[str]:
    marked = [config_field.name for config_field in fields(LoraConfig) if config_field.metadata.get("is_lora_variant")]
    return [*dict.fromkeys([*marked, *OTHER_VARIANTS])]


def _may_be_a_variant(setting: str, value: Any) -> bool:
    """Whether a setting of a newer PEFT could mean an update other than B A, going by PEFT's names for variants."""
    if setting == "use_rslora":
        return False
    is_unknown = setting not in _known_fields()
    return setting.startswith("use_") or (is_unknown and setting.endswith("_config") and isinstance(value, dict))
