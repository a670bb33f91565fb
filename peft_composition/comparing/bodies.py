"""The bodies that methods stand on: mixes of the composition, random LoRAs in its place, and a fresh LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..config import CompositionConfig
from ..evidence.passes import Composition, composition_in
from ..evidence.temporary import adapted, same_randomness
from ..tuner.factors import Factors
from ..tuner.mixing import Mixing


@contextmanager
def composed(base: nn.Module, adapters: Sequence[Any]) -> Iterator[Composition]:
    """A context with a learned composition on the base model; afterwards the base is as before."""
    config = CompositionConfig(adapters=list(adapters), mixing="learned")
    # Every method trains a head of its own, so the adapters' heads are not needed.
    with adapted(base, config, ignored="These tensors of the upstream adapters") as model:
        yield composition_in(model, None)


def mixing_parameters(composition: Composition) -> list[nn.Parameter]:
    """The learned weights, one vector for each module or for those that share one."""
    found = {id(mixing): mixing for mixing in map(_mixing(composition.name), composition.layers.values())}
    return [cast(nn.Parameter, mixing.weight) for mixing in found.values()]


@contextmanager
def random_factors(composition: Composition, seed: int) -> Iterator[None]:
    """A context with random factors in place of all adapters', with the norm of every product B A kept.

    They have the shapes of the adapters and have learned nothing: what they gain is not what adapters know.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, kept = list(composition.layers.values()), []
    try:
        with torch.no_grad():
            for layer in layers:
                factors = cast(Factors, layer.composition_factors[composition.name])
                kept += [(tensor, tensor.detach().clone()) for tensor in (factors.A, factors.B)]
                dim = int(factors.has_experts)
                for A, B in zip(factors.A.split(factors.ranks, dim), factors.B.split(factors.ranks, dim + 1)):
                    _randomize(A, B, dim, generator)
                layer.swap_mixing(composition.name, _mixing(composition.name)(layer))  # what was folded is given up
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        for layer in layers:
            layer.swap_mixing(composition.name, _mixing(composition.name)(layer))


def _randomize(A: Tensor, B: Tensor, dim: int, generator: torch.Generator) -> None:
    """Random values for views of one adapter's factors; dim is 1 where experts come first."""
    if not A.numel():
        return
    size = _norm(A, B, dim)
    for part in (A, B):
        part.copy_(torch.randn(part.shape, generator=generator))
    B.mul_((size / _norm(A, B, dim).clamp_min(1e-12)).to(B))


def _norm(A: Tensor, B: Tensor, dim: int) -> Tensor:
    """The Frobenius norm of B A, of all experts together, without the product: its square is tr(A A' B' B)."""
    rows, columns = A.flatten(dim + 1).float(), B.flatten(dim + 1).float()
    return ((rows @ rows.mT) * (columns.mT @ columns)).sum().clamp_min(0).sqrt()


def _mixing(name: str):  # type: ignore[no-untyped-def]
    return lambda layer: cast(Mixing, layer.composition_mixing[name])


@dataclass(frozen=True)
class FreshLora:
    """A plain LoRA on the modules that the adapters target.

    Attributes:
        model: what is called.
        layers: PEFT's layers.
    """

    model: PeftModel
    layers: Sequence[Any]

    @property
    def factors(self) -> list[nn.Parameter]:
        """A and B of all modules."""
        return [
            parameter
            for layer in self.layers
            for table in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B)
            for parameter in table.parameters()
        ]

    def renew(self, seed: int) -> None:
        """Give A random values and B zeros, as PEFT does."""
        with same_randomness():
            torch.manual_seed(seed)
            for layer in self.layers:
                layer.reset_lora_parameters("default", True)

    @contextmanager
    def times(self, factor: float) -> Iterator[None]:
        """A context in which its product counts `factor` times."""
        for layer in self.layers:
            layer.scale_layer(factor)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.unscale_layer(factor)


@contextmanager
def fresh_lora(base: nn.Module, modules: Sequence[str], rank: int) -> Iterator[FreshLora]:
    """A context with a new LoRA on the base model; afterwards the base is as before.

    Args:
        base: a model without adapters.
        modules: their names.
        rank: of the LoRA; alpha is twice that.
    """
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(modules))
    # PEFT sets fan_in_fan_out rightly itself.
    with adapted(base, config, ignored="fan_in_fan_out is set to") as model:
        yield FreshLora(model, [layer for layer in model.modules() if isinstance(layer, LoraLayer)])
