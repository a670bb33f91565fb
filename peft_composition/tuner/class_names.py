"""The names of a head's classes, by number: read from a model's config, recorded, and given back with the head.

Whoever reads a head's numbers needs them: another training may have numbered the same classes in another order.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..config import CompositionConfig
from .base_model import BaseModel
from .layer import CompositionLayer


def stated_names(model: nn.Module) -> list[str] | None:
    """The names in a classifier's config; None where it has none, or only those that transformers makes up."""
    number = BaseModel.number_of_labels(model)
    stated = getattr(getattr(model, "config", None), "id2label", None)
    if number is None or not isinstance(stated, dict) or sorted(map(str, stated)) != sorted(map(str, range(number))):
        return None
    by_number = {int(key): str(name) for key, name in stated.items()}
    names = [by_number[place] for place in range(number)]
    made_up = [f"LABEL_{place}" for place in range(number)]
    return None if names == made_up or len(set(names)) < number else names


def record_names(config: CompositionConfig, model: nn.Module) -> None:
    """Record the names that a model's config has now; where it has none, what was recorded stays.

    A head of the composition's own keeps its names, too, where the model's config still has those of another
    composition, beside which this one was loaded.
    """
    now = stated_names(model)
    keeps = config.modules_to_save and config.class_names and now == config.names_in_model
    names = config.class_names if keeps else now or config.class_names
    config.class_names = names if names and len(names) == config.num_labels else None


class _Given(NamedTuple):
    """Names that the model's config was given, and what it had before by itself."""

    names: list[str]
    id2label: Any
    label2id: Any


class NamedClasses(BaseTuner):
    """A tuner in whose model the config names the classes of the head that runs.

    The head of the active composition, if it has one of its own, or else that of the base model, which gets its own
    names back. Names that the user sets afterwards stay.
    """

    _given: _Given | None = None

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in every PEFT method."""
        super().set_adapter(adapter_name, inference_mode)
        self._name_classes()

    def enable_adapter_layers(self) -> None:
        """As in every PEFT method."""
        super().enable_adapter_layers()
        self._name_classes()

    def disable_adapter_layers(self) -> None:
        """As in every PEFT method."""
        super().disable_adapter_layers()
        self._name_classes()

    def delete_adapter(self, adapter_name: str) -> None:
        """As in every PEFT method."""
        super().delete_adapter(adapter_name)
        self._name_classes()

    def _name_classes(self) -> None:
        """Give the model's config the names of the head that runs, unless the user gave it others."""
        number = BaseModel.number_of_labels(self.model)
        if number is None:
            return
        own, now, given = cast(Any, self.model).config, stated_names(self.model), self._given
        head = self._running_head()
        last = given.names if given is not None else now if head is None else head.names_in_model
        if now != last:
            return
        names = None if head is None or len(head.class_names or ()) != number else head.class_names
        if names is None and given is not None:
            own.id2label, own.label2id, self._given = given.id2label, given.label2id, None
        elif names is not None and names != now:
            before = (own.id2label, own.label2id) if given is None else given[1:]
            self._given = _Given(list(names), *before)
            own.id2label = dict(enumerate(names))
            own.label2id = {name: place for place, name in enumerate(names)}
        after = stated_names(self.model)
        for config in self.peft_config.values():
            if isinstance(config, CompositionConfig) and config.names_in_model == now:
                config.names_in_model = after

    def _running_head(self) -> CompositionConfig | None:
        """The config of the active composition that has a head of its own; None where the base model's runs."""
        layer = next((module for module in self.model.modules() if isinstance(module, CompositionLayer)), None)
        if layer is not None and layer.disable_adapters:
            return None
        configs = (self.peft_config.get(name) for name in self.active_adapters)
        return next((own for own in configs if isinstance(own, CompositionConfig) and own.modules_to_save), None)
