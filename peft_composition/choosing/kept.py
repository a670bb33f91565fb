"""What candidates put out on earlier rungs, so that they run over the new examples alone; within a bound of memory."""

from __future__ import annotations

from ..evidence.passes import Outputs


MOST_BYTES = 1 << 26


class KeptOutputs:
    """The outputs of the candidates with the best scores, as many as fit into some bytes.

    Args:
        most: bytes.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._bytes = 0
        self._found: dict[int, tuple[float, Outputs]] = {}

    def put(self, number: int, score: float, outputs: Outputs) -> None:
        """Keep a candidate's outputs in place of earlier ones; where room ends, the worst ones go."""
        self.take(number)
        self._found[number] = score, outputs
        self._bytes += _size(outputs)
        while self._bytes > self._most:
            self.take(min(self._found, key=lambda own: self._found[own][0]))

    def take(self, number: int) -> Outputs | None:
        """A candidate's outputs, which are not kept any longer; None without any."""
        _, outputs = self._found.pop(number, (0.0, None))
        if outputs is not None:
            self._bytes -= _size(outputs)
        return outputs

    def drop_others(self, numbers: set[int]) -> None:
        """Keep those of some candidates alone."""
        for number in self._found.keys() - numbers:
            self.take(number)


def _size(outputs: Outputs) -> int:
    return sum(part.nbytes for part in outputs.found)
