"""What comes out of a comparison: a row for each method with its cost, and the verdict; as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..text import LONG, one_line
from .broken import BrokenAdapter
from .methods import EVIDENCE, FRESH, LEARNED, RANDOM, Kind
from .verdict import Verdict


FORMAT = 2
"""Of `Comparison.as_json`; it grows when keys change their meaning or go."""
MEANINGS = {
    EVIDENCE: "adapters weighed by how well each predicts examples that are left out",
    LEARNED: "these weights trained further, together with the head where there is one",
    RANDOM: "random values of the adapters' sizes; what they gain is not what adapters know",
}


@dataclass(frozen=True)
class MethodScore:
    """One method's row.

    Attributes:
        name: of the method.
        kind: "alternative" needs no adapters, "adapters" uses them, "control" uses random ones.
        score: share of right answers, of examples that it was not trained on.
        low: lower end of the 95% interval.
        high: upper end.
        loss: mean negative log-likelihood of the right answer.
        trainable: number of parameters that it trains.
        seconds: that it takes by itself, over all splits: each pass, choice and training that it needs, once. Methods
            share passes, so that all together take less than the sum.
    """

    name: str
    kind: Kind
    score: float
    low: float
    high: float
    loss: float
    trainable: int
    seconds: float


@dataclass(frozen=True)
class Comparison(Sequence[MethodScore]):
    """A table of methods with a verdict; `print` shows both.

    Attributes:
        rows: the methods.
        verdict: on the method that reuses adapters.
        measure: what scores are: "accuracy" or "exact match".
        setting: how it was measured, in words.
        broken: adapters that could not be composed or scored; everything is without them.
        seconds: of the whole comparison, in which what methods share is done once.
    """

    rows: tuple[MethodScore, ...]
    verdict: Verdict
    measure: str
    setting: str
    broken: tuple[BrokenAdapter, ...] = ()
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """By number, or by name of the method."""
        if isinstance(index, str):
            return next(row for row in self.rows if row.name == index)
        return self.rows[index]

    def __str__(self) -> str:
        marks = {"alternative": "without adapters", "adapters": "", "control": "control"}
        names = [one_line(row.name) for row in self.rows]
        width = max(map(len, names))
        lines = [self.setting, f"{'':{width}}  {self.measure:>11}  95% interval     loss   trained   seconds"]
        for name, row in zip(names, self.rows):
            between = f"[{100 * row.low:.1f}, {100 * row.high:.1f}]"
            facts = f"{100 * row.score:9.1f} %  {between:14} {row.loss:6.3f} {row.trainable:9,} {row.seconds:9.1f}"
            lines.append(f"{name:{width}}  {facts}  {marks[row.kind]}".rstrip())
        lines += [f"left out: {one_line(own.adapter)}: {one_line(own.reason, LONG // 4)}" for own in self.broken]
        return "\n".join([*lines, *self.legend, "", str(self.verdict)])

    @property
    def legend(self) -> list[str]:
        """What needs a word: weights by evidence, the scaled LoRA, seconds."""
        names = [row.name for row in self.rows]
        said = [f"{name}: {meaning}" for name, meaning in MEANINGS.items() if name in names]
        scaled = next((name for name in names if name.startswith(f"{FRESH} x ")), None)
        if scaled is not None:
            said.append(f"{scaled}: the fresh LoRA with its product times {scaled.removeprefix(f'{FRESH} x ')}")
        total = f"; {self.seconds:.1f} in all, where passes are shared" if self.seconds else ""
        return [*said, f"seconds: of a method by itself{total}"]

    def as_json(self) -> dict[str, Any]:
        """The result for other programs; all numbers are shares, not percent."""
        own = self.verdict
        return {
            "format": FORMAT,
            "verdict": own.word,
            "best": own.judged,
            "against": own.against,
            "difference": own.difference,
            "low": own.low,
            "high": own.high,
            "probabilities": {"helps": own.helps, "equivalent": own.equivalent, "harms": own.harms},
            "more_examples": own.more,
            "measure": self.measure,
            "setting": self.setting,
            "seconds": self.seconds,
            "broken": [{"adapter": own.adapter, "reason": own.reason} for own in self.broken],
            "methods": [
                {
                    "name": row.name,
                    "kind": row.kind,
                    "score": row.score,
                    "low": row.low,
                    "high": row.high,
                    "loss": row.loss,
                    "trainable": row.trainable,
                    "seconds": row.seconds,
                }
                for row in self.rows
            ],
        }
