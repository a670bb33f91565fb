"""Checks and scales mixing weights that users give for a composition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .scalars import LARGEST_FLOAT32, as_float, as_list, as_text
from .text import plural


# Hand-written weights such as [0.333, 0.333, 0.333] are meant to sum to 1.
SUM_TOLERANCE = 2e-3


def checked_weights(weights: Any, names: Sequence[str], normalization: str) -> list[float]:
    """Weights as floats; for softmax they sum to exactly 1, or to less if they leave a share to the base model.

    Args:
        weights: the given weights, one per adapter.
        names: the names of the adapters.
        normalization: `"softmax"` or `"none"`.

    Raises:
        ValueError: they are not a list of valid weights; the message names the adapter and the value.
    """
    given = as_list(weights)
    if given is None:
        raise ValueError(f"weights must be a list of numbers, got {weights!r}")
    if len(given) != len(names):
        raise ValueError(
            f"weights has {plural(len(given), 'entry', 'entries')} for {plural(len(names), 'adapter')} "
            f"({', '.join(names)})"
        )
    found = []
    for name, entry in zip(names, given):
        weight = as_float(entry)
        if weight is None or not math.isfinite(weight):
            raise ValueError(f"weights: the weight of adapter {name!r} must be a finite number, got {as_text(entry)}")
        if abs(weight) > LARGEST_FLOAT32:
            raise ValueError(
                f"weights: the weight of adapter {name!r} is {as_text(entry)}; weights are stored in float32, "
                f"which ends at {LARGEST_FLOAT32:.2g}"
            )
        found.append(weight)
        if normalization == "softmax" and weight < 0:
            raise ValueError(
                f'the weight of adapter {name!r} is {weight}; normalization="softmax" needs non-negative weights, '
                'use normalization="none" for free weights'
            )
    if normalization == "none":
        return found
    total = math.fsum(found)
    if total > 1 + SUM_TOLERANCE:
        raise ValueError(
            f'weights sum to {total:g}; normalization="softmax" keeps their sum at 1 (or below: the rest is the base '
            'model\'s), use normalization="none" for free weights'
        )
    if total == 0:
        raise ValueError(
            'all weights are zero; normalization="softmax" mixes nothing then, and nothing could be learned. Give one '
            "of the adapters a weight"
        )
    if total < 1 - SUM_TOLERANCE:
        return found
    # Dividing again leaves them unchanged, however often they are saved and loaded.
    return found if math.isclose(total, 1, rel_tol=1e-12) else [weight / total for weight in found]
