"""Explains in error messages why a folder is not a saved composition."""

from __future__ import annotations

import json
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..text import one_line


def why_no_composition(folder: Path) -> str:
    """Why a folder cannot be read as a saved composition, judged by its `adapter_config.json`.

    Args:
        folder: a folder without a composition, or with one that lacks its weights.

    Returns:
        One sentence without a full stop.
    """
    kind = peft_type_in(folder)
    if kind is None:
        return f"{one_line(folder)} is not a saved composition: it has no {CONFIG_NAME} of an adapter"
    if kind == "COMPOSITION":
        files = f"neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}"
        return f"{one_line(folder)} is not a saved composition: its weights are missing, it has {files}"
    what = "a plain LoRA" if kind == "LORA" else f"an adapter of type {one_line(kind)}"
    where = f"; the composition beside it is {one_line(folder.parent)}" if _is_beside_composition(folder) else ""
    return f"{one_line(folder)} is not a saved composition: it is {what}{where}"


def _is_beside_composition(folder: Path) -> bool:
    return peft_type_in(folder.absolute().parent) == "COMPOSITION"


def peft_type_in(folder: Path) -> str | None:
    """The `peft_type` of the `adapter_config.json` in a folder; None if it cannot be read."""
    try:
        fields = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    return kind if isinstance(kind, str) else None
