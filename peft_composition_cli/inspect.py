"""Arguments of `peft-composition inspect`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .application import Command, app, reported
from .options import AsJson, CheckBase, ForTask


@app.command(cls=Command)
def inspect(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="Hub ids (id/folder within it, id@revision), folders, or a folder of adapters.",
        ),
    ],
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Base model, Hub id or folder. The adapters' modules and shapes are checked against its config. "
            "Without it, the adapters are compared with each other.",
            show_default=False,
        ),
    ] = None,
    task: ForTask = None,
    check_base: CheckBase = True,
    as_json: AsJson = False,
) -> None:
    """Show adapters and whether they can be composed, and if not, why."""
    with reported():
        from peft_composition.cli import inspect as command

        is_good = command.run(adapters, base, task and task.value, as_json, check_base)
    if not is_good:
        raise typer.Exit(1)
