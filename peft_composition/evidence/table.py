"""What comes out of scoring: a table of adapters with intervals, and a report of the weights that followed from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..text import one_line, plural
from .choices import Choices
from .passes import Candidate, Kind, Passed
from .posterior import Answers
from .scores import LeftOut, bayesian_bootstrap, interval, margins
from .weights import LEAST_BASE


Measure = Literal["margin", "log-likelihood", "log-likelihood among the answers"]
DRAWS = 500
MEANING = {
    "margin": "leave-one-out margin, -1 to 1: how much nearer an example is to the mean of its own class",
    "log-likelihood": "log-likelihood of an answer token, mean over tokens and then over examples",
    "log-likelihood among the answers": "log-likelihood of the right answer, if it must be one of those "
    "given, mean over examples; accuracy: how often it is the likeliest of them",
}


@dataclass(frozen=True)
class AdapterScore:
    """One candidate's row.

    Attributes:
        name: of the adapter; "uniform" for the mean of all, "base" for the model without any.
        kind: "adapter", "uniform" or "base".
        score: mean over the examples; the table says of what.
        low: lower end of the middle 95% of that mean over Bayesian bootstraps of the examples.
        high: upper end.
        accuracy: share of examples that are named rightly when they are left out; for answers, of those whose every
            token is the most likely one, or, where answers are compared, of those whose own is the likeliest of them.
        seconds: of its pass over the examples.
    """

    name: str
    kind: Kind
    score: float
    low: float
    high: float
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class AdapterScores(Sequence[AdapterScore]):
    """A table of candidates: the adapters in their order, then the uniform mix and the base. `print` shows it sorted.

    The best of many candidates on few examples looks better than it is: mind how many were tried on how many.

    Attributes:
        rows: the candidates.
        measure: what the scores are: "margin", "log-likelihood" or "log-likelihood among the answers".
        examples: how many each was scored on.
        unused: examples that are the only ones of their class, and so could not be left out.
    """

    rows: tuple[AdapterScore, ...]
    measure: Measure
    examples: int
    unused: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """By number, or by name of the candidate."""
        if isinstance(index, str):
            return next(row for row in self.rows if row.name == index)
        return self.rows[index]

    @property
    def best(self) -> AdapterScore:
        """The adapter with the largest score."""
        return max((row for row in self.rows if row.kind == "adapter"), key=lambda row: row.score)

    def __str__(self) -> str:
        tried = sum(row.kind == "adapter" for row in self.rows)
        unused = (
            f" ({plural(self.unused, 'more is the only one', 'more are the only ones')} of their class)"
            if self.unused
            else ""
        )
        lines = [
            f"{plural(tried, 'adapter')} on {plural(self.examples, 'example')}{unused}; score: {MEANING[self.measure]}"
        ]
        names = [row.name if row.kind == "adapter" else f"({row.name})" for row in self.rows]
        width = max(len(one_line(name)) for name in names)
        lines.append(f"{'':{width}}   score  95% interval      accuracy  seconds")
        for name, row in sorted(zip(names, self.rows), key=lambda pair: -pair[1].score):
            between = f"[{row.low:+.3f}, {row.high:+.3f}]"
            facts = f"{row.score:+.3f}  {between:16}  {100 * row.accuracy:6.1f} %  {row.seconds:7.2f}"
            lines.append(f"{one_line(name):{width}}  {facts}")
        return "\n".join(lines)


@dataclass(frozen=True)
class EvidenceReport:
    """What `fit_mixing_weights` did. `print` shows it.

    Attributes:
        method: "heads-and-vote", "likelihood-vote", "vote", "stacking", "posterior" or "choices"; "own-heads" where
            only these could be asked, and "uniform" where there was no evidence to go by.
        weights: by adapter; the same in all modules. What their sum leaves to 1 is the base model's.
        reason: why this method.
        scores: of the candidates that it went by; None where nothing was scored.
        seconds: in all.
        informations: what each adapter's own head tells of the classes of the examples, in nats; None for an adapter
            whose head is not known. None where heads were not asked.
        dropped: the adapters that choose worse among the answers than the best one, by more than a standard error.
    """

    method: str
    weights: dict[str, float]
    reason: str
    scores: AdapterScores | None
    seconds: float
    informations: dict[str, float | None] | None = None
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(len(one_line(name)) for name in (*self.weights, "(base)"))
        ranked = sorted(self.weights.items(), key=lambda item: -item[1])
        lines = [f"{one_line(name):{width}}  {weight:.4f}{self._told(name)}" for name, weight in ranked]
        rest = 1 - sum(self.weights.values())
        if self.method not in ("posterior", "choices") and rest > LEAST_BASE / 2:
            lines.append(f"{'(base)':{width}}  {rest:.4f}")
        text = "\n".join([f"mixing weights by {self.method} ({self.reason}), {self.seconds:.1f} s", *lines])
        return text if self.scores is None else f"{text}\n\n{self.scores}"

    def _told(self, name: str) -> str:
        if name in self.dropped:
            return "  dropped out: it chooses worse among the answers"
        if self.informations is None:
            return ""
        own = self.informations[name]
        return "  its own head is not known" if own is None else f"  its own head tells {own:.3f} nats of the classes"


def per_example(passed: Passed) -> tuple[Tensor, Tensor]:
    """The scores of a pass, by its measure, and whether each example was named rightly; shapes (m,)."""
    found = passed.found
    if isinstance(found, LeftOut):
        values = margins(found)
        return values, values > 0
    if isinstance(found, Choices):
        return -found.among, found.is_right
    return -found.nll / found.tokens, found.is_right


def tabulate(mixes: Sequence[Candidate], passed: Sequence[Passed], examples: int, seed: int) -> AdapterScores:
    """The table of some candidates' passes.

    Args:
        mixes: the candidates.
        passed: what their passes gave.
        examples: how many there are in all.
        seed: of the bootstraps.
    """
    first = passed[0].found
    used = len(first.labels if isinstance(first, LeftOut) else first.nll)
    bootstraps = bayesian_bootstrap(used, DRAWS, seed)
    rows = []
    for candidate, own in zip(mixes, passed):
        values, is_right = per_example(own)
        low, high = interval(values, bootstraps)
        accuracy = float(is_right.double().mean())
        rows.append(
            AdapterScore(candidate.name, candidate.kind, float(values.mean()), low, high, accuracy, own.seconds)
        )
    return AdapterScores(tuple(rows), _measure(first), used, examples - used)


def _measure(found: LeftOut | Answers | Choices) -> Measure:
    if isinstance(found, LeftOut):
        return "margin"
    return "log-likelihood among the answers" if isinstance(found, Choices) else "log-likelihood"
