"""The example scripts learn: each in one process and in two fresh ones, offline, with the same checked result."""

from __future__ import annotations

import importlib
import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict, load_dataset
from few_shot import FewShotArguments, HeadWarmup, cross_entropy, draw, encode_classes, require_one_group
from few_shot_question_answering import ExactMatch, QuestionArguments, answers_of, prompt_of, token_cross_entropy
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from examples.few_shot_transfer import defaults
from peft_composition import CompositionConfig, fit_mixing_weights

from .. import example_inputs, warm
from ..example_inputs import QUESTION_TOKENS, TEST_EXAMPLES, TEXT_TOKENS, Inputs
from ..hub_server import HubServer, environment_of


EXAMPLES = Path(__file__).parents[2] / "examples"
CLASSES = ["negative", "positive"]
OFFLINE_ON_CPU = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(
    script: str, inputs: Inputs, output: Path, processes: int, *arguments: object, **variables: str
) -> dict[str, Any]:
    """Runs a script on the CPU and, unless variables say otherwise, offline; returns its results.

    One process is this one, and two are forked. One that is given variables, which it reads as it imports, and two of
    the script without a Trainer are started as a user starts them.
    """
    command = [str(EXAMPLES / f"{script}.py"), "--model_name_or_path", str(inputs.model)]
    command += ["--dataset_name", str(inputs.dataset), "--adapters", *map(str, inputs.adapters)]
    command += ["--output_dir", str(output), *map(str, arguments)]
    if processes == 1 and not variables:
        printed = _run_here(command)
    else:
        if variables or script == "few_shot_no_trainer":
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            started = [sys.executable, *(launcher if processes > 1 else []), *command]
            environment = {**os.environ, **OFFLINE_ON_CPU, **variables}
            done = subprocess.run(started, capture_output=True, text=True, timeout=600, env=environment)
        else:
            done = warm.run(*command, processes=processes, **OFFLINE_ON_CPU)
        assert done.returncode == 0, done.stderr[-3000:]
        printed = done.stdout
    assert printed.count("test examples") == 1, printed  # one process alone reports
    results = json.loads((output / "results.json").read_text())
    assert results["processes"] == processes
    assert results["test"] == TEST_EXAMPLES
    assert printed.count(f"{results['method']} mixing weights") == bool(results["mixing_weights"])
    return results


def _run_here(command: list[str]) -> str:
    """Runs a script as the main program of this process; returns what it prints."""
    printed = io.StringIO()
    AcceleratorState._reset_state(reset_partial_state=True)  # of programs that ran in this process before
    with patch.dict(os.environ, OFFLINE_ON_CPU), patch.object(sys, "argv", command), redirect_stdout(printed):
        runpy.run_path(command[0], run_name="__main__")
    AcceleratorState._reset_state(reset_partial_state=True)
    return printed.getvalue()


def assert_same(one: dict[str, Any], two: dict[str, Any], metric: str, bound: float = 1e-4) -> None:
    """Two processes sum the same gradients in another order; Adam's division by small gradients makes more of that."""
    assert abs(one["metrics"][metric] - two["metrics"][metric]) <= 2 / TEST_EXAMPLES
    assert two["mixing_weights"] == pytest.approx(one["mixing_weights"], abs=bound)
    assert len(set(one["mixing_weights"].values())) > 1, "the weights have not moved"


def above_chance(classes: int) -> float:
    """What guessing among balanced classes exceeds once in 700 times: by three standard errors."""
    chance = 1 / classes
    return chance + 3 * (chance * (1 - chance) / TEST_EXAMPLES) ** 0.5


# Texts


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return example_inputs.texts(tmp_path_factory.mktemp("texts"))


def accuracy_of_saved(folder: Path, inputs: Inputs) -> float:
    """Of a saved composition on all test sentences, one by one."""
    base = AutoModelForSequenceClassification.from_pretrained(inputs.model, num_labels=2)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_dataset(str(inputs.dataset), cache_dir=str(folder / "cache"))["test"]
    hits = 0
    for row in rows:
        encoded = tokenizer(row["text"], truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")
        with torch.no_grad():
            hits += CLASSES[int(model(**encoded).logits.argmax())] == row["label"]
    return hits / len(rows)


@pytest.mark.parametrize(
    ("script", "option"), [("few_shot_text_classification", "--max_steps"), ("few_shot_no_trainer", "--steps")]
)
def test_a_warmup_as_long_as_the_training_is_refused_by_its_argument(
    script: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model_name_or_path", "m", "--dataset_name", "d", "--adapters", "a", option, "5"]
    arguments += ["--method", "learned", "--head_warmup_steps", "50"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit, match="--head_warmup_steps 50 takes the whole training of 5 steps"):
        importlib.import_module(script).main()


def test_a_warmup_as_long_as_the_epochs_is_refused_by_its_argument(tmp_path: Path) -> None:
    settings = TrainingArguments(str(tmp_path), num_train_epochs=2, use_cpu=True)
    with pytest.raises(SystemExit, match="--head_warmup_steps 4 takes the whole training of 4 steps"):
        HeadWarmup(steps=4).on_train_begin(settings, TrainerState(max_steps=4), TrainerControl())


@pytest.mark.parametrize("script", ["few_shot_text_classification", "few_shot_no_trainer"])
def test_text_classification(texts: Inputs, tmp_path: Path, script: str) -> None:
    shared = ["--method", "learned", "--k", 10, "--max_length", TEXT_TOKENS, "--head_warmup_steps", 10, "--seed", 0]
    size, steps = ("batch_size", "steps") if "no_trainer" in script else ("per_device_train_batch_size", "max_steps")
    results = [
        run(
            script,
            texts,
            tmp_path / str(processes),
            processes,
            *shared,
            f"--{steps}",
            30,
            f"--{size}",
            20 // processes,
        )
        for processes in (1, 2)
    ]
    assert results[0]["support"] == 20
    assert_same(results[0], results[1], "accuracy")
    for processes, result in enumerate(results, start=1):
        assert result["metrics"]["accuracy"] > above_chance(2)
        # Every test example counted once, also where two processes share an odd number of them.
        again = accuracy_of_saved(tmp_path / str(processes), texts)
        assert result["metrics"]["accuracy"] == pytest.approx(again, abs=1.01 / TEST_EXAMPLES)


@pytest.mark.parametrize("script", ["few_shot_text_classification", "few_shot_no_trainer"])
def test_by_default_the_examples_choose_weights_that_stay(texts: Inputs, tmp_path: Path, script: str) -> None:
    steps = "--steps" if "no_trainer" in script else "--max_steps"
    result = run(script, texts, tmp_path, 1, "--max_length", TEXT_TOKENS, "--seed", 0, steps, 2)
    assert result["method"] == "evidence"
    assert result["trainable"] == 384 * 2 + 2  # the head alone
    base = AutoModelForSequenceClassification.from_pretrained(texts.model, num_labels=2)
    again = get_peft_model(base, CompositionConfig(adapters=list(texts.adapters), task_type="SEQ_CLS"))
    tokenizer = AutoTokenizer.from_pretrained(texts.model)
    few = arguments(str(texts.dataset), adapters=[str(texts.adapters[0])], k=5)
    support, _, _ = encode_classes(*draw(few, 0, ["text"], "label"), "label")
    rows = [
        {**tokenizer(row["text"], truncation=True, max_length=TEXT_TOKENS), "labels": row["labels"]} for row in support
    ]
    chosen = fit_mixing_weights(again, rows, collate=DataCollatorWithPadding(tokenizer)).weights
    assert len(set(chosen.values())) > 1, "the examples cannot tell these adapters apart: take others"
    assert result["mixing_weights"] == pytest.approx(chosen, abs=1e-4)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["mixing"] == "fixed"
    assert config["weights"] == pytest.approx(list(chosen.values()), abs=1e-4)


def test_script_and_readme_choose_the_same_weights_and_the_controls_have_none(
    texts: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the study measures them."""
    monkeypatch.setattr(defaults, "TOKENS", TEXT_TOKENS)
    inputs = defaults.Inputs(texts.model, texts.adapters, texts.dataset, 2)
    k = defaults.default_k()
    by_script = defaults.run_script(inputs, tmp_path / "script", "--k", k, "--seed", 0, "--max_steps", 1)
    steps = defaults.readme_lines().replace("max_steps=100", "max_steps=1")
    by_readme = defaults.run_printed(steps, inputs, k, 0, tmp_path / "readme")
    assert len(set(by_script["weights"].values())) > 1, "the examples cannot tell these adapters apart: take others"
    assert list(by_readme["weights"].values()) == pytest.approx(list(by_script["weights"].values()), abs=1e-3)
    base = defaults.run_script(
        inputs, tmp_path / "base", "--k", k, "--seed", 0, "--max_steps", 1, *defaults.METHODS["head only"]
    )
    assert base["weights"] == {}
    for found in (by_script, by_readme, base):
        assert 0 < found["accuracy"] < 100


def test_controls_train_what_they_say_and_a_composition_is_pushed(texts: Inputs, tmp_path: Path) -> None:
    def trained(method: str, *more: object, **variables: str) -> dict[str, Any]:
        shared = ["--method", method, "--k", 2, "--max_steps", 2, "--max_length", TEXT_TOKENS]
        return run("few_shot_text_classification", texts, tmp_path / method, 1, *shared, *more, **variables)

    head = 384 * 2 + 2
    lora = trained("lora")
    assert lora["trainable"] == head + 18 * 8 * (384 + 384)  # rank 8 in 6 layers' query, key and value
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert trained("base")["trainable"] == head
    assert (tmp_path / "base" / "model.safetensors").is_file()
    with HubServer() as hub:
        arguments = ["--push_to_hub", "--hub_model_id", "me/mix", "--hub_token", hub.token]
        uniform = trained("uniform", *arguments, **environment_of(hub, tmp_path / "home"))
        pushed = hub.repositories["me/mix"]
        files = pushed.commits[pushed.refs["main"]]
    assert uniform["trainable"] == head
    assert set(uniform["mixing_weights"].values()) == {0.5}
    assert {"adapter_config.json", "adapter_model.safetensors", "lora/adapter_config.json"} <= set(files)
    assert b"peft_composition" in files["README.md"]


# Images


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return example_inputs.images(tmp_path_factory.mktemp("images"), "vit")


@pytest.fixture(scope="session")
def timm_digits(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return example_inputs.images(tmp_path_factory.mktemp("timm"), "timm")


IMAGES = ["--method", "learned", "--k", 10, "--max_steps", 100, "--head_warmup_steps", 50, "--seed", 0]


def test_image_classification(digits: Inputs, tmp_path: Path) -> None:
    results = [
        run(
            "few_shot_image_classification",
            digits,
            tmp_path / str(processes),
            processes,
            *IMAGES,
            "--per_device_train_batch_size",
            20,  # the same micro-batches in both: the same numbers are added
            "--gradient_accumulation_steps",
            2 // processes,
        )
        for processes in (1, 2)
    ]
    assert results[0]["support"] == 40
    assert_same(results[0], results[1], "accuracy")
    assert min(result["metrics"]["accuracy"] for result in results) > above_chance(4)


def test_image_classification_with_a_timm_model(timm_digits: Inputs, tmp_path: Path) -> None:
    result = run(
        "few_shot_image_classification", timm_digits, tmp_path / "out", 1, *IMAGES, "--per_device_train_batch_size", 40
    )
    assert len(result["mixing_weights"]) == 2
    assert result["metrics"]["accuracy"] > above_chance(4)


# Questions


@pytest.fixture(scope="session")
def questions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return example_inputs.questions(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(
    ("questions", "counts"), [("t5", (1, 2)), ("llama", (1,))], indirect=["questions"], ids=["t5", "llama"]
)
def test_question_answering(questions: Inputs, tmp_path: Path, counts: tuple[int, ...]) -> None:
    shared = ["--choices_column", "choices", "--k", 16, "--max_steps", 10, "--seed", 0]
    shared += ["--max_length", QUESTION_TOKENS, "--max_new_tokens", 3]
    results = [
        run(
            "few_shot_question_answering",
            questions,
            tmp_path / str(processes),
            processes,
            *shared,
            "--per_device_train_batch_size",
            16 // max(counts),  # the same micro-batches in both: the same numbers are added
            "--gradient_accumulation_steps",
            max(counts) // processes,
        )
        for processes in counts
    ]
    if len(results) > 1:
        # Halves of a float32 sum are exact: what is left is one rounding a step.
        assert_same(results[0], results[1], "exact_match", bound=1e-6)
    assert min(result["metrics"]["exact_match"] for result in results) > above_chance(4)


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"answer": "Rome"}, {}, ["Rome"]),
        ({"answer": ["Rome", "Roma"]}, {}, ["Rome", "Roma"]),
        ({"answers": {"text": ["Rome"], "answer_start": [3]}}, {"answer_column": "answers"}, ["Rome"]),
        ({"answer": 1, "options": ["Paris", "Rome"]}, {"choices_column": "options"}, ["Rome"]),
        ({"answer": 7}, {}, ["7"]),
    ],
    ids=["text", "list", "squad", "choice", "number"],
)
def test_answers_in_every_form(row: dict[str, Any], columns: dict[str, str], expected: list[str]) -> None:
    arguments = QuestionArguments("model", "data", method="base", **columns)
    assert answers_of(row, arguments) == expected


def test_prompt_shows_columns_and_choices() -> None:
    arguments = QuestionArguments("model", "data", method="base", prompt="{q}\n{options}\nAnswer:")
    assert arguments.input_columns == ["q", "options"]
    assert prompt_of({"q": "Capital?", "options": ["Paris", "Rome"]}, arguments) == "Capital?\nParis\nRome\nAnswer:"


def test_exact_match_takes_any_right_answer() -> None:
    metric = ExactMatch(keep_in_memory=True)
    found = metric.compute(
        predictions=["rome.", "Paris", "in Rome"], references=[["Rome", "Roma"], ["Rome"], ["Rome"]]
    )
    assert found == {"exact_match": pytest.approx(1 / 3)}


# Drawing


def sentences(count: int, classes: int, first: int = 0) -> Dataset:
    rows = range(first, first + count)
    return Dataset.from_dict({"text": [f"Sentence  {n}" for n in rows], "label": [n % classes for n in rows]})


def save(folder: Path, **splits: Dataset) -> str:
    DatasetDict(splits).save_to_disk(str(folder))
    return str(folder)


def arguments(dataset: str, **more: Any) -> FewShotArguments:
    return FewShotArguments("model", dataset, method="base", **more)


def test_draws_k_of_every_class_and_by_the_seed_alone(tmp_path: Path) -> None:
    wanted = arguments(save(tmp_path, train=sentences(300, 3), test=sentences(50, 3, first=300)), k=4)
    support, test = draw(wanted, 0, ["text"], "label")
    assert support["label"][:] == [0] * 4 + [1] * 4 + [2] * 4
    assert len(test) == 50
    again, other = (draw(wanted, seed, ["text"], "label")[0] for seed in (0, 1))
    assert support["text"][:] == again["text"][:]
    assert set(support["text"][:]) != set(other["text"][:])


def test_no_training_example_is_a_test_example(tmp_path: Path) -> None:
    """Of 20 in the training split, 16 are in the test split too, in other spacing and case."""
    test = Dataset.from_dict({"text": [f"sentence {n}" for n in range(16)], "label": [n % 2 for n in range(16)]})
    folder = save(tmp_path, train=sentences(20, 2), test=test)
    support, _ = draw(arguments(folder, k=2), 0, ["text"], "label")
    assert sorted(support["text"][:]) == [f"Sentence  {n}" for n in range(16, 20)]
    with pytest.raises(ValueError, match=r"--k 3: class 0 has only 2 examples"):
        draw(arguments(folder, k=3), 0, ["text"], "label")


def test_one_split_is_parted(tmp_path: Path) -> None:
    data = datasets.concatenate_datasets([sentences(20, 2), sentences(20, 2)])  # every sentence twice
    support, test = draw(arguments(save(tmp_path, train=data), k=3, test_split="train"), 0, ["text"], "label")
    assert len(set(support["text"][:])) == 6
    assert len(test) == 28
    assert not set(support["text"][:]) & set(test["text"][:])


def test_without_classes_k_in_all(tmp_path: Path) -> None:
    folder = save(tmp_path, train=sentences(20, 2), test=sentences(5, 2, first=20))
    support, _ = draw(arguments(folder, k=7), 0, ["text"])
    assert len(support) == 7


def test_reads_one_file(tmp_path: Path) -> None:
    sentences(20, 2).to_json(str(tmp_path / "rows.jsonl"))
    support, test = draw(arguments(str(tmp_path / "rows.jsonl"), test_split="train", max_test_samples=5), 0, ["text"])
    assert len(support) == 5
    assert len(test) == 5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "--test_split test: .* has only train"),
        ({"test_split": "train", "train_split": "other"}, "--train_split other"),
    ],
    ids=["test", "train"],
)
def test_missing_split_is_named(tmp_path: Path, more: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(arguments(save(tmp_path, train=sentences(20, 2)), **more), 0, ["text"])


def test_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column 'sentence', but text, label"):
        draw(arguments(save(tmp_path, train=sentences(20, 2)), test_split="train"), 0, ["sentence"])


def test_classes_are_numbered_in_the_order_of_their_values() -> None:
    support = Dataset.from_dict({"text": list("abc"), "label": [10, 2, 5]})
    test = Dataset.from_dict({"text": list("de"), "label": [5, 10]})
    numbered, also, names = encode_classes(support, test, "label")
    assert names == ["2", "5", "10"]
    assert numbered["labels"][:] == [2, 0, 1]
    assert also["labels"][:] == [1, 2]
    with pytest.raises(ValueError, match=r"without training examples: \['7'\]"):
        encode_classes(support, Dataset.from_dict({"text": ["f"], "label": [7]}), "label")


@pytest.mark.parametrize(("wrong", "message"), [({"k": 0}, "--k"), ({"method": "lora"}, "needs --adapters")], ids=str)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShotArguments("model", "data", **{"method": "base", **wrong})


# Several processes


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_one_group(2)
    with pytest.raises(RuntimeError, match="2 processes were started, but each would train alone"):
        require_one_group(1)


def test_losses_of_two_processes_add_up_to_that_of_one() -> None:
    """Each process divides its sum by the examples, or tokens, of all."""
    logits, labels = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3
    whole = cross_entropy({"logits": logits}, labels)
    parts = [cross_entropy({"logits": logits[part]}, labels[part], 8) for part in (slice(0, 3), slice(3, 8))]
    assert whole.item() == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert sum(parts).item() == pytest.approx(whole.item())


def test_loss_of_a_causal_model_is_about_the_next_token() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, -100, 3, 1, 0], [-100, 4, 2, 6, 5]])
    expected = (
        -torch.stack(
            [
                logits[row, at - 1].log_softmax(-1)[labels[row, at]]
                for row, at in ((0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3), (1, 4))
            ]
        )
        .double()
        .mean()
    )
    assert token_cross_entropy(shift=1)({"logits": logits}, labels).item() == pytest.approx(expected.item(), rel=1e-5)
