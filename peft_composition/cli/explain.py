"""`peft-composition explain`: a report about a saved composition, from a few labelled examples."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..explaining import Explanation, explain
from ..terminal import print_json, say
from ..text import one_line
from .labelled import is_first
from .outputs import require_writable
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
    """Explain, print the main things, and write the report; with several processes, the first one does."""
    prints = is_first()
    if prints:
        require_writable([*out, folder / "README.md" if is_beside else None])
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
        progress=True,
    )
    if not prints:
        return
    written: list[str] = []
    beside = None
    try:
        for path in out:
            written.append(str(explanation.save(path)))
        if is_beside:
            explanation.save_beside(folder)
            beside = str(folder)
    finally:  # what was found is not lost if it cannot be written
        _show(explanation, written, beside, as_json)


def _show(explanation: Explanation, written: list[str], beside: str | None, as_json: bool) -> None:
    if as_json:
        print_json({**explanation.to_dict(), "out": written, "beside": beside})
        return
    print(explanation)
    for path in written:
        say(f"Report: {path}")
    if beside is not None:
        say(f"Report and card: {beside}")
