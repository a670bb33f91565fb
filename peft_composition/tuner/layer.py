"""`CompositionLayer`: computes compositions beside a base layer and merges them into it.

The classes for linear, convolutional and embedding layers are in `forms`.
"""

from __future__ import annotations

from typing import Any, cast
from warnings import warn

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge, onload_layer
from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor, nn

from . import functional
from .base_layer import PLAIN_LAYERS, is_offloaded, is_on_meta, type_name
from .factors import Factors
from .folding import Folded, Source
from .holder import CompositionHolder
from .mixing import Mixing
from .packing import unpack
from .ties import Place


# Set by nn.DataParallel on its copies for each pass, whose parameters are plain tensors.
_REPLICA = "_is_replica"


class CompositionLayer(CompositionHolder):
    """A base layer with one or more compositions of upstream LoRA adapters.

    `y = base_layer(x) + x (B diag(u) A)^T`, where u repeats the mixing weights over the ranks. If several compositions
    are active, their updates are added. Only the mixing weights are trained.
    """

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The weight update of a composition, in float32 or wider.

        Args:
            adapter_name: name of the composition.

        Returns:
            B diag(u) A in the layout of the base layer's weight, (out, in) for a linear one.
        """
        with self.onloaded([adapter_name]):
            return self._delta_weight(adapter_name, self._weights(adapter_name).detach())

    def require_mergeable(self, adapter_names: list[str] | None = None) -> None:
        """Check that compositions can be merged into the base weights, without changing anything.

        Args:
            adapter_names: the compositions. Default: the active ones. Those that do not touch this layer are ignored.

        Raises:
            ValueError: an adapter has a bias, but the base layer has none.
            TypeError: the base layer is quantized in a way that does not support merging.
            RuntimeError: the weights of the base layer were never loaded, or are sharded.
        """
        base_layer = self.get_base_layer()
        backend = self.quantization_backend
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self.composition_factors:
                continue
            if is_on_meta(base_layer) and not is_offloaded(base_layer):
                raise RuntimeError(
                    f"There is nothing to merge into: the base weights ({type(base_layer).__name__}) are on the meta "
                    "device. Load them first."
                )
            if self._is_sharded:
                raise RuntimeError(
                    "A composition cannot be merged into a sharded model. Save the model, load it without sharding, "
                    "and merge there."
                )
            if self.tie is not None and self.tie.shared_module is not None and "base_layer" not in self._modules:
                raise RuntimeError(
                    f"A composition of a parameter cannot be merged into a module ({type(base_layer).__name__}) that "
                    "is used in several places: it would change all of them. Use it unmerged."
                )
            if backend is None and isinstance(base_layer, PLAIN_LAYERS) and "weight" not in base_layer._parameters:
                raise TypeError(
                    f"The composition {name!r} cannot be merged into a base layer of type {type_name(base_layer)} "
                    "whose weight is computed from other tensors (a parametrization, pruning): the update would be "
                    "lost. Remove that first, or use the composition unmerged."
                )
            if backend is not None and not backend.supports_merge:
                raise TypeError(
                    f"The composition {name!r} cannot be merged into a base layer of type {type_name(base_layer)} "
                    f"(quantization: {backend.backend_name}); use it unmerged."
                )
            if self._ready_factors(name).bias is not None and not isinstance(base_layer.bias, Tensor):
                raise ValueError(
                    f"The composition {name!r} has a LoRA bias, but its base layer ({type(base_layer).__name__}) has "
                    "none to merge it into. Use it unmerged."
                )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add compositions to the base weights.

        Args:
            safe_merge: whether to check that the result is finite before anything is changed. Default: False.
            adapter_names: the compositions. Default: the active ones.

        Raises:
            ValueError: `safe_merge` found values that are not finite; or an adapter has a bias, but the base layer has
                none.
            TypeError: the base layer is quantized in a way that does not support merging.
            RuntimeError: the base layer is on the meta device and has no values.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.composition_factors]
        if not names:
            return
        self.require_mergeable(names)
        if self.quantization_backend is not None:
            # The same text for all layers, so that Python shows it once.
            warn(
                "Merging into quantized weights rounds them again. Much of a small update can be lost, especially "
                "in 4 bit. For exact results, merge into the model in full precision.",
                stacklevel=2,
            )
        weights = {name: self.mixing_weights(name).detach() for name in names}
        self._add_to_base(weights, sign=1, must_be_finite=safe_merge)
        self._folds.clear()
        self.merged_adapters.extend(names)
        self._merged_weights.update(weights)

    def unmerge(self) -> None:
        """Remove all merged compositions from the base weights, up to rounding in their dtype."""
        if not self.merged:
            warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._add_to_base(self._merged_weights, sign=-1)
        if self.tie is not None:
            self.tie.rejoin(self)
        self.merged_adapters.clear()
        self._merged_weights.clear()

    def get_base_weight(self) -> Tensor:
        """The weight of the base layer, dequantized if necessary."""
        unpack(self.get_base_layer())
        return super().get_base_weight()

    def _add_to_base(self, weights: dict[str, Tensor], sign: int, must_be_finite: bool = False) -> None:
        """Add the sum of compositions to the base layer in one step, so that it is rounded once or stays unchanged."""
        base_layer = self.get_base_layer()
        if is_on_meta(base_layer) and is_offloaded(base_layer):
            with onload_layer(self):
                self._add_to_base(weights, sign, must_be_finite)
            return
        with self.onloaded(weights):
            deltas, biases = self._deltas(weights)
        weight = functional.add_delta(self.get_base_weight(), torch.stack(deltas).sum(0), sign)
        bias = None
        if biases:
            bias = functional.add_delta(cast(Tensor, base_layer.bias).data, torch.stack(biases).sum(0), sign)
        if must_be_finite and not all(bool(t.isfinite().all()) for t in (weight, bias) if t is not None):
            raise ValueError(
                f"The merged weights are not finite. Probably one of these is broken: {', '.join(map(repr, weights))}."
            )
        if self.tie is not None and sign > 0:
            self.tie.leave(self)
        self.set_base_weight(weight)
        if bias is not None:
            cast(Tensor, self.get_base_layer().bias).data = bias

    def base_parameters(self) -> list[Place]:
        """The parameters of the base layer that merging changes."""
        base_layer = self.get_base_layer()
        return [Place(base_layer, name) for name in ("weight", "bias") if base_layer._parameters.get(name) is not None]

    def _deltas(self, weights: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The updates of the base layer's weight, and of its bias if there are any."""
        deltas: list[Tensor] = []
        biases: list[Tensor] = []
        for adapter_name, own in weights.items():
            factors = self._ready_factors(adapter_name)
            own = own.to(factors.A.device)  # the model may have moved while it was merged
            deltas.append(self._delta_weight(adapter_name, own))
            if factors.bias is not None:
                biases.append(functional.delta_bias(factors.bias, own))
        return deltas, biases

    def _delta_weight(self, adapter_name: str, weights: Tensor) -> Tensor:
        factors = self.whole_factors(adapter_name)
        return functional.delta_weight(factors.A, factors.B, factors.spread(weights))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the base layer plus the active compositions, in the shape and dtype of the base layer's output."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.composition_factors]
        for name in active:
            if is_offloaded(self.composition_factors._modules[name]):
                with self.onloaded(active):
                    return self._composed_output(active, x, *args, **kwargs)
        return self._composed_output(active, x, *args, **kwargs)

    def _composed_output(self, active: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(active) == 1 and not args and not kwargs:
            output = self._merged_output(active[0], x)
            if output is not None:
                return output
        result = self.base_layer(x, *args, **kwargs)
        if active and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        for adapter_name in active:
            result = result + self._delta_output(adapter_name, x)
        return result.to(dtype)

    def _merged_output(self, adapter_name: str, x: Tensor) -> Tensor | None:
        """The whole output computed with a merged weight; None if that is impossible or slower."""
        return None

    def _delta_output(self, adapter_name: str, x: Tensor) -> Tensor:
        """The output of a composition alone, to be added to that of the base layer."""
        factors, _, folds = self._pass(adapter_name)
        if not folds:
            weights = self._weights(adapter_name)
            delta = self._apply_factors(x, factors.A.detach(), factors.B.detach(), factors.spread(weights))
            bias = None if factors.bias is None else functional.delta_bias(factors.bias, weights)
        else:
            folded = self.folded(adapter_name)
            bias = folded.bias
            if folded.delta is not None:
                delta = self._apply_delta(x, folded.delta)
                delta = delta if folded.scale is None else delta * folded.scale
            else:
                delta = self._apply_factors(x, cast(Tensor, folded.A), cast(Tensor, folded.B), folded.u)
        return delta if bias is None else self._add_bias(delta, bias)

    def _pass(self, adapter_name: str) -> tuple[Factors, bool, bool]:
        """Decide how a forward pass computes a composition; fast enough for single tokens.

        Nothing is folded while an optimizer step is expected that may change the weights undetected. Nothing is folded
        in training either: with reentrant gradient checkpointing, every step begins with a pass without gradients, and
        the results of all layers would be in memory at the same time.

        Returns:
            Its factors; whether the pass must be differentiable in the mixing weights; and whether it may use, and
            cache, the folded composition.
        """
        mixing, factors = self._parts(adapter_name)
        theta = mixing.weight  # as an attribute: FSDP1 wraps a Mixing in its own modules
        if theta is not None and self._learns(adapter_name, mixing, theta):
            return factors, True, False
        if torch.compiler.is_compiling() or self._is_sharded or _REPLICA in self.__dict__ or mixing.motion.is_on:
            return factors, False, False
        return factors, False, not self.training or theta is None or not theta.requires_grad

    def _learns(self, adapter_name: str, mixing: Mixing, theta: Tensor) -> bool:
        """Whether derivatives may be computed.

        After such a pass the weights may change, so results that were folded with the old ones are removed.
        """
        # torch.func replaces parameters by its own tensors, whatever their requires_grad.
        is_foreign = type(theta) is not nn.Parameter and _REPLICA not in self.__dict__
        learns = is_foreign or (theta.requires_grad and torch.is_grad_enabled())
        if learns and is_offloaded(mixing):
            raise RuntimeError(
                f"The mixing weights of the composition {adapter_name!r} are offloaded (device_map): every call would "
                "train a temporary copy. Compose after dispatching the model: get_peft_model then puts the "
                "composition on the device that computes (for a saved one, call get_peft_model with its config and "
                "then set_peft_model_state_dict)."
            )
        if learns and not torch.compiler.is_compiling():  # not part of a compiled graph
            self._folds.drop(adapter_name)
            mixing.motion.begin()
        return learns

    def folded(self, adapter_name: str, into_base: bool = False) -> Folded:
        """The folded composition, cached until its mixing weights or factors change.

        Changes are detected by PyTorch's version counters and by optimizer steps (see `folding`). Changes of theta are
        also detected by its values, if comparing them needs no device synchronisation. Every forward pass with
        gradients, every `train()` or `eval()`, and every move to another device or dtype clears the cache, too. Not
        detected are writes through `.data` to theta on a GPU or to the base weight, and writes in a CUDA graph, if
        they are not made by a PyTorch optimizer: call `eval()` after them.

        Args:
            adapter_name: name of the composition.
            into_base: whether to return the merged weight, if that is worth its memory.

        Returns:
            The folded composition; do not write to it.
        """
        factors = self._ready_factors(adapter_name)
        into_base = into_base and factors.merged_is_kept
        folded = self._folds.get(adapter_name, into_base)
        if folded is None:
            with torch.inference_mode(False), torch.no_grad():  # kept for training, too
                folded = self._folds.make(
                    adapter_name,
                    into_base,
                    sources=lambda: self._sources(adapter_name, into_base),
                    fold=lambda: self._fold(adapter_name, into_base),
                )
        return folded

    def _sources(self, adapter_name: str, into_base: bool) -> list[Source | None]:
        """The parameters that `_fold` reads."""
        mixing, factors = self._parts(adapter_name)
        sources = [Source.of(factors, name) for name in ("A", "B", "bias") if factors._parameters[name] is not None]
        if mixing.weight is not None:
            sources.append(Source.of(mixing, "weight", by_value=True))
        if into_base:
            sources.append(Source.of(self.base_layer, "weight"))
        return sources

    def _fold(self, adapter_name: str, into_base: bool) -> Folded:
        factors = self._ready_factors(adapter_name)
        weights = self._weights(adapter_name).detach()
        u = factors.spread(weights)
        A, B = factors.A.detach(), factors.B.detach()
        bias = None if factors.bias is None else functional.delta_bias(factors.bias.detach(), weights)
        if into_base:
            merged = functional.add_delta(self._base_matrix(), functional.delta_weight(A, B, u))
            return Folded(merged=merged, bias=bias)
        if factors.dense_is_smaller:
            delta, scale = functional.resolved(functional.delta_weight(A, B, u), A.dtype)
            return Folded(delta=delta, scale=scale, bias=bias)
        if factors.copying_A_is_dear:
            return Folded(A=A, B=B, u=u, bias=bias)
        A, B = functional.fold(A, B, u)
        return Folded(A=A, B=B, bias=bias)

    def _base_matrix(self) -> Tensor:
        """The base weight as (out, in); only used by subclasses that merge into it."""
        return cast(Tensor, self.get_base_layer().weight).detach()

    def _apply_factors(self, x: Tensor, A: Tensor, B: Tensor, u: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _apply_delta(self, x: Tensor, delta: Tensor) -> Tensor:
        raise NotImplementedError

    def _add_bias(self, delta: Tensor, bias: Tensor) -> Tensor:
        return delta + bias.to(delta.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can convert this layer: it supports 2-D weights without biases."""
        if adapter_name not in self.composition_factors:
            return True
        return cast(Factors, self.composition_factors[adapter_name]).bias is None

    def extra_repr(self) -> str:
        """PEFT's text about quantized layers."""
        return quantization_extra_repr(self)
