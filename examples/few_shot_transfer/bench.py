"""A downstream task with frozen bodies: features of each candidate, computed once for all draws and kept on disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_composition import CompositionConfig
from peft_composition.evidence.fit import put_weights
from peft_composition.evidence.own_heads import OwnHead, information, own_head
from peft_composition.evidence.passes import ALL_KINDS, candidates, composition_in
from peft_composition.evidence.weights import Information
from peft_composition.references import AdapterReference

from .data import Task, few_shot, labels_of
from .downstream import judged
from .models import Classifier
from .records import identity
from .scenario import Scenario, Setting
from .training import Body
from .upstream import Adapter, peft_options
from .views import VIEWS, view


BATCH = 64
UNIFORM, BASE = "uniform", "base"
Draw = tuple[int, int]  # K and the seed


@dataclass
class Bench:
    """A downstream task and the adapters that meet it.

    Attributes:
        scenario: of classification.
        setting: the task and its adapters.
        task: the data.
        adapters: trained.
        model: the foundation model.
        folder: where features are kept.
    """

    scenario: Scenario
    setting: Setting
    task: Task
    adapters: Sequence[Adapter]
    model: Classifier
    folder: Path

    @property
    def names(self) -> list[str]:
        """Of the adapters."""
        return [adapter.name for adapter in self.adapters]

    @property
    def facts(self) -> dict[str, str]:
        """`scenario` and `target` of its records; the adapters' rank is named where the scenario has several."""
        target, several = self.setting.target, len(self.scenario.upstream.ranks) > 1
        return {
            "scenario": self.scenario.name,
            "target": f"{target}, rank {self.setting.rank}" if several else target,
        }

    @property
    def classes(self) -> int:
        """How many the task has."""
        return len(self.task.classes)

    @cached_property
    def pool(self) -> list[int]:
        """Labels of the training pool."""
        return labels_of(self.task.train)

    @cached_property
    def judged(self) -> dict[str, Dataset]:
        """Validation and test examples."""
        return judged(self.scenario, self.task, self.model)

    @cached_property
    def judged_labels(self) -> dict[str, Tensor]:
        """Their labels."""
        return {split: torch.tensor(labels_of(rows)) for split, rows in self.judged.items()}

    def support(self, draw: Draw) -> list[int]:
        """The examples of a draw, as places in the pool."""
        return few_shot(self.pool, *draw)

    def labels(self, draw: Draw) -> Tensor:
        """Their labels."""
        return torch.tensor([self.pool[index] for index in self.support(draw)])

    def prepare(self, draws: Sequence[Draw]) -> None:
        """Compute what features of the adapters alone, of their uniform mix and of the bare model are missing."""
        wanted = sorted({index for draw in draws for index in self.support(draw)})
        for name in (*self.names, UNIFORM, BASE):
            self._kept(name, "support", wanted)
            for split, rows in self.judged.items():
                self._kept(name, split, list(range(len(rows))))

    def features(self, candidate: str, split: str | Draw) -> Tensor:
        """Features of an adapter alone, of "uniform" or of "base", on a draw or on "validation" or "test"."""
        if isinstance(split, str):
            return self._kept(candidate, split, list(range(len(self.judged[split]))))
        return self._kept(candidate, "support", self.support(split))

    def view_features(self, candidate: str, view: str, draw: Draw) -> Tensor:
        """Features of one view, of `VIEWS`, of every example of a draw."""
        return self._kept(candidate, view, self.support(draw))

    def told(self, draw: Draw, rows: Tensor | None = None) -> list[Information | None]:
        """What the adapters' own heads tell of the classes of the examples of a draw, or of some of them."""
        labels = self.labels(draw)
        if rows is None:
            rows = torch.arange(len(labels))
        return [
            None if head is None else information(self.features(name, draw)[rows], labels[rows], head)
            for name, head in zip(self.names, self._own_heads)
        ]

    def mixed(self, weights: Sequence[float], split: str | Draw | Dataset) -> Tensor:
        """Features of the model mixed by these weights, module by module, computed now; on a split, draw or rows."""
        if isinstance(split, Dataset):
            rows = split
        else:
            rows = self.judged[split] if isinstance(split, str) else self.task.train.select(self.support(split))
        put_weights(self.composition, weights)
        return features_of(self.composition.model, self.model, rows)

    @cached_property
    def _own_heads(self) -> list[OwnHead | None]:
        """The heads that the adapters were saved with."""
        return [own_head("classifier", AdapterReference(name=own.name, path=str(own.folder))) for own in self.adapters]

    @cached_property
    def composition(self) -> Any:
        """The adapters with weights that can be set."""
        even = [1 / len(self.adapters)] * len(self.adapters)
        return composition_in(
            compose(self.model.build(self.classes, 0), self.adapters, self.scenario, mixing="fixed", weights=even),
            None,
        )

    @cached_property
    def _switches(self) -> dict[str, Any]:
        return {own.name: own.switch for own in candidates(self.composition, ALL_KINDS)}

    @cached_property
    def _memory(self) -> dict[str, dict[int, Tensor]]:
        return {}

    def _kept(self, candidate: str, split: str, wanted: Sequence[int]) -> Tensor:
        path = self.folder / f"{self._key(candidate, split)}.pt"
        if path.name not in self._memory:
            self._memory[path.name] = torch.load(path) if path.is_file() else {}
        known = self._memory[path.name]
        missing = [index for index in wanted if index not in known]
        if missing:
            with self._switches[candidate]():
                number = VIEWS.index(split) if split in VIEWS else None
                found = features_of(self.composition.model, self.model, self._rows(split, missing), number)
            known.update({index: row.clone() for index, row in zip(missing, found)})
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(known, path.with_suffix(".draft"))
            path.with_suffix(".draft").replace(path)
        return torch.stack([known[index] for index in wanted])

    def _rows(self, split: str, places: Sequence[int]) -> Dataset:
        return self.judged.get(split, self.task.train).select(places)

    def _key(self, candidate: str, split: str) -> str:
        """Names what features depend on: tasks with the same data and the same adapters share them."""
        own = {adapter.name: adapter.folder.name for adapter in self.adapters}
        bodies = [own[candidate]] if candidate in own else sorted(own.values()) if candidate == UNIFORM else []
        spec = self.scenario.tasks[self.setting.target]
        sizes = self.scenario.downstream.validation_size, self.scenario.downstream.test_size
        return identity(
            {
                "model": [self.model.name, asdict(self.scenario.model)],
                "bodies": bodies,
                "data": [asdict(self.scenario.data[spec.data]), spec.classes, asdict(self.scenario.splits)],
                "rows": [split, sizes if split in self.judged else None],
            }
        )


def compose(base: nn.Module, upstream: Sequence[Adapter], scenario: Scenario, **fields: Any) -> PeftModel:
    """A composition of upstream adapters with a fresh head."""
    adapters: list[Any] = [{"path": adapter.folder, "name": adapter.name} for adapter in upstream]
    with _without_talk_of_heads():
        return get_peft_model(base, CompositionConfig(adapters=adapters, **fields, **peft_options(scenario)))


@contextmanager
def _without_talk_of_heads() -> Iterator[None]:
    with warnings.catch_warnings():
        # That the upstream heads are not used is what we want here: the new task gets a head of its own.
        warnings.filterwarnings("ignore", message="These tensors of the upstream adapters")
        yield


@torch.no_grad()
def features_of(body: nn.Module, model: Classifier, data: Dataset, number: int | None = None) -> Tensor:
    """What the head would be given, (n, width), computed with similar lengths side by side.

    Args:
        body: the model, with or without adapters.
        model: says how examples become inputs.
        data: the examples.
        number: of a view of each that stands in its place. Default: none.
    """
    inner = Body(body.eval())
    rows: Any = model.encode(data)
    if number is not None:
        rows = view(rows, number)
    order = np.arange(len(rows))
    if model.spec.kind == "sentence":
        order = np.argsort([len(ids) for ids in rows["input_ids"][:]], kind="stable")
    found: list[Tensor] = []
    for start in range(0, len(order), BATCH):
        batch: Mapping[str, Any] = model.collate([rows[int(index)] for index in order[start : start + BATCH]])
        found.append(inner(**batch)["logits"])
    return torch.cat(found)[torch.from_numpy(np.argsort(order, kind="stable"))]
