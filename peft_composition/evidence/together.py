"""What every process does on its own, and the error of one is the error of all: none waits for one that failed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from .batches import processes


_Found = TypeVar("_Found")


def together(run: Callable[[], _Found]) -> list[_Found]:
    """Run something in every process.

    Args:
        run: what this process does; it must not wait for others.

    Returns:
        What came out of it in each, by rank.

    Raises:
        Exception: what the first process that failed raised, in all of them.
    """
    if processes() == 1:
        return [run()]
    own: _Found | Exception
    try:
        own = run()
    except Exception as error:  # raised below, in all processes
        own = sendable(error)
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, own)
    for result in found:
        if isinstance(result, Exception):
            raise result
    return cast(list[_Found], found)


def sendable(error: Exception) -> Exception:
    """The error, or its text where other processes could not build it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of others does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
