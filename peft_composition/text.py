"""Text that others wrote (names, licenses, module names, keys) as one short line that cannot act on what shows it.

`one_line` and `quoted` are for terminals, logs and error messages, the others for model cards.
"""

from __future__ import annotations

import re
import reprlib


SHORT = 160  # characters of a name
LONG = 4000  # of a whole message with several names in it

_WHITESPACE = re.compile(r"\s+")
# What Markdown or HTML could read as markup within a line, or make a link of. An underscore inside a
# word is none.
_MARKUP = re.compile(r"[\\`*\[\]<>&|~$#!{}\"'@]|:(?=//)|(?<=www)\.|(?<![^\W_])_|_(?![^\W_])", re.IGNORECASE)
# And what they read as markup at the beginning of one: headings and lists.
_FIRST = re.compile(r"^[-+=:]|^(\d+)[.)]")
_HARMLESS_CODE = re.compile(r"[^\\`<>&|$]+")
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 120


def one_line(text: object, limit: int = SHORT) -> str:
    r"""Foreign text for a terminal, a log or an error message.

    Line breaks and tabs become spaces. All else that does not print becomes an escape as in Python's own `repr`:
    control characters and with them the sequences that begin with ESC, marks that turn the direction of writing, lone
    surrogates. Of longer text the middle is left out.

    Args:
        text: anything; its `str` is shown.
        limit: the most characters of the result.

    Returns:
        The line; it can be encoded as UTF-8. Empty for text of nothing but spaces.

    Example:
        >>> one_line("evil\x1b[2J\nname")
        'evil\\x1b[2J name'
    """
    # What will be left out anyway is left out first, so that megabytes cost nothing.
    raw = str(text)
    cut = _shortened(raw, 2 * limit) if len(raw) > 4 * limit else raw
    line = _WHITESPACE.sub(" ", cut).strip()
    return _shortened("".join(map(_printable, line)), limit)


def quoted(text: object, limit: int = SHORT) -> str:
    """As `one_line`, in quotes and with line breaks as escapes: the `repr` of a name that may be long."""
    return _shortened(repr(_shortened(str(text), limit)), limit)


def shown(value: object) -> str:
    """A value of a config for a message: short, and one line."""
    return one_line(_BRIEF.repr(value))


def in_markdown(text: object, limit: int = SHORT) -> str:
    """Foreign text within Markdown: a paragraph, a heading or the cell of a table shows it and nothing else.

    Args:
        text: anything; its `str` is shown as `one_line` shows it.
        limit: the most characters of what a reader sees.

    Returns:
        Markdown. What could be markup stands there as a numeric character reference, which no reader of Markdown takes
        for structure: no HTML, no link (of a bare address, either), no heading, no mark of our own, no end of a cell.
    """
    line = _MARKUP.sub(lambda match: _reference(match[0]), one_line(text, limit))
    return _FIRST.sub(lambda match: (match[1] or "") + _reference(match[0][-1]), line)


def in_code(text: object, limit: int = SHORT) -> str:
    """As `in_markdown`, set as code."""
    line = one_line(text, limit)
    if _HARMLESS_CODE.fullmatch(line):
        return f"`{line}`"
    return f"<code>{in_markdown(line, limit)}</code>"


def in_python(text: str) -> str:
    """Foreign text as a literal of Python that stands in a card: a whole one, in double quotes, on one line."""
    marks = {"\\": r"\\", '"': r"\"", "<": r"\x3c"}  # without "<" no mark of our own, no HTML
    return '"' + "".join(marks.get(character) or _printable(character) for character in text) + '"'


def _printable(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    kept = max(limit - 3, 0)
    head = kept - kept // 3  # the ends of paths and names tell them apart, too
    return f"{text[:head]}...{text[len(text) - kept // 3 :]}"


def _reference(character: str) -> str:
    return f"&#{ord(character)};"
