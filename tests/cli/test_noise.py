"""Lines of other libraries that users cannot act on are hidden, and everything else is shown, each warning once."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from peft_composition_cli import noise
from peft_composition_cli.application import reported

from .. import docs_setups
from ..warm import ROOT


@pytest.fixture
def shown_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[logging.Logger, list[str]]]:
    """Makes a logger after `noise.hide()`, with the lines that it lets through."""

    def made(name: str) -> tuple[logging.Logger, list[str]]:
        logger, shown = logging.getLogger(name), list[str]()
        for own in {*noise.NOISE, *noise.ONCE, name}:
            monkeypatch.setattr(logging.getLogger(own), "filters", [])
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
        noise.hide()
        handler = logging.Handler()
        handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
        monkeypatch.setattr(logger, "handlers", [handler])
        return logger, shown

    return made


@pytest.mark.parametrize("name", ["torch.utils._pytree", "bitsandbytes.backends.cpu.ops", "transformers.modeling"])
def test_only_the_noise_is_hidden(name: str, shown_by: Callable[[str], tuple[logging.Logger, list[str]]]) -> None:
    logger, shown = shown_by(name)
    for beginning in noise.NOISE.values():
        logger.warning(f"{beginning} and more", "class") if "%s" in beginning else logger.warning(beginning)
    logger.warning("the file is damaged")
    assert shown[-1] == "the file is damaged"
    assert len(shown) == (2 if name in noise.NOISE else 3)


def test_what_is_said_at_every_step_is_shown_once(
    shown_by: Callable[[str], tuple[logging.Logger, list[str]]],
) -> None:
    (name,) = noise.ONCE
    logger, shown = shown_by(name)
    for kind in ("float32", "float32", "bfloat16"):
        logger.warning("inputs will be cast from %s", kind)
    assert shown == ["inputs will be cast from float32", "inputs will be cast from bfloat16"]


@pytest.mark.parametrize(("rank", "lines"), [("0", ["Warning: first", "Warning: second"]), ("1", [])])
def test_each_warning_once(
    rank: str, lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    with reported():
        for text in ("first", "second", "first"):
            warnings.warn(text, stacklevel=1)
    assert capsys.readouterr().err.splitlines() == lines
    with pytest.raises(typer.Exit), reported():
        raise ValueError("of any process")
    assert capsys.readouterr().err == "Error: of any process\n"


def test_a_command_says_nothing_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process, where all libraries are loaded, with stderr in a file."""
    monkeypatch.chdir(tmp_path)
    with docs_setups.text():
        command = [
            "-m",
            "peft_composition",
            "compose",
            "--base",
            "org/base-model",
            "me/lora-a",
            "--out",
            "mix",
            "--json",
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path
        )
    assert json.loads(done.stdout)["out"] == "mix"
    assert done.stderr == ""


PROGRAM = """
from peft_composition_cli import noise
noise.hide()
import peft_composition.cli
from peft_composition.progress import progress_bar
bar = progress_bar(2, "Comparing", "run")
print(type(bar).__name__, getattr(bar, "disable", None))
"""


@pytest.mark.parametrize(("value", "expected"), [(None, "Lines None"), ("1", "tqdm True"), ("0", "tqdm False")])
def test_lines_in_place_of_bars_unless_the_user_decides(value: str | None, expected: str) -> None:
    """In fresh processes with stderr in a file: Hugging Face's libraries read the variable when they are imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    if value is not None:
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = value
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.stdout.strip() == expected, done.stderr
