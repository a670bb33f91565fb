"""`peft-composition compare`: reads base, adapters and examples, compares methods, and prints the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..choosing import read_candidates, read_data
from ..comparing import compare_methods, plot_comparison
from ..comparing.methods import FRESH, LEARNED, METHODS
from ..config import CompositionConfig
from ..references import AdapterReference
from ..terminal import print_comparison, print_json, say
from ..text import one_line, plural
from .inputs import references_of
from .labelled import expanded, load_task
from .outputs import require_writable


def run(
    base: str,
    adapters: list[str] | Path | None,
    data: str,
    columns: Mapping[str, Any],
    *,
    test: str | None,
    task: str | None,
    png: Path | None,
    as_json: bool,
    fast: bool,
    seed: int,
    **options: Any,
) -> None:
    """Compare, print the table and the verdict, and plot them if a file is given."""
    require_writable([png])
    references = _references(adapters)
    examples = read_data(data, **columns)
    tests = None if test is None else read_data(test, **columns, classes=examples.classes or None)
    loaded = load_task(base, examples, references, task)
    rows = loaded.rows
    if not as_json:
        say(f"{plural(len(references), 'adapter')}, {plural(len(examples), 'example')} of {one_line(data)}")
    result = compare_methods(
        loaded.base,
        references,
        rows,
        test=None if tests is None else rows.encoded_alike(tests),
        collate=rows.collate,
        methods=[name for name in METHODS if not (fast and name in (FRESH, LEARNED))],
        progress=True,
        seed=seed,
        **options,
    )
    if as_json:
        print_json(result.as_json())
    else:
        print_comparison(result)
    if png is None:
        return
    png.parent.mkdir(parents=True, exist_ok=True)
    plot_comparison(result).savefig(png, dpi=150)
    if not as_json:
        say(f"Plot: {png}")


def _references(adapters: list[str] | Path | None) -> list[AdapterReference]:
    if isinstance(adapters, Path):
        return CompositionConfig(adapters=read_candidates(adapters)).references
    return references_of(expanded(adapters or []))
