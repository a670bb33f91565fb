"""What is odd about labelled examples and may be meant so: it is said and not refused."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from ..text import one_line, quoted


MOST_COMPARED = 200  # classes; comparing all pairs of names takes long
ALIKE = 0.8  # of difflib's ratio: "postive" and "positive" have 0.93


def warn_about(source: str, rows: Sequence[Any], classes: Sequence[str]) -> None:
    """Warn of rows that are there several times, and of classes that look like typing errors for others.

    Args:
        source: of the examples.
        rows: each with all that it consists of.
        classes: the name of the class of each; empty for answers.
    """
    for said in (*_copies(rows), *_misspelt(Counter(classes))):
        warnings.warn(f"{one_line(source)}: {said}", stacklevel=4)


def _copies(keys: Sequence[Any]) -> Iterator[str]:
    try:
        copies = len(keys) - len(set(keys))
    except TypeError:  # images in memory are not compared
        copies = 0
    if copies:
        yield (
            f"{copies} of {len(keys)} rows {'is a copy' if copies == 1 else 'are copies'} of others; copies count "
            "several times in evidence and intervals: drop them"
        )


def _misspelt(counts: Counter[str]) -> Iterator[str]:
    for name in sorted(counts, key=lambda own: (counts[own], own)):
        others = [other for other in counts if counts[other] > counts[name]]
        meant = next((other for other in others if _bare(other) == _bare(name)), None)
        if meant is None and counts[name] == 1 and len(counts) <= MOST_COMPARED:
            meant = _close(name, others)
        if meant is not None:
            yield (
                f"class {quoted(name)} has {counts[name]} of {sum(counts.values())} examples. If it is a typing error "
                f"for {quoted(meant)}, correct it: now they are two classes"
            )


def _bare(name: str) -> str:
    return " ".join(name.casefold().split())


def _close(name: str, others: Sequence[str]) -> str | None:
    """The other that differs by a few letters; a difference in digits or in a prefix alone ("un", "not_") is meant."""
    letters = re.sub(r"\d", "", name)
    named = {re.sub(r"\d", "", other): other for other in others}
    named = {own: other for own, other in named.items() if not own.endswith(letters) and not letters.endswith(own)}
    named.pop(letters, None)
    return next((named[found] for found in get_close_matches(letters, named, 1, ALIKE)), None)
