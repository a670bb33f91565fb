"""The copies of base weights that PEFT saves beside a LoRA on embeddings: the same as the model's own, or not?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..upstream.adapter import UpstreamAdapter
from ..upstream.keys import BASE_COPY
from .base_model import BaseModel


def warn_about_other_bases(adapters: Iterable[UpstreamAdapter], base: BaseModel) -> None:
    """Say once which adapters were trained on other embeddings than those that the model has.

    A copy that is the model's own weight says nothing; one that is not means that the adapter's update belongs to
    other values.

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
            "factors are mixed into the weights of this model. If they came with embeddings of their own (new tokens, "
            "retrained ones), load these into the base model first.",
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
    """Whether two tensors have the same values, as far as the coarser of their dtypes tells."""
    if own.dtype == copy.dtype:
        return torch.equal(own, copy)
    wide = torch.promote_types(torch.promote_types(own.dtype, copy.dtype), torch.float32)
    coarse = max(torch.finfo(own.dtype).eps, torch.finfo(copy.dtype).eps)
    return torch.allclose(own.to(wide), copy.to(wide), rtol=coarse, atol=0)
