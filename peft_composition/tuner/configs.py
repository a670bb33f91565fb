"""The configs of a composed model by adapter name, in which other methods cannot replace a composition's config."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig

from ..config import CompositionConfig


class Configs(dict[str, PeftConfig]):
    """PEFT passes this dict from one tuner to the next, which adds its own config by name.

    A LoRA with the name of a composition would be saved in its place, with the tensors of both but the config of one.
    """

    def __setitem__(self, adapter_name: str, config: PeftConfig) -> None:
        known = self.get(adapter_name)
        if isinstance(known, CompositionConfig) and not isinstance(config, CompositionConfig):
            raise ValueError(
                f"The model holds a composition {adapter_name!r}: a {type(config).__name__} beside it needs another "
                f'name, as in get_peft_model(model, config, adapter_name="fresh").'
            )
        super().__setitem__(adapter_name, config)

    def update(self, *others: Any, **more: PeftConfig) -> None:
        """Like `dict.update`; every entry is checked."""
        entries: dict[str, PeftConfig] = dict(*others, **more)
        for adapter_name, config in entries.items():
            self[adapter_name] = config
