"""A report about a composition in its folder: written, shown in the card, and removed when the weights become others.

The report itself is made in `explaining`; here it is a page, a picture and a record, which belong to the weights.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..drafts import CARD_DRAFT, draft_in, take_place
from ..text import LONG, in_code, in_markdown, one_line
from .exported import sha256_of, weights_file
from .saved import saved_mixing_weights


FORMAT = 1
"""Counts changes of the record's form."""
PAGE, PICTURE, RECORD = NAMES = ("composition-report.html", "composition-report.png", "composition-report.json")
_LARGEST = 1 << 26  # bytes of a record
_CLOSE = 1e-5  # weights that were saved in float32, and normalised again


class Report(Protocol):
    """What `explaining.Explanation` is."""

    @property
    def adapter_name(self) -> str:
        """Of the composition in its model."""

    @property
    def weights(self) -> Mapping[str, Mapping[str, float]]:
        """`{module: {adapter: weight}}`."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, as values of JSON."""

    def write(self, path: Path) -> None:
        """Write it to a new file, by its suffix."""


def write_report(folder: str | os.PathLike[str], report: Report) -> None:
    """Write a report into the folder of the composition that it is about; the card is written afterwards.

    Raises:
        ValueError: the folder holds no saved composition, or one with other adapters or weights.
    """
    place = Path(folder)
    _require_same_weights(place, report)
    weights = weights_file(place)
    assert weights is not None
    with draft_in(place, CARD_DRAFT) as draft:
        report.write(draft / PAGE)
        try:
            report.write(draft / PICTURE)
        except ImportError:  # without matplotlib there is no picture
            (place / PICTURE).unlink(missing_ok=True)
        files = {path.name: sha256_of(path) for path in sorted(draft.iterdir())}
        fields = {**report.to_dict(), "weights_sha256": sha256_of(weights), "files": files}
        (draft / RECORD).write_text(json.dumps(fields, indent=2), encoding="utf-8")
        for name in (*files, RECORD):
            take_place(draft / name, place / name)


def section_about(folder: Path, subfolder: str | None) -> str | None:
    """The text for a card about the report in a folder; None if there is none, or not about these weights.

    Args:
        folder: of the composition.
        subfolder: the folder's path from the card. Default: the card's own.
    """
    fields = _record_in(folder)
    if fields is None or not _is_current(fields, folder):
        return None
    try:
        text = markdown_of(fields)
    except (KeyError, TypeError, ValueError, AttributeError):  # not written by this package
        return None
    start = f"{subfolder}/" if subfolder else ""
    if (folder / PICTURE).is_file():
        text += f"\n![Scores and weights of the adapters; the table above has the numbers](<{start}{PICTURE}>)\n"
    return f"{text}\nThe whole report: {in_code(start + PAGE)}, a page to download and open in a browser."


def markdown_of(fields: Mapping[str, Any]) -> str:
    """The summary of a report and a table of its adapters, from the record."""
    without = {str(row["name"]): row["change"] for row in fields["left_out"]}
    alone = {str(row["name"]): row for row in fields["scores"]["rows"] if row["kind"] == "adapter"}
    meaning = "margin, -1 to 1" if fields["scores"]["measure"] == "margin" else "log-likelihood of an answer's token"
    lines = [*(in_markdown(sentence, LONG) for sentence in fields["summary"]), ""]
    lines += ["| adapter | weight | alone, 95% interval | left out, 95% interval |", "| --- | --- | --- | --- |"]
    for facts in fields["adapters"]:
        name = str(facts["name"])
        own, change = alone[name], without[name]
        cells = f"{float(facts['mean']):.3f} | {_between(own, 'score')} | {_between(change, 'mean')}"
        lines.append(f"| {in_code(name)} | {cells} |")
    explained = (
        f"alone: {meaning}, by leave-one-out. left out: change of an example's log-likelihood without the adapter."
    )
    data = in_markdown(fields["data"], LONG)
    versions = ", ".join(in_markdown(f"{name} {version}") for name, version in fields["versions"].items())
    return "\n".join([*lines, "", explained, "", f"Data: {data}. Made with {versions}."]) + "\n"


def remove_outdated_report(folder: Path) -> bool:
    """Remove the report in a folder if it is about other weights; files that are not as it was written stay.

    Returns:
        Whether a report was removed.
    """
    fields = _record_in(folder)
    if fields is None or _is_current(fields, folder):
        return False
    files = fields.get("files")
    for name in (PAGE, PICTURE):
        path = folder / name
        if isinstance(files, dict) and path.is_file() and sha256_of(path) == files.get(name):
            path.unlink()
    (folder / RECORD).unlink()
    return True


def _require_same_weights(folder: Path, report: Report) -> None:
    saved = saved_mixing_weights(folder)
    for module, row in report.weights.items():
        for name, weight in row.items():
            there = saved.get(module, {}).get(name, math.nan)
            if not math.isclose(there, weight, rel_tol=_CLOSE, abs_tol=_CLOSE):
                raise ValueError(
                    f"The report is not about the composition in {one_line(folder)}: adapter {one_line(name)!r} has "
                    f"weight {weight:.6g} in module {one_line(module)!r} there, and {there:.6g} in the folder. "
                    "Explain the model that was saved, or save the model that was explained."
                )


def _record_in(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST:
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    is_ours = isinstance(fields, dict) and fields.get("format") == FORMAT and "weights_sha256" in fields
    return fields if is_ours else None


def _is_current(fields: Mapping[str, Any], folder: Path) -> bool:
    weights = weights_file(folder)
    return weights is not None and sha256_of(weights) == fields["weights_sha256"]


def _between(row: Mapping[str, Any], of: str) -> str:
    return f"{float(row[of]):+.3f} [{float(row['low']):+.3f}, {float(row['high']):+.3f}]"
