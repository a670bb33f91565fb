"""The command line: arguments and help texts. What the commands do is in `peft_composition/cli.py`.

It is outside the package, because importing the package loads torch and PEFT: help, completion and errors about
arguments are fast.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Optional


try:
    import typer
    from typer.core import TyperCommand
except ImportError as missing:
    raise SystemExit(
        f"Error: {missing}. The command line needs an extra: pip install 'peft-composition[cli]'"
    ) from None


SUM_TOLERANCE = 2e-3  # as in `peft_composition.given_weights`
HEATMAP_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")  # of those that matplotlib writes


class Mixing(StrEnum):
    """Where the weights of an untrained composition come from."""

    uniform = "uniform"
    fixed = "fixed"


class Normalization(StrEnum):
    """As in `CompositionConfig`."""

    softmax = "softmax"
    none = "none"


class Head(StrEnum):
    """What an export does with the trained head."""

    included = "with"
    excluded = "without"
    separate = "separate"


class Task(StrEnum):
    """Task types of PEFT, as `base_models.AUTO_CLASSES` knows them."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class Dtype(StrEnum):
    """Dtypes of the saved weights."""

    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Part(StrEnum):
    """Rows of the weights' table and heatmap."""

    module = "module"
    block = "block"
    model = "model"


class _Command(TyperCommand):
    """A command whose errors about arguments do not begin with the name of an exception."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Mix trained LoRA adapters into one adapter. Exit codes: 0 success, 1 an error or adapters that cannot be "
    "composed, 2 wrong arguments.",
)

_has_tracebacks = False


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        others = ", ".join(f"{name} {_version_of(name)}" for name in ("peft", "transformers", "torch"))
        typer.echo(f"peft-composition {_version_of('peft-composition')} ({others})")
        raise typer.Exit


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@app.callback()
def _set(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")] = False,
) -> None:
    global _has_tracebacks
    _has_tracebacks = traceback


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Adapters = Annotated[
    list[str], typer.Argument(metavar="ADAPTER...", help="Hub ids (id@revision for a revision) or folders.")
]
Out = Annotated[Path, typer.Option(help="Folder to write to; must be new or empty.", file_okay=False)]
Saved = Annotated[
    Path, typer.Argument(metavar="DIR", help="A saved composition.", exists=True, file_okay=False, show_default=False)
]
ForTask = Annotated[
    Optional[Task],  # noqa: UP045  (typer reads it at run time)
    typer.Option("--task", help="Task type. Default: what the adapters state.", show_default=False),
]
AsDtype = Annotated[
    Optional[Dtype],  # noqa: UP045
    typer.Option("--dtype", help="Dtype of the saved weights. Default: unchanged.", show_default=False),
]


CheckBase = Annotated[
    bool,
    typer.Option(
        "--check-base/--no-check-base",
        help="Refuse adapters that name another base model. Modules and shapes are always compared.",
    ),
]


@app.command(cls=_Command)
def inspect(
    adapters: Adapters,
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
    with _reported():
        from peft_composition import cli

        is_good = cli.inspect(adapters, base, task and task.value, as_json, check_base)
    if not is_good:
        raise typer.Exit(1)


@app.command(cls=_Command)
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
    _require_empty(out)
    with _reported():
        from peft_composition import cli

        cli.compose(
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


@app.command(cls=_Command)
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
    _require_empty(out)
    with _reported():
        from peft_composition import cli

        cli.export(
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


@app.command(cls=_Command)
def weights(
    folder: Saved,
    png: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Also save a heatmap in this file.", dir_okay=False, show_default=False),
    ] = None,
    by: Annotated[Part, typer.Option(help="Rows of the second table and of the heatmap.")] = Part.block,
    as_json: AsJson = False,
) -> None:
    """Show the mixing weights of a saved composition as tables and, with --png, as a heatmap."""
    if png is not None and png.suffix.lower() not in HEATMAP_SUFFIXES:
        suffixes = ", ".join(HEATMAP_SUFFIXES)
        raise typer.BadParameter(f"{png} must end with one of {suffixes}.", param_hint="'--png'")
    with _reported():
        from peft_composition import cli

        cli.weights(folder, png, by.value, as_json)


@app.command(cls=_Command)
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
    _require_empty(out)
    with _reported():
        from peft_composition import cli

        cli.merge(folder, out, base, task and task.value, dtype and dtype.value, as_json)


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


def _require_empty(out: Path) -> None:
    """Refuse to overwrite an existing composition, adapter or model."""
    if out.is_dir() and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is not empty; give a new folder.", param_hint="--out")


@contextmanager
def _reported() -> Iterator[None]:
    """Print errors and warnings as one line each on stderr; errors exit with code 1, `--traceback` shows more."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            for category in (FutureWarning, DeprecationWarning):  # meant for programmers who use the libraries
                warnings.simplefilter("ignore", category)
            yield
    except Exception as error:  # the Hub's HTTP client has errors of its own, in a package that changes
        if _has_tracebacks:
            raise
        kind = "" if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: "
        _complain(f"Error: {kind}{error}")
        raise typer.Exit(1) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _complain(f"Warning: {message}")


def _complain(text: str) -> None:
    try:
        from peft_composition.text import LONG, one_line
    except ImportError:  # the error to show: PEFT or torch is missing or too old
        typer.echo(" ".join(text.split()), err=True)
    else:
        typer.echo(one_line(text, LONG), err=True)


def main() -> None:
    """Run the command line."""
    app(prog_name="peft-composition")
