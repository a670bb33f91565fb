"""Reads the YAML at the beginning of an adapter's card, in bounded time for cards of any size and content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from .schema import read_bytes


MAX_BYTES = 256 << 10
MAX_DEPTH = 20
MAX_EVENTS = 100_000  # takes about a second
MAX_LICENSES = 20
MAX_LICENSE = 100  # characters
_FENCE = b"---"
_NOTHING = ("", "~", "null", "Null", "NULL")


def stated_license(card: Path | None) -> str | None:
    """The license that a card states: its Hub identifier, or `other (name)`.

    People write cards by hand, and no adapter is refused for its card: if the front matter cannot be read, or the
    license is neither a short word nor a list of short words, the result is None.
    """
    if card is None:
        return None
    try:
        block = _front_matter(read_bytes(card, MAX_BYTES))
        if b"license" not in block:  # most cards state none, and parsing YAML takes longer than reading the weights
            return None
        fields = dict(_top_level(block.decode("utf-8")))
    except (OSError, ValueError, OverflowError, yaml.YAMLError):
        return None
    licenses, name = fields.get("license", []), fields.get("license_name", [])
    if not licenses or len(licenses) > MAX_LICENSES or not all(map(_is_short, [*licenses, *name])):
        return None
    stated = ", ".join(licenses)
    return f"{stated} ({name[0]})" if len(name) == 1 else stated


def _is_short(text: str) -> bool:
    return len(text) <= MAX_LICENSE and text.isprintable()


def _front_matter(content: bytes) -> bytes:
    """The text between two lines of three dashes at the beginning; empty if there is none."""
    lines = content.removeprefix(b"\xef\xbb\xbf").lstrip().splitlines()
    if not lines or lines[0].rstrip() != _FENCE:
        return b""
    for number, line in enumerate(lines):
        if number and line.rstrip() == _FENCE:
            return b"\n".join(lines[1:number])
    return b""


def _top_level(text: str) -> Iterator[tuple[str, list[str]]]:
    """The entries of a YAML mapping whose values are scalars or flat lists of scalars.

    Only the parser's events are used: nothing is built, so references and large numbers cost nothing.

    Raises:
        ValueError: the mapping is too long or nested too deeply.
        yaml.YAMLError: it is not YAML.
    """
    key: str | None = None
    is_key, depth, scalars, is_flat = True, 0, list[str](), True
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        is_start, is_end = isinstance(event, yaml.CollectionStartEvent), isinstance(event, yaml.CollectionEndEvent)
        if count > MAX_EVENTS or depth > MAX_DEPTH:
            raise ValueError("it is too long or nested too deeply")
        depth -= is_end
        if depth == 0:
            if is_start and not isinstance(event, yaml.MappingStartEvent):
                raise ValueError("it is not a mapping")
            depth += is_start
            continue
        if isinstance(event, yaml.ScalarEvent) and event.tag is None:
            if not (event.implicit[0] and event.value in _NOTHING):
                scalars.append(event.value)
        elif not is_end:
            is_list = isinstance(event, yaml.SequenceStartEvent) and event.tag is None
            is_flat = is_flat and is_list and depth == 1
        depth += is_start
        if depth == 1:  # a key or a value is complete
            if is_key:
                key = scalars[0] if is_flat and len(scalars) == 1 else None
            elif key is not None and is_flat:
                yield key, scalars
            is_key, scalars, is_flat = not is_key, [], True
