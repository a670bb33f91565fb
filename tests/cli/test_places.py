"""Commands on examples with several processes, on quantized bases, in bf16, on bases without a token to pad with."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from peft_composition.checkpoint.saved import saved_mixing_weights

from .. import docs_setups, warm
from .test_commands import run, run_json


ASKED = ("--data", "asked.csv", "--prompt", "q", "--answer", "a")
LABELLED = ("--data", "mine.csv", "--text", "review", "--label", "stars")
QUICK = ("--steps", "2", "--fast")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tiny Llama without a token to pad with, two LoRAs for it, their mix, and examples."""
    monkeypatch.chdir(tmp_path)
    with docs_setups.quantized():
        write("asked.csv", [["q", "a"], ["the film was", "good"], ["a shop was", "bad"], ["the shop was", "good"]])
        texts = {"bad": ["bad film", "not good", "a bad shop"], "good": ["good film", "the good", "a good shop was"]}
        write("mine.csv", [["review", "stars"], *([text, name] for name in texts for text in texts[name])])
        made = run("compose", "--base", "org/base-lm", "me/style-a", "you/style-b", "--out", "mix")
        assert made.exit_code == 0, made.output
        yield tmp_path


def write(path: str, rows: list[list[str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def copy_of_the_base(kind: str) -> str:
    """The base model in bf16, or quantized."""
    if kind == "bf16":
        model = AutoModelForCausalLM.from_pretrained("org/base-lm", dtype=torch.bfloat16)
    else:
        bits = {"4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8-bit": {"load_in_8bit": True}}[kind]
        config = BitsAndBytesConfig(**bits)  # type: ignore[arg-type]
        model = AutoModelForCausalLM.from_pretrained("org/base-lm", quantization_config=config)
    model.save_pretrained(kind)
    AutoTokenizer.from_pretrained("org/base-lm").save_pretrained(kind)
    return kind


def means(said: dict[str, Any]) -> list[float]:
    return [row["change"]["mean"] for row in said.get("left_out") or said["rows"]]


# Several processes


def test_processes_share_the_passes_and_one_writes(place: Path) -> None:
    def together(*words: str) -> Any:
        done = warm.run("-m", "peft_composition", *words, "--json", processes=2, cwd=place, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # one document, of the first process

    alone = run_json("explain", "mix", *ASKED)
    said = together("explain", "mix", *ASKED, "--out", "report.html", "--beside")
    assert means(said) == pytest.approx(means(alone), abs=1e-6)
    assert (said["out"], said["beside"]) == (["report.html"], "mix")
    assert Path("mix/composition-report.html").is_file()

    alone = run_json("prune", "mix", *ASKED, "--out", "one", "--tolerance", "5")
    said = together("prune", "mix", *ASKED, "--out", "two", "--tolerance", "5")
    assert (said["dropped"], said["kept"]) == (alone["dropped"], alone["kept"])
    assert saved_mixing_weights("two") == saved_mixing_weights("one")


@pytest.mark.parametrize("command", ["compose", "compare", "export", "merge"])
def test_what_one_process_does_is_refused_before_any_work(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes would write into the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = {
        "compose": ("--base", "org/base-lm", "me/style-a", "--out", "new"),
        "compare": ("--base", "org/base-lm", "me/style-a", *ASKED),
        "export": ("mix", "--out", "new"),
        "merge": ("mix", "--out", "new"),
    }[command]
    result = run(command, *words)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert f"{command} runs in one process: start it without torchrun or accelerate launch." in said
    assert not Path("new").exists()


# Kinds of bases


@pytest.mark.parametrize(("kind", "tolerance"), [("bf16", 5e-3), ("4-bit", 2e-2), ("8-bit", 5e-3)])
def test_explain_and_prune(kind: str, tolerance: float, place: Path) -> None:
    base = copy_of_the_base(kind)
    expected = run_json("explain", "mix", *ASKED)
    said = run_json("explain", "mix", *ASKED, "--base", base)
    assert means(said) == pytest.approx(means(expected), abs=tolerance)
    assert means(said) != means(expected)  # it is this base that was loaded
    pruned = run_json("prune", "mix", *ASKED, "--base", base, "--out", "smaller", "--tolerance", "5")
    assert means(pruned) == pytest.approx(means(said))
    assert (pruned["dropped"], pruned["kept"]) == (["style-a"], ["style-b"])
    assert {name for row in saved_mixing_weights("smaller").values() for name in row} == {"style-b"}
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "smaller").eval()
    logits = again(input_ids=torch.tensor([[3, 4, 5]])).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("kind", ["bf16", "4-bit", "8-bit"])
def test_select_and_compare(kind: str, place: Path) -> None:
    base = copy_of_the_base(kind)
    shutil.rmtree("mix")
    found = run_json("select", "--base", base, *ASKED, "me/style-a", "you/style-b")
    assert [row["reason"] for row in found["ranking"]] == [None, None]
    made = run_json("compare", "--base", base, *ASKED, "me/style-a", "you/style-b", "--steps", "2")
    assert made["broken"] == []
    assert "fresh LoRA" in {row["name"] for row in made["methods"]}


def test_a_base_without_a_token_to_pad_with(place: Path) -> None:
    """Texts of several lengths; without such a token Llama's classifier refuses batches of two."""
    assert AutoConfig.from_pretrained("org/base-lm").pad_token_id is None
    found = run_json("select", "--base", "org/base-lm", *LABELLED, "me/style-a", "you/style-b")
    assert [row["reason"] for row in found["ranking"]] == [None, None]
    made = run_json("compare", "--base", "org/base-lm", *LABELLED, "me/style-a", "you/style-b", *QUICK)
    assert made["methods"][0]["name"] == "head only"
    adapters = ("me/style-a", "you/style-b")
    composed = run(
        "compose", "--base", "org/base-lm", *adapters, "--task", "SEQ_CLS", "--num-labels", "2", "--out", "named"
    )
    assert composed.exit_code == 0, composed.output
    assert run_json("explain", "named", *LABELLED)["scores"]["examples"] == 6
    pruned = run_json("prune", "named", *LABELLED, "--out", "smaller", "--tolerance", "9")
    assert len(pruned["kept"]) == 1
