"""Records, in a small file beside a plain LoRA in a saved composition, the weights that it was made from.

Weights and export are written at different times, often days apart. Only this file shows whether an export still
belongs to the weights of the composition.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..names import LORA_SUBFOLDER


RECORD_NAME = "made_from.json"
HEAD_NAME = "head.safetensors"


@dataclass(frozen=True)
class Exported:
    """The record of an export.

    Attributes:
        composition_sha256: hash of the composition's weights file, whose fingerprint represents its config.
        lora_sha256: hash of the export's weights file, which distinguishes it from another adapter in its place.
        relative_error: relative error of the truncation; 0 if nothing was cut.
    """

    composition_sha256: str
    lora_sha256: str
    relative_error: float


def weights_file(folder: Path) -> Path | None:
    """The weights file of an adapter that PEFT loads."""
    candidates = [folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    return next((path for path in candidates if path.is_file()), None)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(folder: Path, composition_sha256: str, relative_error: float) -> None:
    """Write the record of an export into its folder; the weights must be there already."""
    record = Exported(composition_sha256, sha256_of(folder / SAFETENSORS_WEIGHTS_NAME), relative_error)
    (folder / RECORD_NAME).write_text(json.dumps(asdict(record), indent=2), encoding="utf-8")


def export_in(folder: Path) -> Exported | None:
    """The record of the export in a saved composition, if the export belongs to its present weights."""
    place = folder / LORA_SUBFOLDER
    record = _record_in(place)
    is_whole = (place / CONFIG_NAME).is_file() and (place / SAFETENSORS_WEIGHTS_NAME).is_file()
    return record if record is not None and is_whole and _is_current(record, folder) else None


def remove_outdated_export(folder: Path) -> bool:
    """Remove the export in the subfolder of a saved composition if it was made from other weights.

    A folder without a record, or with other weights than recorded, was put there by somebody else and stays.

    Args:
        folder: the folder of the saved composition.

    Returns:
        Whether an export was removed.
    """
    place = folder / LORA_SUBFOLDER
    record = _record_in(place)
    if record is None or _is_current(record, folder):
        return False
    for name in (
        CONFIG_NAME,
        SAFETENSORS_WEIGHTS_NAME,
        HEAD_NAME,
        RECORD_NAME,
    ):  # without the first file, nothing loads the others
        (place / name).unlink(missing_ok=True)
    if not any(place.iterdir()):
        place.rmdir()
    return True


def _is_current(record: Exported, folder: Path) -> bool:
    weights = weights_file(folder)
    return weights is not None and sha256_of(weights) == record.composition_sha256


def _record_in(place: Path) -> Exported | None:
    """The record of an export; None if it is missing or damaged, or the weights beside it are others."""
    if place.is_symlink() or not (place / RECORD_NAME).is_file():
        return None
    try:
        fields = json.loads((place / RECORD_NAME).read_text(encoding="utf-8"))
        record = Exported(
            str(fields["composition_sha256"]), str(fields["lora_sha256"]), float(fields["relative_error"])
        )
    except (ValueError, KeyError, TypeError):
        return None
    if not math.isfinite(record.relative_error):
        return None
    weights = place / SAFETENSORS_WEIGHTS_NAME
    return record if not weights.exists() or sha256_of(weights) == record.lora_sha256 else None
