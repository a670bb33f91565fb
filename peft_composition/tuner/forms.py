"""Composition layers for linear, convolutional and embedding layers."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import functional
from .base_layer import CONVOLUTIONS, device_of, is_hooked, layer_shape
from .factors import Factors
from .layer import CompositionLayer
from .merged import cheapest_form, merged_linear


class Linear(CompositionLayer):
    """A composition for `nn.Linear`, transformers' `Conv1D` or a quantized linear layer."""

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any) -> None:
        super().__init__(base_layer, **quantization_kwargs)
        shape = layer_shape(self.get_base_layer(), **quantization_kwargs)
        self.in_features, self.out_features = shape.in_shape[0], shape.out_features
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """As in the base class; zeros if the composition does not touch the layer, for `convert_to_lora`."""
        if adapter_name in self.composition_factors:
            return super().get_delta_weight(adapter_name)
        shape = (self.out_features, self.in_features)
        return torch.zeros(shape[::-1] if self.fan_in_fan_out else shape, device=device_of(self.get_base_layer()))

    def _merged_output(self, adapter_name: str, x: Tensor) -> Tensor | None:
        factors, learns, folds = self._pass(adapter_name)
        form = cheapest_form(
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
            return merged_linear(x, self._base_matrix(), bias, cast(Tensor, folded.A), cast(Tensor, folded.B))
        weights = self._weights(adapter_name)
        bias = self._composed_bias(None if factors.bias is None else functional.delta_bias(factors.bias, weights))
        u = factors.spread(weights)
        return merged_linear(x, self._base_matrix(), bias, factors.A.detach(), factors.B.detach(), u, form)

    def _can_merge(self, x: Tensor, factors: Factors) -> bool:
        """Whether the base layer only computes x W0^T + b, so that its weight can be replaced by a merged one.

        False in 16 bits and under autocast, where W0 + Delta would be rounded to 8 or 11 bits and lose a small update.
        """
        base = self.base_layer
        weight, A = base._parameters.get("weight"), factors._parameters.get("A")
        if type(weight) is not nn.Parameter or type(base) not in (nn.Linear, Conv1D) or is_hooked(base):
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
    """A composition for `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`."""

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
        """No: PEFT converts linear layers alone."""
        return False


class Embedding(CompositionLayer):
    """A composition for `nn.Embedding`."""

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
        """No: PEFT converts linear layers alone."""
        return False


def form_of(base_layer: nn.Module) -> type[CompositionLayer]:
    """The composition class for a base layer that `layer_shape` does not refuse."""
    if isinstance(base_layer, nn.Embedding):
        return Embedding
    return Conv if isinstance(base_layer, CONVOLUTIONS) else Linear
