"""Progress of long work: a bar, or where the command line writes into a log file, a line every so often."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

from huggingface_hub.utils import tqdm

from .text import plural


SECONDS = 30.0  # between two lines
_are_lines = False


def say_in_lines() -> None:
    """Show lines in place of bars from now on."""
    global _are_lines
    _are_lines = True


def progress_bar(total: int, desc: str, unit: str, is_shown: bool = True) -> Any:
    """What shows progress, as a context with `update`, `reset`, `set_postfix_str` and `n` as tqdm has them.

    It is tqdm's bar, also in notebooks, unless `say_in_lines` was called; `HF_HUB_DISABLE_PROGRESS_BARS` turns it off.

    Args:
        total: how many steps there are.
        desc: what is done.
        unit: of a step.
        is_shown: whether to show it.
    """
    if is_shown and _are_lines:
        return Lines(total, desc, unit)
    return tqdm(total=total, desc=desc, unit=unit, disable=not is_shown)


class Lines:
    """Prints a line when 30 seconds have passed since the last one; what is over before prints none.

    Args:
        total: how many steps there are.
        desc: what is done.
        unit: of a step.
    """

    def __init__(self, total: int, desc: str, unit: str) -> None:
        self.total, self.n = total, 0
        self._desc, self._unit, self._postfix = desc, unit, ""
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count steps that are done."""
        self.n += n
        now = time.monotonic()
        if now - self._said >= SECONDS:
            self._said = now
            spent = now - self._started
            said = f"{self._desc}: {self.n} of {plural(self.total, self._unit)}, {tqdm.format_interval(spent)}"
            if 0 < self.n < self.total:
                said += f", about {tqdm.format_interval(spent / self.n * (self.total - self.n))} left"
            print(said + (f" ({self._postfix})" if self._postfix else ""), file=sys.stderr, flush=True)

    def reset(self, total: int | None = None) -> None:
        """Begin again to count."""
        self.total, self.n = total or self.total, 0
        self._started = time.monotonic()

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """What is done at the moment."""
        self._postfix = s

    def close(self) -> None:
        """Nothing: no line is open."""
