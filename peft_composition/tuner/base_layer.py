"""Properties of a base layer: its shape, device, dtype, quantization and hooks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import compat
from ..upstream.shapes import LayerShape


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLAIN_LAYERS = (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether a module is a layer with adapters of some PEFT method."""
    return _is_tuner_layer(cast(Hashable, type(module)))


@lru_cache
def _is_tuner_layer(kind: type) -> bool:
    """The same by its type: a model has few, and asking PEFT's abstract class for every module is slow."""
    return issubclass(kind, BaseTunerLayer)


def real_device(device: torch.device | None) -> torch.device:
    """The device for constants that belong to parameters on `device`, which may temporarily be the meta device."""
    return torch.device("cpu") if device is None or device.type == "meta" else device


def is_on_meta(module: nn.Module) -> bool:
    """Whether a module has parameters without values."""
    return any(parameter.is_meta for parameter in module.parameters())


def hooks_of(module: nn.Module) -> Sequence[Any]:
    """The hooks that accelerate has added to a module."""
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else getattr(hook, "hooks", (hook,))


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate loads the parameters of a module for every call and unloads them afterwards."""
    return "_hf_hook" in module.__dict__ and any(getattr(hook, "offload", False) for hook in hooks_of(module))


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of this module has side effects: hooks of any kind, or a replaced forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or compat.has_global_hooks()
    )


def layer_shape(base_layer: nn.Module, **quantization_kwargs: Any) -> LayerShape:
    """The shape of the factors that a layer needs; never read from a weight, which may be quantized.

    Args:
        base_layer: a layer of the base model.
        **quantization_kwargs: arguments that PEFT's `resolve_quantization_backend` needs for some backends.

    Returns:
        The shape, with a `refusal` for layers that cannot be composed.
    """
    kind = type(base_layer).__name__
    if isinstance(base_layer, nn.Embedding):
        refusal = None
        if base_layer.max_norm is not None:
            refusal = (
                f"it has max_norm={base_layer.max_norm}, which rescales its rows, so that an update cannot be added"
            )
        return LayerShape(
            kind, (base_layer.num_embeddings,), base_layer.embedding_dim, is_embedding=True, refusal=refusal
        )
    if isinstance(base_layer, CONVOLUTIONS):
        refusal = None
        if base_layer.groups != 1:
            refusal = f"it has groups={base_layer.groups}, and B A is not the weight of a grouped convolution"
        return LayerShape(
            kind, (base_layer.in_channels, *base_layer.kernel_size), base_layer.out_channels, refusal=refusal
        )
    if isinstance(base_layer, Conv1D):
        return LayerShape(kind, (base_layer.nx,), base_layer.nf)
    features = _linear_features(base_layer, **quantization_kwargs)
    if features is None:
        return LayerShape(kind, (), 0, refusal=f"this kind of layer is not supported: {type_name(base_layer)}")
    return LayerShape(kind, (features[0],), features[1])


def _linear_features(base_layer: nn.Module, **quantization_kwargs: Any) -> tuple[int, int] | None:
    if isinstance(base_layer, nn.Linear):
        return base_layer.in_features, base_layer.out_features
    if quantization_backend_of(base_layer, **quantization_kwargs) is None:
        return None
    in_features, out_features = compat.get_in_out_features(base_layer)
    return None if in_features is None or out_features is None else (in_features, out_features)


def quantization_backend_of(base_layer: nn.Module, **quantization_kwargs: Any) -> QuantizationBackend | None:
    """PEFT's backend for a quantized base layer; None for plain weights and for other kinds of layers.

    PEFT treats some layers as plain although their weights are codes (optimum-quanto's, or those of transformers' own
    quantized linear layers). They get a backend that cannot merge, because adding an update to codes gives garbage
    without an error. So do torchao weights if it is unknown how to quantize them again.
    """
    weight = base_layer._parameters.get("weight")
    if type(base_layer) in PLAIN_LAYERS and type(weight) is nn.Parameter and _has_plain_weight(base_layer):
        return None  # nearly every layer; asking every backend takes as long as wrapping the layer
    try:
        backend = resolve_quantization_backend(base_layer, **quantization_kwargs)
    except ValueError:  # torchao weights in a model that transformers did not quantize
        return ForwardOnlyQuantizationBackend("torchao, outside of transformers")
    if isinstance(base_layer, (nn.Embedding, *CONVOLUTIONS)) and backend is not None:
        return ForwardOnlyQuantizationBackend(backend.backend_name)  # it would leave plain weights
    if backend is None and isinstance(base_layer, PLAIN_LAYERS) and not _has_plain_weight(base_layer):
        return ForwardOnlyQuantizationBackend("unknown to PEFT")
    return backend


def type_name(base_layer: nn.Module) -> str:
    """The class of a layer, with the module that defines it."""
    return f"{type(base_layer).__module__}.{type(base_layer).__qualname__}"


def _has_plain_weight(base_layer: nn.Module) -> bool:
    """Whether the weight holds the numbers that the layer computes with, not codes."""
    weight = getattr(base_layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return False
    if hasattr(type(weight), "__tensor_flatten__"):  # made of other tensors: of shards, or of codes and scales
        return hasattr(weight, "device_mesh")
    return weight.dtype.itemsize >= 2 or type(base_layer) in PLAIN_LAYERS  # subclasses have scales beside float8


def device_of(base_layer: nn.Module) -> torch.device:
    """The device that a base layer computes on: that of its weight, or where accelerate loads an offloaded weight.

    Quantized layers have several names for their weight.
    """
    if is_offloaded(base_layer):
        for hook in hooks_of(base_layer):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    for name in ("weight", "qweight", "W_q"):
        weight = getattr(base_layer, name, None)
        if isinstance(weight, Tensor):
            return weight.device
    return next((tensor.device for tensor in base_layer.parameters()), torch.device("cpu"))


def compute_dtype(base_layer: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype that a base layer computes in.

    Args:
        base_layer: the layer, quantized or not.
        default: the model's dtype, for layers that do not show theirs (8-bit codes, float8 weights).

    Returns:
        A dtype of at least 16 bits.
    """
    weight = getattr(base_layer, "weight", None)  # GPTQ's is not a tensor; HQQ and AQLM have none
    of_weight = weight.dtype if isinstance(weight, Tensor) else None
    for candidate in (getattr(base_layer, "compute_dtype", None), of_weight):
        if isinstance(candidate, torch.dtype) and candidate.is_floating_point and candidate.itemsize >= 2:
            return candidate
    return default
