"""What comes out of a selection: the chosen adapters with weights, a ranking with intervals, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import CompositionConfig
from ..evidence.table import MEANING, Measure
from ..references import AdapterReference
from ..text import LONG, one_line, plural


SHOWN = 20


@dataclass(frozen=True)
class RankedAdapter:
    """One candidate's row.

    Attributes:
        name: of the adapter in a composition.
        path: its Hub id or folder, with its subfolder.
        score: mean over the examples that it got to see; None where it could not be scored, or was dropped before.
        low: lower end of the middle 95% of that mean over Bayesian bootstraps of the examples.
        high: upper end.
        accuracy: share of these examples that are named rightly.
        examples: how many it was scored on, or passed without a score: fewer than all if others were ahead.
        reason: why it has no score.
        information: what the head that it was saved with tells of the classes of these examples, in nats; None where
            it has none, or where labels are tokens.
        is_dropped: whether it was dropped in an earlier round, before it had a score.
    """

    name: str
    path: str
    score: float | None
    low: float | None
    high: float | None
    accuracy: float | None
    examples: int
    reason: str | None = None
    information: float | None = None
    is_dropped: bool = False


@dataclass(frozen=True)
class Selection:
    """What `select_adapters` chose. `print` shows it, `as_json` is for programs.

    Attributes:
        chosen: weights by the name of the adapter. What their sum leaves to 1 is the base model's.
        ranking: all candidates, the best first; those scored on fewer examples come behind, then those that were
            dropped without a score, and those that could not be scored last.
        base: the base model's own row.
        config: a config that composes the chosen ones with these weights as the start of a learned composition.
        candidates: how many were tried.
        examples: on how many examples at most.
        risk_worse_than_base: the chance that the best adapter is worse than the base model on new examples, mindful
            of how many were tried. With two examples of each class a small one may be too small.
        measure: what the scores are: "margin" or "log-likelihood".
        passed: examples that went through the model, over the candidates of all processes and the mixes of the last
            ones; what a log had is not passed again and does not count.
        seconds: in all.
    """

    chosen: dict[str, float]
    ranking: tuple[RankedAdapter, ...]
    base: RankedAdapter
    config: CompositionConfig
    candidates: int
    examples: int
    risk_worse_than_base: float
    measure: Measure
    passed: int
    seconds: float

    @property
    def references(self) -> list[AdapterReference]:
        """The chosen adapters, as `CompositionConfig` takes them."""
        return self.config.references

    def as_json(self) -> dict[str, Any]:
        """What `peft-composition select --json` prints; adapters are named by their Hub id or folder."""
        paths = {own.name: own.path for own in self.ranking}
        return {
            "chosen": [{"adapter": paths[name], "weight": weight} for name, weight in self.chosen.items()],
            "ranking": [
                {
                    "adapter": own.path,
                    "score": own.score,
                    "low": own.low,
                    "high": own.high,
                    "examples": own.examples,
                    "information": own.information,
                    "dropped": own.is_dropped,
                    "reason": own.reason,
                }
                for own in self.ranking
            ],
            "candidates": self.candidates,
            "examples": self.examples,
            "risk_worse_than_base": self.risk_worse_than_base,
        }

    def __str__(self) -> str:
        shown = [own for own in self.ranking if own.score is not None][:SHOWN]
        width = max(len(one_line(own.name)) for own in (*shown, self.base))
        lines = [
            f"{plural(self.candidates, 'candidate')} on {plural(self.examples, 'example')}; score: "
            f"{MEANING[self.measure]}",
            *(
                ["head: what its own head tells of the classes, in nats; it counts in the order"]
                if self._asked
                else []
            ),
            f"chance that the best of them is worse than the base: {100 * self.risk_worse_than_base:.0f} %",
            "",
            f"{'':{width}}   score  95% interval      accuracy  examples  {'head' if self._asked else '':>5}  weight",
        ]
        lines += [self._line(own, width) for own in shown]
        lines.append(self._line(self.base, width))
        scored = sum(own.score is not None for own in self.ranking)
        if scored > len(shown):
            lines.append(f"and {scored - len(shown)} more")
        dropped = sum(own.is_dropped for own in self.ranking if own.score is None)
        if dropped:
            lines.append(f"and {dropped} more that were dropped before they had a score (halving=False drops none)")
        broken = [own for own in self.ranking if own.score is None and not own.is_dropped]
        for own in broken[:SHOWN]:
            lines.append(f"{one_line(own.name)}: {one_line(own.reason or '', LONG // 10)}")
        if len(broken) > SHOWN:
            lines.append(f"and {len(broken) - SHOWN} more that could not be scored")
        return "\n".join(lines)

    @property
    def _asked(self) -> bool:
        return any(own.information is not None for own in self.ranking)

    def _line(self, own: RankedAdapter, width: int) -> str:
        between = f"[{own.low:+.3f}, {own.high:+.3f}]"
        weight = f"{self.chosen[own.name]:.3f}" if own.name in self.chosen and own is not self.base else ""
        told = "" if own.information is None else f"{own.information:.3f}"
        accuracy = f"{100 * (own.accuracy or 0):6.1f} %"
        facts = f"{own.score:+.3f}  {between:16}  {accuracy}  {own.examples:8}  {told:>5}  {weight}"
        return f"{one_line(own.name):{width}}  {facts}".rstrip()
