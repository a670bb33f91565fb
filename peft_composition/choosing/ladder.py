"""The rungs of sequential halving: the same few examples for all candidates, then more for those that are left."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..evidence.batches import LABELS, Batch, Collate, all_labels, read_batches
from ..evidence.heads import find_head
from ..evidence.passes import Examples
from ..evidence.score import require_pairs
from ..evidence.scores import require_classes


LOOK = 1  # of a class: none can be left out, but candidates can be compared
LEAST_OF_A_CLASS = 2  # so that one can be left out
MORE_OF_A_CLASS = 3  # where that is at most 15% of all
MANY_OF_A_CLASS = 20
LEAST_ANSWERS = 4
GROWTH = 3


@dataclass(frozen=True)
class Ladder:
    """The examples, by rungs.

    Attributes:
        rungs: what candidates are scored on in each; each has the examples of the one before, and the last one all.
        digest: of all examples.
        first_scored: the first rung that gives scores. Before it is one that has one example of each class.
    """

    rungs: tuple[Examples, ...]
    digest: str
    first_scored: int = 0

    @property
    def sizes(self) -> list[int]:
        """How many examples a rung has."""
        return [len(rung) for rung in self.rungs]


def ladder(
    model: nn.Module,
    data: Any,
    head: str | nn.Module | None,
    collate: Collate | None,
    batch_size: int,
    seed: int,
) -> Ladder:
    """Put examples on rungs, each three times as many as the one before or more, and all in the end.

    Of classes the first one has one example of each, the second two, or of 20: three. Of answers the first has four.

    Args:
        model: that is scored.
        data: the examples, as for `score_adapters`.
        head: as for `score_adapters`.
        collate: as for `score_adapters`.
        batch_size: as for `score_adapters`.
        seed: of the order within a class.
    """
    kinds = _kinds_of_rows(data, collate)
    if kinds is not None:
        levels = _levels(kinds, seed)
        parts = [
            read_batches([data[row] for row in rows], collate, batch_size) for rows in _by_level(levels) if len(rows)
        ]
    else:
        batches = read_batches(data, collate, batch_size)
        labels = all_labels(batches)
        levels = _levels(
            [None] * sum(len(own["labels"]) for own in batches) if labels is None else labels.tolist(), seed
        )
        parts = [_sliced(batches, rows) for rows in _by_level(levels) if len(rows)]
    whole = [batch for part in parts for batch in part]
    labels = all_labels(whole)
    if labels is not None:
        require_classes(labels)  # while the number is that of all examples
        require_pairs(labels)
    found = None if labels is None else find_head(model, head)
    rungs = []
    for end in range(1, len(parts) + 1):
        own = [batch for part in parts[:end] for batch in part]
        rungs.append(Examples(own, None if labels is None else all_labels(own), found))
    return Ladder(tuple(rungs), _digest(whole), 0 if labels is None else 1)


def _kinds_of_rows(data: Any, collate: Collate | None) -> list[int | None] | None:
    """The class of every row, None for an answer; None if `data` has batches, or rows that do not tell."""
    if isinstance(data, (DataLoader, Mapping)) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        return None
    kinds: list[int | None] = []
    for number in range(len(data)):
        row = data[number]
        label = next((row[key] for key in LABELS if key in row), None) if isinstance(row, Mapping) else None
        if isinstance(label, Tensor) and label.dim() == 0:
            label = int(label)
        if isinstance(label, int):
            kinds.append(label)
        elif collate is not None and isinstance(label, (list, Tensor)):
            kinds.append(None)
        else:
            return None
    return kinds or None


def _levels(kinds: Sequence[int | None], seed: int) -> list[int]:
    """The rung of every example, from 0."""
    order = list(range(len(kinds)))
    random.Random(seed).shuffle(order)
    counts: dict[int | None, int] = {}
    place = [0] * len(kinds)
    for row in order:
        place[row] = counts.get(kinds[row], 0)
        counts[kinds[row]] = place[row] + 1
    most = max(counts.values(), default=0)
    size = LEAST_OF_A_CLASS if most < MANY_OF_A_CLASS else MORE_OF_A_CLASS
    ends = [LEAST_ANSWERS] if None in counts else [LOOK, size]
    while ends[-1] < most:
        following = ends[-1] * GROWTH
        ends.append(following if 2 * following <= most else most)  # no rung that is nearly the next one
    return [next(level for level, end in enumerate(ends) if own < end) for own in place]


def _by_level(levels: Sequence[int]) -> list[list[int]]:
    return [[row for row, own in enumerate(levels) if own == level] for level in range(max(levels, default=0) + 1)]


def _sliced(batches: Sequence[Batch], rows: Sequence[int]) -> list[Batch]:
    """Some examples of batches; those of one batch stay together."""
    found, start, wanted = [], 0, set(rows)
    for batch in batches:
        count = len(batch["labels"])
        own = [row - start for row in range(start, start + count) if row in wanted]
        start += count
        if own:
            index = torch.tensor(own)
            found.append(
                {
                    key: value[index.to(value.device)]
                    if isinstance(value, Tensor) and value.dim() and len(value) == count
                    else value
                    for key, value in batch.items()
                }
            )
    return found


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            digest.update(key.encode())
            value = batch[key]
            if isinstance(value, Tensor):
                own = value.detach().cpu().contiguous()
                digest.update(f"{own.dtype} {tuple(own.shape)}".encode())
                digest.update(own.view(torch.uint8).numpy().tobytes() if own.dim() else str(own.item()).encode())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()
