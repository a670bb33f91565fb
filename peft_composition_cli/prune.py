"""Arguments of `peft-composition prune`."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import Command, app, reported
from .data_options import Answer, Data, Image, K, Label, Prompt, Split, Subset, Text, columns_of
from .options import AsJson, Out, RecordedBase, RecordedTask, Saved, require_empty


@app.command(cls=Command)
def prune(
    folder: Saved,
    data: Data,
    out: Out,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Loss of log-likelihood of an example that is no cost.")
    ] = 0.01,
    text: Text = None,
    image: Image = None,
    label: Label = None,
    prompt: Prompt = None,
    answer: Answer = None,
    split: Split = "train",
    subset: Subset = None,
    k: K = None,
    base: RecordedBase = None,
    task: RecordedTask = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a forward pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the intervals, and of --k.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Drop the adapters of a saved composition whose removal does not cost, judged by labelled examples."""
    require_empty(out)
    with reported():
        from peft_composition.cli import prune as command

        command.run(
            folder,
            out,
            data,
            columns_of(text, image, label, prompt, answer, split, subset),
            tolerance=tolerance,
            k=k,
            base=base,
            task=task and task.value,
            batch_size=batch_size,
            seed=seed,
            as_json=as_json,
        )
