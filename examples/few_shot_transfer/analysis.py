"""From finished runs to scores by method, with the single adapters summed up and differences tested. No files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .downstream import correct_answers
from .records import Record


BEST_SINGLE = "best single adapter"
ORACLE_SINGLE = "best single adapter (oracle)"
MEAN_SINGLE = "mean single adapter"
Shots = int | str
Scores = dict[tuple[str, Shots], np.ndarray]  # (method, K) -> (seeds, test examples), 100 where right, else 0
# What the study asks: the first of each pair against the second.
QUESTIONS = {
    "Reuse against training from scratch": [
        ("uniform", "zero-shot"),
        ("learned", "zero-shot"),
        ("uniform", "lora"),
        ("uniform", "full"),
        ("learned", "classifier"),
        ("learned", "lora"),
        ("learned", "full"),
    ],
    "Learned against uniform weights": [("learned", "uniform"), ("learned-free", "learned")],
    "Composition against one adapter": [("learned", MEAN_SINGLE), ("learned", BEST_SINGLE)],
    "Trained against random adapters": [("learned", "random-learned"), ("random-learned", "classifier")],
    "Gradients against search": [("learned", "lorahub")],
    "Weights by evidence": [
        ("evidence", "uniform"),
        ("evidence", "learned"),
        ("evidence", BEST_SINGLE),
        ("evidence-learned", "evidence"),
        ("cold", "uniform"),
        ("cold-block", "cold"),
        ("cold-model", "cold"),
    ],
    "A LoRA of the K examples": [
        ("fresh-member", "cold"),
        ("fresh-member", "lambda-lora"),
        ("lambda-lora", "lora"),
        ("evidence", "lambda-lora"),
    ],
}


@dataclass(frozen=True)
class SettingKey:
    """The settings that have a table of their own."""

    target: str
    upstream: tuple[str, ...]
    rank: int
    label: str | None


def by_setting(records: Iterable[Record]) -> dict[SettingKey, list[Record]]:
    """The final runs of every setting, in the order in which they were first met."""
    groups: dict[SettingKey, list[Record]] = {}
    for record in records:
        if record["phase"] == "final":
            groups.setdefault(_key(record), []).append(record)
    return groups


def similarities_by_setting(records: Iterable[Record]) -> dict[SettingKey, dict[str, dict[str, float]]]:
    """CKA of the upstream adapters with the new task's own, by module and adapter, for the settings that have it."""
    return {_key(record): record["cka"] for record in records if record["phase"] == "similarity"}


def scaled_lora(factor: str) -> str:
    """What "lambda-lora" with one factor is called."""
    return f"LoRA times {factor}"


def scores(records: Sequence[Record]) -> Scores:
    """The scores of one setting's final runs.

    With them the mean of the single adapters, the one that each seed's validation picks, and the one that is best on
    the test set: an oracle, which nobody has in practice. Of "lambda-lora" each factor, and what validation picks.

    Raises:
        ValueError: if a method has other seeds than the rest at some K: the study has not finished.
    """
    runs: dict[tuple[str, str | None, Shots], dict[int, Record]] = {}
    for record in records:
        runs.setdefault((record["method"], record["adapter"], record["k"]), {})[record["seed"]] = record
    found: Scores = {}
    for k in dict.fromkeys(record["k"] for record in records):
        own = {(method, adapter): seeds for (method, adapter, shots), seeds in runs.items() if shots == k}
        seeds = sorted(set().union(*own.values()))
        for (method, adapter), of_seed in own.items():
            if sorted(of_seed) != seeds:
                raise ValueError(f"{method} at K={k} has the seeds {sorted(of_seed)} of {seeds}: run the study again")
            if adapter is None:
                found[method, k] = _stacked(of_seed[seed] for seed in seeds)
        singles = {str(adapter): of_seed for (method, adapter), of_seed in own.items() if method == "single"}
        if singles:
            found.update(_summed_up(singles, seeds, k))
        scaled = {str(factor): of_seed for (method, factor), of_seed in own.items() if method == "lambda-lora"}
        if scaled:
            found.update({(scaled_lora(factor), k): _of_seeds(scaled[factor], seeds) for factor in scaled})
            found["lambda-lora", k] = _picked(scaled, seeds)
    return found


@dataclass(frozen=True)
class Difference:
    """By how many points one method is ahead of another.

    Attributes:
        mean: over seeds and test examples.
        low: lower end of the 95% interval.
        high: upper end.
        p: of a paired t-test over the seeds; NaN with a single seed.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Compares two methods by their scores (seeds, test examples), paired by seed and by example.

    The interval adds in quadrature what another draw of the support set would change (t, few seeds) and what
    other test examples would change (normal, many examples).
    """
    differences = ours - theirs
    mean = float(differences.mean())
    of_examples = stats.norm.ppf(0.975) * stats.sem(differences.mean(axis=0))
    if len(differences) == 1:
        return Difference(mean, mean - of_examples, mean + of_examples, float("nan"))
    by_seed = differences.mean(axis=1)
    of_seeds = stats.t.ppf(0.975, len(by_seed) - 1) * stats.sem(by_seed)
    margin = float(np.hypot(of_seeds, of_examples))
    # Without any spread there is nothing to test.
    p = float(stats.ttest_1samp(by_seed, 0.0).pvalue) if by_seed.std() > 0 else float("nan")
    return Difference(mean, mean - margin, mean + margin, p)


def mean_weights(records: Sequence[Record], method: str, k: Shots) -> dict[str, dict[str, float]]:
    """The weights of a method at one K, by module and adapter, averaged over the seeds; empty where it has none."""
    own = [record["weights"] for record in records if (record["method"], record["k"]) == (method, k)]
    own = [weights for weights in own if weights]
    if not own:
        return {}
    return {
        module: {name: float(np.mean([weights[module][name] for weights in own])) for name in of_module}
        for module, of_module in own[0].items()
    }


def by_adapter(weights: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean weight of every adapter over all modules."""
    names = dict.fromkeys(name for of_module in weights.values() for name in of_module)
    return {name: float(np.mean([of_module[name] for of_module in weights.values()])) for name in names}


def _key(record: Record) -> SettingKey:
    return SettingKey(record["target"], tuple(record["upstream"]), record["rank"], record["label"])


def _summed_up(singles: Mapping[str, Mapping[int, Record]], seeds: Sequence[int], k: Shots) -> Scores:
    stacked = [_of_seeds(of_seed, seeds) for of_seed in singles.values()]
    return {
        (MEAN_SINGLE, k): np.mean(stacked, axis=0),
        (BEST_SINGLE, k): _picked(singles, seeds),
        (ORACLE_SINGLE, k): max(stacked, key=np.mean),
    }


def _picked(runs: Mapping[str, Mapping[int, Record]], seeds: Sequence[int]) -> np.ndarray:
    """Of each seed the run that its validation picks; the first one of several that are best."""
    return _stacked(max((of_seed[seed] for of_seed in runs.values()), key=lambda r: r["validation"]) for seed in seeds)


def _of_seeds(of_seed: Mapping[int, Record], seeds: Sequence[int]) -> np.ndarray:
    return _stacked(of_seed[seed] for seed in seeds)


def _stacked(records: Iterable[Record]) -> np.ndarray:
    return 100.0 * np.stack([correct_answers(record) for record in records])
