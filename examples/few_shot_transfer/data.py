"""Data sets to tasks: classes, splits that never overlap, few-shot support sets by class."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from datasets import ClassLabel, Dataset

from . import sources
from .scenario import ALL, DataSpec, Scenario, SplitSpec, class_indices


@dataclass(frozen=True)
class Task:
    """A task's data: the pool that support sets are drawn from, and what is kept apart from it.

    Attributes:
        classes: their names; `label` counts in them.
        train: upstream training set, and the pool of support sets.
        validation: for the grid search and the choice of one adapter.
        test: looked at by final runs alone.
    """

    classes: list[str]
    train: Dataset
    validation: Dataset
    test: Dataset


class Tasks:
    """The tasks of a scenario, read when they are first asked for."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._read = cache(self._load)

    def __getitem__(self, name: str) -> Task:
        return self._read(name)

    def _load(self, name: str) -> Task:
        spec = self.scenario.tasks[name]
        return task(self.scenario.data[spec.data], spec.classes, self.scenario.splits)


def task(data: DataSpec, classes: Sequence[int | str] | None, splits: SplitSpec) -> Task:
    """Some classes of a data set, split into train, validation and test.

    The splits are made class by class and of the whole data set, so that tasks which share classes share them: no
    test example of one task is a training example of another.

    Args:
        data: the data set.
        classes: as in `TaskSpec`.
        splits: what is kept apart of a data set that does not come with splits.

    Raises:
        ValueError: for a class that the data set does not have.
    """
    parts = _splits(_Key(data), splits)
    names = parts["train"].features["label"].names
    chosen = class_indices(classes, names)
    kept = {split: _of_classes(parts[split], chosen, names) for split in ("train", "validation", "test")}
    return Task([names[index] for index in chosen], **kept)


def labels_of(data: Dataset) -> list[int]:
    """The column `label`, read at once: one by one takes a hundred times as long."""
    labels: list[int] = data["label"][:]
    return labels


def few_shot(labels: Sequence[int], k: int | str, seed: int) -> list[int]:
    """Draws a support set: K examples of each class, or all that a smaller class has.

    Sets of one seed are nested: the one for K = 2 is within the one for K = 5.

    Args:
        labels: of the pool, (n,).
        k: examples per class, or "all".
        seed: of the draw.

    Returns:
        Indices into the pool, class by class.
    """
    return [index for of_class in _shuffled(labels, f"support {seed}") for index in _first(of_class, k)]


def balanced(labels: Sequence[int], size: int | None) -> list[int]:
    """Chooses `size` examples, as many of each class as of any other where there are enough; None: all.

    Returns:
        Indices into the pool, in its order.
    """
    if size is None or size >= len(labels):
        return list(range(len(labels)))
    queues = _shuffled(labels, "evaluation")
    chosen: list[int] = []
    while len(chosen) < size:
        for queue in queues:
            if queue and len(chosen) < size:
                chosen.append(queue.pop(0))
    return sorted(chosen)


class _Key:
    """A DataSpec that a cache can tell from another."""

    def __init__(self, data: DataSpec) -> None:
        self.data = data
        self.text = repr((data.source, sorted(data.options.items(), key=str)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@cache
def _splits(key: _Key, spec: SplitSpec) -> dict[str, Dataset]:
    parts = dict(sources.load(key.data.source, key.data.options))
    for split, fraction in (("test", spec.test), ("validation", spec.validation)):
        if split in parts:
            continue
        held_out = set()
        for of_class in _shuffled(labels_of(parts["train"]), split):
            held_out.update(of_class[: round(fraction * len(of_class))])
        rest = [index for index in range(len(parts["train"])) if index not in held_out]
        parts[split] = parts["train"].select(sorted(held_out))
        parts["train"] = parts["train"].select(rest)
    return parts


def _of_classes(data: Dataset, chosen: Sequence[int], names: Sequence[str]) -> Dataset:
    labels = np.asarray(labels_of(data))
    if list(chosen) == list(range(len(names))):
        return data
    new = {old: position for position, old in enumerate(chosen)}
    kept = data.select(np.flatnonzero(np.isin(labels, chosen)))
    relabelled = [new[label] for label in labels_of(kept)]
    feature = ClassLabel(names=[names[index] for index in chosen])
    return kept.remove_columns("label").add_column("label", relabelled).cast_column("label", feature)


def _shuffled(labels: Sequence[int], seed: str) -> list[list[int]]:
    """The indices of every class in random order, which depends on seed and class alone."""
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    for label, indices in by_class.items():
        random.Random(f"{seed}, class {label}").shuffle(indices)
    return [by_class[label] for label in sorted(by_class)]


def _first(indices: list[int], k: int | str) -> list[int]:
    return indices if k == ALL else indices[: int(k)]
