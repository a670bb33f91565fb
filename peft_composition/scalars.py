"""Reads numbers that users give, from Python, NumPy or PyTorch, and shows them in messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any


LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127
SMALLEST_FLOAT32 = 2.0**-126  # smaller ones lose digits, and some hardware flushes them to 0


def as_float(value: object) -> float | None:
    """A real number as a float (infinity if it is too large), or None if the value is not a number.

    Args:
        value: a number, a NumPy scalar, or a tensor or array without dimensions. A bool is not a number.
    """
    plain = _plain(value)
    if not isinstance(plain, Real) or isinstance(plain, bool):
        return None
    try:
        return float(plain)
    except OverflowError:
        return math.inf if abs(plain) == plain else -math.inf


def as_list(values: object) -> list[Any] | None:
    """The entries of a sequence, or of a one-dimensional array or tensor; None for anything else."""
    plain = _plain(values)
    return list(plain) if isinstance(plain, Sequence) and not isinstance(plain, (str, bytes)) else None


def as_text(value: object) -> str:
    """A value for a message, kept short: for an integer of thousands of digits, the number of its digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"an integer of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    return repr(value)


def _plain(value: object) -> object:
    """Scalars, arrays and tensors of NumPy and PyTorch as Python numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value
