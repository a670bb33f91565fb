"""What a classifier's head is given under each candidate: computed once for all draws, and kept on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from peft_composition.evidence.streamed import read_in_turn


BASE = "(base)"


def features(
    base: nn.Module, candidates: Sequence[Path], read: Callable[[nn.Module], Tensor], folder: Path
) -> dict[str, Tensor]:
    """By the name of the candidate; of those that can be read and scored, and of the base model.

    Args:
        base: the base model.
        candidates: their folders.
        read: computes features with the model as it is, shape (examples, width).
        folder: where they are kept. A file is read instead of computed anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in tqdm([None, *candidates], desc="Features", mininterval=10):
        name = BASE if path is None else path.name
        kept = folder / f"{name}.pt"
        if kept.is_file():
            continue
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                alone, bare = read_in_turn(base, [str(path or candidates[0])])
                with (bare if path is None else alone).switch():
                    found = read(base)
            except ValueError:  # what the library says of a broken one
                continue
        if bool(found.isfinite().all()):
            torch.save(found.clone(), kept.with_suffix(".draft"))
            kept.with_suffix(".draft").replace(kept)
    names = [BASE, *(path.name for path in candidates)]
    return {name: torch.load(folder / f"{name}.pt") for name in names if (folder / f"{name}.pt").is_file()}
