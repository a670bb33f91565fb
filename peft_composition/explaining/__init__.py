"""Explains a composition by evidence from a few examples, and drops the adapters that it does not need."""

from .classes import ClassTable
from .explain import explain
from .explanation import Explanation
from .findings import AdapterFacts, Tested
from .left_out import Change, LeftOutAdapter
from .prune import PruneReport, prune_adapters
from .updates import Updates


__all__ = [
    "explain",
    "Explanation",
    "AdapterFacts",
    "ClassTable",
    "Tested",
    "Updates",
    "prune_adapters",
    "PruneReport",
    "LeftOutAdapter",
    "Change",
]
