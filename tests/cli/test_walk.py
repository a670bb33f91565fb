"""The walk that the README shows, in a shell: from 20 adapters and a csv file to a verdict and a report."""

from __future__ import annotations

import csv
import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from .. import docs_setups, tiny, warm


ADAPTERS = 20
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIMIT = 600  # seconds of the whole walk


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny BERT, 20 LoRAs of three ranks for it in a folder, and 20 reviews of one's own."""
    monkeypatch.chdir(tmp_path)
    with docs_setups.text():
        pass
    base = AutoModelForSequenceClassification.from_pretrained("org/base-model")
    for number in range(ADAPTERS):
        folder = tmp_path / "pool" / f"lora-{number:02}"
        tiny.save_lora(folder, base, ["query", "value"], seed=number, r=2 + number % 3, task_type="SEQ_CLS")
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "org/base-model"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    good = ["the film was good", "a good shop", "good", "the good film", "a film and a good shop"]
    rows = [[text, "liked"] for text in good] + [[text.replace("good", "bad"), "not"] for text in good]
    with open("reviews.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows, *([f"was {text}", label] for text, label in rows)])
    return tmp_path


def documented(command: str) -> list[str]:
    """What the README gives after the adapters or the composition of a command."""
    (line,) = re.findall(rf"^peft-composition {command} [^#\n]*", README, re.MULTILINE)
    words = shlex.split(line)
    return words[next(place for place, word in enumerate(words) if word.startswith("--")) :]


def process(place: Path, *words: object) -> str:
    """What a command prints, run in a process of its own."""
    found = warm.run("-m", "peft_composition", *words, cwd=place, HF_HUB_OFFLINE="1", COLUMNS="300")
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_from_nothing_to_a_verdict(place: Path) -> None:
    started = time.perf_counter()
    pool = sorted(f"pool/{folder.name}" for folder in (place / "pool").iterdir())
    seen = json.loads(process(place, "inspect", *pool, "--base", "org/base-model", "--json"))
    assert len(seen["adapters"]) == ADAPTERS

    selection = json.loads(process(place, "select", "pool", *documented("select"), "--json"))
    assert (selection["candidates"], selection["examples"]) == (ADAPTERS, 20)
    assert {row["adapter"] for row in selection["ranking"]} == {*pool}
    chosen: list[str] = [own["adapter"] for own in selection["chosen"]]

    verdict: dict[str, Any] = json.loads(process(place, "compare", *chosen, *documented("compare"), "--json"))
    scores = {row["name"]: row["score"] for row in verdict["methods"]}
    assert verdict["verdict"] in ("helps", "equivalent", "harms", "cannot tell")
    assert verdict["difference"] == pytest.approx(scores[verdict["best"]] - scores[verdict["against"]])
    assert verdict["low"] <= verdict["difference"] <= verdict["high"]
    assert {"head only", "fresh LoRA", "evidence"} <= scores.keys()

    process(place, "compose", *chosen, *documented("compose"))
    process(place, "explain", "mix", *documented("explain"))
    report = (place / "report.html").read_text(encoding="utf-8")
    assert all(name.rpartition("/")[2] in report for name in chosen)
    process(place, "export", "mix", *documented("export"))
    assert json.loads((place / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert time.perf_counter() - started < LIMIT
