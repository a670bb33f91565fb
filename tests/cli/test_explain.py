"""`peft-composition explain` and `prune` on own data: texts and answers, what they write, and what they refuse."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner, Result

from peft_composition import CompositionConfig, explain, progress, prune_adapters
from peft_composition.checkpoint.saved import saved_mixing_weights
from peft_composition.choosing import EncodedRows, load_processor, read_data
from peft_composition_cli import app

from .. import docs_setups


WORDS = {
    "bad": ["bad film", "not good", "a bad shop", "film was bad", "the bad film"],
    "good": ["good film", "good", "a good shop", "film was good", "the good shop"],
}


def run(*args: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, list(map(str, args)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A saved composition, as in the documentation, and reviews."""
    monkeypatch.chdir(tmp_path)
    with docs_setups.composed() as names:
        with open("mine.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *([t, name] for name in WORDS for t in WORDS[name])])
        names["model"].save_pretrained("composed")
        yield tmp_path


def loaded() -> Any:
    base = AutoModelForSequenceClassification.from_pretrained("org/base-model", num_labels=2)
    return PeftModel.from_pretrained(base, "composed").eval()


def rows() -> EncodedRows:
    return EncodedRows(read_data("mine.csv"), load_processor("org/base-model", "text"))


def test_explain_is_what_the_function_says(folder: Path) -> None:
    options = ("--out", "r/report.html", "--out", "r/report.md", "--test", "mine.csv", "--json")
    result = run("explain", "composed", "--data", folder / "mine.csv", *options)
    assert result.exit_code == 0, result.output
    assert "so those of the examples are numbered in order: 0 bad, 1 good. If the head" in result.stderr
    said = json.loads(result.stdout)
    found = explain(loaded(), rows(), collate=rows().collate, labels=["bad", "good"])
    assert said["out"] == ["r/report.html", "r/report.md"]
    assert [row["change"]["mean"] for row in said["left_out"]] == pytest.approx(
        [row.change.mean for row in found.left_out], abs=1e-6
    )
    assert said["classes"]["names"] == ["bad", "good"]
    assert said["tested"]["examples"] == 10
    assert said["data"] == "mine.csv: 10 examples of 2 classes, 5 of each"
    assert said["command"] == "peft-composition explain composed --data mine.csv --test mine.csv"
    page = Path("r/report.html").read_text()
    assert "What composed is made of" in page
    assert str(folder) not in page + Path("r/report.md").read_text() + result.stdout


def test_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here every pass is said; three adapters take a pass each alone and one each without them."""
    monkeypatch.setattr(progress, "_are_lines", True)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    for command, count, more in (("explain", 8, ()), ("prune", 7, ("--out", "smaller"))):  # and the mix; base
        result = run(command, "composed", "--data", "mine.csv", *more)
        assert result.exit_code == 0, result.output
        what = {"explain": "Explaining", "prune": "Pruning"}[command]
        said = [line for line in result.stderr.splitlines() if line.startswith(what)]
        assert [line.partition(" passes")[0] for line in said] == [
            f"{what}: {number} of {count}" for number in range(1, count + 1)
        ]


def test_classes_are_numbered_as_in_the_training(folder: Path) -> None:
    """Where a training numbered classes otherwise than in order, its head would seem to be wrong on all."""
    model = loaded()
    model.get_base_model().config.id2label = {0: "good", 1: "bad"}
    model.save_pretrained("named")
    batch = {key: value for key, value in rows().collate(rows()[:10]).items() if key != "labels"}
    with torch.no_grad():
        predicted = loaded()(**batch).logits.argmax(-1).tolist()
    truth = [0 if text in WORDS["good"] else 1 for (text,) in rows().examples.inputs]
    expected = sum(one == other for one, other in zip(predicted, truth)) / 10
    assert expected != 0.5  # else the order would not show
    Path("few.csv").write_text("text,label\n" + "".join(f"{text},good\n" for text in WORDS["good"]))
    shares = {}
    for name, test in (("named", "mine.csv"), ("named", "few.csv"), ("composed", "mine.csv")):
        result = run("explain", name, "--data", "mine.csv", "--test", test, "--json")
        assert result.exit_code == 0, result.output
        assert ("numbered in order" in result.stderr) == (name == "composed")
        shares[name, test] = json.loads(result.stdout)["tested"]["accuracy"]
    assert shares["named", "mine.csv"] == pytest.approx(expected)
    assert shares["composed", "mine.csv"] == pytest.approx(1 - expected)
    assert shares["named", "few.csv"] == pytest.approx(sum(p == t == 0 for p, t in zip(predicted, truth)) / 5)

    # Numbers as labels are those of the head, also where some classes have no examples; other names are told.
    Path("numbers.csv").write_text(
        "text,label\n" + "".join(f"{text},{0 if name == 'good' else 1}\n" for name in WORDS for text in WORDS[name])
    )
    result = run("explain", "named", "--data", "numbers.csv", "--test", "numbers.csv", "--json")
    assert json.loads(result.stdout)["tested"]["accuracy"] == pytest.approx(expected)
    assert "Warning" not in result.stderr
    other = Path("mine.csv").read_text().replace(",bad", ",poor")
    Path("other.csv").write_text(other)
    result = run("explain", "named", "--data", "other.csv", "--test", "other.csv")
    assert "classes are called 0 good, 1 bad, and not as those of the examples" in result.stderr


def test_k_of_each_class_that_the_examples_have(folder: Path) -> None:
    """Where a class of the head has no examples, none are drawn of it, and it keeps its number."""
    base = AutoModelForSequenceClassification.from_pretrained(
        "org/base-model", num_labels=3, ignore_mismatched_sizes=True
    )
    base.config.id2label = {0: "hail", 1: "good", 2: "bad"}
    config = CompositionConfig(
        adapters=["me/lora-a", "./lora-c"], task_type="SEQ_CLS", modules_to_save=["classifier"], mixing="uniform"
    )
    get_peft_model(base, config).save_pretrained("weather")
    result = run("explain", "weather", "--data", "mine.csv", "--k", 2, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["data"] == "mine.csv: 4 examples of 2 classes, 2 of each"
    assert said["classes"]["names"] == ["good", "bad"]
    result = run("prune", "weather", "--data", "mine.csv", "--k", 2, "--out", "smaller", "--json")
    assert result.exit_code == 0, result.output
    refused = run("explain", "weather", "--data", "mine.csv", "--k", 9)
    assert "--k 9, but mine.csv has 5 examples of class 'bad'" in refused.output


def test_classes_of_another_base_are_numbered_as_it_numbers_them(folder: Path) -> None:
    """The head of a composition that saves none is that of the base that is loaded."""
    base = AutoModelForSequenceClassification.from_pretrained("org/base-model", num_labels=2)
    base.config.id2label = {0: "good", 1: "bad"}
    model = get_peft_model(base, CompositionConfig(adapters=["me/lora-a", "./lora-c"])).eval()
    model.save_pretrained("named")
    assert not json.loads(Path("named/adapter_config.json").read_text())["modules_to_save"]
    batch = {key: value for key, value in rows().collate(rows()[:10]).items() if key != "labels"}
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(-1).tolist()
    good = [text in WORDS["good"] for (text,) in rows().examples.inputs]
    names = {"other": {0: "bad", 1: "good"}, "nameless": {0: "LABEL_0", 1: "LABEL_1"}}
    shutil.copytree("org/base-model", "other")
    shutil.copytree("org/base-model", "nameless")
    for name, id2label in names.items():
        path = Path(name, "config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": id2label}))
    expected = sum(one == is_good for one, is_good in zip(predicted, good)) / 10
    assert expected != 0.5  # else the order would not show
    options = ("--data", "mine.csv", "--test", "mine.csv", "--json")
    for other, share in (("other", expected), ("nameless", expected), ("org/base-model", 1 - expected)):
        result = run("explain", "named", "--base", other, "--task", "SEQ_CLS", *options)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["tested"]["accuracy"] == pytest.approx(share), other
        # what was recorded is of another head, so that the order is only assumed
        assert ("numbered in order" in result.stderr) == (other == "nameless")


def test_explain_puts_the_report_beside(folder: Path) -> None:
    result = run("explain", "composed", "--data", "mine.csv", "--beside", "--k", 3)
    assert result.exit_code == 0, result.output
    assert "on 6 examples" in result.stdout
    assert "The mix of 3 adapters, which is uniform, gets" in result.stdout
    assert Path("composed/composition-report.html").is_file()
    assert "## Why these weights" in Path("composed/README.md").read_text()


def test_prune_saves_what_is_left(folder: Path) -> None:
    result = run("prune", "composed", "--data", "mine.csv", "--out", "smaller", "--tolerance", 5, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    model = loaded()
    report = prune_adapters(model, rows(), tolerance=5.0, collate=rows().collate)
    assert tuple(said["dropped"]) == report.dropped
    assert len(said["kept"]) == 1
    assert {name for row in saved_mixing_weights("smaller").values() for name in row} == set(report.kept)
    base = AutoModelForSequenceClassification.from_pretrained("org/base-model", num_labels=2)
    again = PeftModel.from_pretrained(base, "smaller").eval()
    batch = {key: value for key, value in rows().collate(rows()[:4]).items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    text = run("prune", "composed", "--data", "mine.csv", "--out", "second", "--tolerance", 5)
    assert "2 of 3 adapters dropped on 10 examples" in text.stdout
    assert "Saved: second" in text.stdout


def test_language_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with docs_setups.generation():
        lines = [json.dumps({"q": f"the film was {word}", "a": word}) for word in ("good", "bad", "not good")]
        Path("asked.jsonl").write_text("\n".join(lines * 2))
        composed = run("compose", "me/style-a", "you/style-b", "--base", "org/base-lm", "--out", "mix")
        assert composed.exit_code == 0, composed.output
        result = run("explain", "mix", "--data", "asked.jsonl", "--prompt", "q", "--answer", "a", "--out", "r.html")
        assert result.exit_code == 0, result.output
        assert "on 6 examples" in result.stdout
        refused = run("explain", "mix", "--data", "asked.jsonl", "--text", "q", "--label", "a")
        assert refused.exit_code == 1
        assert "which needs --prompt and --answer" in refused.output


def test_what_is_refused(folder: Path) -> None:
    for args, code, message in (
        (["explain", "composed", "--data", "mine.csv", "--out", "report.pdf"], 2, "must end with one of"),
        (["explain", "composed", "--data", "mine.csv", "--k", "9"], 1, "--k 9, but"),
        (["explain", "composed", "--data", "none.csv"], 1, "none.csv"),
        (["prune", "composed", "--data", "mine.csv", "--out", "composed"], 2, "is not empty"),
        (["prune", "composed", "--data", "mine.csv", "--out", "new", "--tolerance", "-1"], 2, "tolerance"),
        (["prune", "me/lora-a", "--data", "mine.csv", "--out", "new"], 1, "is not a saved composition"),
    ):
        result = run(*args)
        assert (result.exit_code, message in result.output) == (code, True), result.output
    assert not Path("new").exists()
    composed = run("compose", "me/lora-a", "lora-c", "--base", "org/base-model", "--num-labels", "3", "--out", "mix")
    assert composed.exit_code == 0, composed.output
    assert run("explain", "mix", "--data", "mine.csv").exit_code == 0  # judged by features, not by its new head
    result = run("explain", "mix", "--data", "mine.csv", "--test", "mine.csv")
    assert result.exit_code == 1
    assert "is untrained and cannot predict test data; leave out --test" in result.output
