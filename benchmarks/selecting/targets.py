"""The tasks that candidates are selected for, and what is trained for their pools, on base models of the study.

Support sets, test examples and what planted adapters learn from are three disjoint parts of a task's data.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn


sys.path.append(str(Path(__file__).parents[2] / "examples"))  # the study

from few_shot_transfer import scenario as scenarios
from few_shot_transfer.data import Tasks, balanced, few_shot, labels_of
from few_shot_transfer.models import Classifier
from few_shot_transfer.upstream import foundation, train_adapter


__all__ = ["RECIPES", "Target", "few_shot", "labels_of"]

RANKS = (4, 8, 16)
STEPS = (8, 15, 25, 40)
BATCH, PASS = 16, 50


@dataclass(frozen=True)
class Recipe:
    """A task, and the scenarios of the study whose upstream adapters are for other tasks of the same base model.

    Attributes:
        scenario: of the study, that has the task.
        task: its name there.
        unrelated: upstream tasks by scenario, of other labels; some of clothes know a class or two of it.
        related: upstream tasks of the same labels on other texts.
    """

    scenario: str
    task: str
    unrelated: dict[str, tuple[str, ...]]
    related: dict[str, tuple[str, ...]]


TOPICS = ("g1-5", "g6-10", "g11-15", "g16-20")
RECIPES = {
    "clothes": Recipe(
        "fashion-entangled",
        "new-3-6",
        {"fashion-entangled": ("t0-1", "t4-5", "t8-9"), "fashion-labels": ("tops", "shoes", "others")},
        {},
    ),
    "dress-shirt-boot": Recipe(
        "fashion-labels",
        "new",
        {"fashion-entangled": ("t0-1", "t4-5"), "fashion-labels": ("tops", "shoes", "others")},
        {},
    ),
    "movies": Recipe(
        "vader-domains",
        "movies",
        {"distractors": ("reuters", "g1-10", "g11-20"), "newsgroups-entangled": TOPICS},
        {"vader-domains": ("amazon", "nyt", "tweets")},
    ),
}


@dataclass
class Target:
    """A task to select for.

    Attributes:
        name: of `RECIPES`.
        support_size: examples of each class that support sets are drawn from.
        test_size: examples that picks are judged on.
        trained: the folder in which the study keeps its adapters; those that are not there are trained into it.
    """

    name: str
    support_size: int
    test_size: int
    trained: Path

    @cached_property
    def model(self) -> Classifier:
        """The base model."""
        scenario = scenarios.load(RECIPES[self.name].scenario)
        model = foundation(scenario, self.trained / "foundation", progress=False)
        assert isinstance(model, Classifier)
        return model

    @cached_property
    def support(self) -> Dataset:
        """What support sets are drawn from."""
        return self._train.select(self._drawn)

    @cached_property
    def test(self) -> Dataset:
        """What picks are judged on."""
        rows = self._data.test
        return rows.select(balanced(labels_of(rows), self.test_size))

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self._data.classes)

    def plant(self, folder: Path) -> None:
        """Train an adapter of the very task for each of `RANKS` and `STEPS`, on examples that no support set has."""
        rest = sorted(set(range(len(self._train))) - set(self._drawn))
        rows = self._train.select(rest)
        for rank in RANKS:
            for number, steps in enumerate(STEPS):
                home = folder / f"related-r{rank}-{steps:02}"
                if (home / "adapter_model.safetensors").is_file():
                    continue
                base = self.model.build(self.classes, number)
                train_lora(
                    base,
                    LoraConfig(
                        r=rank,
                        lora_alpha=2 * rank,
                        target_modules=list(self.model.spec.target_modules),
                        modules_to_save=["classifier"],
                    ),
                    lambda places: self.batch(rows, places),
                    len(rows),
                    steps,
                    seed=len(STEPS) * rank + number,
                ).save_pretrained(str(home))

    def batch(self, rows: Dataset, places: Sequence[int]) -> dict[str, Tensor]:
        """Some examples, as the model takes them."""
        encoded = self.model.encode(rows.select(places))
        return self.model.collate([encoded[number] for number in range(len(encoded))])

    def reading(self, rows: Dataset, places: Sequence[int]) -> Callable[[nn.Module], Tensor]:
        """What computes features of some examples in their order, with similar lengths side by side."""
        texts = self.model.spec.kind == "sentence"
        order = sorted(places, key=lambda place: len(rows[place]["input"]) if texts else 0)
        batches = [self.batch(rows, order[start : start + PASS]) for start in range(0, len(order), PASS)]
        back = torch.tensor([order.index(place) for place in places])

        def read(model: Any) -> Tensor:
            seen: list[Tensor] = []
            hook = model.classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            try:
                for batch in batches:
                    model(**{key: value for key, value in batch.items() if key != "labels"})
            finally:
                hook.remove()
            return torch.cat(seen)[back]

        return read

    def of_the_study(self, related: bool) -> dict[str, Path]:
        """Adapters that the study trained, by task."""
        recipe, found = RECIPES[self.name], {}
        for name, tasks in (recipe.related if related else recipe.unrelated).items():
            scenario = scenarios.load(name)
            data = Tasks(scenario)
            for task in tasks:
                rank = scenario.upstream.ranks[0]
                own = train_adapter(scenario, task, rank, data, self.model, self.trained / "upstream", progress=False)
                found[task] = own.folder
        return found

    @cached_property
    def _data(self):  # type: ignore[no-untyped-def]
        recipe = RECIPES[self.name]
        return Tasks(scenarios.load(recipe.scenario))[recipe.task]

    @property
    def _train(self) -> Dataset:
        return self._data.train

    @cached_property
    def _drawn(self) -> list[int]:
        return few_shot(labels_of(self._train), self.support_size, 0)


def train_lora(
    base: nn.Module,
    config: LoraConfig,
    batch_of: Callable[[list[int]], dict[str, Tensor]],
    count: int,
    steps: int,
    seed: int,
    rate: float = 1e-3,
) -> Any:
    """A LoRA and a head, some steps of AdamW long.

    Args:
        base: the base model.
        config: of the LoRA.
        batch_of: some examples, by their places, as the model takes them.
        count: how many examples there are.
        steps: how many to take.
        seed: of the LoRA and of the order.
        rate: the learning rate.
    """
    torch.manual_seed(seed)
    model = get_peft_model(cast(Any, base), config).train()
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=rate)
    order = random.Random(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch_of(order.sample(range(count), BATCH))).loss.backward()
        optimizer.step()
    return model
