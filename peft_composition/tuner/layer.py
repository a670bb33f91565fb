"""The layers of a composition: `CompositionLayer` and its forms for linear, convolutional and embedding layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from warnings import warn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor, nn

from . import functional
from .base_layer import PLAIN_LAYERS, device_of, hooks_of, is_offloaded, is_on_meta, quantization_backend_of, type_name
from .factors import Factors
from .folding import Folded, Folds, Source
from .mixing import Mixing
from .packing import unpack
from .ties import Place, Tie


# What FSDP1 and FSDP2, and ZeRO-3, set on every module whose parameters they shard.
_SHARDING_MARKS = ("_is_fsdp_managed_module", "ds_id")
# What nn.DataParallel sets on the copies it makes for every pass, which have plain tensors for parameters.
_REPLICA = "_is_replica"


class CompositionLayer(nn.Module, BaseTunerLayer):
    """A base layer with one or several compositions of upstream LoRA adapters beside it.

        y = base_layer(x) + x (B diag(u) A)^T          u repeats the mixing weights over the ranks

    The active compositions of a layer add up. Only the mixing weights train.
    """

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
        """The mixing weights w of a composition, shape (N,), float32 or wider."""
        with self.onloaded([adapter_name]):
            return self._weights(adapter_name)

    def _weights(self, adapter_name: str) -> Tensor:
        mixing, factors = self._parts(adapter_name)
        A = factors.A
        return mixing(A.device, A.dtype).to(A.device)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The weight update of a composition, in the layout of the base layer's weight, in float32 or wider."""
        with self.onloaded([adapter_name]):
            return self._delta_weight(adapter_name, self._weights(adapter_name).detach())

    def require_mergeable(self, adapter_names: list[str] | None = None) -> None:
        """Check, and change nothing, that compositions can be merged into the base weights.

        Args:
            adapter_names: the compositions; default: the active ones. Those that do not touch this layer do not count.

        Raises:
            ValueError: an adapter has a bias, the base layer none.
            TypeError: the base layer is quantized in a way that cannot be merged into.
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
                    "A composition cannot be merged into a sharded model. Save the model, load it into one that is "
                    "not sharded, and merge there."
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
                    f"The composition {name!r} has a LoRA bias but its base layer ({type(base_layer).__name__}) has "
                    "none to merge it into."
                )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add active compositions to the base weights.

        Args:
            safe_merge: check that the result is finite before anything is changed.
            adapter_names: the compositions; default: the active ones.

        Raises:
            ValueError: `safe_merge` found values that are not finite; or an adapter has a bias, the base layer none.
            TypeError: the base layer is quantized in a way that cannot be merged into.
            RuntimeError: the base layer has no values yet: it is on the meta device.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.composition_factors]
        if not names:
            return
        self.require_mergeable(names)
        if self.quantization_backend is not None:
            # One text for all layers, so that Python shows it once.
            warn(
                "Merging into quantized weights rounds them again; much of a small update can be lost, in 4 "
                "bit most of all. For exact results merge into the model in full precision.",
                stacklevel=2,
            )
        weights = {name: self.mixing_weights(name).detach() for name in names}
        self._add_to_base(weights, sign=1, must_be_finite=safe_merge)
        self._folds.clear()
        self.merged_adapters.extend(names)
        self._merged_weights.update(weights)

    def unmerge(self) -> None:
        """Take all merged compositions out of the base weights again, to the rounding of their dtype."""
        if not self.merged:
            warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._add_to_base(self._merged_weights, sign=-1)
        if self.tie is not None:
            self.tie.rejoin(self)
        self.merged_adapters.clear()
        self._merged_weights.clear()

    def get_base_weight(self) -> Tensor:
        """The weight of the base layer, dequantized where it is quantized."""
        unpack(self.get_base_layer())
        return super().get_base_weight()

    def _add_to_base(self, weights: dict[str, Tensor], sign: int, must_be_finite: bool = False) -> None:
        """Add the sum of compositions to the base layer: all at once, so that it is rounded once or left as it was."""
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
                f"The merged weights are not finite. Broken seems one of: {', '.join(map(repr, weights))}."
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
        """The updates of the base layer's weight, and those of its bias where there are any."""
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
        """The whole output through a merged weight; None where that is not possible, or costs more."""
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
        """What a forward pass does with a composition, found at the pace of a single token.

        Nothing is folded while a step is due that may change the weights unseen. Nor in training, where with reentrant
        gradient checkpointing a pass without gradient opens every step: all layers' would be in memory at once.

        Returns:
            Its factors; whether the pass must leave a way for derivatives to the mixing weights; and whether it may
            take the composition folded, and leave it so for the passes that follow.
        """
        mixing, factors = self._parts(adapter_name)
        theta = mixing.weight  # an attribute: FSDP1 puts modules of its own around a Mixing
        if theta is not None and self._learns(adapter_name, mixing, theta):
            return factors, True, False
        if torch.compiler.is_compiling() or self._is_sharded or _REPLICA in self.__dict__ or mixing.motion.is_on:
            return factors, False, False
        return factors, False, not self.training or theta is None or not theta.requires_grad

    def _learns(self, adapter_name: str, mixing: Mixing, theta: Tensor) -> bool:
        """Whether derivatives may be asked for.

        Such a pass is followed by new weights: what was folded with the old ones is given up.
        """
        # torch.func puts tensors of its own in the place of parameters, whatever their requires_grad.
        is_foreign = type(theta) is not nn.Parameter and _REPLICA not in self.__dict__
        learns = is_foreign or (theta.requires_grad and torch.is_grad_enabled())
        if learns and is_offloaded(mixing):
            raise RuntimeError(
                f"The mixing weights of the composition {adapter_name!r} are offloaded (device_map): every call would "
                "train a copy that is thrown away. Compose after the model was dispatched: get_peft_model puts the "
                "composition on the device that computes (a saved one: get_peft_model with its config, then "
                "set_peft_model_state_dict)."
            )
        if learns and not torch.compiler.is_compiling():  # nothing of this belongs into a graph
            self._folds.drop(adapter_name)
            mixing.motion.begin()
        return learns

    @property
    def _is_sharded(self) -> bool:
        """Whether FSDP or ZeRO-3 gathers the parameters for every pass.

        What is made of them must not be kept: it would be whole on every device. The version counters do not see new
        values there, either, and a process that kept something would not take part in gathering.
        """
        attributes = self.__dict__
        return _SHARDING_MARKS[0] in attributes or _SHARDING_MARKS[1] in attributes  # torch.compile follows this

    def folded(self, adapter_name: str, into_base: bool = False) -> Folded:
        """A composition as constants, kept until its mixing weights or factors change.

        A change is noticed by PyTorch's version counters and by the steps of optimizers (see `folding`), theta's also
        by its values where comparing them does not wait for a device. Every forward pass with gradients, every
        `train()` or `eval()` and every move to another device or dtype starts anew, too. What is left is a write
        through `.data` into theta on a GPU, or into the base weight anywhere, or in a CUDA graph, by something that
        is no optimizer of PyTorch, with none of these in between: call `eval()` after it.

        Args:
            adapter_name: name of the composition.
            into_base: ask for the merged weight, where that is worth its memory.

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
        """What `_fold` reads."""
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
        """The base weight as (out, in); asked for only where a form of this class merges into it."""
        return cast(Tensor, self.get_base_layer().weight).detach()

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

    def train(self, mode: bool = True) -> CompositionLayer:
        self._folds.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompositionLayer:
        self._folds.clear()
        return super()._apply(fn, recurse)

    def _apply_factors(self, x: Tensor, A: Tensor, B: Tensor, u: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _apply_delta(self, x: Tensor, delta: Tensor) -> Tensor:
        raise NotImplementedError

    def _add_bias(self, delta: Tensor, bias: Tensor) -> Tensor:
        return delta + bias.to(delta.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can convert this layer: it knows 2-D weights and no biases."""
        if adapter_name not in self.composition_factors:
            return True
        return cast(Factors, self.composition_factors[adapter_name]).bias is None

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
