"""Arguments of `peft-composition select`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .application import Command, app, reported
from .data_options import Answer, Data, Image, K, Label, Prompt, Split, Subset, Text, columns_of
from .options import AsJson


@app.command(cls=Command)
def select(
    base: Annotated[str, typer.Option(help="Base model, Hub id or folder.")],
    data: Data,
    adapters: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads it at run time)
        typer.Argument(
            metavar="ADAPTER...",
            help="Candidates: Hub ids (id/folder within it, id@revision), folders, or a folder of adapters.",
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="A file of candidates: what search --out wrote, or a Hub id or folder on each line.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Also the Hub's adapters of this base.")] = False,
    text: Text = None,
    image: Image = None,
    label: Label = None,
    prompt: Prompt = None,
    answer: Answer = None,
    split: Split = "train",
    subset: Subset = None,
    k: K = None,
    most: Annotated[int, typer.Option(min=1, help="Choose at most so many.")] = 4,
    halving: Annotated[
        bool, typer.Option(help="Score all on few examples and the best on more, or all on all.")
    ] = True,
    log: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="Write here what was scored; if the file exists, go on from there.",
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    cache_budget: Annotated[float, typer.Option(min=0, help="GB that downloaded candidates may take.")] = 20.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in one forward pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the draw, of the order of the examples and of the intervals.")] = 0,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Also write the JSON document here.", dir_okay=False, show_default=False),
    ] = None,
    as_json: AsJson = False,
    _: Annotated[bool, typer.Option("--adapters", help="May stand before the adapters.", hidden=True)] = False,
) -> None:
    """Choose from many adapters those that help on a few labelled examples, with weights, and say how sure that is.

    Nothing is trained. With torchrun or accelerate launch, several processes share the candidates.
    """
    if not adapters and candidates is None and not search:
        raise typer.BadParameter("Give adapters, --candidates FILE or --search.")
    with reported():
        from peft_composition.cli import select as command

        command.run(
            base,
            adapters or [],
            candidates,
            search,
            data,
            columns_of(text, image, label, prompt, answer, split, subset),
            k=k,
            seed=seed,
            out=out,
            as_json=as_json,
            most=most,
            halving=halving,
            log=log,
            cache_budget=cache_budget,
            batch_size=batch_size,
        )
