"""`peft-composition search`: the Hub's adapters of a base model as a table, and as a file for `select`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..choosing.candidates import write_candidates
from ..choosing.search import search_adapters
from ..terminal import print_found, print_json, say
from .outputs import require_writable


def run(base: str, out: Path | None, as_json: bool, **filters: Any) -> None:
    """Print a row for every adapter that was found."""
    require_writable([out])
    found = search_adapters(base, **filters)
    if out is not None:
        write_candidates(out, base, found)
    if as_json:
        rows = [{**asdict(own), "composable": own.is_composable} for own in found]
        print_json({"base": base, "adapters": rows, "out": str(out) if out else None})
        return
    print_found(found, base)
    if out is not None:
        say(f"Candidates for select: {out}")
