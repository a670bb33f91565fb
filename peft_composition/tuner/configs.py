"""The configs of a composed model by adapter name: one of another method cannot take a composition's place."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig

from ..config import CompositionConfig


class Configs(dict[str, PeftConfig]):
    """PEFT hands this dict from one tuner to the next, which enters its own config by name.

    A LoRA of a composition's name would be saved in its place, with tensors of both and a config that knows one.
    """

    def __setitem__(self, adapter_name: str, config: PeftConfig) -> None:
        known = self.get(adapter_name)
        if isinstance(known, CompositionConfig) and not isinstance(config, CompositionConfig):
            raise ValueError(
                f"The model holds a composition {adapter_name!r}: a {type(config).__name__} beside it needs a name of "
                f'its own, as in get_peft_model(model, config, adapter_name="fresh").'
            )
        super().__setitem__(adapter_name, config)

    def update(self, *others: Any, **more: PeftConfig) -> None:
        """As of any dict; every entry goes through the check."""
        entries: dict[str, PeftConfig] = dict(*others, **more)
        for adapter_name, config in entries.items():
            self[adapter_name] = config
