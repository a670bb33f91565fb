"""The fields of a config that select modules, as users or checkpoints give them: types, and that they compile."""

from __future__ import annotations

import re
from collections.abc import Set
from numbers import Integral
from typing import Any

from .scalars import as_list
from .text import shown


_NAME = re.compile(r"[\w.-]+")


def names_or_expression(field: str, value: Any) -> Any:
    """`value` of `target_modules` or `exclude_modules`: names, or one regular expression.

    Raises:
        ValueError: it is neither; names the field and the value.
    """
    if isinstance(value, str):
        _require_expression(field, value)
        return value
    return None if value is None else _names(field, value, "a list of module names or a regular expression")


def saved_modules(field: str, value: Any) -> list[str] | None:
    """`value` of `modules_to_save`: a list of names, which PEFT takes as regular expressions, too."""
    if value is None:
        return None
    hint = f"; write [{value!r}]" if isinstance(value, str) and _NAME.fullmatch(value) else ""
    names = _names(field, value, "a list of module names", hint)
    for name in names:
        _require_expression(field, name)
    return [*names]


def layer_indices(field: str, value: Any) -> list[int] | int | None:
    """`value` of `layers_to_transform`: the number of a layer, or a list of such."""
    if value is None or _is_index(value):
        return value if value is None else int(value)
    indices = [*value] if isinstance(value, (Set, range)) else as_list(value)
    if indices is None or not all(map(_is_index, indices)):
        raise ValueError(f"{field} must be the number of a layer or a list of such, from 0 on, got {shown(value)}")
    return [*map(int, indices)]


def layer_lists(field: str, value: Any) -> list[str] | str | None:
    """`value` of `layers_pattern`: the name of a list of layers, or several.

    PEFT takes them as parts of a regular expression. Here they are names, so that the pattern of a stranger's
    checkpoint cannot be one that never ends.
    """
    if value is None:
        return None
    names = [value] if isinstance(value, str) else _names(field, value, "the name of a list of layers, or several")
    for name in names:
        if name and not _NAME.fullmatch(name):
            raise ValueError(f"{field} must be the name of a list of layers, such as 'layers', got {shown(name)}")
    return value if isinstance(value, str) else [*names]


def _names(field: str, value: Any, words: str, hint: str = "") -> Any:
    """Names as given, in a list or a set."""
    entries = [*value] if isinstance(value, Set) else as_list(value)
    if entries is None or not all(isinstance(entry, str) and entry for entry in entries):
        raise ValueError(f"{field} must be {words}, got {shown(value)}{hint}")
    return value if isinstance(value, Set) else entries


def _require_expression(field: str, expression: str) -> None:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{field}: {shown(expression)} is not a regular expression: {error}") from error


def _is_index(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0
