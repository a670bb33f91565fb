"""Explains a composition by evidence from a few examples, and drops the adapters that it does not need."""

from .left_out import Change, LeftOutAdapter
from .prune import PruneReport, prune_adapters


__all__ = ["Change", "LeftOutAdapter", "PruneReport", "prune_adapters"]
