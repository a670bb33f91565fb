"""Chooses adapters: finds those of a base on the Hub, reads examples, and tells which of many help on them."""

from .candidates import adapters_in, read_candidates, write_candidates
from .data import LabelledData, read_data
from .encoding import EncodedRows, load_processor
from .search import FoundAdapter, search_adapters
from .select import select_adapters
from .selection import RankedAdapter, Selection


__all__ = [
    "EncodedRows",
    "FoundAdapter",
    "LabelledData",
    "RankedAdapter",
    "Selection",
    "adapters_in",
    "load_processor",
    "read_candidates",
    "read_data",
    "search_adapters",
    "select_adapters",
    "write_candidates",
]
