"""Unpacks bitsandbytes' 4-bit weights that are packed for the CPU, before they are read or trained.

On a processor with AVX512-BF16 the first forward pass in eval mode reorders the codes of a `Linear4bit` and rounds its
scales to bfloat16, for a kernel without a derivative. Nothing else can read the weights then, and bitsandbytes' own
way back leaves the scales in the wrong order, or quantizes them again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


_PACKED = "packing_format_for_cpu"
# What packing changes besides the codes; stored in the quantization state while they are packed.
_SCALES = ("absmax", "nested", "offset", "state2", "dtype")
_KEPT = "scales_before_packing"


def watch(model: nn.Module) -> None:
    """Unpack packed weights exactly, whenever their model is trained or saved.

    This includes layers without a composition, because gradients must pass through them. It uses hooks of PyTorch,
    which stay when the compositions are removed, and do nothing for weights on other devices.

    Args:
        model: the base model, with all its layers.
    """
    for layer in packable(model.modules()):
        if _before_forward not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_before_forward)
            layer.register_state_dict_pre_hook(_before_saving)


def unpack(layer: nn.Module) -> None:
    """Unpack the weight of a layer; other layers and unpacked weights stay unchanged.

    A weight that was packed before `watch` gets the scales of the packed kernel.
    """
    weight: Any = getattr(layer, "weight", None)
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, _PACKED, False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    with torch.inference_mode(False), torch.no_grad():  # for training, too
        order = copy.copy(state)
        order.original_nested = False  # the codes alone
        codes, _ = _convert_weight_packed_for_cpu_inverse(weight.data, order)
        kept = state.__dict__.pop(_KEPT, None)
        if kept is None:
            kept = {"absmax": state.absmax.t().reshape(-1).float(), "dtype": state.original_dtype}
        for name, value in kept.items():
            setattr(state, name, value)
        setattr(state, _PACKED, False)
        weight.data = codes


def unpack_all(model: nn.Module) -> None:
    """`unpack` for every layer of a model."""
    for layer in packable(model.modules()):
        unpack(layer)


def packable(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The layers of bitsandbytes that may be packed; empty for versions that do not pack."""
    for module in modules:
        if "support_avx512bf16_for_cpu" in vars(module):  # hasattr would search parameters and submodules, too
            yield module


def _before_forward(layer: nn.Module, args: tuple[Any, ...]) -> None:
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None or weight.device.type != "cpu":
        return
    if not getattr(state, _PACKED, False):
        if not layer.training:  # it may be packed now
            state.__dict__[_KEPT] = {name: state.__dict__[name] for name in _SCALES if name in state.__dict__}
    elif layer.training or not args or (args[0].requires_grad and torch.is_grad_enabled()):
        unpack(layer)


def _before_saving(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    unpack(layer)
