"""Contexts that change a model temporarily: eval mode, a single adapter, other mixing weights, or no adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from ..config import CompositionConfig
from ..upstream.shapes import LayerShape
from ..upstream.stacking import StackedFactors
from .factors import Factors
from .forms import Embedding
from .layer import CompositionLayer
from .mixing import Mixing


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """A context with all these models in eval mode; afterwards each module is as before."""
    models = list(models)
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def one_adapter(layers: Iterable[CompositionLayer], composition: str, number: int) -> Iterator[None]:
    """A context that computes with a single adapter, W0 + s_n B_n A_n, using only its rows of the stacked factors.

    A layer that the adapter does not touch computes only its base layer. Nothing is copied: the factors are views. If
    the factors are sharded or offloaded and cannot be cut, the adapter gets weight 1 and all others 0, which gives the
    same result at the cost of all adapters.

    Args:
        layers: the layers of the composition, neither merged nor disabled.
        composition: the name of the composition.
        number: the number of the adapter.
    """
    alone = constant_mixing([1.0])
    with _others_in_place(layers, composition) as held:
        for layer in held:
            factors = cast(Factors, layer.composition_factors[composition])
            if not _can_be_cut(factors):
                weights = [float(other == number) for other in range(len(factors.ranks))]
                layer.swap_mixing(composition, constant_mixing(weights))
            elif factors.ranks[number]:
                layer.composition_factors[composition] = _cut(factors, number, isinstance(layer, Embedding))
                layer.swap_mixing(composition, alone)
            else:
                del layer.composition_factors[composition], layer.composition_mixing[composition]
        yield


@contextmanager
def mixed_by(layers: Iterable[CompositionLayer], composition: str, weights: list[float]) -> Iterator[None]:
    """A context with the same constant mixing weights in all modules; all zeros give the base model.

    Args:
        layers: the layers of the composition, neither merged nor disabled.
        composition: the name of the composition.
        weights: one weight per adapter.
    """
    mixing = constant_mixing(weights)
    with _others_in_place(layers, composition) as held:
        for layer in held:
            if any(weights) or not _can_be_cut(cast(Factors, layer.composition_factors[composition])):
                layer.swap_mixing(composition, mixing)
            else:
                del layer.composition_factors[composition], layer.composition_mixing[composition]
        yield


@contextmanager
def mixed_apart(
    layers: Iterable[CompositionLayer], composition: str, weights_of: Callable[[Mixing], list[float]]
) -> Iterator[None]:
    """A context with other constant mixing weights, which differ between modules as the present ones do.

    Args:
        layers: the layers of the composition, neither merged nor disabled.
        composition: the name of the composition.
        weights_of: one weight per adapter, for the modules with some mixing weights.
    """
    swapped: dict[int, Mixing] = {}
    with _others_in_place(layers, composition) as held:
        for layer in held:
            own = cast(Mixing, layer.composition_mixing[composition])
            if id(own) not in swapped:
                swapped[id(own)] = constant_mixing(weights_of(own))
            layer.swap_mixing(composition, swapped[id(own)])
        yield


def constant_mixing(weights: list[float]) -> Mixing:
    """Mixing weights that are constant."""
    adapters: list[Any] = [str(number) for number in range(len(weights))]
    fixed = CompositionConfig(adapters=adapters, mixing="fixed", weights=weights, normalization="none")
    return Mixing(fixed, torch.float32)


@contextmanager
def _others_in_place(layers: Iterable[CompositionLayer], composition: str) -> Iterator[list[CompositionLayer]]:
    """The layers that have the composition; changes of its parts are undone afterwards."""
    held = [layer for layer in layers if composition in layer.composition_factors]
    tables = [table for layer in held for table in (layer.composition_factors, layer.composition_mixing)]
    before = [dict(table._modules) for table in tables]  # in their order, which is that of a checkpoint's keys
    try:
        yield held
    finally:
        for table, modules in zip(tables, before):
            table._modules.clear()
            table._modules.update(modules)
        for layer in held:  # remove results that were folded meanwhile
            layer.swap_mixing(composition, cast(Mixing, layer.composition_mixing[composition]))


def _can_be_cut(factors: Factors) -> bool:
    """Whether all values are in this process and in memory."""
    A = factors.A
    return not (A.is_meta or hasattr(A, "full_tensor") or A.shape[int(factors.has_experts)] != factors.rank)


def _cut(factors: Factors, number: int, is_embedding: bool) -> Factors:
    """The factors of one adapter, as views."""
    first, rank = sum(factors.ranks[:number]), factors.ranks[number]
    dim = int(factors.has_experts)
    A, B = factors.A.detach().narrow(dim, first, rank), factors.B.detach().narrow(dim + 1, first, rank)
    bias = None if factors.bias is None else factors.bias.detach()[number : number + 1]
    experts = A.shape[0] if factors.has_experts else None
    shape = LayerShape("", tuple(A.shape[dim + 1 :]), B.shape[dim], is_embedding=is_embedding, experts=experts)
    part = Factors([rank], shape, bias is not None, A.dtype, torch.device("meta"))
    part.fill(StackedFactors([rank], A, B, bias), A.device)
    return part
