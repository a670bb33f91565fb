"""Looks up modules in an adapter's `rank_pattern` and `alpha_pattern` as PEFT does, but in bounded time.

PEFT matches the keys as regular expressions by backtracking, which takes forever for some expressions. Here a set of
positions passes through the expression once; `re` itself only decides about single characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from ..text import quoted


MAX_KEYS = 100_000
MAX_EXPRESSIONS = 1000
MAX_KEY_LENGTH = 1000
MAX_NESTING = 50
# The most operations on sets of positions, for one key and module and for all; each takes about a microsecond.
MAX_STEPS_PER_MATCH = 200_000
MAX_STEPS = 10_000_000
CACHED_MODULES = 1 << 16
_PLAIN = re.compile(r"[\w.-]*")
_GROUP = re.compile(r"\((?:\?:|\?P<\w+>)?(?!\?)")
_SET = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[^0-9])", re.DOTALL)
_REPEAT = re.compile(r"(?:[*+?]|\{(?=[0-9,])(?P<least>[0-9]*)(?P<comma>,?)(?P<most>[0-9]*)\})(?P<mode>[?+]?)")
_Index = dict[int, dict[tuple[int, ...], dict[str, int]]]
_ANCHORS = ("^", "$", r"\A", r"\Z", r"\b", r"\B")


class PatternError(ValueError):
    """A key is not a regular expression, or cannot be matched in bounded time; the message names it."""


def value_for(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value that a `rank_pattern` or `alpha_pattern` has for a module.

    Args:
        pattern: values by key. As in PEFT's `get_pattern_key`, the first key counts that matches a suffix of the name;
            if there is none, a key that equals the name.
        module: name of the module.
        default: the value if no key matches.

    Raises:
        PatternError: a key cannot be matched.
    """
    if not pattern:
        return default
    key = _table(tuple(pattern)).find(module)
    return pattern.get(module if key is None else key, default)


def require_patterns(pattern: Mapping[str, Any]) -> None:
    """Raise PatternError if a key cannot be matched."""
    _table(tuple(pattern))


@lru_cache(maxsize=8)  # adapters of one kind have their patterns in common
def _table(keys: tuple[str, ...]) -> _Table:
    return _Table(keys)


class _Table:
    """The keys of one pattern: expressions of fixed length in an index, all others in a list."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        if len(keys) > MAX_KEYS:
            raise PatternError(f"it has {len(keys)} keys; at most {MAX_KEYS} are supported")
        self._keys = keys
        self._steps = 0
        self._found: dict[str, str | None] = {}
        # By length, then by the places where any character matches: the number of the first key with this text.
        self._fixed: _Index = {}
        self._whole: _Index = {}
        self._expressions: list[tuple[int, _Node]] = []
        for number, key in enumerate(keys):
            self._enter(number, key)

    def _enter(self, number: int, key: str) -> None:
        if len(key) > MAX_KEY_LENGTH:
            raise PatternError(f"its key {quoted(key)} is longer than {MAX_KEY_LENGTH} characters")
        node = None if _PLAIN.fullmatch(key) else _parsed(key)
        fixed = _fixed_text(node) if node is not None else (False, [None if char == "." else char for char in key])
        if node is not None and fixed is None:
            _require_valid(key)
            self._expressions.append((number, node))
            if len(self._expressions) > MAX_EXPRESSIONS:
                raise PatternError(f"more than {MAX_EXPRESSIONS} of its keys are regular expressions")
            return
        assert fixed is not None
        is_whole, text = fixed
        places = tuple(place for place, char in enumerate(text) if char is None)
        index = self._whole if is_whole else self._fixed
        plain = "".join("." if char is None else char for char in text)
        index.setdefault(len(text), {}).setdefault(places, {}).setdefault(plain, number)

    def find(self, module: str) -> str | None:
        """The first key that matches a suffix of a name, which starts at the beginning or after a dot."""
        if module not in self._found:
            if len(self._found) >= CACHED_MODULES:
                self._found.clear()
            numbers = self._numbers(module)
            self._found[module] = self._keys[min(numbers)] if numbers else None
        return self._found[module]

    def _numbers(self, module: str) -> list[int]:
        if "\n" in module:  # the dot and the dollar sign of regular expressions treat it specially
            raise PatternError(f"the name of module {quoted(module)} has a line break")
        ends = [module, *(module[place + 1 :] for place, char in enumerate(module) if char == ".")]
        numbers = [*self._indexed(self._whole, ends[:1], module), *self._indexed(self._fixed, ends, module)]
        first = min(numbers, default=len(self._keys))
        name = _Name(module)
        for number, node in self._expressions:
            if number > first:
                break
            name.steps = 0
            try:
                is_match = node.ends(name, name.starts) >> len(module) & 1
            except _TooManyStepsError:
                is_match, name.steps = 0, MAX_STEPS + 1
            self._count(name.steps, number, module)
            if is_match:
                return [number]
        return numbers

    def _indexed(self, index: _Index, ends: list[str], module: str) -> Iterator[int]:
        for end in ends:
            for places, numbers in index.get(len(end), {}).items():
                self._count(1, next(iter(numbers.values())), module)
                text = list(end)
                for place in places:
                    text[place] = "."
                number = numbers.get("".join(text))
                if number is not None:
                    yield number

    def _count(self, steps: int, number: int, module: str) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise PatternError(
                f"its key {quoted(self._keys[number])} takes too long to match with module {quoted(module)}; write "
                "module names instead"
            )


class _TooManyStepsError(Exception):
    pass


class _Name:
    """The name of a module; sets of positions in it are the bits of an integer."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps = 0
        self._characters: dict[str, int] = {}
        self._places: dict[str, int] = {}
        for place, char in enumerate(text):
            self._characters[char] = self._characters.get(char, 0) | 1 << place
        self.starts = 1 | self._characters.get(".", 0) << 1

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS_PER_MATCH:
            raise _TooManyStepsError

    def places_of(self, char: str) -> int:
        return self._characters.get(char, 0)

    def places_matching(self, source: str) -> int:
        places = self._places.get(source)
        if places is None:
            places = sum(where for char, where in self._characters.items() if _matches(source, char))
            self._places[source] = places
        return places


class _Node(Protocol):
    def ends(self, name: _Name, starts: int) -> int: ...


@dataclass(frozen=True)
class _Literal:
    char: str

    def ends(self, name: _Name, starts: int) -> int:
        name.step()
        return (starts & name.places_of(self.char)) << 1


@dataclass(frozen=True)
class _OneOf:
    r"""A dot, a class such as `\d`, or a set in brackets."""

    source: str

    def ends(self, name: _Name, starts: int) -> int:
        name.step()
        return (starts & name.places_matching(self.source)) << 1


@dataclass(frozen=True)
class _Anchor:
    source: str

    def ends(self, name: _Name, starts: int) -> int:
        anchor, found = re.compile(self.source), 0
        for place in range(len(name.text) + 1):
            name.step()
            if anchor.match(name.text, place):
                found |= 1 << place
        return starts & found


@dataclass(frozen=True)
class _Sequence:
    items: tuple[_Node, ...]

    def ends(self, name: _Name, starts: int) -> int:
        for item in self.items:
            if not starts:
                return 0
            starts = item.ends(name, starts)
        return starts


@dataclass(frozen=True)
class _Choice:
    options: tuple[_Node, ...]

    def ends(self, name: _Name, starts: int) -> int:
        found = 0
        for option in self.options:
            found |= option.ends(name, starts)
        return found


@dataclass(frozen=True)
class _Repetition:
    item: _Node
    least: int
    most: int | None

    def ends(self, name: _Name, starts: int) -> int:
        for _ in range(self.least):
            name.step()
            before, starts = starts, self.item.ends(name, starts)
            if starts == before:
                break
        found, new, times = starts, starts, self.least
        while new and (self.most is None or times < self.most):
            name.step()
            new = self.item.ends(name, new) & ~found
            found |= new
            times += 1
        return found


@lru_cache(maxsize=1 << 12)
def _matches(source: str, char: str) -> bool:
    return re.compile(source).fullmatch(char) is not None


def _parsed(key: str) -> _Node:
    parser = _Parser(key)
    try:
        node = parser.choice(0)
        if parser.place < len(key):
            raise parser.refusal()
    except PatternError:
        _require_valid(key)  # says more of what PEFT itself cannot use
        raise
    return node


class _Parser:
    """Takes a regular expression apart; syntax of `re` that sets of positions cannot express is refused."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.place = 0

    def choice(self, depth: int) -> _Node:
        options = [self._sequence(depth)]
        while self.key.startswith("|", self.place):
            self.place += 1
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self, depth: int) -> _Sequence:
        items: list[_Node] = []
        while self.place < len(self.key) and self.key[self.place] not in "|)":
            item = self._item(depth)
            repeat = _REPEAT.match(self.key, self.place)
            if repeat is not None:
                item = self._repeated(item, repeat)
            items.append(item)
        return _Sequence(tuple(items))

    def _item(self, depth: int) -> _Node:
        char = self.key[self.place]
        if char == "(":
            self._take(_GROUP)
            if depth >= MAX_NESTING:
                raise self.refusal()
            inside = self.choice(depth + 1)
            self._take(re.compile(r"\)"))
            return inside
        if char == "[":
            return _OneOf(self._compiled(self._take(_SET)))
        if char in "^$":
            return _Anchor(self._take(re.compile(r"[$^]")))
        if char == "\\":
            source = self._take(_ESCAPE)
            if source in _ANCHORS:
                return _Anchor(source)
            escaped = source[1:]
            return _OneOf(self._compiled(source)) if escaped.isalnum() else _Literal(escaped)
        if char in "*+?":
            raise self.refusal()
        self.place += 1
        return _OneOf(".") if char == "." else _Literal(char)

    def _repeated(self, item: _Node, repeat: re.Match[str]) -> _Node:
        self.place = repeat.end()
        sign = repeat[0][0]
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(sign, (0, None))
        if sign == "{":
            least = int(repeat["least"] or 0)
            most = least if not repeat["comma"] else int(repeat["most"]) if repeat["most"] else None
        if repeat["mode"] == "+":
            raise self.refusal()
        return _Repetition(item, least, most)

    def _take(self, what: re.Pattern[str]) -> str:
        found = what.match(self.key, self.place)
        if found is None:
            raise self.refusal()
        self.place = found.end()
        return found[0]

    def _compiled(self, source: str) -> str:
        try:
            re.compile(source)
        except re.error as error:
            raise self.refusal() from error
        return source

    def refusal(self) -> PatternError:
        return PatternError(
            f"its key {quoted(self.key)} is a regular expression that is not supported from character "
            f"{self.place + 1} on: write module names, or an expression without groups that begin with '(?', "
            "references to groups and possessive quantifiers"
        )


def _require_valid(key: str) -> None:
    """Refuse keys that PEFT itself cannot use."""
    try:
        re.compile(key)
        re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"its key {quoted(key)} is not a regular expression: {error}") from error


def _fixed_text(node: _Node) -> tuple[bool, list[str | None]] | None:
    """For an expression of fixed length: whether it begins at `^`, and its characters (None for any); else None."""
    items = list(node.items) if isinstance(node, _Sequence) else [node]
    is_whole = bool(items) and items[0] == _Anchor("^")
    if items and items[-1] == _Anchor("$"):  # every expression ends where the name ends
        items.pop()
    text: list[str | None] = []
    for item in items[is_whole:]:
        if isinstance(item, _Literal):
            text.append(item.char)
        elif item == _OneOf("."):
            text.append(None)
        else:
            return None
    return is_whole, text
