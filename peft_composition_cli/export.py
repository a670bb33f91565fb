"""Arguments of `peft-composition export`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Optional

import typer

from .application import Command, app, reported
from .options import AsDtype, AsJson, Out, Saved, require_empty


class Head(StrEnum):
    """What an export does with the trained head."""

    included = "with"
    excluded = "without"
    separate = "separate"


@app.command(cls=Command)
def export(
    folder: Saved,
    out: Out,
    rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Largest rank per module. Default: exact.", show_default=False),
    ] = None,
    energy: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Instead of --rank: share of the squared norm to keep, up to 1.", show_default=False),
    ] = None,
    round_rank: Annotated[
        bool, typer.Option("--round-rank", help="Round the rank up to a rank that vLLM accepts.")
    ] = False,
    own_ranks: Annotated[
        bool,
        typer.Option(
            "--own-ranks", help="Keep a rank per module: smaller, but llama.cpp and diffusers read it wrongly."
        ),
    ] = False,
    head: Annotated[Head, typer.Option(help="Save the trained head with it, not at all, or in a separate file.")] = (
        Head.included
    ),
    dtype: AsDtype = None,
    as_json: AsJson = False,
) -> None:
    """Export a saved composition as a plain LoRA that needs no plugin."""
    if rank is not None and energy is not None:
        raise typer.BadParameter("Give --rank or --energy, not both.")
    if energy is not None and not 0 < energy <= 1:
        raise typer.BadParameter(f"must be more than 0 and at most 1, got {energy:g}.", param_hint="--energy")
    if round_rank and own_ranks:
        raise typer.BadParameter("Give --round-rank or --own-ranks, not both.")
    require_empty(out)
    with reported():
        from peft_composition.cli import export as command

        command.run(
            folder,
            out,
            head.value,
            dtype=dtype and dtype.value,
            as_json=as_json,
            rank=rank,
            energy=energy,
            round_rank=round_rank,
            one_rank=not own_ranks,
        )
