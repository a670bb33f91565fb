"""Adapters on a base model for a while: afterwards it is as before, whatever PEFT did to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn


# What `get_peft_model` sets and `unload` leaves: where transformers keeps hooks, and a field of some configs.
OF_THE_MODEL = ("_require_grads_hooks", "_require_grads_hook")
OF_ITS_CONFIG = ("pretraining_tp",)


@contextmanager
def adapted(base: nn.Module, config: PeftConfig, ignored: str) -> Iterator[PeftModel]:
    """A context with adapters on a base model; afterwards it is as before.

    `unload` takes the adapters away, but parameters stay frozen, and where gradient checkpointing is on, so do the
    hooks by which `get_peft_model` makes the outputs of embeddings require gradients.

    Args:
        base: a model without adapters.
        config: of the adapters.
        ignored: regular expression of warnings that do not matter here.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    attributes = [(base, name, base.__dict__.get(name)) for name in OF_THE_MODEL]
    own: Any = getattr(base, "config", None)
    attributes += [(own, name, getattr(own, name)) for name in OF_ITS_CONFIG if hasattr(own, name)]
    before = _hooks(base)
    added: set[tuple[nn.Module, int]] = set()
    try:
        try:
            with same_randomness(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=ignored)
                model = get_peft_model(cast(Any, base), config)
        finally:
            added = _hooks(base) - before
        try:
            yield cast(PeftModel, model)
        finally:
            cast(Any, model).unload()
    finally:
        for module, number in added:
            module._forward_hooks.pop(number, None)
        for owner, name, value in attributes:
            if value is not None:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)
        for parameter, was in trained:
            parameter.requires_grad = was


def same_randomness() -> AbstractContextManager[None]:
    """A context after which PyTorch's random numbers go on as if nothing had been drawn or seeded within."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(devices=devices)


def _hooks(model: nn.Module) -> set[tuple[nn.Module, int]]:
    return {(module, number) for module in model.modules() for number in module._forward_hooks}
