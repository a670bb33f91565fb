"""What comes out of a comparison: a row for each method with its cost, and the verdict; as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..text import one_line
from .methods import Kind
from .verdict import Verdict


FORMAT = 1
"""Of `Comparison.as_json`; it grows when keys change their meaning or go."""


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
        seconds: for all splits, with all passes that it needs; methods that share passes each count them.
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
    """

    rows: tuple[MethodScore, ...]
    verdict: Verdict
    measure: str
    setting: str

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
        return "\n".join([*lines, "", str(self.verdict)])

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
