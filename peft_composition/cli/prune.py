"""`peft-composition prune`: a saved composition without the adapters that it does not need, in a new folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..explaining import PruneReport, prune_adapters
from ..terminal import print_json, say
from .labelled import is_first
from .outputs import require_writable
from .saved import load


def run(
    folder: Path,
    out: Path,
    data: str,
    columns: Mapping[str, Any],
    *,
    tolerance: float,
    k: int | None,
    base: str | None,
    task: str | None,
    batch_size: int,
    seed: int,
    as_json: bool,
) -> None:
    """Prune, save what is left, and print what leaving each out costs; with several processes, the first one does."""
    prints = is_first()
    if prints:
        require_writable([out / "adapter_config.json"])
    loaded = load(folder, data, columns, k=k, seed=seed, base=base, task=task)
    report = prune_adapters(
        loaded.model,
        loaded.rows,
        tolerance=tolerance,
        collate=loaded.rows.collate,
        batch_size=batch_size,
        seed=seed,
        progress=True,
    )
    if not prints:
        return
    written = None
    try:
        loaded.model.save_pretrained(str(out))
        written = str(out)
    finally:  # what was found is not lost if it cannot be saved
        _show(report, written, as_json)


def _show(report: PruneReport, written: str | None, as_json: bool) -> None:
    if as_json:
        print_json({"out": written, **asdict(report)})
        return
    print(report)
    if written is not None:
        say(f"Saved: {written}")
