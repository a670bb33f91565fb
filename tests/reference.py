"""An independent float64 computation of W = W0 + sum_n w_n s_n B_n A_n, read from the files of the upstream adapters.

Nothing here calls the code under test: adapters are a plain loop, the forward pass is that of the base model's own
modules with W in place of W0, and gradients are those of autograd.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


# Relative to the norm of the reference.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# Parameters that the tests target, by the last part of their module's name and in the order in which it has them.
PARAMETERS = {
    "experts": ("gate_up_proj", "down_proj"),
    "gate": ("weight",),
    "router": ("weight",),
    "holder": ("table", "stack"),
    "flipped": ("stack",),
    "lin": ("weight",),
}


@dataclass(frozen=True)
class Lora:
    """One adapter at one module, in float64."""

    scale: float
    A: Tensor  # (r, in), (r, in, *kernel) or (r, vocabulary); of experts (experts, r, in)
    B: Tensor  # (out, r), (out, r, 1, ...) or (dim, r); of experts (experts, out, r)
    bias: Tensor | None = None  # (out,)
    has_experts: bool = False

    @property
    def rank(self) -> int:
        return self.B.shape[2 if self.has_experts else 1]

    def delta(self) -> Tensor:
        """s B A, shape (out, in), (out, in, *kernel) or (dim, vocabulary); of experts (experts, out, in)."""
        if self.has_experts:
            return self.scale * torch.einsum("eor,eri->eoi", self.B, self.A)
        return self.scale * torch.einsum("or,r...->o...", self.B.flatten(1), self.A)


def read_lora(folder: str | Path) -> dict[str, Lora]:
    """The factors of a saved adapter by module or parameter name, with the scale that its config gives them."""
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    tensors = {
        key.removeprefix("base_model.model."): tensor.double()
        for key, tensor in load_file(Path(folder, "adapter_model.safetensors")).items()
    }
    found = {}
    for key, A in tensors.items():
        for middle, end in ((".lora_A", ".weight"), (".lora_embedding_A", "")):
            if key.endswith(middle + end):
                path = key.removesuffix(middle + end)
                to_B = path + middle.replace("A", "B")
                name, target, times = _name_in_base(path, config, tensors)
                rank = _by_pattern(config["rank_pattern"], target, config["r"])
                alpha = _by_pattern(config["alpha_pattern"], target, config["lora_alpha"])
                scale = times * alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
                experts, rest = divmod(A.shape[0], rank)
                assert rest == 0
                B = tensors[to_B + end]
                if experts > 1:
                    A = torch.stack([A[expert * rank : (expert + 1) * rank] for expert in range(experts)])
                    B = torch.stack([B[:, expert::experts] for expert in range(experts)])
                found[name] = Lora(scale, A, B, tensors.get(f"{to_B}.bias"), has_experts=experts > 1)
    return found


def _name_in_base(path: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str, str, int]:
    """Name of the module or parameter that factors belong to, its name in patterns, and how often PEFT adds them."""
    attention, is_inside, _ = path.partition(".base_layer.out_proj")
    if is_inside:
        return f"{attention}.out_proj", attention, attention_output_times()
    if f"{path}.base_layer.out_proj.lora_A.weight" in tensors:
        return f"{path}.in_proj_weight", path, 1
    inner = re.sub(r"(\.base_layer)+$", "", path)
    plain = inner.replace(".base_layer", "")
    targets = config.get("target_parameters") or ()
    if plain.endswith("attn") and any(target.endswith("in_proj_weight") for target in targets):
        return f"{plain}.in_proj_weight", f"{plain}.in_proj_weight", 1
    inside = [  # the innermost wrapper is that of the first parameter
        name
        for name in PARAMETERS.get(plain.rpartition(".")[2], ())
        if any(f".{plain}.{name}".endswith(f".{target}") for target in targets)
    ]
    depth = path.removeprefix(inner).count(".base_layer")
    if not inside:
        return plain, plain, 1
    name = f"{plain}.{inside[len(inside) - 1 - depth]}"
    return name, name, 1


@cache
def attention_output_times() -> int:
    """How often PEFT adds the update of an attention's output projection when it merges (0.21.2: twice)."""
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)}).double()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=1, lora_alpha=1, target_modules=["attention"]))
    output = model.base_model.model["attention"].base_layer.out_proj
    A, B = output.lora_A["default"].weight, output.lora_B["default"].weight
    nn.init.normal_(B)
    product = (B @ A).detach()
    update = model.merge_and_unload()["attention"].out_proj.weight - base["attention"].out_proj.weight
    times = (update / product).detach().flatten()
    torch.testing.assert_close(times, times.round(), rtol=1e-6, atol=0)
    return int(times[0].round())


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The entry for a module; the tests write patterns as plain names, ends of them, or regexes that begin with ^."""
    for end, value in pattern.items():
        if (end.startswith("^") and re.match(end, module)) or f".{module}".endswith(f".{end}"):
            return value
    return default


def weight_of(model: nn.Module, name: str) -> tuple[str, nn.Parameter, bool]:
    """The weight of a module, or a parameter: its name, the parameter, and whether it is stored as (in, out)."""
    owner, _, key = name.rpartition(".")
    if key in model.get_submodule(owner)._parameters:
        parameter = model.get_parameter(name)
        is_transposed = parameter.dim() == 3 and getattr(model.get_submodule(owner), "is_transposed", False)
        return name, parameter, is_transposed
    module = model.get_submodule(name)
    return f"{name}.weight", module.weight, isinstance(module, (Conv1D, nn.Embedding))


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
        if isinstance(self.base, PreTrainedModel) and self.base.get_experts_implementation() is not None:
            self.base.set_experts_implementation("eager")  # the fused kernels know no float64
        for module in self.base.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # it would hide the padding row from the gradient of the formula
        self.adapters = [read_lora(folder) for folder in folders]
        names = [
            name
            for module, layer in base.named_modules()
            for name in (module, *(f"{module}.{parameter}" for parameter in layer._parameters))
        ]
        self.modules = [name for name in names if any(name in adapter for adapter in self.adapters)]

    def delta(self, module: str, weights: Tensor) -> Tensor:
        """sum_n w_n s_n B_n A_n in the layout of the module's weight."""
        _, parameter, is_transposed = weight_of(self.base, module)
        total = torch.zeros_like(parameter.mT if is_transposed else parameter)
        for weight, adapter in zip(weights, self.adapters, strict=True):
            if module in adapter:
                total = total + weight * adapter[module].delta()
        return total.mT if is_transposed else total

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
            name, parameter, _ = weight_of(self.base, module)
            composed[name] = parameter.detach() + self.delta(module, weights[module])
            bias = self.delta_bias(module, weights[module])
            if bias is not None:
                composed[f"{module}.bias"] = self.base.get_submodule(module).bias.detach() + bias
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
