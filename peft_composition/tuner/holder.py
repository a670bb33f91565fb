"""`CompositionHolder`: stores the parts of compositions beside a base layer: adding, moving, finding, deleting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .base_layer import device_of, hooks_of, is_offloaded, is_on_meta, quantization_backend_of
from .factors import Factors
from .folding import Folds
from .mixing import Mixing
from .ties import Tie


# Attributes that FSDP and ZeRO-3 set on every module whose parameters they shard.
_SHARDING_MARKS = ("_is_fsdp_managed_module", "ds_id")


class CompositionHolder(nn.Module, BaseTunerLayer):
    """A base layer with the parts of one or more compositions; a subclass computes with them."""

    adapter_layer_names: tuple[str, ...] = ("composition_mixing",)
    other_param_names: tuple[str, ...] = ("composition_factors",)

    base_layer: nn.Module
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__()
        self.training = base_layer.training  # a composition of a model in eval mode is in eval mode, too
        self.base_layer = base_layer
        self.composition_mixing = nn.ModuleDict()
        self.composition_factors = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        # The weights a composition was merged with: unmerging must subtract the same.
        self._merged_weights: dict[str, Tensor] = {}
        # The tie with other modules of the model; updated by code that knows the whole model.
        self.tie: Tie | None = None
        self._folds = Folds()
        self.cast_input_dtype_enabled = True  # for peft.helpers.disable_input_dtype_casting
        self.quantization_backend = quantization_backend_of(self.get_base_layer(), **quantization_kwargs)

    def update_layer(self, adapter_name: str, mixing: Mixing, factors: Factors, inference_mode: bool = False) -> None:
        """Add a composition to this layer.

        Args:
            adapter_name: name of the composition.
            mixing: its mixing weights; all layers that share them hold the same object.
            factors: its stacked upstream factors.
            inference_mode: whether the mixing weights stay frozen.
        """
        self.composition_mixing[adapter_name] = mixing
        self.composition_factors[adapter_name] = factors
        self._folds.clear()
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def swap_mixing(self, adapter_name: str, mixing: Mixing) -> Mixing:
        """Replace the mixing weights of a composition.

        Args:
            adapter_name: name of the composition.
            mixing: the new weights, one per upstream adapter.

        Returns:
            The former weights.
        """
        before = cast(Mixing, self.composition_mixing[adapter_name])
        self.composition_mixing[adapter_name] = mixing
        self._folds.drop(adapter_name)
        return before

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a composition from this layer, with its cached results."""
        super().delete_adapter(adapter_name)
        self._folds.drop(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move a composition to the base layer's device; dtypes were chosen when it was built and stay."""
        if adapter_name not in self.composition_factors:
            return
        target = device if device is not None else device_of(self.get_base_layer())
        for part in (self.composition_mixing[adapter_name], self.composition_factors[adapter_name]):
            if target.type != "meta" and not is_on_meta(part):
                part.to(target)

    def mixing_weights(self, adapter_name: str) -> Tensor:
        """The mixing weights of a composition.

        Args:
            adapter_name: name of the composition.

        Returns:
            w, shape (N,), normalised, in float32 or wider.
        """
        with self.onloaded([adapter_name]):
            return self._weights(adapter_name)

    def _weights(self, adapter_name: str) -> Tensor:
        mixing, factors = self._parts(adapter_name)
        A = factors.A
        return mixing(A.device, A.dtype).to(A.device)

    def _parts(self, adapter_name: str) -> tuple[Mixing, Factors]:
        return cast(Mixing, self.composition_mixing._modules[adapter_name]), self._ready_factors(adapter_name)

    def whole_factors(self, adapter_name: str) -> Factors:
        """The factors of a composition, for use outside of a forward pass.

        Raises:
            RuntimeError: they were never loaded, or are sharded over processes.
        """
        factors = self._ready_factors(adapter_name)
        if hasattr(factors.A, "full_tensor") or factors.A.shape[int(factors.has_experts)] != factors.rank:
            raise RuntimeError(
                f"The factors of the composition {adapter_name!r} are sharded over several processes. Save the model, "
                "load it without sharding, and repeat this there."
            )
        return factors

    def _ready_factors(self, adapter_name: str) -> Factors:
        # Read directly from the tables of modules: this runs in every forward pass, even for a single token.
        factors = cast(Factors, self.composition_factors._modules[adapter_name])
        if factors.is_pending:
            raise RuntimeError(
                f"The composition {adapter_name!r} was built from a saved config, but its factors were never loaded. "
                "Load it with PeftModel.from_pretrained(base_model, ...). To build a new composition of the same "
                "adapters, use dataclasses.replace(config, composed_modules=None)."
            )
        return factors

    @property
    def _is_sharded(self) -> bool:
        """Whether FSDP or ZeRO-3 gathers the parameters for every pass.

        Results computed from them must not be cached: they would be complete on every device. Version counters miss
            new values
        there, too, and a process that uses a cache would not take part in gathering.
        """
        attributes = self.__dict__
        return _SHARDING_MARKS[0] in attributes or _SHARDING_MARKS[1] in attributes  # torch.compile follows this

    @contextmanager
    def onloaded(self, adapter_names: Iterable[str]) -> Iterator[None]:
        """A context with factors loaded that accelerate has offloaded, as its hooks do in a call.

        Results that are folded meanwhile are not cached, because they would use the memory that offloading saves.
        """
        parts = [self.composition_factors[name] for name in adapter_names]
        parts = [part for part in parts if is_on_meta(part) and is_offloaded(part)]
        try:
            for part in parts:
                for hook in hooks_of(part):
                    hook.pre_forward(part)
            yield
        finally:
            for part in parts:
                for hook in hooks_of(part):
                    hook.post_forward(part, None)
            if parts:
                self._folds.clear()

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; cached results are removed."""
        self._folds.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._folds.clear()
        return super()._apply(fn, recurse)
