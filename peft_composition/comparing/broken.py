"""Adapters that cannot be composed or scored: each is a name with a reason, and the others are composed without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..evidence.passes import Composition
from ..evidence.scores import NotFiniteError
from ..references import AdapterReference
from ..text import LONG, one_line, plural, quoted
from ..upstream.errors import AdapterError
from .bodies import composed


@dataclass(frozen=True)
class BrokenAdapter:
    """An adapter that a comparison goes on without.

    Attributes:
        adapter: its name.
        reason: why it is left out.
    """

    adapter: str
    reason: str


class NotFiniteAdapterError(NotFiniteError):
    """The scores of one adapter are NaN or infinite."""

    def __init__(self, adapter: BrokenAdapter) -> None:
        super().__init__(f"Scoring {quoted(adapter.adapter)}: {adapter.reason}")
        self.adapter = adapter


@contextmanager
def composed_of_good(
    base: nn.Module, references: Sequence[AdapterReference], broken: list[BrokenAdapter]
) -> Iterator[Composition]:
    """A context with a learned composition of the adapters that can be composed; afterwards the base is as before.

    All are composed at once; only if that fails, each is tried alone.

    Args:
        base: a model without adapters.
        references: the adapters.
        broken: those that are known to be broken; others that are found are added.

    Raises:
        ValueError: none can be composed.
    """
    with ExitStack() as stack:
        good = _without(references, broken)
        try:
            composition = stack.enter_context(composed(base, good))
        except _OF_THE_MACHINE:
            raise
        except Exception:
            found = [own for own in (_alone(base, reference) for reference in good) if own is not None]
            if not found:  # each alone can be composed
                raise
            broken += found
            composition = stack.enter_context(composed(base, _without(references, broken)))
        yield composition


_OF_THE_MACHINE = (torch.OutOfMemoryError, MemoryError)


def _without(references: Sequence[AdapterReference], broken: Sequence[BrokenAdapter]) -> list[AdapterReference]:
    names = {own.adapter for own in broken}
    good = [reference for reference in references if reference["name"] not in names]
    if not good:
        raise ValueError(_none(references, broken))
    return good


def _alone(base: nn.Module, reference: AdapterReference) -> BrokenAdapter | None:
    """The adapter with its reason, if it cannot be composed alone."""
    try:
        with composed(base, [reference]):
            return None
    except _OF_THE_MACHINE:
        raise
    except AdapterError as error:
        return BrokenAdapter(reference["name"], error.reason)
    except Exception as error:  # whatever a file that others made can cause
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return BrokenAdapter(reference["name"], one_line(f"{kind}{error}", LONG))


def _none(references: Sequence[AdapterReference], broken: Sequence[BrokenAdapter]) -> str:
    first = broken[0]
    return (
        f"none of {plural(len(references), 'adapter')} can be composed and scored; of {quoted(first.adapter)}: "
        f"{first.reason}"
    )
