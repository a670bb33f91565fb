"""Methods that the paper does not have: weights by evidence, training from there, and a LoRA of the K examples.

None looks at a validation example, but for the LoRA's learning rate. How they are judged is `Downstream`'s.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_composition import fit_mixing_weights

from .downstream import Downstream, Outcome, Run, folder_name, percent
from .methods import Contender, build, mixing_weights
from .plan import recipe_plan
from .scenario import SHARING
from .training import fit, predict, trainable_outside_head
from .upstream import Adapter


FRESH = "fresh"  # the name of the LoRA that is one more adapter of the mix


class Recipes(Downstream):
    """A downstream task that also runs `scenario.ADDED`; keeps the LoRAs that it trains for them.

    - "evidence": weights by `fit_mixing_weights` on the support set stay fixed, only a head is trained.
    - "cold": a fresh head and the weights train together from the uniform mix, without a warm-up. "cold-block" and
      "cold-model": all modules of a transformer block, or of the model, share one weight vector.
    - "evidence-learned": the same from the weights that "evidence" has.
    - "fresh-member": as "cold", with a LoRA that was trained on the support set as one more adapter.
    - "lambda-lora": that LoRA alone, times a factor. Its head stays as it was trained with the whole of it.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._loras: dict[tuple[int | str, int, float], dict[str, torch.Tensor]] = {}

    def run(self, run: Run) -> Outcome:
        """Trains and judges."""
        own: dict[str, Callable[[Run, Sequence[int], float], Outcome]] = {
            "evidence": self._fixed_by_evidence,
            **dict.fromkeys(("cold", *SHARING), self._trained_together),
            "evidence-learned": self._trained_together,
            "fresh-member": self._with_a_fresh_member,
            "lambda-lora": self._scaled,
        }
        if run.contender.method not in own:
            return super().run(run)
        return own[run.contender.method](run, self.support(run.k, run.seed), time.perf_counter())

    def _fixed_by_evidence(self, run: Run, support: Sequence[int], started: float) -> Outcome:
        model = self._built(run.contender, run.seed)
        self._choose_weights(run, model, support)
        correct = self._fit_and_judge_head(run, model, support)
        return self._outcome(run, model, correct, support, started)

    def _trained_together(self, run: Run, support: Sequence[int], started: float) -> Outcome:
        model = self._built(run.contender, run.seed)
        if run.contender.method == "evidence-learned":
            self._choose_weights(run, model, support)
        how = self.scenario.downstream
        plan = recipe_plan(how.recipe_steps, how.batch_size, run.seed, how.checkpoint_steps)
        rows = self.model.encode(self.task.train.select(support))
        fit(model, rows, plan, self.scratch / folder_name(run), self.model.collate)
        return self._outcome(run, model, self._judge(model, run.judged_on), support, started)

    def _with_a_fresh_member(self, run: Run, support: Sequence[int], started: float) -> Outcome:
        folder = self.scratch / f"lora-{folder_name(run)}"
        lora = self._fresh_lora(run, support)
        if PartialState().is_main_process:
            lora.save_pretrained(str(folder))
        PartialState().wait_for_everyone()
        adapters = (*run.contender.adapters, Adapter(FRESH, folder, {}))
        with_it = replace(run, contender=replace(run.contender, adapters=adapters))
        outcome = self._trained_together(with_it, support, started)
        if PartialState().is_main_process:
            shutil.rmtree(folder)
        return outcome

    def _scaled(self, run: Run, support: Sequence[int], started: float) -> Outcome:
        lora = self._fresh_lora(run, support)
        assert run.contender.adapter is not None
        for layer in lora.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(float(run.contender.adapter))
        outcome = self._outcome(run, lora, self._judge(lora, run.judged_on), support, started)
        if run.judged_on == "validation":
            return outcome
        return replace(outcome, validation=percent(self._judge(lora, "validation")))

    def _fresh_lora(self, run: Run, support: Sequence[int]) -> PeftModel:
        """A LoRA with its head, warmed up and trained on the support set as that of "lora"; once for every draw."""
        own = replace(run, contender=Contender("lora"))
        lora = self._built(own.contender, run.seed)
        assert isinstance(lora, PeftModel)
        trained = {name: parameter for name, parameter in lora.named_parameters() if parameter.requires_grad}
        key = (run.k, run.seed, run.learning_rate)
        if key not in self._loras:
            self._warm_up(own, lora, support)
            how = self.scenario.downstream
            plan = self._plan(own, run.learning_rate, how.head_learning_rate, how.checkpoint_steps)
            rows = self.model.encode(self.task.train.select(support))
            fit(lora, rows, plan, self.scratch / folder_name(own), self.model.collate)
            self._loras[key] = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(self._loras[key][name])
        return lora

    def _built(self, contender: Contender, seed: int) -> nn.Module:
        return build(contender, self.scenario, self.setting.rank, self.model, len(self.task.classes), seed)

    def _choose_weights(self, run: Run, model: nn.Module, support: Sequence[int]) -> None:
        rows = self.model.encode(self.task.train.select(support))
        fit_mixing_weights(model.to(PartialState().device), rows, collate=self.model.collate, seed=run.seed)

    def _judge(self, model: nn.Module, split: str) -> list[bool]:
        logits = predict(model, self._encoded[split], self.scratch, self.model.collate)
        return [bool(right) for right in logits.argmax(axis=-1) == self._labels[split]]

    def _outcome(
        self, run: Run, model: nn.Module, correct: list[bool], support: Sequence[int], started: float
    ) -> Outcome:
        validation = percent(correct) if run.judged_on == "validation" else None
        seconds = round(time.perf_counter() - started, 3)
        return Outcome(
            correct, validation, len(support), trainable_outside_head(model), mixing_weights(model), seconds
        )
