"""A control for experiments: LoRA factors that have learned nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def with_random_factors(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The tensors of a saved LoRA with random A and B in every module, and the norm of every product B A kept.

    Args:
        tensors: by the keys of an `adapter_model.safetensors`; a head stays as it is.
        seed: of the factors.

    Returns:
        As many tensors of the same shapes.
    """
    generator = torch.Generator().manual_seed(seed)
    replaced = dict(tensors)
    for name_a in sorted(name for name in tensors if ".lora_A." in name):
        name_b = name_a.replace(".lora_A.", ".lora_B.")
        size = torch.linalg.matrix_norm(tensors[name_b] @ tensors[name_a])
        A, B = (torch.randn(tensors[name].shape, generator=generator) for name in (name_a, name_b))
        replaced[name_a], replaced[name_b] = A, B * size / torch.linalg.matrix_norm(B @ A)
    return replaced
