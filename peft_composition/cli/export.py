"""`peft-composition export`: a saved composition as a plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.export import lora_from_checkpoint
from ..terminal import print_errors, print_json, say
from .inputs import dtype_of


def run(folder: Path, out: Path, head: str, dtype: str | None, as_json: bool, **options: Any) -> None:
    """Save a composition as a plain LoRA, and print what the truncation cost."""
    include_head = {"with": True, "without": False}.get(head, head)
    lora = lora_from_checkpoint(folder, include_head=include_head, dtype=dtype_of(dtype), **options)  # type: ignore[arg-type]
    lora.save_pretrained(out)
    if as_json:
        found = {"ranks": lora.ranks, "errors": lora.errors, "total_error": lora.total_error}
        print_json({"out": str(out), **found})
        return
    if any(lora.errors.values()):
        print_errors(lora)
    say(f"{lora}: {out}")
