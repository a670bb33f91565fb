"""Text from others as one short line: in terminals and messages, and in Markdown as a reader of Markdown reads it."""

from __future__ import annotations

import ast
import html
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from peft_composition.text import LONG, SHORT, in_code, in_markdown, in_python, one_line, plural, quoted
from peft_composition.upstream.errors import AdapterError


ANYTHING = st.text(st.characters(), max_size=400)  # surrogates and controls, too
MARKUP = st.lists(
    st.sampled_from(
        [
            *("<!-- peft-composition:end -->", "<b>", "[a](javascript:x)", "<javascript:x>", "![i](http://h)", "&lt;"),
            *("`", "``", "|", "\\", "*", "_", "x_y", "~~", "$", "# ", "1. ", "- ", "---", "\n", "a", " "),
            *("\x1b[2J", "\u202e", "\ud800"),
        ]
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("MIT License", "MIT License"),
        ("größe/模型", "größe/模型"),
        ("\x1b]0;title\x07\x1b[31mred", r"\x1b]0;title\x07\x1b[31mred"),
        ("a\r\nb\tc\u2028d", "a b c d"),
        ("abc\u202egnp.exe", r"abc\u202egnp.exe"),
        ("lone \ud800 surrogate", r"lone \ud800 surrogate"),
        ("zero\u200bwidth", r"zero\u200bwidth"),
        (None, "None"),
        (" \n ", ""),
    ],
)
def test_what_a_terminal_is_shown(text: object, shown: str) -> None:
    assert one_line(text) == shown


def test_long_text_keeps_both_ends() -> None:
    line = one_line("begin" + "x" * 100_000_000 + "end")
    assert len(line) == SHORT
    assert line.startswith("beginx")
    assert line.endswith("xend")
    assert "x...x" in line
    assert len(one_line("\x00" * 10_000, LONG)) == LONG


def test_quotes_show_line_breaks() -> None:
    assert quoted("a\nb\x1b") == r"'a\nb\x1b'"
    assert len(quoted("\x00" * 10_000)) == SHORT


@given(ANYTHING)
def test_a_line_prints_and_is_short(text: str) -> None:
    for line in (one_line(text), quoted(text)):
        line.encode("utf-8")
        assert line.isprintable()
        assert not {unicodedata.category(character) for character in line} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
        assert len(line) <= SHORT


def read(markdown: str) -> str:
    """The text that a reader of GitHub's Markdown sees; fails where it holds markup."""
    (begin, inline, end) = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(markdown)
    assert (begin.type, end.type) == ("paragraph_open", "paragraph_close")
    assert {token.type for token in inline.children or ()} <= {"text", "text_special"}
    return "".join(token.content for token in inline.children or ())


@given(st.one_of(MARKUP, ANYTHING))
def test_markdown_shows_the_line_and_nothing_else(text: str) -> None:
    line = one_line(text)
    for shown in (in_markdown(text), f"before {in_markdown(text)} after"):
        if shown:
            assert read(shown).removeprefix("before ").removesuffix(" after").strip() == line
    assert "<" not in in_markdown(text)


@given(st.one_of(MARKUP, ANYTHING))
def test_a_cell_of_a_table_is_one_cell(text: str) -> None:
    table = f"| a | b |\n| --- | --- |\n| {in_markdown(text)} | {in_code(text)} |"
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(table)
    rows = [token.children or [] for token in tokens if token.type == "inline"]
    assert len(rows) == 4
    line = one_line(text)
    assert "".join(token.content for token in rows[2]).strip() == line
    in_cell = [token for token in rows[3] if token.type != "html_inline"]
    assert "".join(token.content for token in in_cell).strip() == line
    assert {token.content for token in rows[3] if token.type == "html_inline"} <= {"<code>", "</code>"}


@pytest.mark.parametrize("name", ["lora-a", "me/lora_b.v2", "snake_case_name", "größe", "MIT License", "other (x)"])
def test_ordinary_names_stay_as_they_are(name: str) -> None:
    assert in_markdown(name) == name
    assert in_code(name) == f"`{name}`"


@pytest.mark.parametrize(
    "address",
    ["https://evil.example/a_b", "at http://evil.example?x=1&y", "WWW.evil.example", "mail me@evil.example"],
)
def test_a_bare_address_is_no_link(address: str) -> None:
    """GitHub's Markdown makes links of what contains one of these, without any brackets."""
    markdown = in_markdown(address)
    assert not re.search(r"://|www\.|@", markdown, re.IGNORECASE)
    assert html.unescape(markdown) == address


def test_a_javascript_link_is_text() -> None:
    shown = in_markdown("[click](javascript:alert(1)) <a href='javascript:x'>")
    assert not re.search(r"[\[\]<>]", shown)


def test_an_error_about_an_adapter_is_one_line_whatever_it_quotes() -> None:
    error = AdapterError("evil\x1b[2J" + "x" * 10_000, "module a\u202e\ud800\nError: forged\x07" + "y" * 100_000)
    message = str(error)
    message.encode("utf-8")
    assert message.isprintable()
    assert message.startswith(r"adapter 'evil\x1b[2Jxx")
    assert r": module a\u202e\ud800 Error: forged\x07yy" in message
    assert len(message) < 2 * LONG
    assert error.adapter_name == "evil\x1b[2J" + "x" * 10_000


@given(st.one_of(MARKUP, ANYTHING))
def test_a_literal_of_python_means_the_text(text: str) -> None:
    literal = in_python(text)
    assert ast.literal_eval(literal) == text
    assert literal.isprintable()
    assert "<" not in literal


@pytest.mark.parametrize(
    ("count", "words", "expected"),
    [
        (0, ("adapter",), "0 adapters"),
        (1, ("adapter",), "1 adapter"),
        (2, ("class", "classes"), "2 classes"),
        (1000, ("example",), "1,000 examples"),
        (9, ("pass",), "9 passes"),
    ],
)
def test_counts_agree_with_their_nouns(count: int, words: tuple[str, ...], expected: str) -> None:
    assert plural(count, *words) == expected
