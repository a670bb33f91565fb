"""`peft-composition compare` on own data: text, pairs and answers, against the function; and what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner, Result

from peft_composition import compare_methods
from peft_composition.choosing import EncodedRows, load_processor, read_data
from peft_composition_cli import app

from .. import docs_setups


QUICK = ("--steps", "3", "--batch-size", "4")


def run(*args: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["compare", *map(str, args)])


def write(path: str, rows: list[list[Any]]) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A base and three adapters, as in the documentation, and reviews."""
    monkeypatch.chdir(tmp_path)
    with docs_setups.text():
        words = {"bad": ["bad film", "not good", "a bad shop", "film was bad", "the bad film"]}
        words["good"] = ["good film", "good", "a good shop", "film was good", "the good shop"]
        rows = [[text, label] for label, texts in words.items() for text in texts]
        write("mine.csv", [["review", "stars"], *rows])
        yield tmp_path


def test_the_table_and_the_verdict(folder: Path) -> None:
    result = run("--base", "org/base-model", "--adapters", "me/lora-a", "you/lora-b", "--data", "mine.csv", "--text",
                 "review", "--label", "stars", *QUICK, "--png", "plots/plot.png")  # fmt: skip
    assert result.exit_code == 0, result.output
    for name in ("head only", "fresh LoRA x 0.5", "best single", "evidence, learned", "random LoRAs"):
        assert name in result.stdout
    assert "10 examples, each left out 1 time (5 folds)" in result.stdout
    assert "evidence" in result.stdout.splitlines()[-2]
    assert (folder / "plots/plot.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_what_the_function_gives(folder: Path) -> None:
    result = run("--base", "org/base-model", "me/lora-a", "you/lora-b", "--data", "mine.csv", "--text", "review",
                 "--label", "stars", "--fast", "--json", "--judged", "uniform", *QUICK)  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained("org/base-model", num_labels=2)
    rows = EncodedRows(read_data("mine.csv", text="review", label="stars"), load_processor("org/base-model", "text"))
    expected = compare_methods(
        base, ["me/lora-a", "you/lora-b"], rows, collate=rows.collate, steps=3, batch_size=4, judged="uniform",
        methods=("base", "best single", "uniform", "evidence", "random LoRAs"),
    ).as_json()  # fmt: skip
    for side in (found, expected):
        assert side.pop("seconds") > 0
        for row in side["methods"]:
            assert row.pop("seconds") > 0
    assert found == expected


def test_candidates_from_a_file_and_test_examples(folder: Path) -> None:
    Path("list.txt").write_text("# mine\nme/lora-a\nlora-c  # another\n", encoding="utf-8")
    write("test.csv", [["text", "label"], *[["good film", 1], ["bad film", 0]] * 6])
    result = run("--base", "org/base-model", "--candidates", "list.txt", "--data", "reviews.csv", "--test",
                 "test.csv", "--fast", *QUICK)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "1 draw of 4 examples, judged by 12 others" in result.stdout
    assert "2 adapters, 4 examples of reviews.csv" in result.stdout


def test_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with docs_setups.generation():
        folders = sorted({str(path.parent) for path in Path().rglob("adapter_config.json")})
        bases = [str(path.parent) for path in Path().rglob("config.json")]
        write("qa.csv", [["q", "a"], *[["the film was", "good"], ["a shop was", "bad"]] * 2])
        result = run("--base", bases[0], *folders, "--data", "qa.csv", "--prompt", "q", "--answer", "a", "--fast",
                     "--json", *QUICK)  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["measure"] == "exact match"
    assert found["methods"][0]["name"] == "zero-shot"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "give adapters or --candidates FILE"),
        (("me/lora-a", "--png", "plot.txt"), 2, "must end with one of .png"),
        (("me/lora-a", "--fast", "--judged", "evidence, learned"), 2, "--fast leaves out the method"),
        (("me/lora-a", "--text", "nothing"), 1, "has no column 'nothing'"),
        (("me/lora-a", "--task", "CAUSAL_LM"), 1, "which needs --prompt and --answer"),
        (("me/lora-a",), 1, "give --text,"),
    ],
)
def test_what_is_refused(folder: Path, args: tuple[str, ...], code: int, message: str) -> None:
    columns = () if args in ((), ("me/lora-a",)) or "--text" in args else ("--text", "review")
    result = run("--base", "org/base-model", *args, "--data", "mine.csv", *columns, "--label", "stars")
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.replace("│", " ").split())
