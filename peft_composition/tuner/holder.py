"""`CompositionHolder`: a base layer and the parts of the compositions beside it: adding, moving, finding, deleting."""

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


# What FSDP1 and FSDP2, and ZeRO-3, set on every module whose parameters they shard.
_SHARDING_MARKS = ("_is_fsdp_managed_module", "ds_id")


class CompositionHolder(nn.Module, BaseTunerLayer):
    """A base layer with the parts of one or several compositions beside it; a subclass computes with them."""

    adapter_layer_names: tuple[str, ...] = ("composition_mixing",)
    other_param_names: tuple[str, ...] = ("composition_factors",)

    base_layer: nn.Module
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__()
        self.training = base_layer.training  # what a model in eval mode is composed with is in eval mode, too
        self.base_layer = base_layer
        self.composition_mixing = nn.ModuleDict()
        self.composition_factors = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        # The weights a composition was merged with: unmerging must subtract the same.
        self._merged_weights: dict[str, Tensor] = {}
        # What other modules of the model hold as well; whoever knows the model keeps this up to date.
        self.tie: Tie | None = None
        self._folds = Folds()
        self.cast_input_dtype_enabled = True  # for peft.helpers.disable_input_dtype_casting
        self.quantization_backend = quantization_backend_of(self.get_base_layer(), **quantization_kwargs)

    def update_layer(self, adapter_name: str, mixing: Mixing, factors: Factors, inference_mode: bool = False) -> None:
        """Add a composition to this layer.

        Args:
            adapter_name: name of the composition.
            mixing: its weights; the same object on all layers that share them.
            factors: its stacked upstream factors.
            inference_mode: whether the weights stay frozen.
        """
        self.composition_mixing[adapter_name] = mixing
        self.composition_factors[adapter_name] = factors
        self._folds.clear()
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def swap_mixing(self, adapter_name: str, mixing: Mixing) -> Mixing:
        """Mix a composition by other weights.

        Args:
            adapter_name: name of the composition.
            mixing: the weights, as many as it has upstream adapters.

        Returns:
            What mixed it so far, for putting it back.
        """
        before = cast(Mixing, self.composition_mixing[adapter_name])
        self.composition_mixing[adapter_name] = mixing
        self._folds.drop(adapter_name)
        return before

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a composition from this layer, with what was kept of it."""
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
        """The factors of a composition, for reading them outside of a forward pass.

        Raises:
            RuntimeError: they never came, or this process has only its part of them.
        """
        factors = self._ready_factors(adapter_name)
        if hasattr(factors.A, "full_tensor") or factors.A.shape[int(factors.has_experts)] != factors.rank:
            raise RuntimeError(
                f"The factors of the composition {adapter_name!r} are sharded over several processes. Save the model, "
                "load it into one that is not sharded, and do this there."
            )
        return factors

    def _ready_factors(self, adapter_name: str) -> Factors:
        # As entries of the tables of modules: this is done in every forward pass, at the pace of a single token.
        factors = cast(Factors, self.composition_factors._modules[adapter_name])
        if factors.is_pending:
            raise RuntimeError(
                f"The composition {adapter_name!r} was built from a saved configuration, but its factors were never "
                "loaded. Load it with PeftModel.from_pretrained(base_model, ...). To compose the same adapters anew, "
                "clear the record first: dataclasses.replace(config, composed_modules=None)."
            )
        return factors

    @property
    def _is_sharded(self) -> bool:
        """Whether FSDP or ZeRO-3 gathers the parameters for every pass.

        What is made of them must not be kept: it would be whole on every device. The version counters do not see new
        values there, either, and a process that kept something would not take part in gathering.
        """
        attributes = self.__dict__
        return _SHARDING_MARKS[0] in attributes or _SHARDING_MARKS[1] in attributes  # torch.compile follows this

    @contextmanager
    def onloaded(self, adapter_names: Iterable[str]) -> Iterator[None]:
        """Bring factors that accelerate keeps on disk or in another memory here, as its hooks would if it called them.

        Nothing that was folded meanwhile is kept: it would hold the memory that offloading is to save.
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
        """Switch between training and evaluation; what was kept is made anew."""
        self._folds.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._folds.clear()
        return super()._apply(fn, recurse)
