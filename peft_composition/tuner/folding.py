"""What a layer keeps of a composition while its mixing weights are constants, and how it sees that they changed.

The arithmetic is in `functional.py`; what a layer does with what it keeps is in `layer.py`.
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
    """A composition with its mixing weights multiplied in.

    Holds one of what serves a forward pass: factors with the weights folded into B; where that is no larger, the dense
    update; or the merged weight, for base layers that can do without their own product.

    Attributes:
        A: stacked factors, shape (R, in, ...); None for the dense forms.
        B: stacked factors with scales and mixing weights, shape (out, R, ...).
        u: mixing weights in rank space, shape (R,), where B is without them.
        delta: dense update, shape (out, in, ...).
        scale: what the output of `delta` is multiplied by; without dimensions. None: by 1.
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
    """Which step of an optimizer was the last one in this process: another object after every step.

    Fused optimizers change parameters without moving their version counters. The optimizers of PyTorch, and those made
    from its `Optimizer`, say when they have stepped.
    """

    def __init__(self) -> None:
        self.last = object()

    def __call__(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """An optimizer has stepped."""
        self.last = object()  # written and never read here, so that a compiled step needs no guard on it


STEPS = Steps()


register_optimizer_step_post_hook(STEPS)


class Motion:
    """Whether a parameter is about to change, perhaps without anything that shows it.

    It is once a forward pass has led derivatives to it: a step follows, and the optimizer may be one that moves no
    version counter and says nothing. What is folded meanwhile cannot be kept.
    """

    def __init__(self) -> None:
        self._since: object = None

    @property
    def is_on(self) -> bool:
        """Whether no step was seen since it began."""
        return self._since is STEPS.last

    def begin(self) -> None:
        """Derivatives have been led to the parameter."""
        self._since = STEPS.last

    def end(self) -> None:
        """No step is due any more."""
        self._since = None


class Source(NamedTuple):
    """A parameter that something was folded from, and what shows that it is still the same.

    A parameter that trains is taken to change with every step of any optimizer. PyTorch's version counter does not
    see writes through `.data`, either: where comparing costs little and waits for no device, `values` are compared.
    """

    owner: dict[str, nn.Parameter | None]
    name: str
    parameter: nn.Parameter
    address: int
    version: int
    step: object
    alias: Tensor  # keeps the storage alive, so that no other values can appear at its address
    values: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, name: str, by_value: bool = False) -> Source | None:
        """The parameter `name` of `module` as it is now.

        Args:
            module: its owner.
            name: in the owner.
            by_value: compare values too, if it lies on the CPU.

        Returns:
            The source; None where changes could not be seen, because the parameter was made in inference mode or
            torch.func has put a tensor of its own in its place.
        """
        parameter = module._parameters[name]
        if type(parameter) is not nn.Parameter or parameter.is_inference():
            return None
        alias = parameter.detach()
        values = alias.clone() if by_value and alias.device.type == "cpu" else None
        address, version = alias.data_ptr(), parameter._version
        return cls(module._parameters, name, parameter, address, version, STEPS.last, alias, values)

    def is_unchanged(self) -> bool:
        """Whether the parameter has the values that were folded."""
        parameter = self.parameter
        return (
            self.owner[self.name] is parameter
            and parameter._version == self.version
            and parameter.data_ptr() == self.address
            and (self.step is STEPS.last or not parameter.requires_grad)
            and (self.values is None or torch.equal(self.alias, self.values))
        )


class Folds:
    """Folded compositions by name, at most one for each; copies and pickles start empty."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[bool, Folded, list[Source]]] = {}
        self._cleared = object()

    def get(self, adapter_name: str, into_base: bool) -> Folded | None:
        """What was kept for a composition, if it is of that kind and everything it was made from is unchanged."""
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
        """Fold a composition, and keep the result unless changes of one of its sources could not be seen.

        The sources are recorded first: what another thread writes meanwhile makes the result an old one. Nor is it
        kept if another thread has dropped what was there.

        Args:
            adapter_name: name of the composition.
            into_base: the kind of result.
            sources: gives what it is made from, as that is now; None for what cannot be watched.
            fold: makes it.
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
        """Forget what is kept of one composition."""
        self._cleared = object()
        self._kept.pop(adapter_name, None)

    def clear(self) -> None:
        """Forget all that is kept."""
        self._cleared = object()
        self._kept.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Folds:
        return Folds()

    def __reduce__(self) -> tuple[type[Folds], tuple[()]]:
        return Folds, ()
