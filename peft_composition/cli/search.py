"""`peft-composition search`: the Hub's adapters of a base model as a table, and as a file for `select`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..choosing.candidates import write_candidates
from ..choosing.search import FoundAdapter, search_adapters
from ..terminal import print_found, print_json, say
from .outputs import require_writable


def run(base: str, out: Path | None, as_json: bool, **filters: Any) -> None:
    """Print a row for every adapter that was found."""
    require_writable([out])
    found = search_adapters(base, **filters)
    written = None
    try:
        if out is not None:
            write_candidates(out, base, found)
            written = str(out)
    finally:  # what was found is not lost if it cannot be written
        _show(found, base, written, as_json)


def _show(found: Sequence[FoundAdapter], base: str, written: str | None, as_json: bool) -> None:
    if as_json:
        rows = [{**asdict(own), "composable": own.is_composable} for own in found]
        print_json({"base": base, "adapters": rows, "out": written})
        return
    print_found(found, base)
    if written is not None:
        say(f"Candidates for select: {written}")
