"""What leaving adapters out of a mix costs: the mix without them on the same examples, paired example by example."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from torch import Tensor

from ..evidence.passes import Candidate, Composition, Passed
from ..evidence.scores import LeftOut, bayesian_bootstrap, interval, log_likelihoods, margins
from ..evidence.table import DRAWS
from ..tuner.dropping import is_mix, mixing_of
from ..tuner.mixing import Mixing
from ..tuner.mixing_weights import mixing_weights
from ..tuner.single import mixed_apart


THE_MIX = Candidate("mix", "mix", nullcontext)


@dataclass(frozen=True)
class Change:
    """How the predictions of the examples differ between two mixes; below zero the second one is worse.

    Attributes:
        mean: of the log-likelihood of an example: of its class, or of a token of its answer.
        low: lower end of the middle 95% of that mean over Bayesian bootstraps of the examples.
        high: upper end.
        lost: examples that the first mix names rightly and the second does not.
        won: examples that the second mix names rightly and the first does not.
    """

    mean: float
    low: float
    high: float
    lost: int
    won: int


@dataclass(frozen=True)
class LeftOutAdapter:
    """One adapter's row: the mix without it, compared with the mix.

    Attributes:
        name: of the adapter.
        weight: its mean weight over the modules that it touches.
        modules: how many it touches.
        change: of the predictions when it alone is left out.
        seconds: of the pass over the examples.
    """

    name: str
    weight: float
    modules: int
    change: Change
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What one mix did on every example: log-likelihoods, shape (m,), and whether it was named rightly, shape (m,)."""

    values: Tensor
    is_right: Tensor

    @classmethod
    def of(cls, passed: Passed) -> Outcome:
        """The outcome of a pass."""
        found = passed.found
        if isinstance(found, LeftOut):
            return cls(log_likelihoods(found), margins(found) > 0)
        return cls(-found.nll / found.tokens, found.is_right)

    @property
    def accuracy(self) -> float:
        """The share of examples that are named rightly."""
        return float(self.is_right.double().mean())

    def change_to(self, other: Outcome, seed: int) -> Change:
        """How another mix differs from this one on the same examples."""
        ahead = other.values - self.values
        low, high = interval(ahead, bayesian_bootstrap(len(ahead), DRAWS, seed))
        lost, won = self.is_right & ~other.is_right, ~self.is_right & other.is_right
        return Change(float(ahead.mean()), low, high, int(lost.sum()), int(won.sum()))


def without(composition: Composition, dropped: Collection[int]) -> Candidate:
    """The mix that is left without some adapters, as it would be after dropping them.

    Where nothing with a weight is left, it is the base model.
    """
    config = composition.config
    names = config.adapter_names
    kept = [number for number in range(len(names)) if number not in dropped]

    def weights(own: Mixing) -> list[float]:
        found = [0.0] * len(names)
        if is_mix(config, kept):
            for number, weight in zip(kept, mixing_of(own, config, kept)().tolist()):
                found[number] = weight
        return found

    switch = partial(mixed_apart, list(composition.layers.values()), composition.name, weights)
    return Candidate(", ".join(names[number] for number in sorted(dropped)), "without", switch)


def left_out_rows(
    composition: Composition, whole: Outcome, passed: Mapping[int, Passed], seed: int
) -> list[LeftOutAdapter]:
    """The rows of adapters.

    Args:
        composition: the composition.
        whole: what the mix did.
        passed: the pass without an adapter, by its number.
        seed: of the bootstraps.
    """
    weights = mixing_weights(composition.model, composition.name)
    rows = []
    for number, own in passed.items():
        name = composition.config.adapter_names[number]
        values = [row[name] for row in weights.values() if name in row]
        change = whole.change_to(Outcome.of(own), seed)
        rows.append(LeftOutAdapter(name, fmean(values or [0.0]), len(values), change, own.seconds))
    return rows
