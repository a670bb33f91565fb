"""One backward pass for all candidates: by how much a small share of each, block by block, would change the score.

After "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling" (arXiv 2407.02880).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..evidence.batches import inputs_on
from ..evidence.heads import Features
from ..evidence.passes import Examples, Precision, autocast, read_features
from ..evidence.scores import LeftOut, margins
from ..tuner.factors import Factors
from ..tuner.forms import Linear
from ..tuner.layer import CompositionLayer
from ..tuner.locating import composition_layers
from ..tuner.single import evaluating, mixed_by


MOST_BYTES = 1 << 30  # of gradients; larger base models do without
ADAPTER = "default"  # what `get_peft_model` calls a candidate that is on the model
COST = 4  # two forward passes, and a backward pass, which takes as long as two


class Slopes:
    """Slopes of the candidates, from gradients of the mean margin for the weights of the base model.

    With G the gradient for a weight, the derivative for the share of an adapter there is <G, s B A>: a candidate costs
    no pass. Gradients are computed when a candidate comes that has a module for which there is none yet.

    Args:
        base: the base model.
        examples: all of them, with classes.
        mixed_precision: as for `score_adapters`.

    Attributes:
        is_possible: whether there are slopes, as far as it is known: a first adapter tells.
        passed: examples that went through the model for it; a backward pass counts as two forward ones.
    """

    def __init__(self, base: nn.Module, examples: Examples, mixed_precision: Precision) -> None:
        self._base = base
        self._examples = examples
        self._mixed_precision = mixed_precision
        self._gradients: dict[str, Tensor] = {}
        self.is_possible = examples.labels is not None
        self.passed = 0

    def of_what_is_on(self) -> float | None:
        """Of the one adapter that is on the model now: by how much it is steeper than a random change of its size.

        It is the sum of |<G, s B A>| / |s B A| over its linear layers, by the sum of the root mean squares of G there:
        about 0.8 for a random change, whatever the layers are and however many.

        None where the adapter has no linear layer, the model has no backward pass, or gradients would take too much
        memory.
        """
        layers = {
            name: layer
            for name, layer in composition_layers(self._base)
            if isinstance(layer, Linear) and ADAPTER in layer.composition_factors
        }
        missing = {name: layer for name, layer in layers.items() if name not in self._gradients}
        if missing and self.is_possible:
            if self._is_too_large(missing):
                self.is_possible = bool(self._gradients)  # those of others are there
                return None
            self.is_possible = self._find(missing)
        if not self.is_possible or not layers:
            return None
        along = [self._gradients[name] for name in layers]
        of_a_random_one = sum(float(own.square().mean().sqrt()) for own in along)
        steep = sum(map(_slope, along, layers.values()))
        return steep / of_a_random_one if of_a_random_one > 0 and math.isfinite(steep) else None

    def _is_too_large(self, layers: Mapping[str, Linear]) -> bool:
        size = sum(4 * layer.in_features * layer.out_features for layer in layers.values())
        return size + sum(own.nbytes for own in self._gradients.values()) > MOST_BYTES

    def _find(self, layers: Mapping[str, Linear]) -> bool:
        everywhere = [layer for _, layer in composition_layers(self._base)]
        with mixed_by(everywhere, ADAPTER, [0.0]), evaluating([self._base]):
            try:
                found = gradients(self._base, layers, self._examples, self._mixed_precision)
            except Exception:  # whatever is raised by a model without a backward pass, or without memory for it
                return False
        self.passed += COST * len(self._examples)
        untouched = {  # no example runs through these
            name: torch.zeros(layer.out_features, layer.in_features)
            for name, layer in layers.items()
            if name not in found
        }
        self._gradients.update(untouched | found)
        return all(bool(own.isfinite().all()) for own in found.values())


def gradients(
    base: nn.Module, layers: Mapping[str, nn.Module], examples: Examples, mixed_precision: Precision
) -> dict[str, Tensor]:
    """Of the mean margin, for the weights of some linear layers, shape (out, in), in float32 or wider.

    The weights may be quantized: it is the outer product of what a layer gets and the gradient of what it gives.

    Args:
        base: the model, in eval mode.
        layers: by any name.
        examples: with classes.
        mixed_precision: as for `score_adapters`.
    """
    assert examples.labels is not None
    assert examples.head is not None
    with torch.no_grad():
        features = read_features(base, examples, mixed_precision)
    along = _of_features(features, examples.labels)
    found: dict[str, Tensor] = {}
    start = 0
    for batch in examples.batches:
        count = len(batch["labels"])
        reader = Features(examples.head, keeps_graph=True)
        with torch.enable_grad(), _watched(layers) as seen, reader.watching(), autocast(base, mixed_precision):
            output = base(**inputs_on(batch, base, with_labels=False))
        with torch.enable_grad():
            value = (reader.read(output, count).to(along) * along[start : start + count]).sum()
        start += count
        if not seen:
            continue
        found_here = torch.autograd.grad(value, [added for *_, added in seen], materialize_grads=True)
        for (name, given, _), own in zip(seen, found_here):
            wide = torch.promote_types(own.dtype, torch.float32)
            product = own.flatten(0, -2).to(wide).T @ given.flatten(0, -2).to(wide)
            found[name] = found[name] + product if name in found else product
    return found


@contextmanager
def _watched(layers: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """A context that collects what layers get, and zeros that are added to what they give, for their gradient."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str) -> Any:
        def add(_: nn.Module, given: Sequence[Any], output: Tensor) -> Tensor:
            zeros = torch.zeros_like(output, requires_grad=True)
            seen.append((name, given[0].detach(), zeros))
            return output + zeros

        return add

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _of_features(features: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the mean margin for the features."""
    with torch.enable_grad():
        wide = features.detach().to(torch.promote_types(features.dtype, torch.float32)).requires_grad_()
        return torch.autograd.grad(mean_margin(wide, labels.to(wide.device)), wide)[0]


def mean_margin(features: Tensor, labels: Tensor) -> Tensor:
    """What `margins` of `leave_one_out_distances` give on average, with a gradient.

    Args:
        features: shape (n, d).
        labels: classes, shape (n,).
    """
    own, counts = torch.unique(labels, return_inverse=True, return_counts=True)[1:]
    member = nn.functional.one_hot(own).to(features)
    distances = (features[:, None] - (member.T @ features / counts[:, None])[None]).square().sum(2)
    k = counts[own].to(features)
    rows = k > 1
    factor = torch.where(member.bool(), (k / (k - 1).clamp_min(1)).square()[:, None], 1.0)
    return margins(LeftOut((distances * factor)[rows], own[rows], rows.nonzero().flatten())).mean()


def _slope(gradient: Tensor, layer: CompositionLayer) -> float:
    factors = cast(Factors, layer.composition_factors[ADAPTER])
    A, B = (own.detach().to(gradient) for own in (factors.A, factors.B))
    norm = ((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt()
    return float(((gradient @ A.T) * B).sum().abs() / norm) if norm != 0 else 0.0
