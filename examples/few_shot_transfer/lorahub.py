"""LoraHub (arXiv 2307.13269): one weight per adapter for the whole model, found without gradients through nevergrad.

As its authors' code does, A and B are summed apart with the same weights (which adds the cross terms B_i A_j), the
weights stay within -1.5 and 1.5 and start at zero, and the objective is the loss on the support set plus 0.05 times the
mean absolute weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import nevergrad
import numpy as np
import torch
from peft import PeftModel, set_peft_model_state_dict
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

    def objective(weights: np.ndarray) -> float:
        combine(model, factors, weights)
        return loss() + REGULARIZATION * float(np.abs(weights).mean())

    space = nevergrad.p.Array(init=np.zeros(len(adapters)), lower=-BOUND, upper=BOUND)
    space.random_state.seed(seed)
    found = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget).minimize(objective).value
    combine(model, factors, found)
    return {adapter.name: round(float(weight), 4) for adapter, weight in zip(adapters, found)}


def combine(model: PeftModel, factors: Sequence[dict[str, Tensor]], weights: np.ndarray) -> None:
    """Writes the weighted sums of all A and of all B into the model's LoRA.

    Raises:
        ValueError: if the adapters do not have the same tensors.
    """
    if any(set(other) != set(factors[0]) for other in factors):
        raise ValueError("LoraHub needs adapters with the same target modules")
    total = {name: sum(float(w) * own[name] for w, own in zip(weights, factors)) for name in factors[0]}
    with torch.no_grad():
        set_peft_model_state_dict(model, total)


def _factors(adapter: Adapter) -> dict[str, Tensor]:
    tensors = load_file(adapter.folder / WEIGHTS)
    return {name: tensor for name, tensor in tensors.items() if f".{HEAD}." not in name}
