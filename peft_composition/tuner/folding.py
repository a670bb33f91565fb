"""Caches a composition with constant mixing weights in a layer, and detects when the cache is outdated.

The formulas are in `functional.py`; `layer.py` uses the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


@dataclass(frozen=True)
class Folded:
    """A composition multiplied by its mixing weights.

    It holds one of three forms: factors with the weights folded into B; the dense update, if that is not larger; or
    the merged weight, for base layers whose own product it can replace.

    Attributes:
        A: stacked factors, shape (R, in, ...); None for the dense forms.
        B: stacked factors with scales and mixing weights, shape (out, R, ...).
        u: mixing weights in rank space, shape (R,), if they are not folded into B.
        delta: dense update, shape (out, in, ...).
        scale: factor for the output of `delta`, without dimensions. None: 1.
        merged: base weight plus update, shape (out, in).
        bias: composed LoRA bias, shape (out,), if there is one.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    u: Tensor | None = None
    delta: Tensor | None = None
    scale: Tensor | None = None
    merged: Tensor | None = None
    bias: Tensor | None = None


class Steps:
    """Identifies the last optimizer step in this process by an object that changes with every step.

    Fused optimizers change parameters without incrementing their version counters. The optimizers of PyTorch, and
    subclasses of its `Optimizer`, call hooks after every step.
    """

    def __init__(self) -> None:
        self.last = object()

    def __call__(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Called after an optimizer step."""
        self.last = object()  # never read here, so that a compiled step needs no guard on it


STEPS = Steps()


register_optimizer_step_post_hook(STEPS)


class Motion:
    """Whether a parameter is about to change, possibly undetected.

    This is the case after a forward pass with gradients for the parameter: an optimizer step follows, and the
    optimizer may increment no version counter and call no hook. Results that are folded meanwhile must not be cached.
    """

    def __init__(self) -> None:
        self._since: object = None

    @property
    def is_on(self) -> bool:
        """Whether no step was detected since `begin`."""
        return self._since is STEPS.last

    def begin(self) -> None:
        """Called after a forward pass with gradients for the parameter."""
        self._since = STEPS.last

    def end(self) -> None:
        """Called when no step is expected any more."""
        self._since = None


class Source(NamedTuple):
    """A parameter that was folded, with what is needed to detect changes.

    A trainable parameter counts as changed after every step of any optimizer. PyTorch's version counter misses writes
    through `.data`; if comparing is cheap and needs no device synchronisation, `values` are compared.
    """

    owner: dict[str, nn.Parameter | None]
    name: str
    parameter: nn.Parameter
    address: int
    version: int
    step: object
    alias: Tensor  # keeps the storage alive, so that its address cannot be reused
    values: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, name: str, by_value: bool = False) -> Source | None:
        """The present state of the parameter `name` of `module`.

        Args:
            module: the module that owns the parameter.
            name: the parameter's name in the module.
            by_value: whether to compare values, too, if the parameter is on the CPU.

        Returns:
            The source; None if changes cannot be detected, because the parameter was created in inference mode or
            torch.func has replaced it by a tensor.
        """
        parameter = module._parameters[name]
        if type(parameter) is not nn.Parameter or parameter.is_inference():
            return None
        alias = parameter.detach()
        values = alias.clone() if by_value and alias.device.type == "cpu" else None
        address, version = alias.data_ptr(), parameter._version
        return cls(module._parameters, name, parameter, address, version, STEPS.last, alias, values)

    def is_unchanged(self) -> bool:
        """Whether the parameter still has the folded values."""
        parameter = self.parameter
        return (
            self.owner[self.name] is parameter
            and parameter._version == self.version
            and parameter.data_ptr() == self.address
            and (self.step is STEPS.last or not parameter.requires_grad)
            and (self.values is None or torch.equal(self.alias, self.values))
        )


class Folds:
    """Folded compositions by name, at most one each; copies and pickles start empty."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[bool, Folded, list[Source]]] = {}
        self._cleared = object()

    def get(self, adapter_name: str, into_base: bool) -> Folded | None:
        """The cached result for a composition, if it is of this kind and all its sources are unchanged."""
        kept = self._kept.get(adapter_name)
        if kept is None or kept[0] != into_base:
            return None
        for source in kept[2]:  # no generator: this runs for every layer and token
            if not source.is_unchanged():
                return None
        return kept[1]

    def make(
        self,
        adapter_name: str,
        into_base: bool,
        sources: Callable[[], Sequence[Source | None]],
        fold: Callable[[], Folded],
    ) -> Folded:
        """Fold a composition, and cache the result unless changes of one of its sources cannot be detected.

        The sources are recorded first, so that writes of other threads meanwhile make the result outdated. The result
        is also not cached if another thread has dropped the earlier one.

        Args:
            adapter_name: name of the composition.
            into_base: the kind of result.
            sources: returns the present state of the sources; None for a source that cannot be watched.
            fold: computes the result.
        """
        cleared = self._cleared
        seen = sources()
        folded = fold()
        watched = [source for source in seen if source is not None]
        if len(watched) == len(seen) and cleared is self._cleared:
            self._kept[adapter_name] = into_base, folded, watched
        else:
            self._kept.pop(adapter_name, None)
        return folded

    def drop(self, adapter_name: str) -> None:
        """Remove the cached result of one composition."""
        self._cleared = object()
        self._kept.pop(adapter_name, None)

    def clear(self) -> None:
        """Remove all cached results."""
        self._cleared = object()
        self._kept.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Folds:
        return Folds()

    def __reduce__(self) -> tuple[type[Folds], tuple[()]]:
        return Folds, ()
