"""Results as Markdown: all of them on a page of their own, the few that matter most in a block of the docs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import text
from .plot import plot_training
from .results import Cell, Measurement, Results, UsageError, read_all


BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PAGE = "results.md"
TITLES = {
    "train": "Training step",
    "forward": "Forward pass without gradient",
    "generate": "Generation, one sequence, time per token",
    "linear": "One linear layer without gradient",
    "load": "Loading and saving",
    "export": "Export to a LoRA of rank 16",
}
HOW_TO_READ = """\
Every peer of a cell was built in the same process, warmed up, and timed in interleaved rounds: in each round once, in
an order of its own, and those that no claim rests on in every third round. A figure is the median over the rounds of
the ratio to the reference in the same round, in brackets the quartiles, then the median time. "Arithmetic limit" is
computed: the time of the frozen base (training) or of the base (forward), longer by the least multiplications that a
composition needs. Saved for backward are all tensors that autograd keeps and that are no parameters; the peak is that
of all tensors, parameters and optimizer included."""


def write_report(folder: Path, summary: Path) -> list[Path]:
    """Write the page and the plots beside the results, and replace the block of another page.

    Args:
        folder: of the results.
        summary: a Markdown file with the lines `<!-- benchmarks:begin -->` and `<!-- benchmarks:end -->`.

    Returns:
        The files that were written.

    Raises:
        UsageError: there are no results, or `summary` does not have both lines, once each and in this order.
    """
    results = read_all(folder, TITLES)
    before, after = around_block(summary)
    plots = {
        (found.device, model): plot_training(found, model, folder / f"train-{found.device}-{model}.png")
        for found in results
        if found.table == "train"
        for model in dict.fromkeys(cell.model for cell in found.cells)
    }
    page = folder / PAGE
    page.write_text(_page(results, plots))
    place = Path(os.path.relpath(folder.resolve(), summary.resolve().parent)).as_posix()
    block = f"{BEGIN}\n{_summary_block(results, plots, place)}\n{END}"
    summary.write_bytes(before + block.encode() + after)
    return [page, *plots.values(), summary]


# The page


def _page(results: Sequence[Results], plots: dict[tuple[str, str], Path]) -> str:
    parts = ["# Benchmark results", "Written by `python -m benchmarks report`; do not edit.", HOW_TO_READ]
    for found in results:
        parts += [f"## {TITLES[found.table]} ({_kind(found)})", f"`{found.command}` on {_machine(found)}."]
        for model in dict.fromkeys(cell.model for cell in found.cells):
            cells = [cell for cell in found.cells if cell.model == model]
            parts += [f"### {_capitalized(found.models[model])}"]
            if (found.device, model) in plots and found.table == "train":
                parts += [f"![Time and saved bytes against N]({plots[found.device, model].name})"]
            parts += _cell_tables(cells)
        parts += ["Peers:", "\n".join(f"- {title}: {note}." for title, note in found.peers.items())]
    return "\n\n".join(parts) + "\n"


def _cell_tables(cells: Sequence[Cell]) -> list[str]:
    """Time, then memory where it was measured, then what was left out and why."""
    reference = cells[0].reference
    parts = [f"Time relative to {reference}", _table(cells, text.time)]
    if any(entry.saved_bytes is not None for cell in cells for entry in cell.peers.values()):
        parts += [f"Saved for backward, relative to {reference}", _table(cells, _memory("saved_bytes"))]
        parts += [f"Peak memory of a step, relative to {reference}", _table(cells, _memory("peak_bytes"))]
    reasons: dict[tuple[str, str], list[int]] = {}
    for cell in cells:
        for title, entry in cell.peers.items():
            if entry.skipped is not None:
                reasons.setdefault((title, entry.skipped), []).append(cell.adapters)
    lines = [
        f"- {title} at N = {', '.join(map(str, sorted(set(counts))))}: {reason}"
        for (title, reason), counts in reasons.items()
    ]
    return [*parts, "Left out:\n\n" + "\n".join(lines)] if lines else parts


def _memory(field: str) -> Callable[[Measurement, Measurement], str]:
    def describe(entry: Measurement, reference: Measurement) -> str:
        count, other = getattr(entry, field), getattr(reference, field)
        if count is None or other is None:
            return ""
        return text.size(count) if entry is reference else f"{text.relative(count, other)}, {text.size(count)}"

    return describe


def _table(cells: Sequence[Cell], describe: Callable[[Measurement, Measurement], str]) -> str:
    """Peers (of each case) down, N across; rows without an entry are left away."""
    counts = sorted({cell.adapters for cell in cells})
    found = {(cell.case, cell.adapters): cell for cell in cells}
    cases = list(dict.fromkeys(cell.case for cell in cells))
    rows = []
    for case in cases:
        own = [found.get((case, count)) for count in counts]
        for title in dict.fromkeys(title for cell in own if cell is not None for title in cell.peers):
            entries = [_entry(cell, title, describe) for cell in own]
            if any(entries):
                rows.append([*([case] if cases != [""] else []), title, *(entry or "-" for entry in entries)])
    heading = [*([""] if cases != [""] else []), "", *(f"N = {count}" for count in counts)]
    return markdown_table(heading, rows)


def _entry(cell: Cell | None, title: str, describe: Callable[[Measurement, Measurement], str]) -> str:
    if cell is None or title not in cell.peers:
        return ""
    entry = cell.peers[title]
    return "left out" if entry.skipped is not None else describe(entry, cell.peers[cell.reference])


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned in the source too."""
    lines = [list(heading), *map(list, rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(heading))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in lines)


def _kind(found: Results) -> str:
    return f"{found.device.upper()}, {found.dtype}"


def _machine(found: Results) -> str:
    machine = found.machine
    threads = machine["threads"]
    where = machine.get("gpu") or f"{machine['cpu']}, {threads} {'thread' if threads == 1 else 'threads'}"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "peft", "transformers", "peft-composition"))
    return (
        f"{where}, {machine['ram_gib']} GiB, {machine['system']}, Python {machine['python']}, {versions} "
        f"(commit {machine['commit']}), {machine['date']}, load before the run {machine['load_before']}"
    )


def _capitalized(title: str) -> str:
    return title[:1].upper() + title[1:]


# The block of the other page


@dataclass(frozen=True)
class Extract:
    """Rows of its table.

    Attributes:
        table: which table they come from.
        model: the preferred model; where it was not measured, the first one.
        case: of the cells.
        what: what is measured.
        peers: titles.
        describe: (entry, reference) -> text.
    """

    table: str
    model: str
    case: str
    what: str
    peers: tuple[str, ...]
    describe: Callable[[Measurement, Measurement], str]


def _ratio(entry: Measurement, reference: Measurement) -> str:
    return "" if entry.ratio is None else text.factor(entry.ratio.median)


def _saved_ratio(entry: Measurement, reference: Measurement) -> str:
    if entry.saved_bytes is None or not reference.saved_bytes:
        return ""
    return text.relative(entry.saved_bytes, reference.saved_bytes)


def _seconds(entry: Measurement, reference: Measurement) -> str:
    return "" if entry.seconds is None else text.seconds(entry.seconds.median)


EXTRACTS = (
    Extract(
        "train",
        "vit",
        "",
        "training step",
        ("composition", "PEFT, N active", "PEFT, N trained", "plain loop", "arithmetic limit"),
        _ratio,
    ),
    Extract(
        "train",
        "vit",
        "",
        "saved for backward",
        ("composition", "PEFT, N active", "PEFT, N trained", "plain loop"),
        _saved_ratio,
    ),
    Extract(
        "forward",
        "vit",
        "",
        "forward pass",
        ("composition", "merged composition", "PEFT, N active", "plain loop"),
        _ratio,
    ),
    Extract(
        "generate",
        "llama",
        "",
        "token generated",
        ("composition", "merged composition", "PEFT, N active"),
        _ratio,
    ),
    Extract("load", "vit", "load", "loading", ("composition", "PEFT, N active", "files alone"), _seconds),
    Extract(
        "export",
        "vit",
        "",
        "export to rank 16",
        ("composition", "PEFT, convert_to_lora", "PEFT, add_weighted_adapter"),
        _seconds,
    ),
)


def _summary_block(results: Sequence[Results], plots: dict[tuple[str, str], Path], place: str) -> str:
    parts = []
    for device in dict.fromkeys(found.device for found in results):
        parts += _device_part({found.table: found for found in results if found.device == device})
        plot = next((path for (drawn, _), path in plots.items() if drawn == device), None)
        if plot is not None:
            parts.append(f"![Training step and bytes saved for backward against N]({place}/{plot.name})")
    parts.append(f"All tables, with quartiles, peak memory and what was left out: [{PAGE}]({place}/{PAGE}).")
    return "\n\n".join(parts)


def _device_part(own: dict[str, Results]) -> list[str]:
    """The table of one device, of which models, and where it was measured."""
    rows: list[tuple[str, str, dict[int, str]]] = []
    measured: dict[str, list[str]] = {}
    for extract in EXTRACTS:
        found = own.get(extract.table)
        if found is None or not found.cells:
            continue
        model = extract.model if extract.model in found.models else found.cells[0].model
        cells = [cell for cell in found.cells if (cell.model, cell.case) == (model, extract.case)]
        measured.setdefault(found.models[model], []).append(extract.what)
        for title in extract.peers:
            entries = {cell.adapters: _entry(cell, title, extract.describe) for cell in cells}
            if any(entries.values()):
                label = extract.what if extract.describe is _seconds else f"{extract.what} / {cells[0].reference}"
                rows.append((label, title, entries))
    counts = sorted({count for _, _, entries in rows for count in entries})
    table = markdown_table(
        ["", "", *(f"N = {count}" for count in counts)],
        [[label, title, *(entries.get(count) or "-" for count in counts)] for label, title, entries in rows],
    )
    notes = {title: note for found in own.values() for title, note in found.peers.items()}
    peers = "; ".join(f"{title}: {notes[title]}" for title in dict.fromkeys(row[1] for row in rows) if title in notes)
    models = "; ".join(f"{', '.join(dict.fromkeys(whats))}: {model}" for model, whats in measured.items())
    some = next(iter(own.values()))
    return [table, f"{_capitalized(models)}. {_kind(some)}; {_machine(some)}.", f"Rows: {peers}."]


def around_block(summary: Path) -> tuple[bytes, bytes]:
    """What stands before and after the block, to the byte.

    Raises:
        UsageError: it does not exist, or does not have both lines, once each and in this order.
    """
    content = summary.read_bytes() if summary.is_file() else b""
    begin, end = BEGIN.encode(), END.encode()
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise UsageError(f"{summary.name} needs the lines {BEGIN} and {END}, once each and in this order")
    before, _, rest = content.partition(begin)
    return before, rest.partition(end)[2]
