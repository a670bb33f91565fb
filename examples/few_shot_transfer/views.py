"""Two views of one example, which stand for two examples where a class has one: halves of a text, an image moved."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import Tensor


VIEWS = ("first view", "second view")
PARTS_OF_A_SIDE = 14  # an image is moved by one of them


def view(rows: Dataset, number: int) -> Any:
    """One view of every row.

    Args:
        rows: encoded, of texts or of images.
        number: 0 or 1.

    Returns:
        As many rows, in their order.
    """
    if "input_ids" not in rows.column_names:
        encoded = (rows[place] for place in range(len(rows)))
        return [{**row, "pixel_values": moved(row["pixel_values"], number)} for row in encoded]
    ids = [half(tokens, number) for tokens in rows["input_ids"][:]]
    masks = [[1] * len(tokens) for tokens in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": rows["labels"][:]})


def half(tokens: list[int], number: int) -> list[int]:
    """The first (0) or second (1) half of a text between its special tokens; of an odd number the first has one more.

    A single token cannot be halved: then both are the whole.
    """
    first, body, last = tokens[:1], tokens[1:-1], tokens[-1:]
    if len(body) < 2:
        return tokens
    middle = -(-len(body) // 2)
    return first + (body[:middle] if number == 0 else body[middle:]) + last


def moved(pixels: Tensor, number: int) -> Tensor:
    """The image moved to the lower right (0) or the upper left (1); what leaves at one side comes back at the other.

    Args:
        pixels: shape (..., height, width).
        number: 0 or 1.
    """
    step = max(1, pixels.shape[-2] // PARTS_OF_A_SIDE) * (1 if number == 0 else -1)
    return pixels.roll((step, step), (-2, -1))
