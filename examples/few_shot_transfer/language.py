"""Phase 3 for language models: one method meets one support set. There is no head."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn

from . import lorahub
from .data import Task, few_shot, labels_of
from .downstream import Outcome, Run, folder_name, judged, percent
from .language_model import LanguageModel
from .methods import build, mixing_weights
from .plan import Plan
from .scenario import Scenario, Setting
from .training import fit, trainable_outside_head


class LanguageDownstream:
    """A downstream task for a language model. There is no head: what is frozen answers alike at every K and seed."""

    def __init__(self, scenario: Scenario, setting: Setting, task: Task, model: LanguageModel, scratch: Path) -> None:
        self.scenario, self.setting, self.task, self.model, self.scratch = scenario, setting, task, model, scratch
        self._data = judged(scenario, task, model)
        self._answers: dict[tuple[tuple[str, ...], str], list[bool]] = {}

    def run(self, run: Run) -> Outcome:
        """Trains, where the method does, and judges by exact match."""
        started = time.perf_counter()
        contender = run.contender
        support = few_shot(labels_of(self.task.train), run.k, run.seed)
        model = build(contender, self.scenario, self.setting.rank, self.model, len(self.task.classes), run.seed)
        if contender.is_frozen:
            correct = self._frozen_answers(run, model, run.judged_on)
            validation = percent(self._frozen_answers(run, model, "validation"))
            return self._outcome(correct, validation, 0, 0, None, started)
        rows = self.model.encode(self.task.train.select(support))
        weights: dict[str, dict[str, float]] | None
        if contender.method == "lorahub":
            assert isinstance(model, PeftModel)
            budget = self.scenario.downstream.lorahub_budget
            found = lorahub.search(model, contender.adapters, lambda: self._loss(model, rows), budget, run.seed)
            weights, trainable = {"all": found}, len(found)
        else:
            fit(model, rows, self._plan(run), self.scratch / folder_name(run), self.model.collate)
            weights, trainable = mixing_weights(model), trainable_outside_head(model)
        correct = self.model.correct(model, self._data[run.judged_on])
        judged = percent(correct) if run.judged_on == "validation" else None
        return self._outcome(correct, judged, len(support), trainable, weights, started)

    def _frozen_answers(self, run: Run, model: nn.Module, split: str) -> list[bool]:
        key = (run.contender.body, split)
        if key not in self._answers:
            self._answers[key] = self.model.correct(model, self._data[split])
        return self._answers[key]

    @torch.no_grad()
    def _loss(self, model: nn.Module, rows: Dataset) -> float:
        model.eval()
        device = next(model.parameters()).device
        batch = self.model.collate([dict(row) for row in rows])
        return float(model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss)

    def _plan(self, run: Run) -> Plan:
        how = self.scenario.downstream
        steps = how.checkpoint_steps
        return Plan(run.learning_rate, how.epochs, how.batch_size, None, how.max_steps, run.seed, steps)

    @staticmethod
    def _outcome(
        correct: list[bool],
        validation: float | None,
        support: int,
        trainable: int,
        weights: dict[str, dict[str, float]] | None,
        started: float,
    ) -> Outcome:
        return Outcome(correct, validation, support, trainable, weights, round(time.perf_counter() - started, 3))
