"""Makes foreign text (names, licenses, module names, keys) safe to show: one short line without control sequences.

`one_line` and `quoted` are for terminals, logs and error messages, the other functions for model cards.
"""

from __future__ import annotations

import re
import reprlib


SHORT = 160  # characters of a name
LONG = 4000  # characters of a message with several names

_WHITESPACE = re.compile(r"\s+")
# What Markdown or HTML could read as markup within a line, or make a link of. An underscore inside a
# word is none.
_MARKUP = re.compile(r"[\\`*\[\]<>&|~$#!{}\"'@]|:(?=//)|(?<=www)\.|(?<![^\W_])_|_(?![^\W_])", re.IGNORECASE)
# Characters that they read as markup at the beginning of a line: headings and lists.
_FIRST = re.compile(r"^[-+=:]|^(\d+)[.)]")
_HARMLESS_CODE = re.compile(r"[^\\`<>&|$]+")
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 120


def one_line(text: object, limit: int = SHORT) -> str:
    r"""Foreign text for a terminal, a log or an error message.

    Line breaks and tabs become spaces. All other unprintable characters are escaped as in Python's `repr`: control
    characters (and so all sequences that begin with ESC), marks that change the writing direction, lone surrogates.
    Longer text loses its middle.

    Args:
        text: anything; its `str` is shown.
        limit: the maximal length of the result, in characters.

    Returns:
        The line; it can be encoded as UTF-8. Empty if the text is only spaces.

    Example:
        >>> one_line("evil\x1b[2J\nname")
        'evil\\x1b[2J name'
    """
    # Cut long text first, so that megabytes cost nothing.
    raw = str(text)
    cut = _shortened(raw, 2 * limit) if len(raw) > 4 * limit else raw
    line = _WHITESPACE.sub(" ", cut).strip()
    return _shortened("".join(map(_printable, line)), limit)


def quoted(text: object, limit: int = SHORT) -> str:
    """Like `one_line`, but in quotes and with escaped line breaks: the `repr` of a name that may be long."""
    return _shortened(repr(_shortened(str(text), limit)), limit)


def shown(value: object) -> str:
    """A value of a config for a message, as one short line."""
    return one_line(_BRIEF.repr(value))


def plural(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: `1 adapter`, `2 adapters`, `1,000 adapters`.

    Args:
        count: how many.
        one: the noun for one.
        many: for others. Default: with an "s", or "es" after one.
    """
    return f"{count:,} {one if count == 1 else many or one + ('es' if one.endswith('s') else 's')}"


def in_markdown(text: object, limit: int = SHORT) -> str:
    """Foreign text for a paragraph, a heading or a table cell in Markdown, where it shows as plain text.

    Args:
        text: anything; its `str` is shown, as by `one_line`.
        limit: the maximal length of the visible text, in characters.

    Returns:
        Markdown. What could be markup stands there as a numeric character reference, which no reader of Markdown takes
        for structure: no HTML, no link (of a bare address, either), no heading, no mark of our own, no end of a cell.
    """
    line = _MARKUP.sub(lambda match: _reference(match[0]), one_line(text, limit))
    return _FIRST.sub(lambda match: (match[1] or "") + _reference(match[0][-1]), line)


def in_code(text: object, limit: int = SHORT) -> str:
    """Like `in_markdown`, formatted as code."""
    line = one_line(text, limit)
    if _HARMLESS_CODE.fullmatch(line):
        return f"`{line}`"
    return f"<code>{in_markdown(line, limit)}</code>"


def in_python(text: str) -> str:
    """Foreign text as a Python string literal for a card, in double quotes and on one line."""
    marks = {"\\": r"\\", '"': r"\"", "<": r"\x3c"}  # without "<" there is no HTML and no marker of this package
    return '"' + "".join(marks.get(character) or _printable(character) for character in text) + '"'


def _printable(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    kept = max(limit - 3, 0)
    head = kept - kept // 3  # keep the suffix, too, which distinguishes paths and names
    return f"{text[:head]}...{text[len(text) - kept // 3 :]}"


def _reference(character: str) -> str:
    return f"&#{ord(character)};"
