"""What the library says in Python's words is said in the words of the command that runs, and stays so in Python."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from torch import nn

from peft_composition import CompositionConfig, compare_methods
from peft_composition.choosing import read_data
from peft_composition_cli import app
from peft_composition_cli.words import OTHER_NAMES, run_with, spoken

from .test_commands import run
from .test_compare import folder as reviews  # noqa: F401


@pytest.fixture
def speaking() -> None:
    """As if a command with these options ran."""
    run_with(
        SimpleNamespace(name=name, opts=[opts[0]], secondary_opts=[*opts[1:]], is_flag=is_flag)
        for name, is_flag, *opts in (
            ("label", False, "--label"),
            ("num_labels", False, "--num-labels"),
            ("dtype", False, "--dtype"),
            ("check_base", True, "--check-base", "--no-check-base"),
            ("own_ranks", True, "--own-ranks"),
            ("adapters", False, "adapters"),
        )
    )


@pytest.mark.usefixtures("speaking")
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("has no column: give label=..., one of 'a'", "has no column: give --label, one of 'a'"),
        ("num_labels=3, but 2 are there", "--num-labels 3, but 2 are there"),
        ("(lower num_labels=... or label=...)", "(lower --num-labels or --label)"),
        ("use label=\"a\" or label='b c'.", "use --label a or --label 'b c'."),
        ("export in dtype=torch.float32.", "export in --dtype float32."),
        ("pass CompositionConfig(check_base_model=False). Modules", "pass --no-check-base. Modules"),
        ("with one_rank=True or one_rank=False.", "with no --own-ranks or --own-ranks."),
        ("dataclasses.replace(config, composed_modules=None).", "peft-composition compose."),
        ('Choose one: {"path": ..., "subfolder": "a"}', "Choose one: its path with /a"),
        ('composed: {"path": "me/mix", "subfolder": "lora"}', "composed: me/mix/lora"),
        # what is quoted, of a path, of another function, or no option of this command
        ("'label=...' and \"label=3\"", "'label=...' and \"label=3\""),
        ("in runs/label=3/x or runs/x,label=3", "in runs/label=3/x or runs/x,label=3"),
        ("at https://hub/x?label=3&dtype=auto#label=3", "at https://hub/x?label=3&dtype=auto#label=3"),
        ("pass head=..., adapters=... or seeds=3", "pass head=..., adapters=... or seeds=3"),
        ("the head's label=... and others' label=...", "the head's --label and others' --label"),
        ("check_base_model=maybe", "check_base_model=maybe"),
        ("call f.g(x, (label=1), label=...) or (label=1)", "call f.g(x, (label=1), label=...) or (--label 1)"),
    ],
)
def test_words(said: str, expected: str) -> None:
    assert spoken(said) == expected


def test_other_names_are_options() -> None:
    """None is forgotten when an option is renamed."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {own.name for command in commands.values() for own in command.params}
    assert {name for name, _ in OTHER_NAMES.values()} <= known


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("compare", "{a}", "--data", "mine.csv"), "give --text, one of 'review', 'stars'"),
        (("compare", "{a}", "--data", "mine.csv", "--text", "review"), "give --label, one of"),
        (("select", "{a}", "--data", "mine.csv", "--prompt", "review"), "give both columns, --prompt and --answer"),
        (("select", "{a}", "--data", "mine.csv", "--text", "review", "--image", "stars"), "give --text or --image, a"),
        (
            ("select", "{a}", "--data", "mine.csv", "--prompt", "review", "--answer", "stars"),
            "encoder (bert), which does",
        ),
        (("compare", "{a}", "--data", "mine.csv", "{columns}", "--seeds", "3"), "--seeds 3 draws of all examples"),
        (("compare", "{a}", "--data", "mine.csv", "{columns}", "--k", "4"), "lower --k or --seeds, give --test,"),
        (
            ("compare", "{a}", "--data", "mine.csv", "{columns}", "--k", "9"),
            "--k 9, but class 'bad' has only 5 examples",
        ),
        (("select", "{a}", "--data", "mine.csv", "{columns}", "--k", "9"), "--k 9, but mine.csv has 5 examples"),
        (("compose", "{a}", "{a}", "--out", "new"), "give each once, or a copy in a folder of another name"),
        (("compose", "you", "--out", "new"), "Choose one: its path with /lora-b"),
    ],
)
def test_commands(reviews: Path, args: tuple[str, ...], said: str) -> None:  # noqa: F811
    words = [own.format(a="me/lora-a", columns="--columns") for own in args]
    if "--columns" in words:
        at = words.index("--columns")
        words[at : at + 1] = ["--text", "review", "--label", "stars"]
    result = run(*words, "--base", "org/base-model")
    assert result.exit_code == 1, result.output
    output = " ".join((result.stderr + result.stdout).split())
    assert said in output
    assert not re.search(r"\b(label|text|image|k|seeds|test|prompt|answer|check_base_model)=", output)
    assert not Path("new").exists()


def test_a_folder_of_adapters_stands_for_those_in_it(reviews: Path) -> None:  # noqa: F811
    shown = run("inspect", "you", "--base", "org/base-model")
    assert shown.exit_code == 0, shown.output
    assert "2 of 2 can be composed." in shown.stdout
    columns = ("--text", "review", "--label", "stars", "--steps", "1", "--fast")
    result = run("compare", "--base", "org/base-model", "you", "--data", "mine.csv", *columns)
    assert result.exit_code == 0, result.output
    assert "2 adapters, 10 examples of mine.csv" in result.stdout


def test_python_is_told_in_python(reviews: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"give label=\.\.\., one of 'review'"):
        read_data("mine.csv", text="review")
    with pytest.raises(ValueError, match=r'give each a name of its own: \{"path": \.\.\., "name": \.\.\.\}'):
        CompositionConfig(adapters=["me/lora-a", "me/lora-a"])
    with pytest.raises(ValueError, match=r"seeds=3 draws of all examples would be the same: give k=\.\.\.,"):
        compare_methods(nn.Linear(2, 2), [], [], seeds=3)
