"""Arguments of `peft-composition prune`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .application import Command, app, reported
from .data_options import Answer, Data, Image, K, Label, Prompt, Split, Subset, Text
from .options import AsJson, Out, Saved, Task, require_empty


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
    base: Annotated[
        Optional[str],  # noqa: UP045  (typer reads it at run time)
        typer.Option(help="Base model, Hub id or folder. Default: as recorded.", show_default=False),
    ] = None,
    task: Annotated[
        Optional[Task],  # noqa: UP045
        typer.Option(help="Task type, for the class of the base model. Default: as recorded.", show_default=False),
    ] = None,
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
            {
                "text": text,
                "image": image,
                "label": label,
                "prompt": prompt,
                "answer": answer,
                "split": split,
                "subset": subset,
            },
            tolerance=tolerance,
            k=k,
            base=base,
            task=task and task.value,
            batch_size=batch_size,
            seed=seed,
            as_json=as_json,
        )
