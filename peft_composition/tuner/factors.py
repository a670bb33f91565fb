"""`Factors`: the frozen, stacked factors of all upstream adapters for one module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..upstream.shapes import LayerShape
from ..upstream.stacking import StackedFactors
from . import functional
from .base_layer import real_device
from .merged import dense_is_smaller


def _mark_unwritten(parameter: nn.Parameter) -> None:
    """Set the first value to NaN, which no factor contains."""
    if not parameter.is_meta and parameter.numel():
        _first(parameter).fill_(math.nan)


def _is_unwritten(parameter: nn.Parameter) -> bool:
    return parameter.is_meta or (parameter.numel() > 0 and math.isnan(_first(parameter).item()))


def _first(parameter: nn.Parameter) -> Tensor:
    return parameter.data.as_strided((1,), (1,))  # a third of what indexing costs, for every factor of a model


class Factors(nn.Module):
    """The stacked, frozen factors of all upstream adapters for one module.

    Args:
        ranks: rank of every adapter; 0 if it does not touch the module.
        shape: shape of the module's factors.
        has_bias: whether an adapter has a LoRA bias.
        dtype: compute dtype of the base layer.
        device: device of the base layer.
    """

    A: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        ranks: Sequence[int],
        shape: LayerShape,
        has_bias: bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.ranks = list(ranks)
        self.rank = total = sum(ranks)
        self.has_experts = shape.experts is not None
        # The factors of one token are few, however large the vocabulary of an embedding is.
        sizes = math.prod(shape.in_shape), shape.out_features
        self.dense_is_smaller = not shape.is_embedding and dense_is_smaller(total, *sizes)
        # In float16, folding changes A as well.
        self.copying_A_is_dear = shape.is_embedding and dtype == torch.float16
        # A merged weight also replaces the base layer's own product, so it may take twice the memory.
        self.merged_is_kept = not shape.is_embedding and dense_is_smaller(2 * total, *sizes)
        bias_shape = (len(ranks), shape.out_features) if has_bias else None
        for name, size in (("A", shape.shape_of_A(total)), ("B", shape.shape_of_B(total)), ("bias", bias_shape)):
            parameter = None
            if size is not None:
                parameter = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
            self.register_parameter(name, parameter)
        # Parameters without values yet. A plain dict, which does not register them a second time.
        self._placeholders = {name: parameter for name, parameter in self._parameters.items() if parameter is not None}
        for parameter in self._placeholders.values():
            _mark_unwritten(parameter)
        self._widest, self._places = functional.places_of_ranks(self.ranks)
        self._places_here: Tensor | None = None
        self._place_ranks(real_device(device))

    @property
    def is_pending(self) -> bool:
        """Whether the factors were built from a saved config and never loaded.

        Loading replaces the parameters, or writes into them, as TRL does when it copies a composition as a reference.
        """
        if not self._placeholders:
            return False
        for name, parameter in self._placeholders.items():
            if self._parameters.get(name, parameter) is parameter and _is_unwritten(parameter):
                return True
        self._placeholders.clear()
        return False

    def _replicate_for_data_parallel(self) -> Factors:
        replica = cast(Factors, super()._replicate_for_data_parallel())
        if not self.is_pending:  # in a replica, parameters cannot be distinguished from placeholders
            replica._placeholders = {}
        return replica

    def fill(self, stacked: StackedFactors, device: torch.device) -> None:
        """Set the values, even if the parameters were created on the meta device.

        The entries are set directly in the table of parameters: inside accelerate's `init_empty_weights`, registering
            them
        would discard the values.
        """
        for name in ("A", "B", "bias"):
            tensor = getattr(stacked, name)
            if tensor is not None:
                self._parameters[name] = nn.Parameter(tensor.to(device), requires_grad=False)
        self._placeholders.clear()
        self._place_ranks(device)

    def spread(self, weights: Tensor) -> Tensor:
        """Mixing weights, shape (N,), repeated over the stacked rows: u, shape (R,)."""
        return functional.spread(weights, self._widest, self._place_ranks(weights.device))

    def _place_ranks(self, device: torch.device) -> Tensor | None:
        if self._places is None:
            return None
        if self._places_here is None or self._places_here.device != device:
            with torch.inference_mode(False):  # training will use it, but no tensors made in inference mode
                self._places_here = torch.tensor(self._places, dtype=torch.int64, device=device)
        return self._places_here

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factors:
        super()._apply(fn, recurse)
        self._place_ranks(real_device(self.A.device))  # now, and not in a forward pass that may be compiled
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Factors:
        """Does nothing: upstream factors are never trained."""
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        found = [name for name in self._placeholders if prefix + name in state_dict]
        if self.is_pending and found:
            # The first values are used without a copy, so that N adapters are not in memory twice.
            taken = {prefix + name: self._as_placeholder(name, state_dict[prefix + name]) for name in found}
            state_dict = {**state_dict, **taken}
            local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        for name in found:
            del self._placeholders[name]

    def _as_placeholder(self, name: str, tensor: Tensor) -> Tensor:
        """A loaded tensor in the dtype and on the device of the parameter that it replaces."""
        waiting = self._placeholders[name]
        return tensor.detach().to(tensor.device if waiting.is_meta else waiting.device, waiting.dtype)

    def extra_repr(self) -> str:
        """Shapes and ranks."""
        return f"A={tuple(self.A.shape)}, B={tuple(self.B.shape)}, ranks={self.ranks}"
