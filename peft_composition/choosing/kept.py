"""What candidates put out on earlier rungs, and their own heads: neither is done again, within a bound of memory."""

from __future__ import annotations

from typing import NamedTuple

from ..evidence.own_heads import OwnHead
from ..evidence.passes import Outputs


MOST_BYTES = 1 << 26


class Kept(NamedTuple):
    """Of one candidate.

    Attributes:
        outputs: on the examples that it passed.
        head: that it was saved with, None without one.
    """

    outputs: Outputs
    head: OwnHead | None = None


class KeptOutputs:
    """The outputs and heads of the candidates with the best scores, as many as fit into some bytes.

    Args:
        most: bytes.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._bytes = 0
        self._found: dict[int, tuple[float, Kept]] = {}

    def put(self, number: int, score: float, kept: Kept) -> None:
        """Keep a candidate's outputs in place of earlier ones; where room ends, the worst ones go."""
        self.take(number)
        self._found[number] = score, kept
        self._bytes += _size(kept)
        while self._bytes > self._most:
            self.take(min(self._found, key=lambda own: self._found[own][0]))

    def take(self, number: int) -> Kept | None:
        """What is kept of a candidate, and is not any longer; None without anything."""
        _, kept = self._found.pop(number, (0.0, None))
        if kept is not None:
            self._bytes -= _size(kept)
        return kept

    def drop_others(self, numbers: set[int]) -> None:
        """Keep those of some candidates alone."""
        for number in self._found.keys() - numbers:
            self.take(number)


def _size(kept: Kept) -> int:
    return sum(part.nbytes for part in (*kept.outputs.found, *(kept.head or {}).values()))
