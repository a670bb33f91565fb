"""Arguments of `peft-composition explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .application import Command, app, reported
from .data_options import Answer, Data, Image, K, Label, Prompt, Split, Subset, Text, columns_of
from .options import AsJson, RecordedBase, RecordedTask, Saved


REPORT_SUFFIXES = (".html", ".md", ".png", ".json")  # as `Explanation.save` writes


@app.command(cls=Command)
def explain(
    folder: Saved,
    data: Data,
    out: Annotated[
        Optional[list[Path]],  # noqa: UP045  (typer reads it at run time)
        typer.Option(
            metavar="FILE",
            help="Write the report: .html, .md, .png or .json; may be given several times.",
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    beside: Annotated[
        bool, typer.Option("--beside", help="Put the report into the composition's folder, and into its card.")
    ] = False,
    test: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Further examples, for the composition's own head.", show_default=False),
    ] = None,
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
    """Explain a saved composition by labelled examples: which adapter is where, and what leaving it out costs."""
    for path in out or ():
        if path.suffix not in REPORT_SUFFIXES:
            raise typer.BadParameter(
                f"{path} must end with one of {', '.join(REPORT_SUFFIXES)}.", param_hint="'--out'"
            )
    with reported():
        from peft_composition.cli import explain as command

        command.run(
            folder,
            data,
            columns_of(text, image, label, prompt, answer, split, subset),
            out=out or (),
            is_beside=beside,
            test=test,
            k=k,
            base=base,
            task=task and task.value,
            batch_size=batch_size,
            seed=seed,
            as_json=as_json,
        )
