"""Removes local paths from a saved composition before others can read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from peft.utils import CONFIG_NAME

from .drafts import CONFIG_DRAFT, draft_in, take_place
from .names import LORA_SUBFOLDER
from .references import is_hub_id


def without_local_paths(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a composition's config as they are saved, with absolute paths of folders cut to their last part.

    Names, hashes, Hub ids, commits and relative paths stay, and so do the paths that a checkpoint without factors
    needs to find its adapters.

    Args:
        fields: the fields of a config.

    Returns:
        The same fields; `"/home/me/loras/first"` becomes `"./first"`.
    """
    result = dict(fields)
    if not fields.get("composed_modules"):  # not built yet: the paths say where the adapters are
        return result
    if fields.get("save_adapters"):
        result["adapters"] = [{**entry, "path": _shortened(entry["path"])} for entry in fields["adapters"]]
    result["provenance"] = [
        {
            **entry,
            "path": _shortened(entry["path"]),
            "base_model_name_or_path": _shortened(entry.get("base_model_name_or_path")),
        }
        for entry in fields["provenance"]
    ]
    return result


def publish(folder: Path) -> None:
    """Prepare a folder for upload: remove the base model from configs if it is a local folder.

    The base models that the adapters state stay; it is unknown whether the folder holds the same weights.

    Args:
        folder: a folder with an `adapter_config.json`, and possibly that of a plain LoRA in a subfolder.
    """
    for path in (folder / CONFIG_NAME, folder / LORA_SUBFOLDER / CONFIG_NAME):
        if not path.is_file():
            continue
        fields = json.loads(path.read_text(encoding="utf-8"))
        base = fields.get("base_model_name_or_path")
        if base and not is_hub_id(base):
            fields["base_model_name_or_path"] = None
            with draft_in(path.parent, CONFIG_DRAFT) as draft:
                (draft / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
                take_place(draft / CONFIG_NAME, path)


def _shortened(path: str | None) -> str | None:
    if path is None:
        return None
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(path).is_absolute() or path.startswith("~"):
            return f"./{kind(path).name}"
    return path
