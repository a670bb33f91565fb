"""The study at the Hub's scale: its scenario files on look-alikes of the data sets, with tiny models, offline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from few_shot_transfer import scenario as scenarios
from few_shot_transfer import sources
from few_shot_transfer.data import task
from few_shot_transfer.language_model import LanguageModel, normal
from few_shot_transfer.models import Classifier
from few_shot_transfer.records import read
from few_shot_transfer.report import write
from few_shot_transfer.scenario import DataSpec, Scenario
from few_shot_transfer.sources.hub import question_of
from few_shot_transfer.study import Study
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from .. import lookalikes


HUB = scenarios.names("hub")
Replacing = Callable[[Scenario], Scenario]


@pytest.fixture(scope="session")
def look_alike(tmp_path_factory: pytest.TempPathFactory) -> Replacing:
    """Replaces the data sets of a scenario by look-alikes; each is written once."""
    folder = tmp_path_factory.mktemp("lookalikes")
    written: dict[str, Path] = {}

    def replaced(spec: Scenario) -> Scenario:
        data = {}
        for name, own in spec.data.items():
            path, config = own.options["path"], own.options.get("config")
            if path not in written:
                written[path] = lookalikes.write(folder, path, config)
            data[name] = DataSpec(own.source, {**own.options, "path": str(written[path])})
        return replace(spec, data=data)

    return replaced


@pytest.mark.parametrize("name", HUB)
def test_splits_and_columns_are_those_of_the_data_sets(name: str, look_alike: Replacing) -> None:
    spec = look_alike(scenarios.load(name))
    targets = {target for own in spec.rounds for target in own.target}
    for target in targets:
        own = spec.tasks[target]
        found = task(spec.data[own.data], own.classes, spec.splits)
        for part in (found.train, found.validation, found.test):
            assert {"input", "label"} <= set(part.column_names)
            assert len(part) > 0
        assert set(found.train["label"][:]) <= set(range(len(found.classes)))


def test_domains_are_told_apart(look_alike: Replacing) -> None:
    spec = look_alike(scenarios.load("pacs"))
    for name in spec.data:
        data = sources.load("hub", spec.data[name].options)["train"]
        assert Counter(data["label"][:]) == dict.fromkeys(range(7), 10)


@pytest.mark.parametrize(
    ("row", "spec", "expected"),
    [
        (
            {"q": "Why?", "yes": "b", "n1": "c", "n2": "a"},
            {"question": "q", "correct": "yes", "wrong": ["n1", "n2"]},
            {"input": "Why?\n(A) a (B) b (C) c", "answer": "b", "label": 1},
        ),
        (
            {"q": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "key": "2"},
            {"question": "q", "options": "choices.text", "labels": "choices.label", "key": "key"},
            {"input": "Why?\n(A) x (B) y", "answer": "y", "label": 1},
        ),
        (
            {"q": "Why?", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "key": "C"},
            {"question": "q", "options": "choices.text", "labels": "choices.label", "key": "key"},
            {"input": "Why?\n(A) x (B) y (C) z", "answer": "z", "label": 2},
        ),
        (
            {"q": "Why?", "choices": {"text": list("vwxyz"), "label": list("12345")}, "key": "5"},
            {"question": "q", "options": "choices.text", "labels": "choices.label", "key": "key"},
            {"input": "Why?\n(A) v (B) w (C) x (D) y (E) z", "answer": "z", "label": 4},
        ),
        (
            {"text": "Once.", "q": "Why?", "options": ["x", "y"], "key": 0},
            {"context": "text", "question": "q", "options": "options", "key": "key"},
            {"input": "Once.\nWhy?\n(A) x (B) y", "answer": "x", "label": 0},
        ),
    ],
    ids=["columns", "labelled", "of three", "of five", "indexed"],
)
def test_questions(row: dict[str, object], spec: dict[str, object], expected: dict[str, object]) -> None:
    assert question_of(row, spec) == expected


@pytest.mark.parametrize(
    ("said", "is_right"),
    [("Barn owl.", True), (" barn owl\nIt is a bird.", True), ("an owl", False), ("(A) barn owl", False), ("", False)],
)
def test_answers_match_exactly_but_for_case_and_full_stop(said: str, is_right: bool) -> None:
    assert (normal(said) == normal("barn owl")) == is_right


def test_a_wrong_column_is_an_error_that_names_those_there_are(look_alike: Replacing) -> None:
    options = {**look_alike(scenarios.load("pacs")).data["photo"].options, "label": "kind"}
    with pytest.raises(ValueError, match=r"no columns \['kind'\]; it has \['image', 'domain', 'label'\]"):
        sources.load("hub", options)


def _finished(spec: Scenario, output: Path) -> Counter[str]:
    Study(spec, output, progress=False).run()
    records = read(output / "results" / f"{spec.name}.jsonl")
    before = len(records)
    Study(spec, output, progress=False).run()
    assert len(read(output / "results" / f"{spec.name}.jsonl")) == before, "finished runs were repeated"
    return Counter(record["method"] for record in records if record["phase"] == "final")


def test_images_from_end_to_end(tmp_path: Path, look_alike: Replacing) -> None:
    folder = tmp_path / "vit"
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    spec = scenarios.smoke(look_alike(scenarios.load("pacs")))
    spec = replace(spec, model=replace(spec.model, path=str(folder)))
    finished = _finished(spec, tmp_path / "out")
    assert finished == {**dict.fromkeys(spec.methods, 2), "single": 6}
    page = write([spec], tmp_path / "out" / "results", tmp_path / "report").read_text(encoding="utf-8")
    assert "| *Learned composition, paper* | *57.21 ± 11.56* |" in page


def _small_t5(folder: Path) -> Path:
    known = ["Which", "option", "of", "them", "is", "?", "(", ")", *"ABCDE", *map(str, range(24))]
    words = ["<pad>", "</s>", "<unk>", *known]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_questions_from_end_to_end(tmp_path: Path, look_alike: Replacing) -> None:
    spec = scenarios.smoke(look_alike(scenarios.load("question-answering")))
    spec = replace(spec, model=replace(spec.model, path=str(_small_t5(tmp_path / "t5")), max_new_tokens=3))
    finished = _finished(spec, tmp_path / "out")
    assert finished == {**dict.fromkeys(spec.methods, 2), "single": 6}


def test_a_question_that_is_too_long_keeps_its_options(tmp_path: Path) -> None:
    spec = scenarios.load("question-answering").model
    model = LanguageModel(replace(spec, path=str(_small_t5(tmp_path)), max_length=4))
    rows = Dataset.from_dict({"input": ["Which of them is 3 ? ( A ) 1 ( B ) 2"], "answer": ["2"]})
    assert model.tokenizer.decode(model.encode(rows)[0]["input_ids"]) == "( B ) 2"


def test_an_image_checkpoint_as_the_hub_has_it_is_read_whole(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    bare = transformers.ViTModel(config).eval()
    bare.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    named = load_file(tmp_path / "model.safetensors")
    assert "encoder.layer.1.attention.attention.query.weight" in named, "no longer the form of the Hub's checkpoints"
    spec = scenarios.load("pacs").model
    model = Classifier(replace(spec, path=str(tmp_path))).build(7, seed=0).eval()
    targets = [name for name, _ in model.named_modules() if name.split(".")[-1] in spec.target_modules]
    assert len(targets) == 6
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = bare(pixels).last_hidden_state[:, 0] @ model.classifier.weight.T
        assert torch.allclose(model(pixels).logits, expected, atol=1e-6)
