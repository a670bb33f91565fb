"""Trains what is trainable in a model on the rows of a split, the same way for every method that trains a body."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..tuner.layer import CompositionLayer
from ..tuner.single import evaluating
from .heads import Budget, batches
from .tasks import Split, Task


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """A context to train in without dropout, as heads on cached features are trained."""
    with evaluating([model]):
        layers = [module for module in model.modules() if isinstance(module, CompositionLayer)]
        for layer in layers:
            layer.train()  # nothing is folded between steps
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()


@contextmanager
def as_before(model: nn.Module, head: Sequence[nn.Parameter]) -> Iterator[None]:
    """A context in which nothing is trainable at first; afterwards the head and what was trainable are as before."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    values = [parameter.detach().clone() for parameter in head]
    model.requires_grad_(False)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(head, values):
                parameter.copy_(value)
        for parameter, was in trainable:
            parameter.requires_grad_(was)


def fit(
    task: Task,
    model: nn.Module,
    split: Split,
    at_rate: Sequence[tuple[Sequence[nn.Parameter], float]],
    budget: Budget,
    seed: int,
    name: str,
) -> None:
    """Train parameters, each group at its rate, by AdamW over shuffled batches.

    Args:
        task: has the loss.
        model: as it is.
        split: whose rows are trained on.
        at_rate: parameters with their learning rates.
        budget: how long.
        seed: of the order of the examples.
        name: of the method, for messages.

    Raises:
        ValueError: the loss is not finite.
    """
    parameters = [parameter for group, _ in at_rate for parameter in group]
    for parameter in parameters:
        parameter.requires_grad_(True)
    groups = [{"params": list(group), "lr": rate} for group, rate in at_rate if group]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / budget.steps)
    with without_dropout(model):
        for rows in batches([split.train], budget, seed)[:, 0]:
            loss = task.loss(model, rows)
            if not math.isfinite(loss.item()):
                rates = ", ".join(f"{rate:g}" for _, rate in at_rate)
                raise ValueError(f"{name}: the training loss is {loss.item()} at learning rates {rates}; lower them")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
