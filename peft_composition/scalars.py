"""Numbers that users write: of Python, NumPy and PyTorch, read as floats and shown in messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any


LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127
SMALLEST_FLOAT32 = 2.0**-126  # smaller ones lose digits, and hardware that flushes them takes them for 0


def as_float(value: object) -> float | None:
    """A real number as a float, infinite where it is too large for one; None for what is no number.

    Args:
        value: a number, a scalar of NumPy, or a tensor or array without dimensions. A bool is no number.
    """
    plain = _plain(value)
    if not isinstance(plain, Real) or isinstance(plain, bool):
        return None
    try:
        return float(plain)
    except OverflowError:
        return math.inf if abs(plain) == plain else -math.inf


def as_list(values: object) -> list[Any] | None:
    """The entries of a sequence, or of an array or tensor of one dimension; None for anything else."""
    plain = _plain(values)
    return list(plain) if isinstance(plain, Sequence) and not isinstance(plain, (str, bytes)) else None


def as_text(value: object) -> str:
    """A value for a message, in one short piece: an integer of thousands of digits by the number of its digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"an integer of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    return repr(value)


def _plain(value: object) -> object:
    """What NumPy and PyTorch make of their scalars, arrays and tensors for Python."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value
