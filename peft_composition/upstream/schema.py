"""Reads an upstream adapter's `adapter_config.json` and checks all fields that are used.

Files come from strangers: only regular files are read, and only up to a limit.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..scalars import as_float
from ..text import one_line, shown
from . import formats
from .patterns import PatternError, require_patterns


MAX_CONFIG_BYTES = 8 << 20  # a rank for each of 100,000 modules
MAX_TEXT = 4096
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter of any kind; for a LoRA, all fields that are used have been checked.

    Args:
        path: the file.

    Raises:
        ValueError: the file is not readable, does not describe a PEFT adapter, or has a field with an invalid value;
            the message names the field and the value, but not the adapter.
    """
    try:
        content = read_bytes(path, MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{one_line(path)} cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(f"{one_line(path)} has more than {MAX_CONFIG_BYTES} bytes, too many for a config")
    placeholder = formats.placeholder(content)
    if placeholder is not None:
        raise ValueError(f"{one_line(path)} {placeholder}")
    try:
        config = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{one_line(path)} is not valid JSON: {one_line(error)}") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        found = formats.of_config(config) if isinstance(config, dict) else None
        detail = f"; {found}" if found else ""
        raise ValueError(f"{one_line(path)} does not describe a PEFT adapter: it has no peft_type{detail}")
    _require(config, _FIELDS)
    if config["peft_type"] == "LORA":
        _require(config, _LORA_FIELDS)
        for field in ("rank_pattern", "alpha_pattern"):
            try:
                require_patterns(config.get(field) or {})
            except PatternError as error:
                raise ValueError(f"{field}: {error}") from error
    return config


def read_bytes(path: Path, limit: int) -> bytes:
    """The first bytes of a regular file; anything else, such as a pipe, could block forever.

    Args:
        path: the file.
        limit: how many bytes to read at most.

    Raises:
        OSError: the file does not exist, cannot be read, or is not a regular file.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{one_line(path)} is not a regular file")
        return file.read(limit)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _require(config: Mapping[str, Any], fields: Mapping[str, tuple[str, Callable[[Any], bool]]]) -> None:
    for name, (words, is_valid) in fields.items():
        if name in config and not is_valid(config[name]):
            raise ValueError(f"{name} must be {words}, got {_culprit(config[name], is_valid)}")


def _culprit(value: Any, is_valid: Callable[[Any], bool]) -> str:
    """The value to show in a message; for a large dict only the first invalid entry."""
    if isinstance(value, dict) and len(value) > 4:
        wrong = next((key for key, entry in value.items() if not is_valid({key: entry})), None)
        if wrong is not None:
            return f"{shown(value[wrong])} for {shown(wrong)}"
    return shown(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and not UNPRINTABLE.search(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _is_number(value: Any) -> bool:
    number = as_float(value)
    return number is not None and math.isfinite(number)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _optional(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


def _pattern_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(is_valid, value.values())))


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "peft_type": ("the name of a PEFT method", _is_text),
    "base_model_name_or_path": ("the name of a model or null", _optional(_is_text)),
    "task_type": ("the name of a task or null", _optional(_is_text)),
}
_LORA_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a positive integer", _optional(_is_rank)),
    "lora_alpha": ("a finite number", _is_number),
    "rank_pattern": ("a dict of positive integers by module name", _pattern_of(_is_rank)),
    "alpha_pattern": ("a dict of finite numbers by module name", _pattern_of(_is_number)),
    "use_rslora": ("true or false", _optional(lambda value: isinstance(value, bool))),
    "use_dora": ("true or false", _optional(lambda value: isinstance(value, bool))),
    "bias": ("a word", _is_text),
    "init_lora_weights": ("true, false or a word", _optional(lambda v: isinstance(v, bool) or _is_text(v))),
    "target_modules": (
        "a list of module names, or one expression",
        _optional(lambda value: _is_text(value) or _is_list_of_text(value)),
    ),
    "target_parameters": ("a list of parameter names", _optional(_is_list_of_text)),
}
