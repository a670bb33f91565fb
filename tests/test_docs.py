"""The documentation: its code runs as it is printed, its links lead somewhere, and messages and names have entries."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import shlex
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftConfig
from typer.testing import CliRunner

import peft_composition
from peft_composition_cli import app

from .docs_blocks import DOCS, ROOT, Block, blocks_of, pages
from .docs_messages import asking, covers, entries, messages
from .docs_setups import SETUPS


# A block that cannot run here says why; another one is a reason to look whether it could.
NOT_RUN = 0


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


RUN = [
    page
    for page in pages()
    if any(block.setup and (block.is_python or any(block.commands())) for block in blocks_of(page))
]


@pytest.mark.parametrize("page", RUN, ids=page_name)
@pytest.mark.filterwarnings("error:Training ended")
def test_code_runs_as_it_is_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (setup, blocks) in enumerate(groupby(blocks_of(page), key=lambda block: block.setup)):
        if not setup:
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        with ExitStack() as stack:
            names: dict[str, Any] = {"__name__": "__docs__", **stack.enter_context(SETUPS[setup]())}
            for block in blocks:
                if block.why_not is None:
                    _run(block, page, names)


def _run(block: Block, page: Path, names: dict[str, Any]) -> None:
    if block.is_python:
        code = "\n" * (block.line - 1) + block.text  # so that a traceback names the line of the page
        exec(compile(code, str(page), "exec"), names)
    for command in block.commands():
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, shlex.split(command)[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{command}\n{result.output}"


def test_every_block_runs_or_says_why_not() -> None:
    without = [
        f"{page_name(page)}:{block.line}"
        for page in pages()
        for block in blocks_of(page)
        if (block.is_python or any(block.commands())) and not (block.setup or block.why_not)
    ]
    assert not without, f"no <!-- setup: ... --> and no <!-- not run: ... --> before {without}"
    left_out = [block.why_not for page in pages() for block in blocks_of(page) if block.why_not is not None]
    assert len(left_out) == NOT_RUN, left_out


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


# Messages


def test_every_message_that_asks_for_something_has_an_entry() -> None:
    quoted = entries()
    without = [message for message in asking() if not any(covers(entry, message.text) for entry in quoted)]
    shown = "\n".join(map(str, without))
    assert not without, f"docs/how-to/troubleshooting.md has no entry (a line of a ```text block) for\n{shown}"


def test_every_entry_quotes_a_message() -> None:
    texts = [message.text for message in messages()]
    stale = [entry for entry in entries() if not any(covers(entry, text) for text in texts)]
    assert not stale, "no message of the package has these words any more, in docs/how-to/troubleshooting.md: " + str(
        stale
    )


def test_entries_are_long_enough_to_mean_one_thing() -> None:
    assert len(entries()) > 80
    for entry in entries():
        assert max(len(part.split()) for part in entry.split("...")) >= 3, entry


# Links


LINKING = [
    *pages(),
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "examples/few_shot_transfer/README.md")),
]


@pytest.mark.parametrize("page", LINKING, ids=page_name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    """The site is checked by Sphinx; this is what readers of the repository follow, the README's links among them."""
    broken = []
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        is_found = target.exists() and (not anchor or target.suffix != ".md" or anchor in _anchors(target))
        if not is_found:
            broken.append(f"{path}#{anchor}")
    assert not broken


def _anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


# The reference, and who is cited


OF_PEFT = {field.name for field in dataclasses.fields(PeftConfig)}
PUBLIC = (
    "peft_composition",
    "peft_composition.analysis",
    "peft_composition.checkpoint",
    "peft_composition.choosing",
    "peft_composition.evidence",
    "peft_composition.explaining",
)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    public = importlib.import_module(module)
    missing = [
        name
        for name in public.__all__
        if not re.search(rf"\b(?:{'|'.join(map(re.escape, PUBLIC))})\.{re.escape(name)}\b", text)
    ]
    assert not missing, f"name {missing} of {module} on a page of docs/reference"


def public_things() -> list[tuple[str, Any]]:
    things = [
        (f"{name}.{member}", getattr(importlib.import_module(name), member))
        for name in PUBLIC
        for member in importlib.import_module(name).__all__
    ]
    return [(name, thing) for name, thing in things if callable(thing)]


@pytest.mark.parametrize(("name", "thing"), public_things(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_argument_of_what_is_public_is_explained(name: str, thing: Any) -> None:
    text = inspect.getdoc(thing) or ""
    assert len(text.splitlines()[0].split()) >= 3
    explained = set(re.findall(r"^    \*{0,2}(\w+): ", text, flags=re.MULTILINE))
    if dataclasses.is_dataclass(thing) or not inspect.isclass(thing):
        assert set(inspect.signature(thing).parameters) - explained <= OF_PEFT
    if not inspect.isclass(thing):
        annotation = inspect.signature(thing).return_annotation
        assert ("\nReturns:" in text) == (annotation not in (None, "None"))


def test_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    assert citation["version"] == peft_composition.__version__
    assert citation["authors"] == [{"name": "The peft-composition authors"}]
    (paper,) = citation["references"]
    assert "2402.15414" in paper["url"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["title"] in readme
    assert " and ".join(f"{who['family-names']}, {who['given-names']}" for who in paper["authors"]) in readme
