"""LoraHub (arXiv 2307.13269): one weight per adapter for the whole model, found without gradients through nevergrad.

As its authors' code does, A and B are summed apart with the same weights (which adds the cross terms B_i A_j), the
weights stay within -1.5 and 1.5 and start at zero, and the objective is the loss on the support set plus 0.05 times
the mean absolute weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import nevergrad
import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from .models import HEAD
from .upstream import WEIGHTS, Adapter


BOUND = 1.5
REGULARIZATION = 0.05


def search(
    model: PeftModel, adapters: Sequence[Adapter], loss: Callable[[], float], budget: int, seed: int
) -> dict[str, float]:
    """Finds weights and leaves the model with the LoRA that they make.

    Args:
        model: a LoRA of the adapters' rank and target modules, which is overwritten.
        adapters: what is combined.
        loss: the loss of the model, as it is, on the support set.
        budget: how many combinations are tried.
        seed: of the search.

    Returns:
        The weight of every adapter.
    """
    factors = [_factors(adapter) for adapter in adapters]
    failures: list[BaseException] = []

    def objective(weights: np.ndarray) -> float:
        # nevergrad's thread would wait for ever for a search that an error or Ctrl-C has left: bring it to its end.
        if failures:
            return np.finfo(float).max
        try:
            combine(model, factors, weights)
            return loss() + REGULARIZATION * float(np.abs(weights).mean())
        except BaseException as failure:
            failures.append(failure)
            return np.finfo(float).max

    space = nevergrad.p.Array(init=np.zeros(len(adapters)), lower=-BOUND, upper=BOUND)
    space.random_state.seed(seed)
    found = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget).minimize(objective).value
    if failures:
        raise failures[0]
    combine(model, factors, found)
    return {adapter.name: round(float(weight), 4) for adapter, weight in zip(adapters, found)}


def combine(model: PeftModel, factors: Sequence[dict[str, Tensor]], weights: np.ndarray) -> None:
    """Writes the weighted sums of all A and of all B into the model's LoRA.

    Raises:
        ValueError: if the adapters do not have the same tensors.
    """
    if any(set(other) != set(factors[0]) for other in factors):
        raise ValueError("LoraHub needs adapters with the same target modules")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in factors[0]:
            stacked = torch.stack([float(w) * own[name] for w, own in zip(weights, factors)])
            parameters[name.replace(".weight", f".{model.active_adapter}.weight")].copy_(stacked.sum(dim=0))


def _factors(adapter: Adapter) -> dict[str, Tensor]:
    tensors = load_file(adapter.folder / WEIGHTS)
    return {name: tensor for name, tensor in tensors.items() if f".{HEAD}." not in name}
