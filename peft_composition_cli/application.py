"""The program: what all commands share, their errors and warnings, and the version."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Annotated, Any

from . import noise
from .words import run_with, spoken


try:
    import typer
    from typer.core import TyperCommand
except ImportError as missing:
    raise SystemExit(
        f"Error: {missing}. The command line needs an extra: pip install 'peft-composition[cli]'"
    ) from None


ALONE = ("compose", "compare", "export", "merge")
"""Commands that write or take long, which several processes would do several times."""


class Command(TyperCommand):
    """A command whose errors about arguments do not begin with the name of an exception."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise

    def invoke(self, ctx: Any) -> Any:
        """As typer's; what the library says is put into the words of this command."""
        run_with(self.params)
        if self.name in ALONE and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise typer.BadParameter(
                f"{self.name} runs in one process: start it without torchrun or accelerate launch. select, explain "
                "and prune share their work among several."
            )
        return super().invoke(ctx)


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


@contextmanager
def reported() -> Iterator[None]:
    """Print errors and warnings as one line each on stderr; errors exit with code 1, `--traceback` shows more."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _once()
            for category in (FutureWarning, DeprecationWarning):  # meant for programmers who use the libraries
                warnings.simplefilter("ignore", category)
            yield
    except Exception as error:  # the Hub's HTTP client has errors of its own, in a package that changes
        if _has_tracebacks:
            raise
        kind = "" if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: "
        _complain(f"Error: {kind}{error}")
        raise typer.Exit(1) from None


def _once() -> Callable[..., None]:
    """A function that prints each warning once, however often it is raised, and by however many processes."""
    shown: set[str] = set()
    is_first = os.environ.get("RANK", "0") == "0"

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if is_first and str(message) not in shown:
            shown.add(str(message))
            _complain(f"Warning: {message}")

    return show


def _complain(text: str) -> None:
    try:
        from peft_composition.text import LONG, one_line
    except ImportError:  # the error to show: PEFT or torch is missing or too old
        typer.echo(" ".join(text.split()), err=True)
    else:
        typer.echo(spoken(one_line(text, LONG)), err=True)


def main() -> None:
    """Run the command line."""
    noise.hide()
    app(prog_name="peft-composition")
