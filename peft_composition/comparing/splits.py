"""Stratified splits of the examples: repeated cross-fitting, where each example is left out once in every repeat."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..text import plural


Called = Callable[[int], str]
"""What a message calls the examples of a class."""


def _by_number(label: int) -> str:
    return f"class {label}"


def cross_fit(labels: Tensor, folds: int, repeats: int, seed: int, called: Called = _by_number) -> list[Tensor]:
    """Number the fold in which each example is left out, for every repeat.

    Each class is dealt out to the folds in random order, starting at the fold where the last class ended, so that
    folds are of nearly equal size and the classes are spread evenly. A class of one example would be missing when it
    is left out.

    Args:
        labels: classes, shape (n,).
        folds: at most how many; there are no more than the smallest class has examples.
        repeats: how often.
        seed: of the order.
        called: for messages.

    Returns:
        For every repeat the number of each example's fold, shape (n,).

    Raises:
        ValueError: fewer than two folds are asked for, or a class has only one example.
    """
    classes, counts = labels.unique(return_counts=True)
    if folds < 2 or int(counts.min()) < 2:
        small = int(classes[counts.argmin()])
        raise ValueError(
            f"cross-fitting needs 2 folds or more and 2 examples of every class, got folds={folds}, and "
            f"{called(small)} has {plural(int(counts.min()), 'example')}; give more examples, or test=..."
        )
    folds = min(folds, int(counts.min()))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(repeats):
        of_example = torch.zeros(len(labels), dtype=torch.int64)
        start = 0
        for each in classes:
            rows = (labels == each).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)]
            of_example[rows] = (start + torch.arange(len(rows))) % folds
            start += len(rows)
        found.append(of_example)
    return found


def draw_per_class(labels: Tensor, k: int, seed: int, called: Called = _by_number) -> Tensor:
    """Draw K examples of each class.

    Args:
        labels: classes, shape (n,).
        k: how many of each.
        seed: of the draw. Draws of one seed are nested: that of a smaller K is within it.
        called: for messages.

    Returns:
        Their rows, in order.

    Raises:
        ValueError: a class has fewer.
    """
    rows = []
    for each in labels.unique():
        own = (labels == each).nonzero().flatten()
        if len(own) < k:
            raise ValueError(f"k={k}, but {called(int(each))} has only {plural(len(own), 'example')}")
        generator = torch.Generator().manual_seed(1000 * seed + int(each))
        rows.append(own[torch.randperm(len(own), generator=generator)[:k]])
    return torch.cat(rows).sort().values
