"""Figures as text, the same on the screen and in the report."""

from __future__ import annotations

from .results import Measurement, Summary


def seconds(value: float) -> str:
    """Seconds in the unit that suits them, with three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{_three_digits(value / 1e-6)} µs"


def ratio(summary: Summary) -> str:
    """Median and quartiles of a ratio."""
    return f"{factor(summary.median)} ({factor(summary.low)}-{factor(summary.high)})"


def size(count: int) -> str:
    """Bytes in decimal gigabytes or megabytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{_three_digits(count / 1e6)} MB"


def relative(count: int, reference: int) -> str:
    """Bytes over bytes."""
    return factor(count / reference) if reference else "-"


def factor(value: float) -> str:
    """A ratio with two decimals; three digits are enough for a large one."""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def time(entry: Measurement, reference: Measurement) -> str:
    """Ratio to the reference with quartiles, and seconds."""
    if entry.seconds is None or entry.ratio is None:
        return ""
    own = seconds(entry.seconds.median)
    return own if entry is reference else f"{ratio(entry.ratio)}, {own}"


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"
