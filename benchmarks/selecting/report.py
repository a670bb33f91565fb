"""Puts the tables of the results into the documentation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .judged import table


BEGIN, END = "<!-- selecting:begin -->", "<!-- selecting:end -->"
TITLES = {
    "clothes": "Dress, coat, sandal or shirt, on a ViT pretrained on digits (4 classes)",
    "dress-shirt-boot": "Dress, shirt or boot, on the same (3 classes)",
    "movies": "Sentiment of movie reviews, on a sentence encoder (2 classes)",
    "small": "A tiny network (2 classes)",
}


def write_block(results: Path, page: Path) -> None:
    """Replace the block of a page by what the results say.

    Args:
        results: folder of `selecting-*.json`.
        page: has the lines `BEGIN` and `END`.

    Raises:
        ValueError: it does not, once each and in this order.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page.name} needs the lines {BEGIN} and {END}, once each and in this order")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    block = "\n\n".join(_parts(results))
    page.write_text(f"{before}{BEGIN}\n\n{block}\n\n{END}{after}", encoding="utf-8")


def _parts(results: Path) -> Iterator[str]:
    for name, title in TITLES.items():
        file = results / f"selecting-{name}.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            draws = len({line["seed"] for line in found["lines"]})
            yield (
                f"{title}: {found['candidates']} candidates, {found['related']} of the task, {found['unrelated']} "
                f"made of adapters of other tasks, {found['random']} random, {found['broken']} broken; {draws} draws."
            )
            yield table(found["lines"], found["related"])
    file = results / "selecting-cost-cpu.json"
    if file.is_file():
        yield "\n".join(_costs(json.loads(file.read_text(encoding="utf-8"))))


def _costs(found: dict[str, Any]) -> Iterator[str]:
    machine = found["machine"]
    yield f"`select_adapters` in a fresh process, {machine['cpu']}, {found['cells'][0]['threads']} threads:"
    yield ""
    yield "| candidates | K | | examples passed | seconds | seconds of CPU | peak memory, MB | of it before |"
    yield "| --- " * 8 + "|"
    for own in found["cells"]:
        kind = "halving" if own["halving"] else "all on all examples"
        yield (
            f"| {own['candidates']} | {own['k']} | {kind} | {own['passed']} | {own['seconds']:.0f} | "
            f"{own['cpu seconds']:.0f} | {own['peak MB']} | {own['before MB']} |"
        )
