"""The peers that are measured side by side: each a name and a function that makes a ready model for N adapters.

All share the frozen weights of one base model and compute in its dtype. Where the base model has a head for the new
task, every peer trains a head of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_composition import CompositionConfig

from .models import RANK, Workbench


# PEFT loads adapter after adapter, each by a walk over the whole model.
MOST_FOR_PEFT = 64
TOO_MANY_FOR_PEFT = f"PEFT would take many minutes to load more than {MOST_FOR_PEFT} adapters"


class UnavailableError(Exception):
    """A peer cannot be measured; the message is the reason that the tables give."""


@dataclass(frozen=True)
class Peer:
    """One contestant.

    Attributes:
        key: its name on the command line.
        title: its name in the tables.
        note: what exactly it does.
        build: (workbench, N) -> model; raises `UnavailableError` where that cannot be. None: it is no model.
        is_leading: whether claims rest on it, so that it is timed in every round.
    """

    key: str
    title: str
    note: str
    build: Callable[[Workbench, int], nn.Module] | None = None
    is_leading: bool = False


def _base(bench: Workbench, count: int) -> nn.Module:
    return bench.shared_base()


def _frozen(bench: Workbench, count: int) -> nn.Module:
    """The base model with its gradients made to flow as far back as any adapter on the targets needs them.

    Adapters need the gradient of the output of every target module. For the first ones, whose input has no gradient,
    it is asked for at their output and no further; the others have it on the way there.
    """
    model = bench.shared_base()

    def ask_for_gradient(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    for name in target_names(bench):
        model.get_submodule(name).register_forward_hook(ask_for_gradient)
    bench.train_head(model)
    return model


def _lora(bench: Workbench, count: int) -> nn.Module:
    config = bench.lora_config()
    config.modules_to_save = list(bench.architecture.head) or None
    return get_peft_model(bench.shared_base(), config, autocast_adapter_dtype=False)


def compose(
    bench: Workbench, base: nn.Module, count: int, mixing: Literal["learned", "uniform"] = "learned"
) -> PeftModel:
    """A composition of N saved adapters on a base model."""
    config = CompositionConfig(
        adapters=list(bench.references(count)),
        mixing=mixing,
        modules_to_save=list(bench.architecture.head) or None,
        task_type=bench.architecture.task_type,
    )
    return get_peft_model(base, config)


def _composition(bench: Workbench, count: int) -> nn.Module:
    return compose(bench, bench.shared_base(), count)


def _uniform(bench: Workbench, count: int) -> nn.Module:
    if not bench.architecture.head:
        raise UnavailableError("nothing trains: uniform weights, and the model has no head")
    return compose(bench, bench.shared_base(), count, "uniform")


def _merged(bench: Workbench, count: int) -> nn.Module:
    model = compose(bench, bench.own_base(), count)
    model.merge_adapter()
    return model


def _peft_trained(bench: Workbench, count: int) -> nn.Module:
    _require_loadable(count)
    model = bench.peft_model(count)
    bench.train_head(model.get_base_model())
    return model


def _peft(bench: Workbench, count: int) -> nn.Module:
    _require_loadable(count)
    model = bench.peft_model(count).requires_grad_(False)
    scales = nn.ParameterList()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, scale in module.scaling.items():
                module.scaling[name] = nn.Parameter(torch.tensor(scale / count, device=bench.device))
                scales.append(module.scaling[name])
    model.learned_scales = scales  # so that the optimizer finds them
    bench.train_head(model.get_base_model())
    return model


def _loop(bench: Workbench, count: int) -> nn.Module:
    model = bench.shared_base()
    for name, factors in read_factors(bench, count):
        model.set_submodule(name, PlainLoop(model.get_submodule(name), factors))
    bench.train_head(model)
    return model


def _xlora(bench: Workbench, count: int) -> nn.Module:
    _require_loadable(count)
    base = bench.shared_base()
    assert isinstance(base, PreTrainedModel)
    base.config.use_cache = False  # X-LoRA demands it
    config = XLoraConfig(
        task_type=bench.architecture.task_type,
        hidden_size=base.config.hidden_size,
        adapters={str(number): reference["path"] for number, reference in enumerate(bench.references(count))},
    )
    try:
        return get_peft_model(base, config)
    except Exception as error:  # whatever PEFT's X-LoRA meets on a model it was not made for is its result here
        reason = str(error).partition("\n")[0]
        raise UnavailableError(f"does not run on this model: {type(error).__name__}: {reason}") from error


def _require_loadable(count: int) -> None:
    if count > MOST_FOR_PEFT:
        raise UnavailableError(TOO_MANY_FOR_PEFT)


class PlainLoop(nn.Module):
    """y = W0 x + sum_n softmax(v)_n s_n B_n A_n x, adapter by adapter, with v trained.

    The way of LoRA Soups' CAT (arXiv 2410.13025), where the weight multiplies the output of every adapter.

    Args:
        base: the frozen layer.
        factors: A of shape (r, in) and s B of shape (out, r) for every adapter.
    """

    def __init__(self, base: nn.Module, factors: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.base = base
        self.logits = nn.Parameter(torch.zeros(len(factors), device=factors[0][0].device))
        self.factors = nn.ParameterList(nn.Parameter(tensor, False) for pair in factors for tensor in pair)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.base(x)
        for number, weight in enumerate(self.logits.softmax(0)):
            A, B = self.factors[2 * number], self.factors[2 * number + 1]
            y = y + weight * F.linear(F.linear(x, A), B)
        return y


def target_names(bench: Workbench) -> list[str]:
    """The full names of the modules that LoRA targets, read from a saved adapter."""
    keys = load_file(bench.references(1)[0]["path"] + "/adapter_model.safetensors")
    found = set(map(_module_name, keys))
    return [name for name, _ in bench.base.named_modules() if name in found]


def read_factors(bench: Workbench, count: int) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]]]]:
    """For every target module its name and the factors (A, s B) of N adapters, on the device of the base model."""
    scale = LoraConfig().lora_alpha / RANK
    files = [load_file(reference["path"] + "/adapter_model.safetensors") for reference in bench.references(count)]
    for name in target_names(bench):
        prefix = f"base_model.model.{name}.lora_"
        yield (
            name,
            [
                (
                    tensors[f"{prefix}A.weight"].to(bench.device, bench.dtype),
                    (scale * tensors[f"{prefix}B.weight"]).to(bench.device, bench.dtype),
                )
                for tensors in files
            ],
        )


def _module_name(key: str) -> str:
    return key.removeprefix("base_model.model.").partition(".lora_")[0]


BASE = Peer("base", "base model", "the base model alone", _base, is_leading=True)
FROZEN = Peer(
    "frozen",
    "frozen base",
    "the base model, its gradients computed as far back as any adapter on the targets needs them: what no adapter "
    "method can undercut",
    _frozen,
    is_leading=True,  # the arithmetic limit is reckoned from it
)
LORA = Peer("lora", "LoRA", f"PEFT's LoRA, r = {RANK}, on the same modules", _lora, is_leading=True)
COMPOSITION = Peer("composition", "composition", "this library, learned weights", _composition, is_leading=True)
UNIFORM = Peer("uniform", "uniform composition", "this library, uniform weights: the new head alone trains", _uniform)
MERGED = Peer("merged", "merged composition", "this library after `merge_adapter`", _merged, is_leading=True)
PEFT = Peer(
    "peft",
    "PEFT, N active",
    "N LoRAs active in PEFT; in training their factors are frozen, and one scale per adapter and module trains",
    _peft,
)
PEFT_TRAINED = Peer(
    "peft-trained",
    "PEFT, N trained",
    "N LoRAs active in PEFT, as its own interface offers it: the factors of all of them train",
    _peft_trained,
)
LOOP = Peer(
    "loop",
    "plain loop",
    "a loop over the adapters with one trained weight each, as LoRA Soups' CAT does",
    _loop,
)
XLORA = Peer("xlora", "X-LoRA", "PEFT's X-LoRA: two forward passes, weights per token", _xlora)
