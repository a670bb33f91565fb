"""The code of the README and of the pages in docs/, and the marks in front of it.

    <!-- setup: NAME -->       the blocks from here on run, one after the other, in that set-up (`docs_setups`)
    <!-- not run: REASON -->   the next block is not run

Run are blocks of Python, and the lines of other blocks that begin with `peft-composition`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_MARK = re.compile(r"<!-- (setup|not run): (.+?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: where its text begins, from 1.
        language: what stands behind the fence.
        text: what is in it.
        setup: name of the set-up that holds there; empty where none does.
        why_not: why it is not run; None where it is.
    """

    line: int
    language: str
    text: str
    setup: str
    why_not: str | None

    @property
    def is_python(self) -> bool:
        return self.language == "python"

    def commands(self) -> Iterator[str]:
        """The calls of the command line in it, without comments."""
        if self.language in ("", "bash", "console"):
            for line in self.text.replace("\\\n", " ").splitlines():
                if line.startswith("peft-composition "):
                    yield line.partition(" #")[0].strip()


def pages() -> list[Path]:
    """The README and all pages that people write."""
    written = [page for page in sorted(DOCS.rglob("*.md")) if not page.relative_to(DOCS).parts[0].startswith("_")]
    return [ROOT / "README.md", *(page for page in written if not page.name.startswith("_"))]


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page in their order."""
    setup, why_not = "", None
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            for kind, value in _MARK.findall(token.content):
                setup, why_not = (value, why_not) if kind == "setup" else (setup, value)
        elif token.type == "fence":
            assert token.map is not None
            yield Block(token.map[0] + 2, token.info.strip(), token.content, setup, why_not)
            why_not = None
