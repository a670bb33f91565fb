"""Puts what the library says into the words of the command that runs: it names arguments as Python has them.

One place for all commands: `label=...` becomes `--label`, `k=9` becomes `--k 9`, `save_adapters=False` becomes
`--no-save-adapters`. What a command has no option for stays as it is, and so do quotes and calls in Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple


class Option(NamedTuple):
    """How an argument is given on the command line; a switch has no value."""

    name: str
    off: str | None
    is_switch: bool


# Arguments of the library whose options have other names, with whether a switch means the opposite.
OTHER_NAMES = {
    "check_base_model": ("check_base", False),
    "include_head": ("head", False),
    "licenses": ("license", False),
    "one_rank": ("own_ranks", True),
    "tags": ("tag", False),
    "with_copies": ("copies", False),
}
# What is said of Python alone.
PHRASES = (
    (re.compile(r'\{"path": \.\.\., "subfolder": "([^"]+)"\}'), r"its path with /\1"),
    (re.compile(r'\{"path": "([^"]+)", "subfolder": "([^"]+)"\}'), r"\1/\2"),
    (
        re.compile(r'give each a name of its own: \{"path": \.\.\., "name": \.\.\.\}'),
        "give each once, or a copy in a folder of another name",
    ),
    (re.compile(r"dataclasses\.replace\(config, composed_modules=None\)"), "peft-composition compose"),
)
_QUOTED = r"""(?<!\w)'[^']*'(?!\w)|(?<![\w=])"[^"]*"(?!\w)"""
_CALL = r"(?<![\w.])[\w.]+\((?:[^()]|\([^()]*\))*\)"
_ARGUMENT = re.compile(
    rf"""{_QUOTED}|{_CALL}|(?<![\w.,/\\=:@?&#-])(?P<name>[a-z]\w*)=(?P<value>\.\.\.|"[^"]*"|'[^']*'|[\w+-]+(?:\.\w+)*)"""
)
_running: ContextVar[Mapping[str, Option]] = ContextVar("_running", default={})  # noqa: B039  (never changed in place)


def run_with(parameters: Iterable[Any]) -> None:
    """Speak in the words of a command from now on, by its parameters as typer has them."""
    found = {}
    for own in parameters:
        names = [name for name in own.opts if name.startswith("--")]
        if names:
            off = own.secondary_opts[0] if own.secondary_opts else None
            found[own.name] = Option(names[0], off, bool(getattr(own, "is_flag", False)))
    _running.set(found)


def spoken(text: str) -> str:
    """A message of the library in the words of the running command; as it is where none runs."""
    options = _running.get()
    if not options:
        return text
    if "check_base" in options:
        text = text.replace("CompositionConfig(check_base_model=False)", "check_base_model=False")
    for phrase, words in PHRASES:
        text = phrase.sub(words, text)
    return _ARGUMENT.sub(lambda match: _put(match, options), text)


def _put(match: re.Match[str], options: Mapping[str, Option]) -> str:
    name, value = match["name"], match["value"]
    known, is_opposite = OTHER_NAMES.get(name or "", (name, False))
    option = options.get(known)
    if option is None:
        return match[0]
    if value == "...":
        return option.name
    if option.is_switch:
        if value not in ("True", "False"):
            return match[0]
        is_on = (value == "True") != is_opposite
        return option.name if is_on else option.off or f"no {option.name}"
    bare = value.removeprefix("torch.").strip("\"'")
    return f"{option.name} {value if ' ' in bare else bare}"
