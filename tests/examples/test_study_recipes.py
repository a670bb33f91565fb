"""The methods of the study that the paper does not have, on a scenario of digits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from few_shot_transfer import scenario as scenarios
from few_shot_transfer.analysis import scaled_lora, scores
from few_shot_transfer.bench import features_of
from few_shot_transfer.downstream import Outcome, Run, correct_answers, describe
from few_shot_transfer.methods import Contender
from few_shot_transfer.models import Classifier
from few_shot_transfer.plan import RECIPE_RATE, recipe_plan
from few_shot_transfer.recipes import FRESH, Recipes
from few_shot_transfer.records import Record, read
from few_shot_transfer.report import write
from few_shot_transfer.scenario import ADDED, FACTORS
from few_shot_transfer.study import Study, limited
from few_shot_transfer.upstream import Adapter
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from peft_composition.evidence.fit import weights_by
from peft_composition.evidence.scores import leave_one_out_distances

from .digits import digits


TINY = (
    digits()
    + f"""methods: [lora, uniform, {", ".join(ADDED)}]
upstream: {{max_steps: 4, batch_size: 8, learning_rate: 0.05}}
downstream:
  shots: [1, 3]
  seeds: 1
  warmup_epochs: 2
  epochs: 10
  batch_size: 6
  recipe_steps: 4
  grid: {{head: [1.0e-2], lora: [3.0e-2], full: [1.0e-4], mixing: [1.0e-2]}}
  validation_size: 9
  test_size: 61
"""
)
Found = dict[tuple[str, str | None, int, int], Record]  # by method, adapter, K and seed


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Found]:
    """A study that has run, and its final runs."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "digits.yaml").write_text(TINY, encoding="utf-8")
    study = Study(scenarios.load(str(folder / "digits.yaml")), folder, progress=False)
    study.run()
    records = [own for own in read(folder / "results" / "digits.jsonl") if own["phase"] == "final"]
    return study, {(own["method"], own["adapter"], own["k"], own["seed"]): own for own in records}


def rows_of(record: Record) -> list[dict[str, float]]:
    """Its mixing weights, module by module."""
    return list(record["weights"].values())


def test_every_method_has_its_runs_and_its_row(done: tuple[Study, Found]) -> None:
    study, found = done
    runs = Counter(method for method, *_ in found)
    assert runs == {"lora": 2, "uniform": 2, **dict.fromkeys(ADDED, 2), "lambda-lora": 2 * len(FACTORS)}
    assert not list(study.folder.glob("scratch/*")), "the LoRAs of the support sets are left behind"
    page = write([study.scenario], study.folder / "results", study.folder / "report").read_text()
    for row in ("Weights by evidence", "LoRA times a factor (by validation)", "LoRA times 0.25"):
        assert f"| {row} |" in page


def test_a_lora_times_one_is_that_lora_and_smaller_factors_are_not(done: tuple[Study, Found]) -> None:
    _, found = done
    alone = {factor: [found["lambda-lora", factor, k, 0]["correct"] for k in (1, 3)] for factor in FACTORS}
    assert alone["1"] == [found["lora", None, k, 0]["correct"] for k in (1, 3)]
    assert alone["0.25"] != alone["1"]
    assert all(found["lambda-lora", factor, 3, 0]["validation"] is not None for factor in FACTORS)


def test_weights_by_evidence_are_those_of_each_adapter_loaded_alone(done: tuple[Study, Found]) -> None:
    study, found = done
    (setting,) = study.scenario.settings()
    task, model = study.tasks["new"], study.model
    assert isinstance(model, Classifier)
    folders = [study._adapters[name, setting.rank][0].folder for name in setting.upstream]
    stage = Recipes(study.scenario, setting, task, model, study.folder / "again")
    support = task.train.select(stage.support(3, 0))
    bodies = [PeftModel.from_pretrained(model.build(2, 0), str(folder)) for folder in folders]
    base, mean = model.build(2, 0), model.build(2, 0)
    with torch.no_grad():
        for body in bodies:
            for name, layer in body.base_model.model.named_modules():
                if isinstance(layer, LoraLayer):
                    mean.get_submodule(name).weight += layer.get_delta_weight("default") / len(bodies)
    features = [features_of(body, model, support) for body in (*bodies, mean, base)]
    left = [leave_one_out_distances(own, torch.tensor(support["label"][:])) for own in features]
    expected = weights_by("likelihood-vote", left, 0).tolist()
    rows = rows_of(found["evidence", None, 3, 0])
    assert len(rows) == 4
    assert all(row == rows[0] for row in rows)
    assert list(rows[0].values()) == pytest.approx(expected, abs=2e-3)
    assert expected != pytest.approx([0.5, 0.5], abs=0.05)
    assert found["evidence", None, 3, 0]["trainable"] == 0


def test_one_example_of_each_class_is_no_evidence(done: tuple[Study, Found]) -> None:
    _, found = done
    assert found["evidence", None, 1, 0]["correct"] == found["uniform", None, 1, 0]["correct"]
    assert rows_of(found["evidence", None, 1, 0])[0] == {"low": 0.5, "middle": 0.5}
    cold, warm = (found[method, None, 1, 0] for method in ("cold", "evidence-learned"))
    assert (cold["correct"], cold["weights"]) == (warm["correct"], warm["weights"])
    assert found["cold", None, 3, 0]["weights"] != found["evidence-learned", None, 3, 0]["weights"]


def test_what_trains_moves(done: tuple[Study, Found]) -> None:
    _, found = done
    shared = {"cold-block": 2, "cold-model": 1}  # of two layers
    for method, vectors in shared.items():
        record = found[method, None, 3, 0]
        assert record["trainable"] == 2 * vectors
        assert len({tuple(row.values()) for row in rows_of(record)}) == vectors
    for method, adapters in (("cold", 2), ("evidence-learned", 2), ("fresh-member", 3)):
        record = found[method, None, 3, 0]
        assert record["trainable"] == 4 * adapters  # two layers of two projections
        assert len({tuple(row.values()) for row in rows_of(record)}) > 1, "modules have weights of their own"
        assert all(
            sum(row.values()) == pytest.approx(1, abs=1e-3) or method == "evidence-learned" for row in rows_of(record)
        )
    assert list(rows_of(found["fresh-member", None, 3, 0])[0]) == ["low", "middle", FRESH]
    assert recipe_plan(100, 16).steps(1) == recipe_plan(100, 16).steps(1000) == 100
    assert recipe_plan(100, 16).head_learning_rate == recipe_plan(100, 16).learning_rate == RECIPE_RATE


class Seen(Recipes):
    """Stops where the mix with the fresh LoRA would be trained, and keeps that LoRA."""

    def _trained_together(self, run: Run, support: Sequence[int], started: float) -> Outcome:
        self.members = [adapter.name for adapter in run.contender.adapters]
        self.tensors = load_file(run.contender.adapters[-1].folder / "adapter_model.safetensors")
        return Outcome([True], None, len(support), 0, None, 0.0)


def test_the_fresh_member_is_the_lora_of_the_support_set(done: tuple[Study, Found], tmp_path: Path) -> None:
    study, _ = done
    (setting,) = study.scenario.settings()
    model = study.model
    assert isinstance(model, Classifier)
    stage = Seen(study.scenario, setting, study.tasks["new"], model, tmp_path)
    own = tuple(Adapter(name, study._adapters[name, setting.rank][0].folder, {}) for name in setting.upstream)
    stage.run(Run(Contender("fresh-member", own), 3, 0, 1e-3, "test"))
    assert stage.members == ["low", "middle", FRESH]
    ((key, trained),) = stage._loras.items()
    assert key == (3, 0, 1e-3)
    factors = {name: tensor for name, tensor in stage.tensors.items() if "lora_" in name}
    assert len(factors) == 2 * 4
    for name, tensor in factors.items():
        assert torch.equal(tensor, trained[name.replace(".weight", ".default.weight")])
    assert all(float(tensor.abs().sum()) > 0 for tensor in factors.values()), "it was not trained"


def test_a_factor_is_picked_by_validation_not_by_test() -> None:
    records: list[dict[str, Any]] = []
    for seed, validation in enumerate(({"0.25": 50.0, "1": 60.0}, {"0.25": 70.0, "1": 60.0})):
        for factor in ("0.25", "1"):
            right = [factor == "0.25"] * 4
            outcome = describe(Outcome(right, validation[factor], 6, 0, None, 0.0))
            records.append({"method": "lambda-lora", "adapter": factor, "k": 3, "seed": seed, **outcome})
    found = scores(records)
    assert found["lambda-lora", 3].mean(axis=1).tolist() == [0, 100]
    assert found[scaled_lora("0.25"), 3].mean() == 100
    assert correct_answers(records[0]).tolist() == [True] * 4


@pytest.mark.parametrize("method", ADDED)
def test_language_models_are_refused_before_anything_runs(method: str) -> None:
    spec = scenarios.load("wordnet-questions")
    with pytest.raises(ValueError, match=f"method '{method}' is for classifiers, and the model is 'causal'"):
        limited(spec, None, (method,))


def test_scenarios_that_name_no_methods_run_those_of_the_paper_and_its_controls() -> None:
    assert not set(ADDED) & set(scenarios.load("fashion-labels").methods)


def test_a_scenario_can_be_cut_down_to_one_task_and_other_shots() -> None:
    spec = limited(scenarios.load("vader-domains"), 8, ("uniform", "evidence"), (2, 5), "nyt")
    assert [own.target for own in spec.settings()] == ["nyt"]
    assert (spec.downstream.shots, spec.downstream.seeds) == ((2, 5), 8)
    with pytest.raises(ValueError, match="'books' is no downstream task of vader-domains: there are movies, amazon"):
        limited(scenarios.load("vader-domains"), None, None, target="books")
    with pytest.raises(ValueError, match="shots are positive numbers"):
        limited(scenarios.load("vader-domains"), None, None, (0,))


def test_the_grid_search_judges_by_its_own_support_sets_however_a_scenario_is_cut_down(tmp_path: Path) -> None:
    text = (
        TINY.replace(", ".join(ADDED), "learned")
        .replace("shots: [1, 3]", "shots: [1, 3, 5]")
        .replace("seeds: 1", "seeds: 2")
    )
    text = text.replace("grid:", "selection: {shots: [5], seeds: 2}\n  grid:").replace(
        "head: [1.0e-2]", "head: [0.01, 0.1]"
    )
    (tmp_path / "digits.yaml").write_text(text, encoding="utf-8")
    spec = scenarios.load(str(tmp_path / "digits.yaml"))
    found = {}
    for name, own in (("whole", spec), ("part", limited(spec, 1, ("uniform",), (1,)))):
        Study(own, tmp_path / name, progress=False).run()
        records = read(tmp_path / name / "results" / "digits.jsonl")
        found[name] = {
            (own["method"], own["seed"], own["learning_rate"]): own["correct"]
            for own in records
            if own["phase"] == "selection"
        }
    assert len(found["part"]) == 4
    assert found["part"].items() <= found["whole"].items()
