"""The layers of a composition: `CompositionLayer` and its forms for linear, convolutional and embedding layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from warnings import warn

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import compat, functional
from .config import CompositionConfig
from .folding import Folded, Folds, Motion, Source
from .packing import unpack
from .ties import Place, Tie
from .upstream.shapes import LayerShape
from .upstream.stacking import StackedFactors


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN_LAYERS = (nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS)
# What FSDP1 and FSDP2, and ZeRO-3, set on every module whose parameters they shard.
_SHARDING_MARKS = ("_is_fsdp_managed_module", "ds_id")
# What nn.DataParallel sets on the copies it makes for every pass, which have plain tensors for parameters.
_REPLICA = "_is_replica"


class Mixing(nn.Module):
    """Mixing weights of one or several modules: `w = softmax(v0 + gain * theta)`, or without the softmax.

    theta is the parameter `weight`, zero at the start, of shape (N,); uniform and fixed mixings have none. It is kept
    in float32 (float64 in a float64 model), whatever dtype the model is cast to.

    Args:
        config: gives `mixing`, `weights`, `normalization` and `gain`.
        dtype: float32 or float64.
        device: of the parameter.
    """

    def __init__(self, config: CompositionConfig, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        count = len(config.references)
        weights = config.weights if config.weights is not None else [1 / count] * count
        self.normalization = config.normalization
        assert config.gain is not None  # __post_init__ fills in the default
        self.count = count
        self.gain = config.gain
        self.start: list[float] | None = None
        if config.mixing == "learned":
            self.weight: nn.Parameter | None = nn.Parameter(torch.zeros(count, dtype=dtype, device=device))
            if config.weights is not None or config.normalization == "none":
                self.start = functional.starting_logits(weights, config.normalization)
        else:
            self.register_parameter("weight", None)
            self.start = weights
        self.motion = Motion()  # of theta; replicas of nn.DataParallel share it
        # Constants are no buffers: DDP would broadcast them on every step.
        self._start: Tensor | None = None
        if self.start is not None:
            self._start_on(real_device(device), torch.promote_types(dtype, torch.float32))

    def forward(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The mixing weights w, shape (N,), in float32 or wider.

        Args:
            device: where the constants of a uniform or fixed mixing shall be; learned weights are where theta is.
                Default: the CPU.
            dtype: what these constants shall at least have.
        """
        if self.weight is None:
            wide = torch.promote_types(dtype, torch.float32)
            return self._start_on(torch.device("cpu") if device is None else device, wide)
        logits = self.gain * _gathered(self.weight, self.count)
        if self._start is not None:
            logits = logits + self._start_on(logits.device, logits.dtype)
        return functional.normalize(logits, self.normalization)

    def _start_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self._start is None or self._start.device != device or self._start.dtype != dtype:
            with torch.inference_mode(False):  # kept for training, which cannot use tensors made in inference mode
                self._start = torch.tensor(self.start, dtype=dtype, device=device)
        return self._start

    def reset(self, device: torch.device) -> None:
        """Put theta at zero on `device`, also where it was created on the meta device."""
        if self.weight is not None:
            self._parameters["weight"] = nn.Parameter(
                torch.zeros(self.weight.shape, dtype=self.weight.dtype, device=device),
                requires_grad=self.weight.requires_grad,
            )

    def train(self, mode: bool = True) -> Mixing:
        if self.weight is None or self.weight.grad is None:  # no step is due
            self.motion.end()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mixing:
        """Move like any module, but never round theta below float32."""
        before = self.weight
        kept = None if before is None or before.is_meta else before.detach().clone()
        super()._apply(fn, recurse)
        if self.weight is not None and self.weight.dtype.itemsize < torch.float32.itemsize:
            source = self.weight.detach() if kept is None else kept.to(self.weight.device)
            gradient, self.weight.grad = self.weight.grad, None
            self.weight.data = source.float()
            self.weight.grad = None if gradient is None else gradient.float()
        if self._start is not None:  # now, and not in the first forward pass: that may be the one that is compiled
            self._start_on(real_device(fn(self._start[:0]).device), self._start.dtype)
        return self

    def extra_repr(self) -> str:
        return f"adapters={self.count}, gain={self.gain}"


def _mark_unwritten(parameter: nn.Parameter) -> None:
    """Make the first value NaN, which no factor is."""
    if not parameter.is_meta and parameter.numel():
        parameter.data.view(-1)[0] = math.nan


def _is_unwritten(parameter: nn.Parameter) -> bool:
    return parameter.is_meta or (parameter.numel() > 0 and bool(parameter.data.view(-1)[0].isnan()))


class Factors(nn.Module):
    """The frozen factors of all upstream adapters for one module, stacked; never trainable.

    Args:
        ranks: rank of every adapter, 0 where it does not touch the module.
        shape: of the module.
        has_bias: whether an adapter brings a LoRA bias.
        dtype: compute dtype of the base layer.
        device: of the base layer.
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
        self.dense_is_smaller = not shape.is_embedding and functional.dense_is_smaller(total, *sizes)
        # In float16, folding changes A as well.
        self.copying_A_is_dear = shape.is_embedding and dtype == torch.float16
        # A merged weight saves the base layer's own product as well, so that it may take twice the memory.
        self.merged_is_kept = not shape.is_embedding and functional.dense_is_smaller(2 * total, *sizes)
        bias_shape = (len(ranks), shape.out_features) if has_bias else None
        for name, size in (("A", shape.shape_of_A(total)), ("B", shape.shape_of_B(total)), ("bias", bias_shape)):
            parameter = None
            if size is not None:
                parameter = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
            self.register_parameter(name, parameter)
        # Parameters whose values have not come yet. A plain dict, so that it registers nothing a second time.
        self._placeholders = {name: parameter for name, parameter in self._parameters.items() if parameter is not None}
        for parameter in self._placeholders.values():
            _mark_unwritten(parameter)
        self._widest, self._places = functional.places_of_ranks(self.ranks)
        self._places_here: Tensor | None = None
        self._place_ranks(real_device(device))

    @property
    def is_pending(self) -> bool:
        """Whether the factors were built from a saved configuration and their values never came.

        They come with other parameters, from a state dict, or are written into these, as TRL does that copies a
        composition to have a reference.
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
        if not self.is_pending:  # a replica has no parameters that could be told from placeholders
            replica._placeholders = {}
        return replica

    def fill(self, stacked: StackedFactors, device: torch.device) -> None:
        """Take the values, also where the parameters were created on the meta device.

        The entries are set in the table of parameters itself: inside accelerate's `init_empty_weights` a registration
        would throw the values away.
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
            with torch.inference_mode(False):  # kept for training, which cannot use tensors made in inference mode
                self._places_here = torch.tensor(self._places, dtype=torch.int64, device=device)
        return self._places_here

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factors:
        super()._apply(fn, recurse)
        self._place_ranks(real_device(self.A.device))  # now, and not in a forward pass that may be compiled
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Factors:
        return self  # upstream factors stay as they were trained

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        found = [name for name in self._placeholders if prefix + name in state_dict]
        if self.is_pending and found:
            # The first values are taken over and not copied: N adapters shall not be in memory twice.
            taken = {prefix + name: self._as_placeholder(name, state_dict[prefix + name]) for name in found}
            state_dict = {**state_dict, **taken}
            local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        for name in found:
            del self._placeholders[name]

    def _as_placeholder(self, name: str, tensor: Tensor) -> Tensor:
        """A loaded tensor in the dtype and on the device of the parameter that waits for it."""
        waiting = self._placeholders[name]
        return tensor.detach().to(tensor.device if waiting.is_meta else waiting.device, waiting.dtype)

    def extra_repr(self) -> str:
        return f"A={tuple(self.A.shape)}, B={tuple(self.B.shape)}, ranks={self.ranks}"


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
            if target.type != "meta" and not _is_on_meta(part):
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
            if _is_on_meta(base_layer) and not _is_offloaded(base_layer):
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
            if backend is None and isinstance(base_layer, _PLAIN_LAYERS) and "weight" not in base_layer._parameters:
                raise TypeError(
                    f"The composition {name!r} cannot be merged into a base layer of type {_type_name(base_layer)} "
                    "whose weight is computed from other tensors (a parametrization, pruning): the update would be "
                    "lost. Remove that first, or use the composition unmerged."
                )
            if backend is not None and not backend.supports_merge:
                raise TypeError(
                    f"The composition {name!r} cannot be merged into a base layer of type {_type_name(base_layer)} "
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
        if _is_on_meta(base_layer) and _is_offloaded(base_layer):
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
            if _is_offloaded(self.composition_factors._modules[name]):
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
        if learns and _is_offloaded(mixing):
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
        parts = [part for part in parts if _is_on_meta(part) and _is_offloaded(part)]
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


class Linear(CompositionLayer):
    """A composition beside `nn.Linear`, transformers' `Conv1D` or a quantized linear layer."""

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        shape = layer_shape(self.get_base_layer(), **quantization_kwargs)
        self.in_features, self.out_features = shape.in_shape[0], shape.out_features
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """As in every form; zeros where the composition does not touch this layer: `convert_to_lora` asks all."""
        if adapter_name in self.composition_factors:
            return super().get_delta_weight(adapter_name)
        shape = (self.out_features, self.in_features)
        return torch.zeros(shape[::-1] if self.fan_in_fan_out else shape, device=device_of(self.get_base_layer()))

    def _merged_output(self, adapter_name: str, x: Tensor) -> Tensor | None:
        factors, learns, folds = self._pass(adapter_name)
        form = functional.cheapest_form(
            x.numel() // self.in_features,
            factors.rank,
            self.in_features,
            self.out_features,
            trains_input=x.requires_grad and torch.is_grad_enabled(),
            trains_weights=learns,
        )
        if form == "stacked" and not (folds and factors.merged_is_kept):
            return None
        if not self._can_merge(x, factors):
            return None
        if folds:
            folded = self.folded(adapter_name, into_base=True)
            bias = self._composed_bias(folded.bias)
            if folded.merged is not None:
                return F.linear(x, folded.merged, bias)
            return functional.merged_linear(
                x, self._base_matrix(), bias, cast(Tensor, folded.A), cast(Tensor, folded.B)
            )
        weights = self._weights(adapter_name)
        bias = self._composed_bias(None if factors.bias is None else functional.delta_bias(factors.bias, weights))
        u = factors.spread(weights)
        return functional.merged_linear(x, self._base_matrix(), bias, factors.A.detach(), factors.B.detach(), u, form)

    def _can_merge(self, x: Tensor, factors: Factors) -> bool:
        """Whether the base layer is no more than x W0^T + b, so that its weight may be replaced by a merged one.

        Not in 16 bits, nor under autocast, where W0 + Delta would be rounded to 8 or 11 bits and lose a small update.
        """
        base = self.base_layer
        weight, A = base._parameters.get("weight"), factors._parameters.get("A")
        if type(weight) is not nn.Parameter or type(base) not in (nn.Linear, Conv1D) or _is_hooked(base):
            return False
        if self._is_sharded:
            return False
        dtype, device = weight.dtype, weight.device
        return (
            dtype.itemsize >= torch.float32.itemsize
            and type(x) in (Tensor, nn.Parameter)
            and dtype == x.dtype == cast(Tensor, A).dtype
            and device == x.device == cast(Tensor, A).device
            and device.type != "meta"
            and not torch.is_autocast_enabled(device.type)
            and not weight.requires_grad
        )

    def _base_matrix(self) -> Tensor:
        weight = super()._base_matrix()
        return weight.t() if self.fan_in_fan_out else weight

    def _composed_bias(self, update: Tensor | None) -> Tensor | None:
        bias = cast("Tensor | None", self.get_base_layer().bias)
        if update is None or bias is None:
            return bias if update is None else update
        return bias + update.to(bias.dtype)

    def _apply_factors(self, x: Tensor, A: Tensor, B: Tensor, u: Tensor | None) -> Tensor:
        return functional.linear_delta_output(self._cast_input_dtype(x, A.dtype), A, B, u)

    def _apply_delta(self, x: Tensor, delta: Tensor) -> Tensor:
        return F.linear(self._cast_input_dtype(x, delta.dtype), delta)

    def _delta_weight(self, adapter_name: str, weights: Tensor) -> Tensor:
        delta = super()._delta_weight(adapter_name, weights)
        return delta.t() if self.fan_in_fan_out else delta


class Conv(CompositionLayer):
    """A composition beside `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`."""

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        base = self._convolution
        self.in_features, self.out_features = base.in_channels, base.out_channels

    @property
    def _convolution(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        return cast(nn.Conv2d, self.get_base_layer())

    def _apply_factors(self, x: Tensor, A: Tensor, B: Tensor, u: Tensor | None) -> Tensor:
        return functional.conv_delta_output(self._cast_input_dtype(x, A.dtype), A, B, u, self._convolve)

    def _apply_delta(self, x: Tensor, delta: Tensor) -> Tensor:
        return self._convolve(self._cast_input_dtype(x, delta.dtype), delta)

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        return self._convolution._conv_forward(x, kernel, None)  # with its stride, padding and dilation

    def _add_bias(self, delta: Tensor, bias: Tensor) -> Tensor:
        return delta + bias.to(delta.dtype).reshape(-1, *(1,) * len(self._convolution.kernel_size))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


class Embedding(CompositionLayer):
    """A composition beside `nn.Embedding`."""

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        base = cast(nn.Embedding, self.get_base_layer())
        self.in_features, self.out_features = base.num_embeddings, base.embedding_dim

    def _apply_factors(self, x: Tensor, A: Tensor, B: Tensor, u: Tensor | None) -> Tensor:
        delta = functional.embedding_delta_output(x, A, B, u)
        scale = self._get_embed_scale()  # Gemma scales its embeddings in forward
        return delta if scale is None else delta * scale.to(delta.dtype)

    def _delta_weight(self, adapter_name: str, weights: Tensor) -> Tensor:
        return super()._delta_weight(adapter_name, weights).t()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


def _gathered(theta: Tensor, count: int) -> Tensor:
    """theta in float32 or wider and with all its entries, also where FSDP rounds or shards it."""
    if type(theta) is not nn.Parameter and hasattr(theta, "full_tensor"):  # FSDP2, outside of a forward pass
        theta = theta.full_tensor()
    if theta.shape[0] != count:
        raise RuntimeError(
            f"Of {count} mixing weights only {theta.shape[0]} are here: FSDP1 has sharded them and gathers them "
            "elsewhere. It cannot shard weights that several modules share: use FSDP2 "
            '(peft_composition.sharding.shard) or weight_sharing="module". Outside of a forward pass, ask within '
            "FSDP.summon_full_params(model)."
        )
    return theta.to(torch.promote_types(theta.dtype, torch.float32))


def real_device(device: torch.device | None) -> torch.device:
    """Where constants are made for parameters on `device`: also for those that are on the meta device for a while."""
    return torch.device("cpu") if device is None or device.type == "meta" else device


def _is_on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def hooks_of(module: nn.Module) -> Sequence[Any]:
    """The hooks that accelerate has put on a module."""
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else getattr(hook, "hooks", (hook,))


def _is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate brings the parameters of a module in for every call, and takes them away after."""
    return "_hf_hook" in module.__dict__ and any(getattr(hook, "offload", False) for hook in hooks_of(module))


def _is_hooked(module: nn.Module) -> bool:
    """Whether something waits for calls of this very module: hooks of any kind, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or compat.has_global_hooks()
    )


def form_of(base_layer: nn.Module) -> type[CompositionLayer]:
    """The class that puts a composition beside a base layer for which `layer_shape` has no refusal."""
    if isinstance(base_layer, nn.Embedding):
        return Embedding
    return Conv if isinstance(base_layer, _CONVOLUTIONS) else Linear


def layer_shape(base_layer: nn.Module, **quantization_kwargs: Any) -> LayerShape:
    """What factors a layer needs, never read from a weight that may be quantized.

    Args:
        base_layer: a layer of the base model.
        **quantization_kwargs: what PEFT's `resolve_quantization_backend` needs for some backends.

    Returns:
        The shape, with a `refusal` for layers that have one but cannot hold a composition.
    """
    kind = type(base_layer).__name__
    if isinstance(base_layer, nn.Embedding):
        refusal = None
        if base_layer.max_norm is not None:
            refusal = f"it has max_norm={base_layer.max_norm}, which rescales its rows and is no sum of weights"
        return LayerShape(
            kind, (base_layer.num_embeddings,), base_layer.embedding_dim, is_embedding=True, refusal=refusal
        )
    if isinstance(base_layer, _CONVOLUTIONS):
        refusal = None
        if base_layer.groups != 1:
            refusal = f"it has groups={base_layer.groups}, and the product B A is no weight of a grouped convolution"
        return LayerShape(
            kind, (base_layer.in_channels, *base_layer.kernel_size), base_layer.out_channels, refusal=refusal
        )
    if isinstance(base_layer, Conv1D):
        return LayerShape(kind, (base_layer.nx,), base_layer.nf)
    features = _linear_features(base_layer, **quantization_kwargs)
    if features is None:
        return LayerShape(kind, (), 0, refusal=f"this kind of layer is not supported: {_type_name(base_layer)}")
    return LayerShape(kind, (features[0],), features[1])


def _linear_features(base_layer: nn.Module, **quantization_kwargs: Any) -> tuple[int, int] | None:
    if isinstance(base_layer, nn.Linear):
        return base_layer.in_features, base_layer.out_features
    if quantization_backend_of(base_layer, **quantization_kwargs) is None:
        return None
    in_features, out_features = compat.get_in_out_features(base_layer)
    return None if in_features is None or out_features is None else (in_features, out_features)


def quantization_backend_of(base_layer: nn.Module, **quantization_kwargs: Any) -> QuantizationBackend | None:
    """PEFT's backend for a quantized base layer; None for one with plain weights, and for other kinds of layers.

    What PEFT takes for a plain layer although its weights are codes (optimum-quanto's, or those of transformers' own
    quantized linear layers) gets a backend that cannot merge: adding an update to codes gives garbage, without an
    error. So do torchao weights that nothing tells how to quantize again.
    """
    try:
        backend = resolve_quantization_backend(base_layer, **quantization_kwargs)
    except ValueError:  # torchao weights in a model that transformers did not quantize
        return ForwardOnlyQuantizationBackend("torchao, outside of transformers")
    if isinstance(base_layer, (nn.Embedding, *_CONVOLUTIONS)) and backend is not None:
        return ForwardOnlyQuantizationBackend(backend.backend_name)  # it would put back plain weights
    if backend is None and isinstance(base_layer, _PLAIN_LAYERS) and not _has_plain_weight(base_layer):
        return ForwardOnlyQuantizationBackend("unknown to PEFT")
    return backend


def _type_name(base_layer: nn.Module) -> str:
    return f"{type(base_layer).__module__}.{type(base_layer).__qualname__}"


def _has_plain_weight(base_layer: nn.Module) -> bool:
    """Whether the weight is the numbers that the layer computes with, and not codes of them."""
    weight = getattr(base_layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return False
    if hasattr(type(weight), "__tensor_flatten__"):  # made of other tensors: of shards, or of codes and scales
        return hasattr(weight, "device_mesh")
    return weight.dtype.itemsize >= 2 or type(base_layer) in _PLAIN_LAYERS  # subclasses have scales beside float8


def device_of(base_layer: nn.Module) -> torch.device:
    """The device a base layer computes on: where its weight is, or where accelerate brings it when it is offloaded.

    Quantized layers name their weight in several ways.
    """
    if _is_offloaded(base_layer):
        for hook in hooks_of(base_layer):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    for name in ("weight", "qweight", "W_q"):
        weight = getattr(base_layer, name, None)
        if isinstance(weight, Tensor):
            return weight.device
    return next((tensor.device for tensor in base_layer.parameters()), torch.device("cpu"))


def compute_dtype(base_layer: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype a base layer computes in.

    Args:
        base_layer: the layer, quantized or not.
        default: the model's dtype, for layers that do not tell (8-bit codes, float8 weights).

    Returns:
        A dtype of at least 16 bits.
    """
    weight = getattr(base_layer, "weight", None)  # GPTQ's is no tensor, HQQ and AQLM have none
    of_weight = weight.dtype if isinstance(weight, Tensor) else None
    for candidate in (getattr(base_layer, "compute_dtype", None), of_weight):
        if isinstance(candidate, torch.dtype) and candidate.is_floating_point and candidate.itemsize >= 2:
            return candidate
    return default
