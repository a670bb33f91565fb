"""How a new task is met: each method as a model that is ready to be trained, and what of it stays frozen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_composition import CompositionConfig, CompositionModel

from .models import HEAD, Foundation
from .scenario import BASELINES, FACTORS, FROZEN, RECIPES, SHARING, Scenario
from .upstream import Adapter, peft_options


LEARNED = ("learned", "learned-free", "random-learned", "fresh-member", *RECIPES)


@dataclass(frozen=True)
class Contender:
    """A method, with what it needs to be built.

    Attributes:
        method: one of `scenario.METHODS`.
        adapters: the upstream adapters, or the random ones; none for the baselines.
        adapter: the name of the one adapter of "single", or the factor of "lambda-lora"; else None.
    """

    method: str
    adapters: tuple[Adapter, ...] = ()
    adapter: str | None = None

    @property
    def is_frozen(self) -> bool:
        """Whether nothing but a head is trained."""
        return self.method in FROZEN

    @property
    def body(self) -> tuple[str, ...]:
        """Names what comes before the head at the start: contenders with equal bodies share features there.

        LoRA and full fine-tuning start from the bare model, all compositions from the mean of their adapters.
        """
        return tuple(str(adapter.folder) for adapter in self.adapters)


def contenders(
    methods: Sequence[str], adapters: Sequence[Adapter], random_adapters: Sequence[Adapter]
) -> list[Contender]:
    """The methods with their adapters; "single" once for every adapter, "lambda-lora" once for every factor."""
    found = []
    for method in methods:
        if method == "single":
            found += [Contender(method, (adapter,), adapter.name) for adapter in adapters]
        elif method == "lambda-lora":
            found += [Contender(method, (), factor) for factor in FACTORS]
        elif method in BASELINES:
            found.append(Contender(method))
        else:
            chosen = random_adapters if method.startswith("random") else adapters
            found.append(Contender(method, tuple(chosen)))
    return found


def build(
    contender: Contender, scenario: Scenario, rank: int, model: Foundation, classes: int, seed: int
) -> nn.Module:
    """The method's model, with a fresh head that depends on the seed alone.

    Args:
        contender: the method.
        scenario: names the target modules.
        rank: of a fresh LoRA.
        model: the foundation model.
        classes: of the new task.
        seed: of the head, and of a fresh LoRA.
    """
    base = model.build(classes, seed)
    method = contender.method
    if method == "full":
        return base
    if method in ("zero-shot", "classifier"):
        return _frozen(base)
    if method in ("lora", "lambda-lora", "lorahub"):
        return fresh_lora(base, scenario, rank, seed)
    return _composition(base, contender.adapters, scenario, method)


def fresh_lora(base: nn.Module, scenario: Scenario, rank: int, seed: int) -> PeftModel:
    """An untrained LoRA, made as the upstream ones were."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=round(scenario.upstream.alpha_per_rank * rank),
        target_modules=list(scenario.model.target_modules),
        **peft_options(scenario),
    )
    return get_peft_model(base, config)


def mixing_weights(model: nn.Module) -> dict[str, dict[str, float]] | None:
    """The weights of a composition by module and adapter, to four digits; None for other models."""
    if not (isinstance(model, PeftModel) and isinstance(model.base_model, CompositionModel)):
        return None
    weights = model.base_model.mixing_weights()
    return {module: {name: round(w, 4) for name, w in of_module.items()} for module, of_module in weights.items()}


def _frozen(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    if hasattr(model, HEAD):
        model.get_submodule(HEAD).requires_grad_(True)
    return model


def _composition(base: nn.Module, upstream: Sequence[Adapter], scenario: Scenario, method: str) -> PeftModel:
    # The uniform composition of a single adapter is that adapter, and needs no head of the same size.
    mixing: Literal["learned", "uniform", "fixed"] = "learned" if method in LEARNED else "uniform"
    options: dict[str, Any] = {"normalization": "none"} if method == "learned-free" else {}
    if method in SHARING:
        options = {"weight_sharing": SHARING[method]}
    if method == "evidence":
        mixing, options = "fixed", {"weights": [1 / len(upstream)] * len(upstream)}  # until there is evidence
    adapters: list[Any] = [{"path": adapter.folder, "name": adapter.name} for adapter in upstream]
    config = CompositionConfig(adapters=adapters, mixing=mixing, **peft_options(scenario), **options)
    with warnings.catch_warnings():
        # That the upstream heads are not used is what we want here: the new task gets a head of its own.
        warnings.filterwarnings("ignore", message="These tensors of the upstream adapters")
        return get_peft_model(base, config)
