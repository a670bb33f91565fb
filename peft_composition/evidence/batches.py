"""Reads the K examples as batches from a DataLoader, a data set or a list, equal in every process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from ..text import one_line, quoted, shown


Batch = dict[str, Any]
Collate = Callable[[list[Any]], Mapping[str, Any]]
LABELS = ("labels", "label")


def read_batches(data: Any, collate: Collate | None, batch_size: int) -> list[Batch]:
    """All batches, read once, so that every candidate gets the same examples in the same order.

    Args:
        data: a `DataLoader`; an iterable of batches; or a data set or list of rows.
        collate: turns rows into a batch. Default: the rows' own, or transformers' `default_data_collator`.
        batch_size: the batch size for rows.

    Returns:
        Batches with a tensor under `"labels"`; all processes get those of the first process.

    Raises:
        ValueError: there is no batch, a batch is not a mapping or has no labels, or the loader splits the examples
            over processes.
    """
    if processes() == 1:
        return _read(data, collate, batch_size)
    shared: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            shared = [_read(data, collate, batch_size)]
        except Exception as error:  # the other processes must not wait forever
            shared = [error]
    dist.broadcast_object_list(shared, src=0)
    if isinstance(shared[0], Exception):
        raise shared[0]
    return shared[0]


def processes() -> int:
    """The number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if processes() > 1 else 0


def inputs_on(batch: Batch, model: nn.Module, with_labels: bool) -> Batch:
    """The model's inputs, on its device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if with_labels or key != "labels"
    }


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether answers are what a decoder says of an encoder's input, and not what follows it."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _read(data: Any, collate: Collate | None, batch_size: int) -> list[Batch]:
    if isinstance(data, DataLoader) and processes() > 1:
        is_prepared = type(data) is not DataLoader  # by accelerate, which gives each process a part
        if is_prepared or isinstance(data.sampler, DistributedSampler):
            raise ValueError(
                f"This {type(data).__name__} gives each process a part of the examples, but processes share "
                "candidates, not examples. Pass the data set, or the DataLoader before accelerate prepared it."
            )
    batches = [_checked(batch) for batch in _batches(data, collate, batch_size)]
    if not batches:
        raise ValueError("there are no examples to score adapters on")
    return batches


def collate_of(data: Any, given: Collate | None) -> Collate | None:
    """What makes batches of rows: what is given, or what the rows bring along, as `EncodedRows` do; or None."""
    return given or getattr(data, "collate", None)


def require_rows(data: Any) -> None:
    """Refuse what is neither rows nor batches.

    Raises:
        ValueError: it is a path, a single row or batch, or examples that are not encoded.
    """
    if isinstance(data, Mapping):
        raise ValueError(
            f"data must be batches or rows, got a single mapping of {one_line(list(data))}; put it in a list"
        )
    is_path = isinstance(data, (str, os.PathLike))
    if hasattr(data, "itertuples"):  # a pandas frame, whose columns are no rows
        raise ValueError(
            f"data must be batches or rows as the model takes them, got a {type(data).__name__}. read_data of "
            "peft_composition.choosing reads it: EncodedRows(read_data(frame, ...), load_processor(...))"
        )
    if is_path or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        got = shown(data) if is_path else f"a {type(data).__name__}"
        raise ValueError(
            f"data must be batches or rows as the model takes them, got {got}. Use read_data and EncodedRows of "
            "peft_composition.choosing: EncodedRows(read_data(...), load_processor(...))"
        )


def _batches(data: Any, collate: Collate | None, batch_size: int) -> Iterable[Any]:
    require_rows(data)
    if isinstance(data, DataLoader) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        return data
    collate = collate_of(data, collate)
    if collate is None and (not len(data) or is_batch(data[0])):
        return data
    rows = [for_the_model(data[index]) for index in range(len(data))]
    if collate is None:
        from transformers import default_data_collator

        _require_equal_lengths(rows)
        collate = default_data_collator if isinstance(rows[0], Mapping) else default_collate
    return [collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def for_the_model(row: Any) -> Any:
    """A row without its texts, which no model takes; a Trainer leaves such columns out, too."""
    if not isinstance(row, Mapping):
        return row
    label = _labels(row)
    if isinstance(label, str):
        raise ValueError(
            f"labels must be whole numbers from 0, one for each class, got {quoted(label)}. Number the classes, or "
            "read the data by read_data of peft_composition.choosing, with EncodedRows"
        )
    return {key: value for key, value in row.items() if not isinstance(value, str)}


def _require_equal_lengths(rows: Sequence[Any]) -> None:
    """Refuse rows that only a collator which pads could stack."""
    lengths: dict[str, int] = {}
    for number, row in enumerate(rows):
        for key, value in row.items() if isinstance(row, Mapping) else ():
            is_several = isinstance(value, (list, tuple)) or getattr(value, "ndim", None)
            length = len(value) if is_several else None
            if length is not None and lengths.setdefault(key, length) != length:
                raise ValueError(
                    f"The rows have different lengths: {one_line(key)} has {lengths[key]} entries in row 0 and "
                    f"{length} in row {number}. Give a collator that pads: collate=DataCollatorWithPadding(tokenizer) "
                    "for classes, collate=DataCollatorForSeq2Seq(tokenizer) for answers, which pads labels with -100."
                )


def is_batch(first: Any) -> bool:
    """Whether an entry of a list is a batch and not a row, judged by its labels and its input ids.

    One-dimensional labels are the classes of a batch, or the tokens of one row; for a row the input ids are
    one-dimensional, too.
    """
    labels = _labels(first) if isinstance(first, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        return False
    ids = first.get("input_ids")
    return labels.dim() > 1 or not isinstance(ids, Tensor) or ids.dim() > 1


def _checked(batch: Any) -> Batch:
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch must be a mapping of the model's arguments, got {type(batch).__name__}")
    labels = _labels(batch)
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"a batch must have a tensor of labels under 'labels', got {type(labels).__name__}; it has "
            f"{one_line(sorted(map(str, batch)))}"
        )
    if labels.is_floating_point() or labels.dim() not in (1, 2) or not labels.numel():
        raise ValueError(
            "labels must be whole numbers: one class for each example, shape (examples,), or the tokens of its "
            f"answer, shape (examples, positions); got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return {**{key: value for key, value in batch.items() if key not in LABELS}, "labels": labels}


def _labels(batch: Mapping[str, Any]) -> Any:
    return next((batch[key] for key in LABELS if key in batch), None)


def all_labels(batches: Sequence[Batch]) -> Tensor | None:
    """The class of every example, shape (n,); None if the labels are tokens."""
    dims = {batch["labels"].dim() for batch in batches}
    if dims == {1}:
        return torch.cat([batch["labels"].cpu() for batch in batches])
    if dims == {2}:
        return None
    raise ValueError("some batches have one label per example, others several; use one kind")
