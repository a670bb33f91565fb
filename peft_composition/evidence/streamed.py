"""Reads adapters one after the other, so that only one is in memory, however many are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

from peft import PeftModel
from torch import nn

from ..config import CompositionConfig
from ..tuner.locating import composition_layers
from .passes import Candidate
from .temporary import adapted


def read_in_turn(base: nn.Module, adapters: Sequence[Any]) -> list[Candidate]:
    """Candidates for each adapter alone on a base model, then for the base model; each is read when it is scored.

    Args:
        base: a model without adapters.
        adapters: the adapters, as in `CompositionConfig`.

    Raises:
        ValueError: the model already has adapters, or an entry does not refer to an adapter.
    """
    if isinstance(base, PeftModel) or any(True for _ in composition_layers(base)):
        raise ValueError(
            f"This model ({type(base).__name__}) already has adapters. Pass the base model to score adapters from "
            "files, or leave out adapters=... to score those of its composition."
        )
    config = CompositionConfig(adapters=cast(Any, adapters), mixing="uniform")
    found = [Candidate(own["name"], "adapter", partial(_alone, base, own)) for own in config.references]
    return [*found, Candidate("base", "base", nullcontext)]


@contextmanager
def _alone(base: nn.Module, reference: Any) -> Iterator[None]:
    """A context with one adapter on the base model; afterwards the model is as before."""
    # Features are scored, so the adapters' heads are not needed.
    config = CompositionConfig(adapters=[reference], mixing="uniform")
    with adapted(base, config, ignored="These tensors of the upstream adapters"):
        yield
