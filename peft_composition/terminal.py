"""Prints the output of `peft-composition`: lines, tables for people, and JSON for machines.

Names, licenses and reasons come from others; they are never printed as markup or control sequences.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peft_composition_cli.words import spoken

from .analysis.inspection import AdapterReport
from .analysis.report import Part, WeightRow, short_labels
from .checkpoint.export import LoraExport
from .choosing.search import FoundAdapter
from .comparing import Comparison
from .text import LONG, one_line, plural


MOST_COLUMNS = 6  # adapters in a table by parts: there is no room for more beside the name of a block
MOST_NAMES = 6  # names of adapters in a note


def say(text: str) -> None:
    """Print a line, however long."""
    Console(soft_wrap=True, highlight=False, markup=False, emoji=False).print(one_line(text, LONG))


def print_json(value: object) -> None:
    """Print one JSON document; control characters are escaped."""
    print(json.dumps(value, indent=2))


def print_reports(reports: Sequence[AdapterReport], base: str | None) -> None:
    """Print a row per adapter, and below in full width why some cannot be composed, and notes."""
    title = _plain(plural(len(reports), "adapter") + (f" for {base}" if base else ""))
    table = Table(title=title, show_lines=True, show_edge=False, pad_edge=False)
    table.add_column("adapter, base, targets, license", overflow="fold")
    table.add_column("rank", no_wrap=True)
    table.add_column("modules", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("composable", no_wrap=True)
    for report in reports:
        table.add_row(
            _described(report),
            _span(report.ranks),
            "-" if report.modules is None else str(report.modules),
            "-" if report.bytes is None else _size(report.bytes),
            Text("yes", "green") if report.is_composable else Text("no", "red"),
        )
    console = Console(highlight=False, emoji=False)
    console.print(table, "")
    for report in reports:
        if report.reason is not None:
            console.print(Text.assemble((one_line(report.name), "bold"), ": ", one_line(report.reason, LONG)))
    for note, names in _by_note(reports).items():
        console.print(Text.assemble((_listed(names), "bold"), ": ", one_line(note, LONG)))
    good = sum(report.is_composable for report in reports)
    console.print(f"{good} of {len(reports)} can be composed.")


def print_found(found: Sequence[FoundAdapter], base: str) -> None:
    """Print a row per adapter of the Hub, and below why some cannot be composed."""
    table = Table(title=_plain(f"{plural(len(found), 'adapter')} for {base}"), show_edge=False)
    table.add_column("adapter, targets", overflow="fold")
    for heading in ("rank", "task", "license"):
        table.add_column(heading, overflow="fold")
    for heading in ("downloads", "updated", "size", "composable"):
        table.add_column(heading, justify="right", no_wrap=True)
    for own in found:
        name = Text.assemble((one_line(own.id), "bold"), "\n", one_line(", ".join(own.targets)))
        size = "-" if own.bytes is None else _size(own.bytes)
        cells = (_span(own.ranks), _plain(own.task or "-"), _plain(own.license or "not stated"))
        is_good = Text("yes", "green") if own.is_composable else Text("no", "red")
        table.add_row(name, *cells, str(own.downloads), own.updated or "-", size, is_good)
    console = Console(highlight=False, emoji=False)
    console.print(table, "")
    for own in found:
        if own.reason is not None:
            console.print(Text.assemble((one_line(own.id), "bold"), ": ", one_line(own.reason, LONG)))
    good = sum(own.is_composable for own in found)
    console.print(f"{good} of {len(found)} can be composed, going by their configs; weights were not looked at.")


def print_errors(lora: LoraExport) -> None:
    """Print the error of an export's truncation, module by module."""
    table = Table(title="Relative error of the truncation")
    table.add_column("module", overflow="fold")
    table.add_column("rank", justify="right")
    table.add_column("error", justify="right")
    for module, error in lora.errors.items():
        table.add_row(_plain(module), str(lora.ranks[module]), f"{error:.3g}")
    Console().print(table)


def print_means(rows: Sequence[WeightRow]) -> None:
    """Print the mixing weights of every adapter over the whole model."""
    table = Table(title="Mixing weights")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("adapter", overflow="fold")
    for heading in ("modules", "mean", "min", "max"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, row in enumerate(rows, 1):
        values = (f"{value:.3f}" for value in (row.mean, row.min, row.max))
        table.add_row(f"({number})", _plain(row.adapter), str(row.modules), *values)
    Console().print(table)


def print_parts(rows: Sequence[WeightRow], whole: Sequence[WeightRow], by: Part) -> None:
    """Print a row per part and a column per adapter; of many adapters only those with the largest weights."""
    largest = sorted(whole, key=lambda row: -abs(row.mean))[:MOST_COLUMNS]
    shown = [row.adapter for row in whole if row in largest]
    few = f"the {len(shown)} of {len(whole)} adapters with the largest weights; --json prints all"
    console = Console()
    headings = [one_line(adapter) for adapter in shown]
    parts = [*dict.fromkeys(row.part for row in rows)]
    labels, common = parts, ""
    if _width(labels, headings) > console.width:  # names would be broken: use the numbers of the previous table
        headings = [f"({number})" for number, row in enumerate(whole, 1) if row in largest]
    if _width(labels, headings) > console.width:
        labels, common = short_labels(parts)
    title = f"Mean weight by {by}" + (f" of {common}" if common else "")
    table = Table(title=_plain(title), caption=few if len(shown) < len(whole) else None)
    table.add_column(by, overflow="fold")
    for heading in headings:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    means = {(row.part, row.adapter): f"{row.mean:.3f}" for row in rows}
    for part, label in zip(parts, labels):
        table.add_row(_plain(label), *(means.get((part, adapter), "-") for adapter in shown))
    console.print(table)


def _width(labels: Sequence[str], headings: Sequence[str]) -> int:
    """The width in characters of a table with columns of numbers."""
    return sum(max(len(heading), 5) + 3 for heading in headings) + max(map(len, map(one_line, labels))) + 4


def _plain(text: str) -> Text:
    """Text for a cell; rich would read a plain string as markup."""
    return Text(one_line(text))


def _described(report: AdapterReport) -> Text:
    """Name, base model, targets, license and commit, a line each."""
    terms = [report.license or "license not stated", report.commit[:12] if report.commit else ""]
    lines = [report.base or "base not stated", ", ".join(report.targets), ", ".join(filter(None, terms))]
    return Text("\n").join([Text(one_line(report.name), "bold"), *(_plain(line) for line in lines if line)])


def _by_note(reports: Sequence[AdapterReport]) -> dict[str, list[str]]:
    """Every note with the names of its adapters: many adapters of one kind have the same notes."""
    found: dict[str, list[str]] = {}
    for report in reports:
        for note in report.notes:
            found.setdefault(note, []).append(report.name)
    return found


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(one_line, names[:MOST_NAMES]))
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES} more"


def _span(ranks: tuple[int, int] | None) -> str:
    if ranks is None:
        return "-"
    low, high = ranks
    return str(low) if low == high else f"{low}-{high}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def print_comparison(result: Comparison) -> None:
    """Print a row for every method, and the verdict."""
    table = Table(title=one_line(result.setting), title_justify="left")
    table.add_column("method", overflow="fold")
    for heading in (result.measure, "95% interval", "loss", "trained", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("")
    notes = {"alternative": "no adapters", "adapters": "", "control": "control"}
    for row in result:
        table.add_row(
            Text(one_line(row.name)),
            f"{100 * row.score:.1f}%",
            f"{100 * row.low:.1f} to {100 * row.high:.1f}",
            f"{row.loss:.3f}",
            f"{row.trainable:,}",
            f"{row.seconds:.1f}",
            notes[row.kind],
        )
    Console(highlight=False, emoji=False).print(table)
    for own in result.broken:
        say(f"left out: {one_line(own.adapter)}: {spoken(own.reason)}")
    for line in result.legend:
        say(line)
    say(str(result.verdict))
