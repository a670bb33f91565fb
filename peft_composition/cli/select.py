"""`peft-composition select`: which of many adapters help on labelled examples, and the command that composes them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_composition_cli.words import spoken

from ..choosing import Selection, read_candidates, read_data, search_adapters, select_adapters
from ..drafts import write_whole
from ..references import location_of
from ..terminal import print_json, say
from .inputs import references_of
from .labelled import expanded, is_first, load_task
from .outputs import require_writable


def run(
    base: str,
    adapters: Sequence[str],
    candidates: Path | None,
    is_searched: bool,
    data: str,
    columns: dict[str, Any],
    *,
    k: int | None,
    seed: int,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Print what was chosen; with several processes, the first one prints."""
    prints = is_first()
    if prints:
        require_writable([out])
    found: list[Any] = [*references_of(expanded(adapters))] if adapters else []
    if candidates is not None:
        found += read_candidates(candidates)
    examples = read_data(data, **columns)
    if k is not None:
        examples, _ = examples.draw(k, seed)
    if is_searched:
        found += [{"path": own.id, "revision": own.commit} for own in search_adapters(base) if own.is_composable]
    task = load_task(base, examples)
    selection = select_adapters(task.base, found, task.rows, task_type=task.type, seed=seed, **options)
    if not prints:
        return
    if as_json:
        print_json(selection.as_json())
    else:
        for line in str(selection).splitlines():
            print(spoken(line))
        print()
        what = "them" if len(selection.chosen) > 1 else "it (one adapter alone; no other improved it)"
        say(f"To compose {what}: {_command(base, selection, len(examples.classes))}")
    if out is not None:
        write_whole(out, json.dumps(selection.as_json(), indent=2) + "\n")


def _command(base: str, selection: Selection, classes: int) -> str:
    """The command that composes what was chosen."""
    names = [*map(location_of, selection.config.references)]
    weights = ",".join(f"{weight:.4f}" for weight in selection.chosen.values())
    words = ["peft-composition", "compose", "--base", base, *names, "--mixing", "fixed", "--weights", weights]
    if selection.config.task_type:  # adapters need not state one
        words += ["--task", str(selection.config.task_type)]
    if classes:
        words += ["--num-labels", str(classes)]
    return shlex.join([*words, "--out", "mix"])
