"""Checks the fields of a config that select modules: their types, and that regular expressions compile."""

from __future__ import annotations

import re
from collections.abc import Set
from numbers import Integral
from typing import Any

from .scalars import as_list
from .text import shown


HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
"""The modules that PEFT trains in full for a task type; they are therefore not composed."""
_NAME = re.compile(r"[\w.-]+")


def names_or_expression(field: str, value: Any) -> Any:
    """The `value` of `target_modules` or `exclude_modules`: names, or one regular expression.

    Raises:
        ValueError: it is neither; the message names the field and the value.
    """
    if isinstance(value, str):
        _require_expression(field, value)
        return value
    return None if value is None else _names(field, value, "a list of module names or a regular expression")


def saved_modules(field: str, value: Any) -> list[str] | None:
    """The `value` of `modules_to_save`: a list of names, which PEFT also treats as regular expressions.

    Each once: PEFT adds the names of heads to a loaded config that has them already.
    """
    if value is None:
        return None
    hint = f"; write [{value!r}]" if isinstance(value, str) and _NAME.fullmatch(value) else ""
    names = _names(field, value, "a list of module names", hint)
    for name in names:
        _require_expression(field, name)
    return [*dict.fromkeys(sorted(names) if isinstance(names, Set) else names)]


def layer_indices(field: str, value: Any) -> list[int] | int | None:
    """The `value` of `layers_to_transform`: the index of a layer, or a list of indices."""
    if value is None or _is_index(value):
        return value if value is None else int(value)
    indices = [*value] if isinstance(value, (Set, range)) else as_list(value)
    if indices is None or not all(map(_is_index, indices)):
        raise ValueError(f"{field} must be the index of a layer, or a list of indices from 0 on, got {shown(value)}")
    return [*map(int, indices)]


def layer_lists(field: str, value: Any) -> list[str] | str | None:
    """The `value` of `layers_pattern`: one or more names of module lists.

    PEFT treats them as parts of a regular expression. Here they must be names, so that a stranger's checkpoint cannot
    contain a pattern that takes forever to match.
    """
    if value is None:
        return None
    names = [value] if isinstance(value, str) else _names(field, value, "one or more names of module lists")
    for name in names:
        if name and not _NAME.fullmatch(name):
            raise ValueError(f"{field} must be the name of a module list, such as 'layers', got {shown(name)}")
    return value if isinstance(value, str) else [*names]


def _names(field: str, value: Any, words: str, hint: str = "") -> Any:
    """The names of a list or a set."""
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


def with_head(task_type: str | None, saved: list[str] | None) -> list[str] | None:
    """The names of `modules_to_save`, with those of the new head of a task.

    For tokens and questions PEFT adds them when the model is built, to the config that it was given alone.
    """
    head = HEADS.get(task_type or "", [])
    return [*dict.fromkeys([*(saved or []), *head])] if head else saved
