"""Seconds and peak memory of a selection, in this process."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_composition.choosing import select_adapters


def measure(
    base: nn.Module, candidates: Sequence[Path], rows: Sequence[Any], halving: bool, **options: Any
) -> dict[str, Any]:
    """What `select_adapters` takes.

    Args:
        base: the base model.
        candidates: folders of adapters.
        rows: the support set.
        halving: whether to drop candidates that are behind on fewer examples.
        options: of `select_adapters`.
    """
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    selection = select_adapters(base, candidates, rows, halving=halving, progress=False, **options)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "candidates": len(candidates),
        "halving": halving,
        "examples": len(rows),
        "passed": selection.passed,
        "pick": selection.ranking[0].name,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "cpu seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak MB": round(after.ru_maxrss / 1024),
        "before MB": round(before.ru_maxrss / 1024),
    }


def so_many(candidates: Sequence[Path], count: int, folder: Path) -> list[Path]:
    """Some of the candidates, of all kinds; or all and links to some, since the cost is not that of what they learned.

    Args:
        candidates: in an order that has kinds side by side.
        count: how many.
        folder: for links.
    """
    if count <= len(candidates):
        return [candidates[number * len(candidates) // count] for number in range(count)]
    links = []
    for number in range(count - len(candidates)):
        links.append(folder / f"{number:04}")
        os.symlink(candidates[number % len(candidates)].resolve(), links[-1])
    return [*candidates, *links]
