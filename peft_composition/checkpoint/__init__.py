"""Saves and shares compositions: model cards, pushing to the Hub, plain LoRAs."""

from .card import write_model_card
from .export import LoraExport, lora_from_checkpoint, to_lora
from .push import CompositionCardMixin, add_to_checkpoint, push_to_hub
from .saved import saved_mixing_weights


__all__ = [
    "to_lora",
    "lora_from_checkpoint",
    "add_to_checkpoint",
    "LoraExport",
    "push_to_hub",
    "write_model_card",
    "CompositionCardMixin",
    "saved_mixing_weights",
]
