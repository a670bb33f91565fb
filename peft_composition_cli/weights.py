"""Arguments of `peft-composition weights`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

from .application import Command, app, reported
from .options import AsJson, Saved


HEATMAP_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")  # of those that matplotlib writes


class Part(StrEnum):
    """Rows of the weights' table and heatmap."""

    module = "module"
    block = "block"
    model = "model"


@app.command(cls=Command)
def weights(
    folder: Saved,
    png: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Also save a heatmap in this file.", dir_okay=False, show_default=False),
    ] = None,
    by: Annotated[Part, typer.Option(help="Rows of the second table and of the heatmap.")] = Part.block,
    as_json: AsJson = False,
) -> None:
    """Show the mixing weights of a saved composition as tables and, with --png, as a heatmap."""
    if png is not None and png.suffix.lower() not in HEATMAP_SUFFIXES:
        suffixes = ", ".join(HEATMAP_SUFFIXES)
        raise typer.BadParameter(f"{png} must end with one of {suffixes}.", param_hint="'--png'")
    with reported():
        from peft_composition.cli import weights as command

        command.run(folder, png, by.value, as_json)
