"""The study program: sampling, scenario files, the results file, and a real run that is killed and goes on."""

from __future__ import annotations

import copy
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from few_shot_transfer import scenario as scenarios
from few_shot_transfer import training
from few_shot_transfer.analysis import BEST_SINGLE, MEAN_SINGLE, ORACLE_SINGLE, difference, scores
from few_shot_transfer.data import balanced, few_shot, task
from few_shot_transfer.downstream import Outcome, correct_answers, describe
from few_shot_transfer.models import SentenceClassifier
from few_shot_transfer.plan import Plan
from few_shot_transfer.records import Results, identity, read
from few_shot_transfer.report import write
from few_shot_transfer.scenario import DataSpec, SplitSpec
from few_shot_transfer.training import Body, HeadOnFeatures, Rows, fit, fit_head, loaders, predict
from torch import nn

from peft_composition.training import last_complete_checkpoint

from .. import warm
from .digits import digits


ROOT = Path(__file__).parents[2]
SCENARIO = "vader-domains"


# Sampling


@pytest.fixture
def labels() -> list[int]:
    """60 of class 0, 30 of class 1 and 4 of class 2, mixed."""
    mixed = [0] * 60 + [1] * 30 + [2] * 4
    random.Random(0).shuffle(mixed)
    return mixed


def test_support_sets_have_k_of_each_class_and_all_of_a_smaller_one(labels: list[int]) -> None:
    assert Counter(labels[index] for index in few_shot(labels, 5, seed=0)) == {0: 5, 1: 5, 2: 4}
    assert sorted(few_shot(labels, "all", seed=0)) == list(range(len(labels)))


def test_support_sets_are_seeded_and_nested(labels: list[int]) -> None:
    assert few_shot(labels, 5, seed=1) == few_shot(labels, 5, seed=1)
    assert set(few_shot(labels, 5, seed=1)) != set(few_shot(labels, 5, seed=2))
    assert set(few_shot(labels, 2, seed=1)) < set(few_shot(labels, 5, seed=1))


def test_evaluation_sets_are_balanced_as_far_as_there_are_examples(labels: list[int]) -> None:
    chosen = balanced(labels, 34)
    assert Counter(labels[index] for index in chosen) == {0: 15, 1: 15, 2: 4}
    assert chosen == sorted(set(chosen))
    assert balanced(labels, None) == balanced(labels, 1000) == list(range(len(labels)))


def test_splits_never_overlap_even_between_tasks_that_share_classes() -> None:
    digits = DataSpec("mnist", {"variant": "digits"})
    splits = SplitSpec(test=0.3, validation=0.2)
    whole, some = task(digits, None, splits), task(digits, ["3-5"], splits)
    assert some.classes == ["3", "4", "5"]

    def prints(part: Any) -> list[bytes]:
        return [np.asarray(image).tobytes() for image in part["input"]]

    # scikit-learn's digits have no two equal images of these classes, so an image names its row.
    test, others = set(prints(whole.test)), set(prints(whole.train)) | set(prints(whole.validation))
    assert not test & others
    assert not set(prints(whole.train)) & set(prints(whole.validation))
    assert set(prints(some.test)) < test
    assert set(prints(some.train)) < set(prints(whole.train))
    assert len(whole.train) + len(whole.validation) + len(whole.test) == 1797
    assert set(some.train["label"][:]) == {0, 1, 2}


# Scenario files


@pytest.mark.parametrize("name", scenarios.names())
def test_every_scenario_file_is_understood(name: str) -> None:
    spec = scenarios.load(name)
    settings = list(spec.settings())
    assert settings
    for setting in settings:
        assert setting.upstream
    assert scenarios.smoke(spec).downstream.max_steps == 2
    assert spec.downstream.seeds >= 3


def _content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((scenarios.FOLDER / f"{SCENARIO}.yaml").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(shots=[1]), "shots: there is no such field"),
        (lambda c: c["downstream"].update(epoch=1), "downstream.epoch: there is no such field"),
        (lambda c: c["downstream"].update(shots=[0]), "shots are positive numbers"),
        (
            lambda c: c["downstream"].update(batch_size="big"),
            "downstream.batch_size: Input should be a valid integer, got 'big'",
        ),
        (lambda c: c["downstream"].update(batch_size="64"), "downstream.batch_size: Input should be a valid integer"),
        (lambda c: c["downstream"].update(seeds=True), "downstream.seeds: Input should be a valid integer, got True"),
        (lambda c: c["data"].update(more={"variant": "digits"}), "data.more.source: Field required"),
        (lambda c: c["downstream"].pop("selection"), "needs selection"),
        (lambda c: c.update(methods=["magic"]), "unknown method 'magic'"),
        (lambda c: c.update(rounds=[{"target": "books"}]), "unknown task 'books'"),
        (lambda c: c["model"].pop("path"), "either a path or pretraining"),
        (lambda c: c.update(scale="huge"), "scale: Input should be 'offline' or 'hub', got 'huge'"),
    ],
    ids=["field", "nested", "shots", "type", "string", "bool", "source", "grid", "method", "task", "model", "choice"],
)
def test_what_a_scenario_file_may_not_say(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    content = _content()
    change(content)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml") as raised:
        scenarios.load(str(path))
    assert words in str(raised.value)


def test_families_share_their_classes_and_subsets_are_all_met(tmp_path: Path) -> None:
    content = _content()
    content["data"] = {"digits": {"source": "mnist", "variant": "digits"}}
    content["tasks"] = {"new": {"data": "digits", "classes": ["0-1"]}}
    content["tasks"]["old"] = {"data": "digits", "classes": ["2-7"], "parts": 3}
    content["rounds"] = [{"target": "new", "upstream": ["old"], "subsets": True}]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    spec = scenarios.load(str(path))
    assert {name: own.classes for name, own in spec.tasks.items() if name != "new"} == {
        "old/0": (2, 3),
        "old/1": (4, 5),
        "old/2": (6, 7),
    }
    assert Counter(len(setting.upstream) for setting in spec.settings()) == {1: 3, 2: 3, 3: 1}


def test_classes_by_index_name_and_range() -> None:
    names = ["ant", "bee", "cat", "dog"]
    assert scenarios.class_indices(None, names) == [0, 1, 2, 3]
    assert scenarios.class_indices(["dog", "0-1"], names) == [3, 0, 1]
    for wrong, words in ((["2-4"], "0 to 3"), (["eel"], "no class 'eel'"), ([1, "bee"], "twice")):
        with pytest.raises(ValueError, match=words):
            scenarios.class_indices(wrong, names)


# Results


def test_a_torn_last_line_is_cut_and_run_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = Results(path)
    results.append({"id": "a", "accuracy": 50.0})
    results.append({"id": "b", "accuracy": 60.0})
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"id": "c", "accu')
    assert [record["id"] for record in read(path)] == ["a", "b"]
    again = Results(path)
    assert path.read_bytes() == whole
    assert "b" in again
    assert "c" not in again
    again.append({"id": "c", "accuracy": 70.0})
    assert [record["id"] for record in read(path)] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="already in"):
        again.append({"id": "c"})


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b\n{"id": "c"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"results.jsonl:2: not JSON"):
        Results(path)


def test_identity_depends_on_the_settings_alone() -> None:
    assert identity({"a": 1, "b": [1, 2]}) == identity({"b": [1, 2], "a": 1})
    assert identity({"a": 1}) != identity({"a": 2})


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_answers_survive_their_packing(count: int) -> None:
    correct = [bool(bit) for bit in np.random.default_rng(count).integers(0, 2, count)]
    record = describe(Outcome(correct, None, 2, 0, None, 0.1))
    assert correct_answers(json.loads(json.dumps(record))).tolist() == correct


def test_the_best_adapter_is_picked_by_validation_not_by_test() -> None:
    def final(method: str, adapter: str | None, seed: int, right: int, validation: float | None) -> dict[str, Any]:
        outcome = Outcome([True] * right + [False] * (4 - right), validation, 2, 0, None, 0.1)
        return {"method": method, "adapter": adapter, "k": 1, "seed": seed, **describe(outcome)}

    records = [
        final("single", "x", 0, 1, 90.0),
        final("single", "y", 0, 3, 80.0),
        final("single", "x", 1, 2, 70.0),
        final("single", "y", 1, 4, 75.0),
        final("lora", None, 0, 2, None),
        final("lora", None, 1, 2, None),
    ]
    own = scores(records)
    assert own[BEST_SINGLE, 1].mean(axis=1).tolist() == [25.0, 100.0]
    assert own[ORACLE_SINGLE, 1].mean(axis=1).tolist() == [75.0, 100.0]
    assert own[MEAN_SINGLE, 1].mean(axis=1).tolist() == [50.0, 75.0]
    with pytest.raises(ValueError, match="run the study again"):
        scores(records[:-1])


def test_differences_are_paired() -> None:
    ours = np.array([[100.0, 100, 0, 100], [100, 0, 0, 100], [100, 100, 0, 0]])
    theirs = np.array([[100.0, 0, 0, 100], [100, 0, 0, 0], [0, 100, 0, 0]])
    found = difference(ours, theirs)
    by_seed = np.array([25.0, 25.0, 25.0])
    by_example = np.array([100 / 3, 100 / 3, 0, 100 / 3])
    margin = 1.959963984540054 * by_example.std(ddof=1) / 2  # no spread over the seeds
    assert found.mean == pytest.approx(by_seed.mean())
    assert (found.low, found.high) == pytest.approx((25 - margin, 25 + margin))
    assert found.is_clear


# Training


def test_a_training_that_breaks_off_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    features, classes = generator.normal(size=(24, 8)).astype(np.float32), generator.integers(0, 3, 24).tolist()
    plan = Plan(1e-2, epochs=4, batch_size=8, seed=3, checkpoint_steps=2)

    class Breaking(Rows):
        left = 60

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.left -= 1
            if self.left < 0:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    def head() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(8, 3)

    straight, broken, resumed = head(), head(), head()
    fit(HeadOnFeatures(straight), Rows(features, classes), plan, tmp_path / "straight")
    with pytest.raises(OSError, match="disk"):
        fit(HeadOnFeatures(broken), Breaking(features, classes), plan, tmp_path / "other")
    checkpoint = last_complete_checkpoint(tmp_path / "other")
    assert checkpoint is not None
    assert checkpoint.endswith("checkpoint-6")
    watched = Breaking(features, classes)  # 12 steps of 8 examples would break again, the 6 that are left do not
    fit(HeadOnFeatures(resumed), watched, plan, tmp_path / "other")
    assert torch.equal(resumed.weight, straight.weight)


def test_a_head_trained_on_features_is_the_head_trained_in_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    whole = SentenceClassifier(config)
    whole.bert.requires_grad_(False)
    parts = copy.deepcopy(whole)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 50, (20, 7), generator=generator)
    rows = [
        {"input_ids": own, "attention_mask": torch.ones_like(own), "labels": i % 3} for i, own in enumerate(tokens)
    ]
    plan = Plan(1e-2, epochs=5, batch_size=8, seed=3)
    start = whole.classifier.weight.detach().clone()

    fit(whole, rows, plan, tmp_path)
    features = predict(Body(parts), rows, tmp_path)
    fit_head(parts.classifier, features, [row["labels"] for row in rows], plan, tmp_path)

    one, other = whole.classifier.weight.detach(), parts.classifier.weight.detach()
    assert float((one - other).norm()) < 1e-4 * float((one - start).norm())


def test_loading_processes_give_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = task(DataSpec("mnist", {"variant": "digits"}), ["0", "1"], SplitSpec()).test
    processor = transformers.ViTImageProcessor(size={"height": 14, "width": 14})
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=14, patch_size=7, **shape))

    def pixels(rows: dict[str, Any]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows["input"]]
        return {"pixel_values": list(processor(images, return_tensors="pt")["pixel_values"]), "labels": rows["label"]}

    encoded = digits.with_transform(pixels)
    alone = predict(model, encoded, tmp_path)
    assert alone.std(axis=0).min() > 0
    asked = []
    monkeypatch.setattr(training, "loaders", lambda data, has_gpu: asked.append(len(data)) or 2)
    assert np.array_equal(predict(model, encoded, tmp_path), alone)
    assert asked == [len(digits)]


def test_a_gpu_gets_loading_processes_where_there_are_many_images() -> None:
    data = Dataset.from_dict({"label": [0] * 1000})
    images = data.with_transform(dict)
    found = [loaders(images, True), loaders(images, False), loaders(images.select(range(999)), True)]
    assert found == [8, 0, 0]
    assert loaders(data, True) == 0
    assert loaders(Rows(np.zeros((2000, 2), np.float32), [0] * 2000), True) == 0


# From end to end


def _start(output: Path) -> ForkServerProcess:
    command = ["-m", "examples.few_shot_transfer", "run", SCENARIO, "--smoke", "--seeds", "1", "--output", output]
    return warm.start(*command, printed=output.parent / "log")


def _kill_when(process: ForkServerProcess, is_time: Callable[[], bool]) -> None:
    while not is_time():
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.join()


def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    output = tmp_path / "study"
    results = output / "results" / f"{SCENARIO}.jsonl"

    def upstream_is_under_way() -> bool:
        return any((output / "upstream").glob(".amazon-*-training/checkpoint-*/trainer_state.json"))

    def downstream_is_under_way() -> bool:
        return sum(record["phase"] == "final" for record in read(results)) >= 3

    _kill_when(_start(output), upstream_is_under_way)
    assert not list((output / "upstream").glob("amazon-*")), "the first adapter was finished before the kill"
    _kill_when(_start(output), downstream_is_under_way)
    before = results.read_bytes()
    adapters = {path: path.stat().st_mtime_ns for path in (output / "upstream").glob("*/adapter_model.safetensors")}
    assert len(adapters) == 4, "three upstream ones, and the new task's own for CKA"
    whole = before[: before.rfind(b"\n") + 1]
    results.write_bytes(whole + b'{"id": "torn')

    process = _start(output)
    process.join(600)
    assert process.exitcode == 0, (tmp_path / "log.err").read_text()[-3000:]
    assert results.read_bytes().startswith(whole), "what had finished was not left as it was"
    assert {path: path.stat().st_mtime_ns for path in adapters} == adapters, "an adapter was trained again"
    records = read(results)
    assert len({record["id"] for record in records}) == len(records)
    methods = Counter(record["method"] for record in records if record["phase"] == "final")
    assert methods == {**dict.fromkeys(scenarios.load(SCENARIO).methods, 1), "single": 3}
    assert len([record for record in records if record["phase"] == "session"]) == 2
    assert not list(output.glob("scratch/*"))

    page = write([scenarios.smoke(scenarios.load(SCENARIO))], output / "results", tmp_path / "report").read_text()
    for name in ("Classifier tuning", "Learned composition", "Best single adapter (by validation)"):
        assert f"| {name} |" in page
    for plot in (f"{SCENARIO}-movies.png", f"{SCENARIO}-gain.png", f"{SCENARIO}-movies-weights.png"):
        assert (tmp_path / "report" / plot).stat().st_size > 5000
        assert f"({plot})" in page


TINY = (
    digits()
    + """methods: [classifier, lora, learned, lorahub]
upstream: {max_steps: 4, batch_size: 8}
downstream:
  shots: [3]
  seeds: 2
  warmup_epochs: 2
  epochs: 2
  batch_size: 4
  validation_size: 9
  test_size: 21
  lorahub_budget: 6
similarity: {examples: 20}
"""
)


def test_two_processes_share_the_work_and_one_writes(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text(TINY, encoding="utf-8")
    study = ["-m", "examples.few_shot_transfer", "run", tmp_path / "digits.yaml", "--output", tmp_path]
    done = warm.run(*study, processes=2, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-9000:]

    records = read(tmp_path / "results" / "digits.jsonl")
    assert len({record["id"] for record in records}) == len(records)
    final = [record for record in records if record["phase"] == "final"]
    assert Counter(record["method"] for record in final) == dict.fromkeys(
        ("classifier", "lora", "learned", "lorahub"), 2
    )
    assert {record["examples"] for record in final} == {21}, "odd, and every example is judged once"
    (session,) = [record for record in records if record["phase"] == "session"]
    assert session["processes"] == 2
    assert session["command"] == "python -m examples.few_shot_transfer run digits.yaml"
    assert {record["session"] for record in records if record is not session} == {session["id"]}
    assert str(tmp_path) not in (tmp_path / "results" / "digits.jsonl").read_text(encoding="utf-8")

    (compared,) = [record for record in records if record["phase"] == "similarity"]
    assert {tuple(row) for row in compared["cka"].values()} == {("low", "middle")}
    assert len(compared["cka"]) == 4  # two layers of two projections
    page = write(
        [scenarios.load(str(tmp_path / "digits.yaml"))], tmp_path / "results", tmp_path / "report"
    ).read_text()
    assert "| 3 | " in page[page.index("mean over modules") :]
    assert (tmp_path / "report" / "digits-new-weights.png").stat().st_size > 5000
