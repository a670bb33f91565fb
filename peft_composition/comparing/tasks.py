"""What classifiers and models that answer in tokens have of their own: what is cached, evidence, loss and scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evidence.batches import inputs_on, is_encoder_decoder
from ..evidence.fit import weights_by
from ..evidence.heads import find_head, logits_of, original_head
from ..evidence.own_heads import OwnHead, information
from ..evidence.passes import (
    Composition,
    Examples,
    Precision,
    asking_own_heads,
    autocast,
    candidates,
    read_answers,
    read_features,
)
from ..evidence.posterior import IGNORED, Answers, posterior
from ..evidence.scores import has_pairs, leave_one_out_distances, log_likelihoods
from ..evidence.weights import Information, ahead_of_mean, informed, nats
from .heads import Budget, Heads, predict, train_heads
from .rows import Rows


BATCH = 32


@dataclass(frozen=True)
class Split:
    """Rows to train on, and rows to judge by."""

    train: Tensor
    test: Tensor


@dataclass(frozen=True)
class Judged:
    """Of the rows that a split is judged by: whether each is right, and the log-likelihood of its answer."""

    right: Tensor
    log_likelihood: Tensor


class Task(Protocol):
    """What the methods need of the kind of model."""

    rows: Rows
    budget: Budget

    def read(self, model: nn.Module, rows: Tensor) -> Any:
        """What is cached of a frozen body for some rows."""

    def evidence(
        self,
        adapters: Sequence[Any],
        uniform: Any,
        base: Any,
        rows: Tensor,
        seed: int,
        heads: Sequence[OwnHead | None],
    ) -> tuple[int, Tensor]:
        """The number of the best adapter alone, and mixing weights, from what was read of some rows.

        Args:
            adapters: of each adapter alone, of all rows.
            uniform: of the uniform mix.
            base: of the base model.
            rows: to go by.
            seed: of the bootstraps.
            heads: that the adapters were saved with; None where one is not known.
        """

    def own_heads(self, composition: Composition) -> list[OwnHead | None]:
        """The heads that the adapters were saved with, for `evidence`."""

    def frozen(self, of_splits: Sequence[Any], splits: Sequence[Split], seed: int) -> list[Judged]:
        """Judge a method with a frozen body, from what was read of all rows by each split's own body."""

    def renew(self, seed: int) -> None:
        """Make the head a fresh one."""

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The loss of a batch of rows."""

    def judge(self, model: nn.Module, rows: Tensor) -> Judged:
        """Judge the model as it is."""

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """Of the head; none without one."""


class Classes:
    """A classifier: its head is new, so each method trains one.

    Args:
        model: the base model.
        rows: all examples.
        head: the head or its name; default: as for `score_adapters`.
        budget: of the trainings.
        precision: of passes and trainings.
    """

    def __init__(
        self, model: nn.Module, rows: Rows, head: str | nn.Module | None, budget: Budget, precision: Precision
    ) -> None:
        assert rows.labels is not None
        self.rows, self.budget, self.precision = rows, budget, precision
        self.labels = rows.labels
        self.head = find_head(model, head)
        most = int(self.labels.max()) + 1
        stated = getattr(self.head, "out_features", None) or getattr(
            getattr(model, "config", None), "num_labels", most
        )
        self.classes = int(stated or most)
        if int(self.labels.min()) < 0 or most > self.classes:
            raise ValueError(
                f"labels are {int(self.labels.min())} to {most - 1}, but the head of {type(model).__name__} has "
                f"{self.classes} classes, numbered from 0: load the base model with num_labels={most}"
            )
        self.width = 0

    def read(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Pooled features or scores of answers, of some rows."""
        batches = list(self.rows.batches(rows, BATCH))
        with torch.no_grad():
            features = read_features(model, Examples(batches, self.labels[rows], self.head), self.precision)
        self.width = features.shape[1]
        return features.float().cpu()

    def evidence(
        self,
        adapters: Sequence[Tensor],
        uniform: Tensor,
        base: Tensor,
        rows: Tensor,
        seed: int,
        heads: Sequence[OwnHead | None],
    ) -> tuple[int, Tensor]:
        """The number of the best adapter alone, and mixing weights."""
        labels, count = self.labels[rows], len(adapters)
        if len(labels.unique()) == 1:  # nothing can be told apart
            return 0, torch.full((count,), 1 / count, dtype=torch.float64)
        module = original_head(self.head)
        told = [
            None if head is None else information(own[rows], labels, head, module)
            for own, head in zip(adapters, heads)
        ]
        return best_and_weights([own[rows] for own in (*adapters, uniform, base)], labels, told, seed)

    def own_heads(self, composition: Composition) -> list[OwnHead | None]:
        """The heads that the adapters were saved with; None where one is not known."""
        mixes = candidates(composition, ("adapter",))
        return [own.own_head for own in asking_own_heads(composition, mixes, self.head)]

    def frozen(self, of_splits: Sequence[Tensor], splits: Sequence[Split], seed: int) -> list[Judged]:
        """Judge a method with a frozen body."""
        same = all(own is of_splits[0] for own in of_splits)
        features = of_splits[0][None, None] if same else torch.stack(list(of_splits))[None]
        heads = train_heads(features, self.labels, [own.train for own in splits], self.classes, self.budget, seed)
        found = []
        for number, split in enumerate(splits):
            part: Heads = [own[:, number : number + 1] for own in heads]
            own = features[:, 0 if same else number][:, split.test]
            found.append(self._judged(predict(part, own[:, None])[0, 0], split.test))
        return found

    def renew(self, seed: int) -> None:
        """Make the head a fresh one."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in self.head.modules():
                if isinstance(module, nn.Linear):  # as `train_heads` begins
                    start = torch.randn(module.in_features, module.out_features, generator=generator) * 0.02
                    module.weight.copy_(start.T)
                    if module.bias is not None:
                        module.bias.zero_()

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The loss of a batch of rows."""
        logits = self._logits(model, rows)
        return F.cross_entropy(logits.float(), self.labels[rows].to(logits.device))

    def judge(self, model: nn.Module, rows: Tensor) -> Judged:
        """Judge the model as it is."""
        with torch.no_grad():
            logits = torch.cat([self._logits(model, part).float().cpu() for part in rows.split(BATCH)])
        return self._judged(logits, rows)

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """Of the head."""
        return list(self.head.parameters())

    def _logits(self, model: nn.Module, rows: Tensor) -> Tensor:
        batch = self.rows.batch(rows.tolist())
        with autocast(model, self.precision):
            logits = logits_of(model(**inputs_on(batch, model, with_labels=False)))
        if logits is None:
            raise ValueError(f"{type(model).__name__} returns no logits")
        return logits

    def _judged(self, logits: Tensor, rows: Tensor) -> Judged:
        labels = self.labels[rows]
        chances = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        return Judged((logits.argmax(-1) == labels).double(), chances.double())


def best_and_weights(
    features: Sequence[Tensor], labels: Tensor, told: Sequence[Information | None], seed: int
) -> tuple[int, Tensor]:
    """The number of the best adapter alone by evidence of some examples, and mixing weights, shape (N,).

    Args:
        features: of the N adapters alone, of their uniform mix and of the base model.
        labels: of the examples, of two classes at least.
        told: what the adapters' own heads tell of them; None where a head is not known.
        seed: of the bootstraps.
    """
    count = len(features) - 2
    if not has_pairs(labels):
        # Without other evidence the best is that whose head tells most, the first where none is known.
        weights = informed(torch.full((count,), 1 / count, dtype=torch.float64), told, labels)
        ahead = ahead_of_mean(nats(told))
        return ahead.index(max(ahead)), weights
    left = [leave_one_out_distances(own, labels) for own in features]
    best = int(torch.stack([log_likelihoods(own).mean() for own in left[:count]]).argmax())
    return best, informed(weights_by("likelihood-vote", left, seed), told, labels)


class Tokens:
    """A causal or encoder-decoder model: answers are tokens, right if each is the most likely one; there is no head.

    Args:
        model: the base model.
        rows: all examples.
        budget: of the trainings.
        precision: of passes and trainings.
    """

    head_parameters: list[nn.Parameter] = []  # noqa: RUF012  (there are none)

    def __init__(self, model: nn.Module, rows: Rows, budget: Budget, precision: Precision) -> None:
        self.rows, self.budget, self.precision = rows, budget, precision
        self.is_seq2seq = is_encoder_decoder(model)

    def read(self, model: nn.Module, rows: Tensor) -> Answers:
        """Pooled features or scores of answers, of some rows."""
        with torch.no_grad():
            return read_answers(model, list(self.rows.batches(rows, BATCH)), self.precision)

    def evidence(
        self,
        adapters: Sequence[Answers],
        uniform: Answers,
        base: Answers,
        rows: Tensor,
        seed: int,
        heads: Sequence[OwnHead | None],
    ) -> tuple[int, Tensor]:
        """The number of the best adapter alone, and mixing weights."""
        nll = torch.stack([own.nll[rows] for own in adapters], dim=1)
        tokens = adapters[0].tokens[rows]
        return int((nll / tokens[:, None]).mean(0).argmin()), posterior(nll, tokens)

    def own_heads(self, composition: Composition) -> list[OwnHead | None]:
        """None: answers have no head."""
        return []

    def frozen(self, of_splits: Sequence[Answers], splits: Sequence[Split], seed: int) -> list[Judged]:
        """Judge a method with a frozen body."""
        return [_of_answers(Answers(*(part[split.test] for part in own))) for own, split in zip(of_splits, splits)]

    def renew(self, seed: int) -> None:
        """Nothing: there is no head."""

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The loss of a batch of rows."""
        batch = self.rows.batch(rows.tolist())
        with autocast(model, self.precision):
            logits = model(**inputs_on(batch, model, with_labels=self.is_seq2seq)).logits
        labels = batch["labels"].to(logits.device)
        if not self.is_seq2seq:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def judge(self, model: nn.Module, rows: Tensor) -> Judged:
        """Judge the model as it is."""
        return _of_answers(self.read(model, rows))


def _of_answers(found: Answers) -> Judged:
    return Judged(found.is_right.double(), -found.nll / found.tokens)


def loss_of(judged: Judged) -> float:
    """Mean negative log-likelihood."""
    value = -float(judged.log_likelihood.mean())
    return value if math.isfinite(value) else math.inf
