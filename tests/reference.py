"""An independent float64 computation of W = W0 + sum_n w_n s_n B_n A_n, read from the files of the upstream adapters.

Nothing here calls the code under test: adapters are a plain loop, the forward pass is that of the base model's own
modules with W in place of W0, and gradients are those of autograd.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


# Relative to the norm of the reference.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class Lora:
    """One adapter at one module, in float64."""

    scale: float
    A: Tensor  # (r, in), (r, in, *kernel) or (r, vocabulary)
    B: Tensor  # (out, r), (out, r, 1, ...) or (dim, r)
    bias: Tensor | None = None  # (out,)

    def delta(self) -> Tensor:
        """s B A, shape (out, in), (out, in, *kernel) or (dim, vocabulary)."""
        return self.scale * torch.einsum("or,r...->o...", self.B.flatten(1), self.A)


def read_lora(folder: str | Path) -> dict[str, Lora]:
    """The factors of a saved adapter by module name, with the scale that its config gives them."""
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    tensors = {
        key.removeprefix("base_model.model."): tensor.double()
        for key, tensor in load_file(Path(folder, "adapter_model.safetensors")).items()
    }
    found = {}
    for key, A in tensors.items():
        for middle, end in ((".lora_A", ".weight"), (".lora_embedding_A", "")):
            if key.endswith(middle + end):
                module = key.removesuffix(middle + end)
                to_B = module + middle.replace("A", "B")
                rank = _by_pattern(config["rank_pattern"], module, config["r"])
                alpha = _by_pattern(config["alpha_pattern"], module, config["lora_alpha"])
                assert A.shape[0] == rank
                scale = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
                found[module] = Lora(scale, A, tensors[to_B + end], tensors.get(f"{to_B}.bias"))
    return found


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The entry for a module; the tests write patterns as plain module names or ends of them."""
    return next((value for end, value in pattern.items() if f".{module}".endswith(f".{end}")), default)


def mixing_weights(start: Sequence[float] | Tensor, theta: Tensor, gain: float, normalization: str) -> Tensor:
    """w from theta in float64: softmax(log(start) + gain theta), or start + gain theta."""
    start = torch.as_tensor(start, dtype=torch.float64)
    if normalization == "none":
        return start + gain * theta
    odds = start * torch.exp(gain * theta)
    return odds / odds.sum()


class Reference:
    """A base model whose weights are composed by the formula, in float64.

    Args:
        base: the model; a copy of it is taken in float64, from whatever dtype it has.
        folders: the upstream adapters.
    """

    def __init__(self, base: nn.Module, folders: Sequence[str | Path]) -> None:
        self.base = copy.deepcopy(base).double()
        for module in self.base.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # it would hide the padding row from the gradient of the formula
        self.adapters = [read_lora(folder) for folder in folders]
        self.modules = [name for name, _ in base.named_modules() if any(name in adapter for adapter in self.adapters)]

    def delta(self, module: str, weights: Tensor) -> Tensor:
        """sum_n w_n s_n B_n A_n in the layout of the module's weight."""
        layer = self.base.get_submodule(module)
        is_transposed = isinstance(layer, (Conv1D, nn.Embedding))
        total = torch.zeros_like(layer.weight.t() if is_transposed else layer.weight)
        for weight, adapter in zip(weights, self.adapters, strict=True):
            if module in adapter:
                total = total + weight * adapter[module].delta()
        return total.t() if is_transposed else total

    def delta_bias(self, module: str, weights: Tensor) -> Tensor | None:
        """sum_n w_n s_n b_n; None where no adapter has a bias for the module."""
        terms = [
            weight * adapter[module].scale * adapter[module].bias
            for weight, adapter in zip(weights, self.adapters, strict=True)
            if module in adapter and adapter[module].bias is not None
        ]
        return torch.stack(terms).sum(0) if terms else None

    def parameters(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The composed weights and biases by their names in the base model."""
        composed = {}
        for module in self.modules:
            layer = self.base.get_submodule(module)
            composed[f"{module}.weight"] = layer.weight.detach() + self.delta(module, weights[module])
            bias = self.delta_bias(module, weights[module])
            if bias is not None:
                composed[f"{module}.bias"] = layer.bias.detach() + bias
        return composed

    def __call__(self, weights: Mapping[str, Tensor], *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Output (or logits) of the composed model."""
        return logits(torch.func.functional_call(self.base, self.parameters(weights), args, kwargs))

    def absolute(self) -> Reference:
        """The same with every number replaced by its size: gives the sizes of what is summed, for rounding bounds."""
        other = copy.deepcopy(self)
        for parameter in other.base.parameters():
            parameter.data.abs_()
        other.adapters = [
            {
                module: replace(
                    lora,
                    scale=abs(lora.scale),
                    A=lora.A.abs(),
                    B=lora.B.abs(),
                    bias=None if lora.bias is None else lora.bias.abs(),
                )
                for module, lora in adapter.items()
            }
            for adapter in self.adapters
        ]
        return other

    def alone(self, number: int) -> Reference:
        """The same with one adapter and nothing of the base model: the output is linear in the adapter's weight."""
        other = copy.deepcopy(self)
        for parameter in other.base.parameters():
            parameter.data.zero_()
        other.adapters = [other.adapters[number]]
        return other


def logits(result: Any) -> Tensor:
    """The tensor in what a model returns."""
    return result if isinstance(result, Tensor) else result.logits


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    assert actual.shape == expected.shape
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())
