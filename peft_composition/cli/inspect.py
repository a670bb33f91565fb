"""`peft-composition inspect`: a row for every adapter, and whether it can be composed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from peft_composition_cli.words import spoken

from ..analysis.inspection import inspect_adapters
from ..checkpoint.base_models import base_config
from ..terminal import print_json, print_reports
from .inputs import references_of, task_and_loader
from .labelled import expanded


def run(adapters: Sequence[str], base: str | None, task: str | None, as_json: bool, check_base: bool = True) -> bool:
    """Print a row for every adapter; True if all can be composed."""
    names = dict.fromkeys(expanded(adapters))  # a row says all, however often an adapter is named
    references = references_of([*names])
    model = None
    if base is not None:
        config = base_config(base)
        task, loader = task_and_loader(references, task, config, check_base, is_strict=False)
        model = loader.empty(config)
    reports = [
        replace(report, reason=report.reason and spoken(report.reason), notes=[*map(spoken, report.notes)])
        for report in inspect_adapters(references, model, task, check_base)
    ]
    if as_json:
        rows = [{**asdict(report), "composable": report.is_composable} for report in reports]
        print_json({"base": base, "task_type": task, "adapters": rows})
    else:
        print_reports(reports, base)
    return all(report.is_composable for report in reports)
