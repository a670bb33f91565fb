"""Phase 3: one method meets one support set, and is judged on validation or on test examples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn

from . import lorahub
from .data import Task, balanced, few_shot, labels_of
from .methods import Contender, build, mixing_weights
from .models import Classifier, Foundation
from .plan import Plan
from .scenario import Scenario, Setting
from .training import Body, active_head, fit, fit_head, predict, trainable_outside_head


HEAD_FIT_STEPS = 50  # of the head for every combination that LoraHub tries


@dataclass(frozen=True)
class Run:
    """What one run is: a method, K, a seed and a learning rate.

    Args:
        judged_on: "validation" in the grid search, "test" in final runs.
    """

    contender: Contender
    k: int | str
    seed: int
    learning_rate: float
    judged_on: str


@dataclass(frozen=True)
class Outcome:
    """What came out of a run.

    Attributes:
        correct: for every example that it was judged on, in a fixed order.
        validation: accuracy there in percent, also of final runs where it costs nothing; else None.
        support: size of the support set.
        trainable: parameters besides the head.
        weights: mixing weights by module and adapter, or LoraHub's under "all"; else None.
        seconds: for training and judging; shared features count for the run that needed them first.
    """

    correct: list[bool]
    validation: float | None
    support: int
    trainable: int
    weights: dict[str, dict[str, float]] | None
    seconds: float


def judged(scenario: Scenario, task: Task, model: Foundation) -> dict[str, Dataset]:
    """The validation and test examples that methods are judged on, with similar lengths side by side."""
    how = scenario.downstream
    chosen = {
        "validation": task.validation.select(balanced(labels_of(task.validation), how.validation_size)),
        "test": task.test.select(balanced(labels_of(task.test), how.test_size)),
    }
    return {split: model.sort_by_length(data) for split, data in chosen.items()}


class Downstream:
    """A downstream task and the foundation model that meets it; keeps what its runs share.

    Shared are the features of frozen bodies and the warmed-up heads: with dropout off they are what every run would
    compute again.
    """

    def __init__(self, scenario: Scenario, setting: Setting, task: Task, model: Classifier, scratch: Path) -> None:
        self.scenario, self.setting, self.task, self.model, self.scratch = scenario, setting, task, model, scratch
        self._data = judged(scenario, task, model)
        self._encoded = {split: model.encode(data) for split, data in self._data.items()}
        self._labels = {split: np.asarray(labels_of(data)) for split, data in self._data.items()}
        self._pool_labels = labels_of(task.train)
        self._features: dict[tuple[tuple[str, ...], str], np.ndarray] = {}
        self._heads: dict[tuple[tuple[str, ...], int | str, int], dict[str, torch.Tensor]] = {}

    def support(self, k: int | str, seed: int) -> list[int]:
        """Indices into the task's training pool."""
        return few_shot(self._pool_labels, k, seed)

    def run(self, run: Run) -> Outcome:
        """Trains and judges."""
        started = time.perf_counter()
        how, contender = self.scenario.downstream, run.contender
        support = self.support(run.k, run.seed)
        model = build(contender, self.scenario, self.setting.rank, self.model, len(self.task.classes), run.seed)
        if contender.method == "lorahub":
            assert isinstance(model, PeftModel)
            return self._lorahub(run, model, support, started)
        self._warm_up(run, model, support)
        validation = None
        if contender.is_frozen:
            self._fit_head(run, model, self._support_features(contender, model, support), support)
            head = active_head(model)
            correct = self._judge_head(head, self._body_features(contender, model, run.judged_on), run.judged_on)
            if run.judged_on == "test":
                features = self._body_features(contender, model, "validation")
                validation = percent(self._judge_head(head, features, "validation"))
        else:
            rows = self.model.encode(self.task.train.select(support))
            plan = self._plan(run, run.learning_rate, how.head_learning_rate, how.checkpoint_steps)
            fit(model, rows, plan, self.scratch / folder_name(run), self.model.collate)
            logits = predict(model, self._encoded[run.judged_on], self.scratch, self.model.collate)
            correct = (logits.argmax(axis=-1) == self._labels[run.judged_on]).tolist()
        return Outcome(
            correct,
            percent(correct) if run.judged_on == "validation" else validation,
            len(support),
            trainable_outside_head(model),
            mixing_weights(model),
            round(time.perf_counter() - started, 3),
        )

    def _lorahub(self, run: Run, model: PeftModel, support: Sequence[int], started: float) -> Outcome:
        """Searches the weights; the head is fitted anew for every combination, and in the end as for all methods."""
        rows, labels = self.task.train.select(support), torch.tensor(self._labels_of(support))
        encoded = self.model.encode(rows)
        start = {name: tensor.clone() for name, tensor in active_head(model).state_dict().items()}

        def loss() -> float:
            features = torch.from_numpy(predict(Body(model), encoded, self.scratch, self.model.collate))
            return self._fitted_loss(start, features, labels)

        how = self.scenario.downstream
        weights = lorahub.search(model, run.contender.adapters, loss, how.lorahub_budget, run.seed)
        correct = self._fit_and_judge_head(run, model, support)
        return Outcome(
            correct,
            percent(correct) if run.judged_on == "validation" else None,
            len(support),
            len(weights),
            {"all": weights},
            round(time.perf_counter() - started, 3),
        )

    def _fit_and_judge_head(self, run: Run, model: nn.Module, support: Sequence[int]) -> list[bool]:
        """What a head gets right whose body is this draw's alone, so that no other run shares its features."""
        encoded = self.model.encode(self.task.train.select(support))
        features = predict(Body(model), encoded, self.scratch, self.model.collate)
        head = active_head(model)
        fit_head(head, features, self._labels_of(support), self._warm_up_plan(run), self.scratch)
        self._fit_head(run, model, features, support)
        judged = predict(Body(model), self._encoded[run.judged_on], self.scratch, self.model.collate)
        return self._judge_head(head, judged, run.judged_on)

    def _fitted_loss(self, start: dict[str, torch.Tensor], features: torch.Tensor, labels: torch.Tensor) -> float:
        """The support set's loss under a head that was fitted to these features in a few full-batch steps."""
        head = nn.Linear(features.shape[1], len(self.task.classes))
        head.load_state_dict(start)
        rate = self.scenario.downstream.warmup_learning_rate
        optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0)
        for _ in range(HEAD_FIT_STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features), labels).backward()
            optimizer.step()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(head(features), labels))

    def _warm_up(self, run: Run, model: nn.Module, support: Sequence[int]) -> None:
        key = (run.contender.body, run.k, run.seed)
        head = active_head(model)
        if key not in self._heads:
            features = self._support_features(run.contender, model, support)
            fit_head(head, features, self._labels_of(support), self._warm_up_plan(run), self.scratch)
            self._heads[key] = {name: tensor.detach().cpu().clone() for name, tensor in head.state_dict().items()}
        head.load_state_dict(self._heads[key])

    def _fit_head(self, run: Run, model: nn.Module, features: np.ndarray, support: Sequence[int]) -> None:
        plan = self._plan(run, run.learning_rate)
        fit_head(active_head(model), features, self._labels_of(support), plan, self.scratch)

    def _support_features(self, contender: Contender, model: nn.Module, support: Sequence[int]) -> np.ndarray:
        features = self._body_features(contender, model, "support")
        return features[np.searchsorted(self._supports, support)]

    def _body_features(self, contender: Contender, model: nn.Module, split: str) -> np.ndarray:
        """Features of the model as it was built, before anything but its head is trained."""
        key = (contender.body, split)
        if key not in self._features:
            rows = self._encoded_supports if split == "support" else self._encoded[split]
            self._features[key] = predict(Body(model), rows, self.scratch, self.model.collate)
        return self._features[key]

    @cached_property
    def _supports(self) -> list[int]:
        """All examples of any support set, by index; the grid search may judge by others than the final runs."""
        how = self.scenario.downstream
        drawn = {(k, seed) for k in how.shots for seed in range(how.seeds)}
        if how.selection is not None:
            drawn |= {(k, seed) for k in how.selection.shots for seed in range(how.selection.seeds)}
        return sorted({index for k, seed in drawn for index in self.support(k, seed)})

    @cached_property
    def _encoded_supports(self) -> Dataset:
        return self.model.encode(self.task.train.select(self._supports))

    def _judge_head(self, head: nn.Module, features: np.ndarray, split: str) -> list[bool]:
        with torch.no_grad():
            device = next(head.parameters()).device
            logits = head(torch.from_numpy(features).to(device)).cpu().numpy()
        return (logits.argmax(axis=-1) == self._labels[split]).tolist()

    def _labels_of(self, support: Sequence[int]) -> list[int]:
        return [self._pool_labels[index] for index in support]

    def _warm_up_plan(self, run: Run) -> Plan:
        how = self.scenario.downstream
        return Plan(how.warmup_learning_rate, how.warmup_epochs, how.batch_size, seed=run.seed)

    def _plan(
        self, run: Run, rate: float, head_rate: float | None = None, checkpoint_steps: int | None = None
    ) -> Plan:
        how = self.scenario.downstream
        return Plan(rate, how.epochs, how.batch_size, head_rate, how.max_steps, run.seed, checkpoint_steps)


def describe(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON holds it."""
    return {
        "accuracy": percent(outcome.correct),
        "validation": outcome.validation,
        "support": outcome.support,
        **packed(outcome.correct),
        "trainable": outcome.trainable,
        "weights": outcome.weights,
        "seconds": outcome.seconds,
    }


def packed(correct: Sequence[bool]) -> dict[str, Any]:
    """`correct` as hexadecimal digits, four examples each, the first one highest; and how many `examples`."""
    bits = "".join("01"[value] for value in correct)
    padded = bits + "0" * (-len(bits) % 4)
    return {"examples": len(bits), "correct": f"{int(padded, 2):0{len(padded) // 4}x}"}


def correct_answers(record: dict[str, Any]) -> np.ndarray:
    """What `packed` packed, as booleans (n,)."""
    digits = record["correct"]
    bits = f"{int(digits, 16):0{4 * len(digits)}b}"[: record["examples"]]
    return np.array([bit == "1" for bit in bits])


def percent(correct: Sequence[bool]) -> float:
    """The share of right answers, in percent."""
    return round(100 * sum(correct) / len(correct), 4)


def folder_name(run: Run) -> str:
    """A name for the checkpoints of a run."""
    parts = [run.contender.method, run.contender.adapter, f"k{run.k}", f"seed{run.seed}", f"lr{run.learning_rate:g}"]
    return "-".join(part for part in parts if part).replace("/", "_")
