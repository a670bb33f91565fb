"""The names of the classes of a head, by number: read from a model's config, recorded, and given back on loading.

Whoever reads a head's numbers needs them: another training may have numbered the same classes in another order.
"""

from __future__ import annotations

from torch import nn

from ..config import CompositionConfig
from .base_model import BaseModel


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


def give_names(config: CompositionConfig, model: nn.Module, is_alone: bool) -> None:
    """Give the model's config the names of a saved composition's own head.

    Args:
        config: of the saved composition.
        model: its base model.
        is_alone: whether no other adapter is in the model. Beside others only a config without names gets them.
    """
    names = config.class_names
    if not names or not config.modules_to_save or BaseModel.number_of_labels(model) != len(names):
        return
    if is_alone or stated_names(model) is None:
        own = model.config
        own.id2label = dict(enumerate(names))  # type: ignore[union-attr]
        own.label2id = {name: number for number, name in enumerate(names)}  # type: ignore[union-attr]
