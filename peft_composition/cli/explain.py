"""`peft-composition explain`: a report about a saved composition, from a few labelled examples."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..explaining import explain
from ..terminal import print_json, say
from ..text import one_line
from .saved import load, typed


def run(
    folder: Path,
    data: str,
    columns: Mapping[str, Any],
    *,
    out: Sequence[Path],
    is_beside: bool,
    test: str | None,
    k: int | None,
    base: str | None,
    task: str | None,
    batch_size: int,
    seed: int,
    as_json: bool,
) -> None:
    """Explain, print the main things, and write the report into files and beside the composition."""
    loaded = load(folder, data, columns, k=k, seed=seed, base=base, task=task, test=test)
    options = {"data": data, **columns, "test": test, "k": k, "base": base, "task": task, "seed": seed or None}
    if options.get("split") == "train":
        del options["split"]
    explanation = explain(
        loaded.model,
        loaded.rows,
        test=loaded.test,
        labels=loaded.rows.examples.classes or None,
        title=f"What {one_line(folder.resolve().name)} is made of",
        data_name=Path(data).name if Path(data).exists() else data,
        command=shlex.join(typed("explain", folder, options)),
        collate=loaded.rows.collate,
        batch_size=batch_size,
        seed=seed,
    )
    written = [str(explanation.save(path)) for path in out]
    if is_beside:
        explanation.save_beside(folder)
    if as_json:
        print_json({**explanation.to_dict(), "out": written, "beside": str(folder) if is_beside else None})
        return
    print(explanation)
    for path in written:
        say(f"Report: {path}")
    if is_beside:
        say(f"Report and card: {folder}")
