"""Arguments of `peft-composition compose`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

from .application import Command, app, reported
from .options import Adapters, AsJson, CheckBase, ForTask, Out, require_empty


SUM_TOLERANCE = 2e-3  # as in `peft_composition.given_weights`


class Mixing(StrEnum):
    """Where the weights of an untrained composition come from."""

    uniform = "uniform"
    fixed = "fixed"


class Normalization(StrEnum):
    """As in `CompositionConfig`."""

    softmax = "softmax"
    none = "none"


@app.command(cls=Command)
def compose(
    base: Annotated[str, typer.Option(help="Base model, Hub id or folder.")],
    adapters: Adapters,
    out: Out,
    mixing: Annotated[Mixing, typer.Option(help="uniform: 1/N each. fixed: --weights.")] = Mixing.uniform,
    weights: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="NUMBER,...", help="One per adapter, for --mixing fixed: --weights 0.4,0.6", show_default=False
        ),
    ] = None,
    normalization: Annotated[
        Normalization, typer.Option(help="softmax: weights are positive and sum to 1. none: free weights.")
    ] = Normalization.softmax,
    task: ForTask = None,
    num_labels: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1,
            help="Save a new, untrained head for this number of labels, unless the base has a trained one of this "
            "size. Default: save a head only if the base has one.",
            show_default=False,
        ),
    ] = None,
    save_adapters: Annotated[
        bool, typer.Option(help="Save the upstream factors, or only the adapters' names and hashes.")
    ] = True,
    lora: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--lora/--no-lora",
            help="Also save a plain LoRA, which needs no plugin, in OUT/lora. Default: with --save-adapters.",
            show_default=False,
        ),
    ] = None,
    push: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="REPO", help="Push the result to this Hub repository.", show_default=False),
    ] = None,
    check_base: CheckBase = True,
    as_json: AsJson = False,
    _: Annotated[bool, typer.Option("--adapters", help="May stand before the adapters.", hidden=True)] = False,
) -> None:
    """Compose adapters, uniformly or with given weights, and save the result."""
    numbers = _numbers(weights, adapters)
    if mixing is Mixing.fixed and len(numbers) != len(adapters):
        needed = "1 number" if len(adapters) == 1 else f"{len(adapters)} numbers"
        raise typer.BadParameter(f"--mixing fixed needs {needed} in --weights, got {len(numbers)}.")
    if mixing is Mixing.uniform and numbers:
        raise typer.BadParameter("--mixing uniform ignores --weights; give --mixing fixed to use them.")
    _require_good_weights(numbers, normalization)
    require_empty(out)
    with reported():
        from peft_composition.cli import compose as command

        command.run(
            base,
            adapters,
            mixing.value,
            numbers or None,
            normalization.value,
            out,
            task=task and task.value,
            num_labels=num_labels,
            save_adapters=save_adapters,
            with_lora=save_adapters if lora is None else lora,
            push=push,
            as_json=as_json,
            check_base=check_base,
        )


def _numbers(weights: str | None, adapters: Sequence[str]) -> list[float]:
    """The comma-separated numbers of `--weights`."""
    if weights is None:
        return []
    strays = [adapter for adapter in adapters if _is_number(adapter) and not Path(adapter).exists()]
    wrong = [text for text in weights.split(",") if not _is_number(text)]
    if strays or wrong:
        problem = f"{wrong[0]!r} is not a number" if wrong else f"{strays[0]!r} is not an adapter"
        raise typer.BadParameter(
            f"{problem}; separate numbers with commas and no spaces: --weights 0.4,0.6", param_hint="'--weights'"
        )
    return [float(text) for text in weights.split(",")]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _require_good_weights(weights: Sequence[float], normalization: Normalization) -> None:
    """Check the weights like `CompositionConfig`, before anything slow."""
    problem = None
    if not all(map(math.isfinite, weights)):
        problem = f"must be finite numbers, got {_joined(weights)}"
    elif normalization is Normalization.softmax and weights:
        if min(weights) < 0:
            problem = f"must not be negative, got {_joined(weights)}; for free weights use --normalization none"
        elif math.fsum(weights) > 1 + SUM_TOLERANCE:
            problem = f"must sum to 1 or less, got {math.fsum(weights):g}; free weights: --normalization none"
    if problem:
        raise typer.BadParameter(f"{problem}.", param_hint="--weights")


def _joined(weights: Sequence[float]) -> str:
    return ",".join(f"{weight:g}" for weight in weights)
