"""What the study says that it will cost: counts against real runs, FLOPs and memory against formulas and torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from few_shot_transfer import recipes
from few_shot_transfer import scenario as scenarios
from few_shot_transfer.__main__ import app
from few_shot_transfer.cost import Assumptions, cost_of
from few_shot_transfer.counting import Body, Sizes, Work, sizes_of, tally
from few_shot_transfer.footprint import Footprint, SavedStorages, footprint
from few_shot_transfer.records import read
from few_shot_transfer.study import Study
from few_shot_transfer.training import GroupedTrainer, HeadOnFeatures
from typer.testing import CliRunner

from peft_composition import fit_mixing_weights

from .digits import digits


VIT = scenarios.load("split-cifar100").model
DIGITS = (
    digits(layers=1, steps=3, of_round=", subsets: true")
    + f"""methods: [classifier, lora, uniform, learned, single, lorahub, {", ".join(scenarios.ADDED)}]
upstream: {{max_steps: 2, batch_size: 8}}
downstream:
  shots: [3]
  seeds: 1
  warmup_epochs: 2
  epochs: 3
  max_steps: 5
  batch_size: 4
  grid: {{head: [1.0e-2], lora: [1.0e-3], full: [1.0e-4], mixing: [1.0e-3, 1.0e-2]}}
  selection: {{shots: [3], seeds: 1}}
  validation_size: 9
  test_size: 21
  lorahub_budget: 4
  recipe_steps: 7
"""
)


@pytest.mark.parametrize("name", scenarios.names())
def test_the_runs_of_every_scenario_are_those_of_its_progress_bar(name: str, tmp_path: Path) -> None:
    spec = scenarios.load(name)
    counted = tally(spec)
    assert counted.runs == Study(spec, tmp_path, progress=False)._count(list(spec.settings()))
    assert 0 < counted.computed <= counted.runs
    assert len(counted.upstream) == len(spec.wanted()) + (spec.model.pretraining is not None)


def test_counts_are_those_of_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits.yaml").write_text(DIGITS, encoding="utf-8")
    spec = scenarios.load(str(tmp_path / "digits.yaml"))
    done: Counter[str] = Counter()
    train, predict = GroupedTrainer.train, GroupedTrainer.predict

    def counted_train(self: GroupedTrainer, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        done["head_steps" if isinstance(self.model, HeadOnFeatures) else "steps"] += self.state.global_step
        return result

    def counted_predict(self: GroupedTrainer, data: Any, *args: Any, **kwargs: Any) -> Any:
        done["seen"] += len(data)
        return predict(self, data, *args, **kwargs)

    def counted_evidence(model: Any, data: Any, **kwargs: Any) -> Any:
        report = fit_mixing_weights(model, data, **kwargs)
        assert report.scores is not None
        done["seen"] += len(report.scores) * len(data)
        return report

    monkeypatch.setattr(recipes, "fit_mixing_weights", counted_evidence)
    monkeypatch.setattr(GroupedTrainer, "train", counted_train)
    monkeypatch.setattr(GroupedTrainer, "predict", counted_predict)
    Study(spec, tmp_path, progress=False).run()

    expected = tally(spec)
    works = [*expected.upstream.values(), *expected.downstream]
    assert done == {part: sum(getattr(work, part) for work in works) for part in ("steps", "head_steps", "seen")}
    records = [record for record in read(tmp_path / "results" / "digits.jsonl") if "outcome" in record]
    assert len(records) == expected.runs
    assert len({record["outcome"] for record in records}) == expected.computed < expected.runs


def test_sizes_follow_from_the_data_and_the_splits_that_are_made_of_them() -> None:
    assert sizes_of(scenarios.load("split-cifar100"), "c1-25") == Sizes(25, 11250, 1250, 2500)
    assert sizes_of(scenarios.load("vision-tasks"), "flowers") == Sizes(102, 1020, 1020, 6149)
    assert sizes_of(scenarios.load("question-answering"), "quail") == Sizes(4, 10246, 2164, 556, 450, 8)
    photo = sizes_of(scenarios.load("pacs"), "photo")
    assert (photo.classes, photo.train + photo.validation + photo.test) == (7, 1670)
    assert Sizes(4, 10, 0, 0).support(2) == 8
    assert Sizes(4, 10, 0, 0).support(5) == 8, "a class has two"
    assert Sizes(4, 10, 0, 0).support("all") == 10


def test_data_of_unknown_size_are_an_error_that_says_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text(DIGITS.replace("variant: digits", "variant: letters"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"'letters' of source 'mnist' .* add it to sizes\.yaml"):
        tally(scenarios.load(str(tmp_path / "digits.yaml")))


def test_flops_are_those_of_the_formula() -> None:
    tokens, width, patches = 50, 768, 49
    patching = 2 * patches * (3 * 32 * 32) * width
    layer = 2 * tokens * (4 * width**2 + 2 * width * 4 * width) + 2 * 2 * tokens**2 * width
    forward = patching + 12 * layer + 2 * width * 100
    full = footprint(VIT, Body("full"), 8, (0, 0))
    assert full.forward == forward
    assert full.step == 3 * forward - patching, "images need no gradient"
    lora = footprint(VIT, Body("lora", 16), 8, (0, 0))
    factors = 12 * 3 * 2 * tokens * 2 * 16 * width
    assert lora.forward == forward + factors
    assert 2 * forward - patching < lora.step + 2 * tokens * 12 * 3 * width**2
    assert lora.step < 2 * forward + 3 * factors


def test_parameters_are_those_of_the_whole_model() -> None:
    t5 = scenarios.load("question-answering").model
    # Of Flan-T5 large, 783,150,080 with its own output matrix, which `T5Config` ties to the embedding.
    assert footprint(t5, Body("full"), 2, (8, 4)).trainable == 783_150_080 - 32128 * 1024


def test_what_trains_is_counted_for_every_method() -> None:
    head = 768 * 100 + 100
    full, lora = (footprint(VIT, body, 8, (0, 0)) for body in (Body("full"), Body("lora", 16)))
    learned = footprint(VIT, Body("mixing", 16, 3), 8, (0, 0))
    assert full.weights == 4 * full.trainable
    assert lora.trainable == head + 36 * 2 * 16 * 768
    assert learned.trainable == head + 36 * 3
    assert learned.activations < full.activations
    assert learned.memory < full.memory


def test_memory_is_what_torch_keeps() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    kept = {}
    for device in ("cpu", "meta"):
        with torch.device(device):
            model: Any = transformers.ViTForImageClassification._from_config(config, attn_implementation="eager")
            pixels, labels = torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
        saved = SavedStorages(model)
        with saved.counting():
            loss = model(pixel_values=pixels, labels=labels).loss
        kept[device] = saved.total
        if device == "cpu":
            optimizer = torch.optim.AdamW(model.parameters())
            loss.backward()
            optimizer.step()
            parameters = list(model.parameters())
            weights = sum(p.nbytes for p in parameters)
            gradients = sum(p.grad.nbytes for p in parameters)
            averages = sum(s.nbytes for p in parameters for s in optimizer.state[p].values() if s.ndim)
    assert kept["meta"] == kept["cpu"] > 0
    counted = Footprint(0, 0, weights, sum(p.numel() for p in parameters), kept["meta"])
    assert counted.memory == weights + gradients + averages + kept["cpu"]


def test_hours_are_those_of_the_slower_of_computing_and_reading() -> None:
    spec = scenarios.load("split-cifar100")
    batch = spec.downstream.batch_size
    one = footprint(spec.model, Body("full"), batch, (spec.model.max_length, 0))
    work = Work(Body("full"), Sizes(25, 11250, 1250, 2500), steps=100, trained=100 * batch, head_steps=1000)
    flops = 100 * batch * one.step
    slow_gpu = cost_of(spec, [work], Assumptions(tflops=1e-3 * flops / 1e12, images=1e9, head_step=0.01))
    assert (slow_gpu.computing, slow_gpu.seconds) == pytest.approx((1000.0, 1010.0))
    slow_disk = cost_of(spec, [work], Assumptions(tflops=1e6, images=batch, step=0.5, head_step=0.01))
    assert (slow_disk.computing, slow_disk.images, slow_disk.seconds) == pytest.approx((50.0, 100.0, 110.0))
    answers = replace(spec, model=replace(spec.model, max_new_tokens=10))
    answering = cost_of(answers, [Work(Body("full"), work.task, answered=33)], Assumptions(tflops=1e9, token=0.1))
    assert answering.seconds == pytest.approx(3 * 10 * 0.1, rel=1e-3)


def test_the_command_prints_a_table_and_what_to_type() -> None:
    printed = CliRunner().invoke(app, ["cost", "split-cifar100"])
    assert printed.exit_code == 0, printed.output
    row = next(line for line in printed.output.splitlines() if line.startswith("| `split-cifar100`"))
    assert [cell.strip() for cell in row.split("|")][2:5] == ["3", "324", "324"]
    assert "\naccelerate launch -m examples.few_shot_transfer run split-cifar100\n" in printed.output
    assert CliRunner().invoke(app, ["cost"]).exit_code == 2
