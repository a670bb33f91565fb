"""What a folder holds that is no saved composition: for error messages."""

from __future__ import annotations

import json
from pathlib import Path

from peft.utils import CONFIG_NAME

from ..text import one_line


def why_no_composition(folder: Path) -> str:
    """Why a folder cannot be read as a saved composition, judged by its `adapter_config.json`.

    Args:
        folder: has no composition, or one without its weights.

    Returns:
        One sentence without a full stop.
    """
    kind = _peft_type(folder)
    if kind is None:
        return f"{one_line(folder)} is no saved composition: it has no {CONFIG_NAME} of an adapter"
    if kind == "COMPOSITION":
        return f"There is no saved composition in {one_line(folder)}: its weights file is missing"
    what = "a plain LoRA" if kind == "LORA" else f"an adapter of type {one_line(kind)}"
    where = f"; the composition beside it is {one_line(folder.parent)}" if _is_beside_composition(folder) else ""
    return f"{one_line(folder)} is no saved composition: it is {what}, not a composition{where}"


def _is_beside_composition(folder: Path) -> bool:
    return _peft_type(folder.absolute().parent) == "COMPOSITION"


def _peft_type(folder: Path) -> str | None:
    try:
        fields = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    return kind if isinstance(kind, str) else None
