"""Errors from reading upstream adapters."""

from __future__ import annotations

from ..text import LONG, one_line, quoted


class AdapterError(ValueError):
    """An upstream adapter cannot be composed; the message names the adapter, the module and the values.

    Attributes:
        adapter_name: name of the adapter in the composition.
        reason: the message without that name, in one line.
    """

    def __init__(self, name: str, reason: str) -> None:
        reason = one_line(reason, LONG)  # whatever it quotes
        super().__init__(f"adapter {quoted(name)}: {reason}")
        self.adapter_name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[AdapterError], tuple[str, str]]:
        return type(self), (self.adapter_name, self.reason)


class NotCachedError(AdapterError):
    """The Hub cannot be asked, and the cache does not have the file."""
