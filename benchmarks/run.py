"""Runs tables: settings from the options, cell after cell to the screen and to the file."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table as Grid

from . import export, forward, generate, linear, load, machine, text, train
from .models import ARCHITECTURES, Architecture, Workbench
from .results import Cell, Results, UsageError
from .settings import Settings, Table


TABLES: dict[str, Table] = {
    "train": train.TABLE,
    "forward": forward.TABLE,
    "generate": generate.TABLE,
    "linear": linear.TABLE,
    "load": load.TABLE,
    "export": export.TABLE,
}
MORE_ON_GPU = 256


def run_tables(names: Sequence[str], options: argparse.Namespace, folder: Path) -> None:
    """Measure tables one after the other and write a file for each.

    Args:
        names: of the tables.
        options: of the command line.
        folder: for adapters, empty.

    Raises:
        UsageError: the options name a peer or only models that none of the tables has.
    """
    chosen = _chosen(names, options)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def new_workbench(architecture: Architecture, name: str) -> Workbench:
        return Workbench(architecture, folder / name, device, dtype)

    @cache
    def workbench(key: str) -> Workbench:
        return new_workbench(ARCHITECTURES[key], key)

    described = machine.describe(device)
    gc.collect()
    gc.freeze()  # the many objects of the imports stay; collections between the rounds pass over them
    for name in chosen:
        settings = _settings(name, options, device, workbench, new_workbench)
        results = Results(
            table=name,
            device=device.type,
            dtype=str(dtype).removeprefix("torch."),
            command=_command(name, options),
            machine=described,
            models={key: TABLES[name].describe(ARCHITECTURES[key]) for key in settings.models},
            peers={peer.title: peer.note for peer in settings.peers},
        )
        if options.add:
            results = Results.read(results.path_in(options.out)).continued_by(results)
        for cell in TABLES[name].run(settings):
            results.put(cell)
            results.write(options.out)
            Console().print(_grid(name, cell))
    gc.unfreeze()


def _chosen(names: Sequence[str], options: argparse.Namespace) -> list[str]:
    """The tables that have a chosen model."""
    chosen = [name for name in names if _models(name, options)]
    if not chosen:
        raise UsageError(f"{' and '.join(names)} cannot be measured on {', '.join(options.models)}")
    known = dict.fromkeys(peer.key for name in chosen for peer in TABLES[name].peers)
    unknown = [key for key in options.peers or () if key not in known]
    if unknown:
        raise UsageError(f"there are no peers {', '.join(unknown)} here; there are {', '.join(known)}")
    return chosen


def _models(name: str, options: argparse.Namespace) -> tuple[str, ...]:
    table = TABLES[name]
    return table.models if options.models is None else tuple(key for key in options.models if key in table.rounds)


def _settings(
    name: str,
    options: argparse.Namespace,
    device: torch.device,
    workbench: Callable[[str], Workbench],
    new_workbench: Callable[[Architecture, str], Workbench],
) -> Settings:
    table = TABLES[name]
    reference = table.peers[0]
    adapters = options.adapters or (*table.adapters, *([MORE_ON_GPU] if device.type == "cuda" else []))
    rounds = dict(table.rounds) if options.repeats is None else dict.fromkeys(table.rounds, options.repeats)
    return Settings(
        models=_models(name, options),
        adapters=tuple(sorted(set(adapters))),
        peers=tuple(p for p in table.peers if not options.peers or p is reference or p.key in options.peers),
        rounds=rounds,
        memory_limit=None if options.memory_limit is None else options.memory_limit * 1e9,
        workbench=workbench,
        new_workbench=new_workbench,
        device=device,
    )


def _command(name: str, options: argparse.Namespace) -> str:
    """The command line without its paths."""
    words = ["python -m benchmarks", name, *(["--add"] if options.add else [])]
    for option in ("models", "adapters", "peers", "repeats", "memory_limit"):
        value = getattr(options, option)
        if value is not None:
            words += [f"--{option.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)


def _grid(name: str, cell: Cell) -> Grid:
    """One cell on the screen, the reasons of what is left out below it."""
    left_out = [f"{title}: {entry.skipped}" for title, entry in cell.peers.items() if entry.skipped]
    case = f", {cell.case}" if cell.case else ""
    grid = Grid(title=f"{name}: {cell.model}, N = {cell.adapters}{case}", caption="\n".join(left_out) or None)
    has_memory = any(entry.saved_bytes is not None for entry in cell.peers.values())
    headings = ("peer", "time", f"/ {cell.reference}", "rounds", *(("saved", "peak") if has_memory else ()))
    for heading in headings:
        grid.add_column(heading, justify="left" if heading == "peer" else "right", no_wrap=True)
    for title, entry in cell.peers.items():
        if entry.seconds is None or entry.ratio is None:
            continue
        rounds = "" if entry.computed else str(entry.seconds.count)
        sizes = ["" if size is None else text.size(size) for size in (entry.saved_bytes, entry.peak_bytes)]
        grid.add_row(
            title, text.seconds(entry.seconds.median), text.ratio(entry.ratio), rounds, *sizes[: len(headings) - 4]
        )
    return grid
