"""Compares the copies of base weights that PEFT saves with a LoRA on embeddings with the model's own weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..upstream.adapter import UpstreamAdapter
from ..upstream.keys import BASE_COPY
from .base_model import BaseModel


def warn_about_other_bases(adapters: Iterable[UpstreamAdapter], base: BaseModel) -> None:
    """Warn about adapters that were trained on embeddings other than the model's.

    A copy that differs from the model's weight means that the adapter's update belongs to other values.

    Args:
        adapters: the adapters.
        base: the base model.
    """
    different = [
        f"adapter {adapter.name!r}, {module} (by up to {difference:.3g})"
        for adapter in adapters
        for module, difference in _different_copies(adapter, base)
    ]
    if different:
        warnings.warn(
            f"These adapters were trained on other base weights than this model has: {'; '.join(different)}. Their "
            "factors are mixed into the weights of this model. If they have their own embeddings (new or retrained "
            "tokens), load these into the base model first.",
            stacklevel=2,
        )


def _different_copies(adapter: UpstreamAdapter, base: BaseModel) -> Iterator[tuple[str, float]]:
    for key in adapter.weights:
        if not key.endswith(BASE_COPY):
            continue
        spelled = key.replace("_orig_mod.", "").removeprefix("base_model.model.").removesuffix(BASE_COPY)
        module = base.current_name(spelled)
        own = base.layers[module]._parameters.get("weight") if module in base.layers else None
        if own is None or own.is_meta or not own.is_floating_point() or own.shape != adapter.weights.shape(key):
            continue  # quantized or not loaded; other shapes are refused with the factors
        copy = adapter.weights.read(key)
        if not _is_same(own.detach().cpu(), copy):
            yield module, float((own.detach().cpu().double() - copy.double()).abs().max())


def _is_same(own: Tensor, copy: Tensor) -> bool:
    """Whether two tensors have the same values in the coarser of their dtypes."""
    if own.dtype == copy.dtype:
        return torch.equal(own, copy)
    wide = torch.promote_types(torch.promote_types(own.dtype, copy.dtype), torch.float32)
    coarse = max(torch.finfo(own.dtype).eps, torch.finfo(copy.dtype).eps)
    return torch.allclose(own.to(wide), copy.to(wide), rtol=coarse, atol=0)
