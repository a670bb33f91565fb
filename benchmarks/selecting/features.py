"""What a classifier's head is given under each candidate: computed once for all draws, and kept on disk.

Adapters are added to the weights, which is quicker than a composition for each; a test holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from .pool import BROKEN, CONFIG, WEIGHTS


BASE = "(base)"
PREFIX = "base_model.model."


def features(
    base: nn.Module, candidates: Sequence[Path], read: Callable[[nn.Module], Tensor], folder: Path
) -> dict[str, Tensor]:
    """By the name of the candidate; of those that are not broken, and of the base model.

    Args:
        base: the base model, in eval mode.
        candidates: their folders.
        read: computes features with the model as it is, shape (examples, width).
        folder: where they are kept. A file is read instead of computed anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {path.name: path for path in candidates if not path.name.startswith(BROKEN)}
    for name in tqdm([BASE, *whole], desc="Features", mininterval=10):
        kept = folder / f"{name}.pt"
        if kept.is_file():
            continue
        with torch.inference_mode(), added(base, whole.get(name)):
            found = read(base)
        torch.save(found.clone(), kept.with_suffix(".draft"))
        kept.with_suffix(".draft").replace(kept)
    return {name: torch.load(folder / f"{name}.pt") for name in [BASE, *whole]}


@contextmanager
def added(base: nn.Module, candidate: Path | None) -> Iterator[None]:
    """A context in which an adapter is added to the weights of a model; afterwards they are as before, to the bit."""
    before: dict[str, Tensor] = {}
    try:
        for name, A, B in [] if candidate is None else factors(candidate):
            weight = base.get_parameter(f"{name}.weight")
            before[name] = weight.detach().clone()
            weight.data += B @ A
        yield
    finally:
        for name, own in before.items():
            base.get_parameter(f"{name}.weight").data.copy_(own)


def factors(candidate: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """An adapter's modules, each with A and B; the scale is in B."""
    tensors = load_file(candidate / WEIGHTS)
    config = json.loads((candidate / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    for name in sorted(own for own in tensors if own.endswith(".lora_A.weight")):
        B = scale * tensors[name.replace(".lora_A.", ".lora_B.")].float()
        yield name.removeprefix(PREFIX).removesuffix(".lora_A.weight"), tensors[name].float(), B
