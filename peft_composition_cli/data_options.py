"""Options of commands that read labelled examples."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer


Data = Annotated[
    str,
    typer.Option(
        help="Labelled examples: a .csv, .tsv, .json, .jsonl or .parquet file, a folder of images with a subfolder "
        "for each class, or a data set on the Hub.",
    ),
]
Text = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads it at run time)
    typer.Option(help="Column of the texts; given twice, two columns of pairs. Default: text.", show_default=False),
]
Image = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Column of images or of paths to them.", show_default=False),
]
Label = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Column of the classes. Default: label.", show_default=False),
]
Prompt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Column of what a language model reads; with --answer.", show_default=False),
]
Answer = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Column of what it should answer.", show_default=False),
]
Split = Annotated[str, typer.Option(help="Split of a data set.")]
Subset = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Configuration of a data set on the Hub.", show_default=False),
]
K = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--k",
        min=1,
        help="Draw so many examples of each class (of answers: in all). Default: all.",
        show_default=False,
    ),
]


def columns_of(
    text: list[str] | None,
    image: str | None,
    label: str | None,
    prompt: str | None,
    answer: str | None,
    split: str,
    subset: str | None,
) -> dict[str, Any]:
    """These options as `read_data` takes them."""
    columns = {"text": text or None, "image": image, "label": label, "prompt": prompt, "answer": answer}
    return {**columns, "split": split, "subset": subset}
