"""Arguments of `peft-composition search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .application import Command, app, reported
from .options import AsJson, Task


@app.command(cls=Command)
def search(
    base: Annotated[str, typer.Option(help="Base model, Hub id.")],
    task: Annotated[
        Optional[Task],  # noqa: UP045  (typer reads it at run time)
        typer.Option(help="Only adapters with this task type.", show_default=False),
    ] = None,
    most_rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Only adapters of at most this rank.", show_default=False),
    ] = None,
    license: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Only adapters with this license; may be given several times.", show_default=False),
    ] = None,
    min_downloads: Annotated[int, typer.Option(min=0, help="Only adapters with so many downloads in 30 days.")] = 0,
    author: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Only adapters of this user or organisation.", show_default=False),
    ] = None,
    tag: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Only adapters with this tag; may be given several times.", show_default=False),
    ] = None,
    copies: Annotated[
        bool, typer.Option("--copies/--no-copies", help="Also adapters of copies of the base, such as 4-bit ones.")
    ] = True,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the most downloaded first.")] = 100,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Also write them for select.", dir_okay=False, show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the adapters on the Hub that were trained on a base model, and whether they can be composed."""
    with reported():
        from peft_composition.cli import search as command

        command.run(
            base,
            out,
            as_json,
            task=task and task.value,
            most_rank=most_rank,
            licenses=license or [],
            min_downloads=min_downloads,
            author=author,
            tags=tag or [],
            with_copies=copies,
            limit=limit,
        )
