"""`peft-composition select`, from files on disk to what is printed, and on several processes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from .. import docs_setups, warm
from .test_commands import run, run_json


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny BERT, three LoRAs for it and a broken one in a folder, and reviews."""
    monkeypatch.chdir(tmp_path)
    with docs_setups.text():
        pass
    shutil.copytree("me/lora-a", "pool/a")
    shutil.copytree("lora-c", "pool/c")
    shutil.copytree("you/lora-b", "pool/broken")
    Path("pool/broken/adapter_model.safetensors").write_bytes(b"")
    rows = [["the film was good and a shop", "yes"], ["the film was not good", "no"]]
    with open("many.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["review", "liked"], *(rows * 6)])
    return tmp_path


COMMAND = ("select", "--base", "org/base-model", "--data", "many.csv", "--text", "review", "--label", "liked")


def test_a_folder_of_adapters_and_single_ones(place: Path) -> None:
    found = run_json(*COMMAND, "--adapters", "pool", "you/lora-b")
    assert set(found) == {"chosen", "ranking", "candidates", "examples", "risk_worse_than_base"}
    assert (found["candidates"], found["examples"]) == (4, 12)
    assert {own["adapter"] for own in found["ranking"]} == {"pool/a", "pool/c", "pool/broken", "you/lora-b"}
    assert found["ranking"][-1]["adapter"] == "pool/broken"
    assert found["ranking"][-1]["reason"]
    assert found["ranking"][-1]["score"] is None
    assert 0 <= found["risk_worse_than_base"] <= 1
    assert run_json(*COMMAND, "--k", "2", "pool")["examples"] == 4


def test_what_it_prints_composes(place: Path) -> None:
    (place / "list.txt").write_text("me/lora-a\nyou/lora-b  # mine\n")
    result = run(*COMMAND, "--candidates", "list.txt", "--out", "new/result.json", "--log", "log.jsonl")
    assert result.exit_code == 0, result.output
    assert "2 candidates on 12 examples" in result.stdout
    written = json.loads((place / "new" / "result.json").read_text())
    assert {own["adapter"] for own in written["ranking"]} == {"me/lora-a", "you/lora-b"}
    assert len((place / "log.jsonl").read_text().splitlines()) == 4
    before, _, command = result.stdout.rpartition(": peft-composition ")
    is_one = len(written["chosen"]) == 1
    assert before.endswith("To compose it (one adapter alone; no other improved it)" if is_one else "To compose them")
    composed = run(*command.split())
    assert composed.exit_code == 0, composed.output
    assert "--num-labels 2" in command
    assert (place / "mix" / "adapter_config.json").is_file()


def test_what_it_prints_composes_adapters_that_state_no_task(place: Path) -> None:
    for file in (place / "pool").glob("*/adapter_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": None}))
    config = place / "org" / "base-model" / "config.json"  # of a sentence encoder
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["BertModel"]}))
    result = run(*COMMAND, "pool/a", "pool/c")
    assert result.exit_code == 0, result.output
    composed = run(*result.stdout.rpartition(": peft-composition ")[2].split())
    assert composed.exit_code == 0, composed.output


def test_those_that_were_dropped_are_counted_in_the_words_of_the_command(place: Path) -> None:
    for number in range(12):
        shutil.copytree("me/lora-a", f"pool/copy-{number:02}")
    result = run(*COMMAND, "pool")
    assert result.exit_code == 0, result.output
    counted = [line for line in result.stdout.splitlines() if "dropped before they had a score" in line]
    assert [line.partition("(")[2] for line in counted] == ["--no-halving drops none)"]
    assert "\nbroken: " in result.stdout


def test_arguments_that_are_refused(place: Path) -> None:
    for words, complaint, code in (
        ((*COMMAND,), "Give adapters, --candidates FILE or --search.", 2),
        ((*COMMAND, "pool", "--k", "7"), "--k 7, but many.csv has 6 examples of class 'no'", 1),
        ((*COMMAND, "pool", "--k", "1"), "There is one example of each of 2 classes", 1),
        ((*COMMAND[:-1], "stars", "pool"), "many.csv has no column 'stars'; it has 'review', 'liked'", 1),
        ((*COMMAND, "mix"), "none of 1 candidate could be scored", 1),
    ):
        result = run(*words)
        assert result.exit_code == code, result.output
        assert complaint in " ".join(result.stderr.replace("│", "").split())


def test_answers_and_images(place: Path) -> None:
    with docs_setups.generation():
        pass
    with docs_setups.images():
        pass
    rows = [{"question": "the film was", "reply": word} for word in ("good", "bad", "good", "a shop")]
    Path("qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["select", "--base", "org/base-lm", "--data", "qa.jsonl", "--prompt", "question", "--answer", "reply"]
    found: Any = run_json(*words, "me/style-a", "you/style-b")
    assert (found["candidates"], found["examples"]) == (2, 4)
    found = run_json("select", "--base", "org/vit", "--data", "photos", "me/flowers", "you/birds")
    assert (found["candidates"], found["examples"]) == (2, 4)


def test_two_processes_print_once_and_the_same(place: Path) -> None:
    expected = run_json(*COMMAND, "pool")
    done = warm.run(
        "-m", "peft_composition", *COMMAND, "pool", "--json", processes=2, cwd=place, ACCELERATE_USE_CPU="true"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
