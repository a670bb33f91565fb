"""Lines of other libraries that say nothing to those who run a command are hidden; everything else is shown.

What is said at every step is shown once. Of progress bars a log file would get every state: where stderr is no
terminal, bars are off, and long commands say in lines how far they are, unless the user has decided about bars.
"""

from __future__ import annotations

import logging
import os
import sys


# By the logger, how such lines begin: of programmers' affairs within these libraries, whatever the user does.
NOISE = {
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported by torch.compile",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}


ONCE = ("bitsandbytes.autograd._functions",)
"""Loggers that say the same at every matrix product."""


says_lines = False
"""Whether commands show lines in place of bars; the package is told when it is loaded."""


def hide() -> None:
    """Hide such lines from now on, before the libraries are loaded; the program calls it once."""
    global says_lines
    for name, beginning in NOISE.items():
        logging.getLogger(name).addFilter(_Without(beginning))
    for name in ONCE:
        logging.getLogger(name).addFilter(_Once())
    if not sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        says_lines = True


class _Without(logging.Filter):
    """Leaves out messages that begin so."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it begins otherwise."""
        return not str(record.msg).startswith(self._beginning)


class _Once(logging.Filter):
    """Lets each message through once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is new."""
        said = record.getMessage()
        is_new = said not in self._seen
        self._seen.add(said)
        return is_new
