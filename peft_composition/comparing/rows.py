"""The examples of a comparison as rows that any split can make batches of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ..evidence.batches import Batch, Collate, all_labels, collate_of, is_batch, read_batches, require_rows
from ..text import quoted


class Rows:
    """Labelled examples.

    Args:
        data: a data set or list of rows, a `DataLoader` over one, or a list of batches whose examples have one shape.
        collate: makes a batch of rows. Default: the loader's, the rows' own (`EncodedRows`), or transformers'
            `default_data_collator`.

    Attributes:
        labels: the class of each, shape (n,); None where labels are tokens of answers.

    Raises:
        ValueError: there are no examples, or they have no labels.
    """

    def __init__(self, data: Any, collate: Collate | None) -> None:
        if isinstance(data, DataLoader):
            data, collate = data.dataset, collate or data.collate_fn
        collate = collate_of(data, collate)
        require_rows(data)
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise ValueError(
                f"data must be rows that can be split: a data set, a list, or a DataLoader over one, got "
                f"{type(data).__name__}"
            )
        self._names = tuple(getattr(getattr(data, "examples", None), "classes", ()))
        self._rows = [data[index] for index in range(len(data))]
        if collate is None and self._rows and is_batch(self._rows[0]):
            self._rows = [_row(batch, index) for batch in self._rows for index in range(len(_any(batch)))]
            collate = default_collate
        self._collate = collate
        self.labels = all_labels(read_batches(self._rows, collate, 64))

    def __len__(self) -> int:
        return len(self._rows)

    def called(self, label: int) -> str:
        """What a message calls the examples of a class; all of them where labels are tokens."""
        if self.labels is None:
            return "the data"
        return f"class {quoted(self._names[label]) if label < len(self._names) else label}"

    def batch(self, rows: Sequence[int]) -> Batch:
        """One batch of these rows."""
        return read_batches([self._rows[row] for row in rows], self._collate, len(rows))[0]

    def batches(self, rows: Tensor, batch_size: int) -> Iterator[Batch]:
        """Batches of these rows, in their order."""
        for part in rows.split(batch_size):
            yield self.batch(part.tolist())

    def subset(self, rows: Tensor) -> Rows:
        """Some of the rows."""
        part = object.__new__(Rows)
        part._rows, part._collate, part._names = [self._rows[row] for row in rows.tolist()], self._collate, self._names
        part.labels = None if self.labels is None else self.labels[rows]
        return part

    def joined(self, others: Rows) -> Rows:
        """These rows and then the others."""
        both = object.__new__(Rows)
        both._rows, both._collate, both._names = [*self._rows, *others._rows], self._collate, self._names
        if (self.labels is None) != (others.labels is None):
            raise ValueError("labels are classes in one part of the examples and tokens in the other; use one kind")
        both.labels = None
        if self.labels is not None and others.labels is not None:
            both.labels = torch.cat([self.labels, others.labels])
        return both


def _row(batch: Batch, index: int) -> Batch:
    return {key: value[index] for key, value in batch.items()}


def _any(batch: Batch) -> Any:
    return next(iter(batch.values()))
