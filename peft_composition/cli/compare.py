"""`peft-composition compare`: reads base, adapters and examples, compares methods, and prints the verdict."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.base_models import base_config
from ..choosing import EncodedRows, load_processor, read_candidates, read_data
from ..comparing import compare_methods, plot_comparison
from ..comparing.methods import FRESH, LEARNED, METHODS
from ..config import CompositionConfig
from ..references import AdapterReference
from ..terminal import print_comparison, print_json, say
from ..text import one_line, plural
from .inputs import references_of, task_and_loader
from .labelled import expanded, task_of
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
    config = base_config(base)
    wanted = task or task_of(examples, bool(getattr(config, "is_encoder_decoder", False)))
    task, loader = task_and_loader(references, wanted, config, check_base=True, is_strict=True)
    if loader.is_classifier != (examples.kind != "answer"):
        needs = "--label" if loader.is_classifier else "--prompt and --answer"
        raise ValueError(f"{base} is loaded as a {loader.builds.__name__}, which needs {needs}; give them, or --task")
    model, _ = loader.from_pretrained(
        base, num_labels=len(examples.classes) if loader.is_classifier else None, is_reported=False
    )
    processor = load_processor(base, examples.kind)
    is_seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    rows = EncodedRows(examples, processor, is_seq2seq)
    if not as_json:
        say(f"{plural(len(references), 'adapter')}, {plural(len(examples), 'example')} of {one_line(data)}")
    result = compare_methods(
        model,
        references,
        rows,
        test=None if tests is None else EncodedRows(tests, processor, is_seq2seq),
        collate=rows.collate,
        methods=[name for name in METHODS if not (fast and name in (FRESH, LEARNED))],
        progress=sys.stderr.isatty(),
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
