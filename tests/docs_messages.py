"""The messages of the package, read from its source, and the entries of the page that explains them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from .docs_blocks import DOCS, ROOT, blocks_of


PACKAGE = ROOT / "peft_composition"
PAGE = DOCS / "how-to" / "troubleshooting.md"
FEWEST_WORDS = 4  # of text that is for people
HOLE = "\0"  # in a message, where it puts something in

# How a clause begins that asks for something. A message without any is not listed on the page unless it is worth it.
VERBS = (
    "add ask build call check choose clear compose convert copy dequantize download exclude export fetch free gather "
    "give install keep leave let list load make merge move name pass pin pull push put read remove rename resize "
    "run save say set shorten take train truncate try unload unmerge update upgrade use write"
)
ASKS = re.compile(
    rf"(?:^|[.;:,(?] |\b(?:or|and|then|first) )(?:{VERBS.replace(' ', '|')})\b(?!-)"
    r"|\blog in\b|pip install|\bhf auth|\bFor (?:those|one of)|needs a name|must name|which can be composed"
    r"|--[a-z-]+ (?:is|writes)",
    re.IGNORECASE,
)


class Message(NamedTuple):
    """Text that the package may show, with a hole for everything it puts in."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text.replace(HOLE, '...')}"


def messages() -> Iterator[Message]:
    """All text in the package that is for people: not docstrings, and no helps of fields."""
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        skipped = {id(node) for silent in filter(_is_silent, ast.walk(tree)) for node in ast.walk(silent)}
        for node in ast.walk(tree):
            if id(node) in skipped or not isinstance(node, (ast.JoinedStr, ast.BinOp, ast.Constant)):
                continue
            skipped |= {id(inner) for inner in ast.walk(node)}
            text = _text(node)
            if len(re.findall(r"[A-Za-z]{2,}", text)) >= FEWEST_WORDS and not text.startswith("<!--"):
                yield Message(f"{file.relative_to(ROOT).as_posix()}:{node.lineno}", text)


def asking() -> list[Message]:
    """The messages that ask for something."""
    return [message for message in messages() if ASKS.search(message.text)]


def entries() -> list[str]:
    """The lines of the page that quote messages."""
    return [line for block in blocks_of(PAGE) if block.language == "text" for line in block.text.splitlines()]


def covers(entry: str, text: str) -> bool:
    """Whether an entry quotes a message: its parts between the dots stand there one after the other."""
    place = 0
    for part in (part.strip() for part in entry.split("...")):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def _is_silent(node: ast.AST) -> bool:
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_docstring or (isinstance(node, ast.keyword) and node.arg in ("help", "metadata"))


def _text(node: ast.expr) -> str:
    """What an expression of text says; a hole for what is not known."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return HOLE
