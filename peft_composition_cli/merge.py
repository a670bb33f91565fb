"""Arguments of `peft-composition merge`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .application import Command, app, reported
from .options import AsDtype, AsJson, Out, Saved, Task, require_empty


@app.command(cls=Command)
def merge(
    folder: Saved,
    out: Out,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Base model, Hub id or folder. Default: as recorded.", show_default=False),
    ] = None,
    task: Annotated[
        Optional[Task],  # noqa: UP045
        typer.Option(help="Task type, for the class of the base model. Default: as recorded.", show_default=False),
    ] = None,
    dtype: AsDtype = None,
    as_json: AsJson = False,
) -> None:
    """Save the base model with a composition merged into it, and its tokenizer or processor."""
    require_empty(out)
    with reported():
        from peft_composition.cli import merge as command

        command.run(folder, out, base, task and task.value, dtype and dtype.value, as_json)
