"""What a layer keeps of a composition while its mixing weights are constants, and how it sees that they changed.

The arithmetic is in `functional.py`; when a layer folds, and what it does with the result, in `layer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Folded:
    """A composition with its mixing weights multiplied in.

    Holds one of what serves a forward pass: factors with the weights folded into B; where that is no larger, the dense
    update; or the merged weight, for base layers that can do without their own product.

    Attributes:
        A: stacked factors, shape (R, in, ...); None for the dense forms.
        B: stacked factors with scales and mixing weights, shape (out, R, ...).
        delta: dense update, shape (out, in, ...).
        merged: base weight plus update, shape (out, in).
        bias: composed LoRA bias, shape (out,), if there is one.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    delta: Tensor | None = None
    merged: Tensor | None = None
    bias: Tensor | None = None


class Source(NamedTuple):
    """A parameter that something was folded from, and what shows that it is still the same.

    PyTorch's version counter does not see writes through `.data`. Where comparing costs little and waits for no
    device, `values` are compared as well.
    """

    owner: dict[str, nn.Parameter | None]
    name: str
    parameter: nn.Parameter
    address: int
    version: int
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
        return cls(module._parameters, name, parameter, alias.data_ptr(), parameter._version, alias, values)

    def is_unchanged(self) -> bool:
        parameter = self.parameter
        return (
            self.owner[self.name] is parameter
            and parameter._version == self.version
            and parameter.data_ptr() == self.address
            and (self.values is None or torch.equal(self.alias, self.values))
        )


class Folds:
    """Folded compositions by name, at most one for each; copies and pickles start empty."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[bool, Folded, list[Source]]] = {}

    def get(self, adapter_name: str, into_base: bool) -> Folded | None:
        """What was kept for a composition, if it is of that kind and everything it was made from is unchanged."""
        kept = self._kept.get(adapter_name)
        if kept is None or kept[0] != into_base:
            return None
        for source in kept[2]:  # no generator: this runs for every layer and token
            if not source.is_unchanged():
                return None
        return kept[1]

    def put(self, adapter_name: str, into_base: bool, folded: Folded, sources: Sequence[Source | None]) -> None:
        """Keep a folded composition, unless changes of one of its sources could not be seen."""
        seen = [source for source in sources if source is not None]
        if len(seen) == len(sources):
            self._kept[adapter_name] = into_base, folded, seen
        else:
            self.drop(adapter_name)

    def drop(self, adapter_name: str) -> None:
        self._kept.pop(adapter_name, None)

    def clear(self) -> None:
        self._kept.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Folds:
        return Folds()

    def __reduce__(self) -> tuple[type[Folds], tuple[()]]:
        return Folds, ()
