"""Which classes are named rightly by which mix, and which are taken for which others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..evidence.batches import inputs_on
from ..evidence.heads import logits_of
from ..evidence.passes import Examples
from ..evidence.scores import LeftOut
from ..tuner.single import evaluating


@dataclass(frozen=True)
class ClassTable:
    """Predictions by class.

    Attributes:
        names: of the classes.
        examples: how many there are of each.
        right: how many of each are named rightly, by mix: "mix", "uniform" and "base", or some of them.
        confusion: rows of true classes, columns of what the mix takes them for.
    """

    names: tuple[str, ...]
    examples: tuple[int, ...]
    right: Mapping[str, tuple[int, ...]]
    confusion: tuple[tuple[int, ...], ...]

    def accuracy(self, mix: str) -> float:
        """The share of all examples that a mix names rightly."""
        return sum(self.right[mix]) / max(sum(self.examples), 1)

    @property
    def mistakes(self) -> list[tuple[str, str, int]]:
        """What the mix takes for what, and how often; the most frequent first."""
        found = [
            (self.names[truth], self.names[taken], count)
            for truth, row in enumerate(self.confusion)
            for taken, count in enumerate(row)
            if truth != taken and count
        ]
        return sorted(found, key=lambda mistake: -mistake[2])


def table_of(truth: Tensor, predicted: Mapping[str, Tensor], names: Sequence[str]) -> ClassTable:
    """The table of some predictions.

    Args:
        truth: the number of each example's class, shape (n,).
        predicted: what each mix takes them for, shape (n,); "mix" among them.
        names: of the classes.
    """
    count = len(names)

    def by_class(chosen: Tensor) -> tuple[int, ...]:
        return tuple(torch.bincount(chosen, minlength=count).tolist())

    confusion = torch.bincount(truth * count + predicted["mix"], minlength=count * count).reshape(count, count)
    right = {mix: by_class(truth[truth == found]) for mix, found in predicted.items()}
    return ClassTable(tuple(names), by_class(truth), right, tuple(tuple(row) for row in confusion.tolist()))


def left_out_table(found: Mapping[str, LeftOut], names: Sequence[str]) -> ClassTable:
    """Leave-one-out predictions of class means; ties count as in the accuracy, as not named rightly.

    Args:
        found: the distances, by mix.
        names: of the classes, in the order of the columns.
    """
    predicted = {}
    for mix, left in found.items():
        own = left.distances.gather(1, left.labels[:, None])
        others = left.distances.scatter(1, left.labels[:, None], torch.inf)
        is_right = own[:, 0] < others.amin(1)
        predicted[mix] = torch.where(is_right, left.labels, others.argmin(1))
    return table_of(next(iter(found.values())).labels, predicted, names)


def predictions(model: nn.Module, examples: Examples) -> Tensor:
    """The classes that a model's own head names, shape (n,)."""
    found = []
    with evaluating([model]), torch.no_grad():
        for batch in examples.batches:
            logits = logits_of(model(**inputs_on(batch, model, with_labels=False)))
            if logits is None or logits.dim() != 2 or len(logits) != len(batch["labels"]):
                shape = None if logits is None else tuple(logits.shape)
                raise ValueError(
                    f"test: the model must return one row of logits for each of {len(batch['labels'])} examples, got "
                    f"{shape}"
                )
            if bool(logits.isnan().any()):
                raise ValueError(f"test: {int(logits.isnan().sum())} of {logits.numel()} logits are NaN")
            found.append(logits.argmax(1).cpu())
    return torch.cat(found)


def class_names(model: nn.Module, given: Any, labels: Sequence[int]) -> list[str]:
    """The names of classes by their labels.

    Args:
        model: whose config may name them.
        given: a list by label, or a mapping. Default: what the config says, or else the labels.
        labels: the labels.

    Raises:
        ValueError: a label has no name in what is given.
    """
    if given is not None:
        known = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
        missing = [label for label in labels if label not in known]
        if missing:
            raise ValueError(f"labels: there is no name for class {missing[0]} among the {len(known)} that are given")
        return [str(known[label]) for label in labels]
    stated = getattr(getattr(model, "config", None), "id2label", None) or {}
    named = [stated.get(label, f"LABEL_{label}") for label in labels]
    return [str(label) if name == f"LABEL_{label}" else str(name) for label, name in zip(labels, named)]
