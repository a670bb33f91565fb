"""One backward pass for all candidates: what a small share of each, block by block, would do to the evidence.

After "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling" (arXiv 2407.02880), which ranks task
vectors by the gradients of their coefficients at zero. With G the gradient of the score for a weight W, the derivative
for the coefficient of an adapter there is <G, s B A>: a candidate costs the reading of its file, and no pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from peft_composition.choosing.slopes import mean_margin

from .features import factors


Read = Callable[[Sequence[int]], Callable[[nn.Module], Tensor]]


def gradients(
    base: nn.Module, read: Callable[[nn.Module], Tensor], labels: Tensor, modules: Sequence[str]
) -> dict[str, Tensor]:
    """Of the mean margin, for the weights of some modules of the base model.

    Args:
        base: the base model.
        read: computes features with a gradient, shape (n, d).
        labels: of the examples.
        modules: their names.
    """
    weights = [base.get_parameter(f"{name}.weight") for name in modules]
    was = [(own, own.requires_grad) for own in base.parameters()]
    try:
        for own, _ in was:
            own.requires_grad = any(own is weight for weight in weights)
        found = torch.autograd.grad(mean_margin(read(base), labels), weights)
    finally:
        for own, required in was:
            own.requires_grad = required
    return dict(zip(modules, found))


def derivatives(candidates: Sequence[Path], found: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of each candidate's coefficient in each block.

    Args:
        candidates: folders of adapters that can be read.
        found: results of `gradients`, one for each draw.

    Returns:
        The derivatives, shape (draws, candidates, blocks), and the norms of s B A, shape (candidates, blocks).
    """
    modules = sorted(found[0])
    stacked = {name: torch.stack([own[name] for own in found]) for name in modules}
    slopes = torch.zeros(len(found), len(candidates), len(modules))
    norms = torch.ones(len(candidates), len(modules))
    for number, folder in enumerate(candidates):
        for name, A, B in factors(folder):
            block = modules.index(name)
            slopes[:, number, block] = ((stacked[name] @ A.T) * B).sum((1, 2))
            norms[number, block] = torch.linalg.matrix_norm(B @ A)
    return slopes, norms


def scales_of(found: Mapping[str, Tensor]) -> Tensor:
    """The root mean squares of gradients, in the order of the blocks of `derivatives`, shape (blocks,)."""
    return torch.stack([found[name].square().mean().sqrt() for name in sorted(found)])


def modules_of(candidate: Path) -> list[str]:
    """Where an adapter has factors."""
    return [name for name, *_ in factors(candidate)]
