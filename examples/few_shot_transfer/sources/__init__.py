"""Where data come from: one module a source, each with `load(**options)`, which returns the splits of a data set.

A data set is a dict of `datasets.Dataset` by split ("train", and "validation" and "test" where it has them) with the
columns `input` (a text, or a PIL image), `label` (a `ClassLabel`), and for question answering `answer` (a text).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from datasets import Dataset


Splits = dict[str, Dataset]


def load(source: str, options: Mapping[str, Any]) -> Splits:
    """Reads a data set.

    Args:
        source: the name of a module beside this one.
        options: of its `load`.

    Raises:
        ValueError: for an unknown source, or options that it does not know.
        RuntimeError: if the data cannot be had; the message says what to do.
    """
    try:
        module = importlib.import_module(f"{__name__}.{source}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{source}":
            raise
        raise ValueError(f"no source {source!r} in {__name__}") from error
    try:
        splits: Splits = module.load(**options)
    except TypeError as error:
        raise ValueError(f"source {source!r}: {error}") from error
    return splits
