"""Adapters that are read one after the other: one is in memory at a time, however many there are to score."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from ..config import CompositionConfig
from ..tuner.locating import composition_layers
from .passes import Candidate


def read_in_turn(base: nn.Module, adapters: Sequence[Any]) -> list[Candidate]:
    """Each adapter alone on a base model, and last that model as it is; nothing is read before its turn comes.

    Args:
        base: a model without adapters.
        adapters: as `CompositionConfig` takes them.

    Raises:
        ValueError: the model has adapters already, or an entry is no reference to one.
    """
    if isinstance(base, PeftModel) or any(True for _ in composition_layers(base)):
        raise ValueError(
            f"This model ({type(base).__name__}) has adapters already. Pass the base model to score adapters from "
            "files, or leave out adapters=... to score those of its composition."
        )
    config = CompositionConfig(adapters=list(adapters), mixing="uniform")
    found = [Candidate(own["name"], "adapter", partial(_alone, base, own)) for own in config.references]
    return [*found, Candidate("base", "base", nullcontext)]


@contextmanager
def _alone(base: nn.Module, reference: Any) -> Iterator[None]:
    """The base model with one adapter, read now; as before afterwards."""
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    try:
        with warnings.catch_warnings():
            # That the heads of adapters are not used goes without saying here: features are scored.
            warnings.filterwarnings("ignore", message="These entries of the upstream adapters")
            model = get_peft_model(base, CompositionConfig(adapters=[reference], mixing="uniform"))
        try:
            yield
        finally:
            model.unload()
    finally:
        for parameter in trained:
            parameter.requires_grad = True
