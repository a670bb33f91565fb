"""Options and arguments that several commands have, and the values that they may take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer


class Task(StrEnum):
    """Task types of PEFT, as `base_models.AUTO_CLASSES` knows them."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class Dtype(StrEnum):
    """Dtypes of the saved weights."""

    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Adapters = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER...", help="Hub ids (id/folder within it, id@revision) or folders."),
]
Out = Annotated[Path, typer.Option(help="Folder to write to; must be new or empty.", file_okay=False)]
Saved = Annotated[
    Path, typer.Argument(metavar="DIR", help="A saved composition.", exists=True, file_okay=False, show_default=False)
]
ForTask = Annotated[
    Optional[Task],  # noqa: UP045  (typer reads it at run time)
    typer.Option("--task", help="Task type. Default: what the adapters state.", show_default=False),
]
RecordedBase = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--base", help="Base model, Hub id or folder. Default: as recorded.", show_default=False),
]
RecordedTask = Annotated[
    Optional[Task],  # noqa: UP045
    typer.Option(
        "--task", help="Task type, for the class of the base model. Default: as recorded.", show_default=False
    ),
]
AsDtype = Annotated[
    Optional[Dtype],  # noqa: UP045
    typer.Option("--dtype", help="Dtype of the saved weights. Default: unchanged.", show_default=False),
]

CheckBase = Annotated[
    bool,
    typer.Option(
        "--check-base/--no-check-base",
        help="Refuse adapters that name another base model. Modules and shapes are always compared.",
    ),
]


def require_empty(out: Path) -> None:
    """Refuse to overwrite an existing composition, adapter or model."""
    if out.is_dir() and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is not empty; give a new folder.", param_hint="--out")
