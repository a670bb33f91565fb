"""Arguments of `peft-composition compare`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

from .application import Command, app, reported
from .data_options import Answer, Data, Image, Label, Prompt, Split, Subset, Text, columns_of
from .options import AsJson, ForTask
from .weights import HEATMAP_SUFFIXES


class Judged(StrEnum):
    """Methods that the verdict may be about."""

    single = "best single"
    uniform = "uniform"
    evidence = "evidence"
    learned = "evidence, learned"


@app.command(cls=Command)
def compare(
    base: Annotated[str, typer.Option(help="Base model, Hub id or folder.")],
    data: Data,
    adapters: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads it at run time)
        typer.Argument(
            metavar="ADAPTER...",
            help="Hub ids (id/folder within it, id@revision), folders, or a folder of adapters.",
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="Instead of adapters: a file with one on each line, or from search.",
            dir_okay=False,
            exists=True,
            show_default=False,
        ),
    ] = None,
    text: Text = None,
    image: Image = None,
    label: Label = None,
    prompt: Prompt = None,
    answer: Answer = None,
    split: Split = "train",
    subset: Subset = None,
    test: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="More examples to judge by, with the same columns. Default: each is left out in turn.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1, help="Draw so many examples of each class; judge by the others or by --test.", show_default=False
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of draws.")] = 1,
    judged: Annotated[Judged, typer.Option(help="Method that the verdict is about.")] = Judged.evidence,
    fast: Annotated[
        bool, typer.Option("--fast", help="Without what trains a body (fresh LoRA; evidence, learned): seconds.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of every training.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of every training.")] = 16,
    folds: Annotated[int, typer.Option(min=2, help="Folds in which examples are left out.")] = 5,
    rope: Annotated[
        float, typer.Option(min=0, max=99, help="Points of accuracy that are no difference in practice.")
    ] = 1.0,
    task: ForTask = None,
    seed: Annotated[int, typer.Option(help="Of splits, heads and LoRAs.")] = 0,
    png: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Also save a plot in this file.", dir_okay=False, show_default=False),
    ] = None,
    as_json: AsJson = False,
    _: Annotated[bool, typer.Option("--adapters", help="May stand before the adapters.", hidden=True)] = False,
) -> None:
    """Compare reusing adapters with a new head alone and with a fresh LoRA on the same examples, with a verdict."""
    if bool(adapters) == (candidates is not None):
        raise typer.BadParameter("give adapters or --candidates FILE, one of the two.", param_hint="ADAPTER...")
    if png is not None and png.suffix.lower() not in HEATMAP_SUFFIXES:
        raise typer.BadParameter(f"{png} must end with one of {', '.join(HEATMAP_SUFFIXES)}.", param_hint="'--png'")
    if fast and judged is Judged.learned:
        raise typer.BadParameter("--fast leaves out the method that --judged names; give another.")
    with reported():
        from peft_composition.cli import compare as command

        columns = columns_of(text, image, label, prompt, answer, split, subset)
        command.run(
            base,
            adapters or candidates,
            data,
            columns,
            test=test,
            task=task and task.value,
            png=png,
            as_json=as_json,
            fast=fast,
            k=k,
            seeds=seeds,
            judged=judged.value,
            steps=steps,
            batch_size=batch_size,
            folds=folds,
            rope=rope / 100,
            seed=seed,
        )
