"""`Findings`: what is known about a composition, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoint.explained import FORMAT, markdown_of
from ..evidence.table import AdapterScores
from ..text import one_line, plural, quoted
from .classes import ClassTable
from .left_out import LeftOutAdapter
from .updates import Updates


@dataclass(frozen=True)
class AdapterFacts:
    """Where one adapter comes from, and where it is.

    Attributes:
        name: of the adapter.
        source: the Hub id with its commit, or "a local folder".
        license: that it states.
        ranks: smallest and largest rank.
        modules: how many it touches.
        mean: its mean weight over them.
        min: its smallest weight.
        max: its largest weight.
    """

    name: str
    source: str
    license: str
    ranks: tuple[int, int]
    modules: int
    mean: float
    min: float
    max: float


@dataclass(frozen=True)
class Tested:
    """The composition as it is, with its own head, on examples that it was not fitted to.

    Attributes:
        examples: how many.
        accuracy: share that is named rightly; for answers, those of which every token is the most likely one.
        log_likelihood: mean of an answer's token; None for classes.
        classes: predictions by class; None for answers.
    """

    examples: int
    accuracy: float
    log_likelihood: float | None
    classes: ClassTable | None


@dataclass(frozen=True)
class Findings:
    """The fields of an `Explanation`, where they are explained, and what follows from them."""

    title: str
    adapter_name: str
    mixing: str
    normalization: str
    base_model: str | None
    adapters: tuple[AdapterFacts, ...]
    weights: Mapping[str, Mapping[str, float]]
    scores: AdapterScores
    left_out: tuple[LeftOutAdapter, ...]
    updates: Updates
    classes: ClassTable | None
    tested: Tested | None
    similarities: Mapping[str, Mapping[str, float]] | None
    data: str
    command: str | None
    versions: Mapping[str, str]
    created: str
    seconds: float

    @property
    def summary(self) -> list[str]:
        """The main things in a few sentences, plain text of any names."""
        scores, rows = self.scores, self.left_out
        of_kind = {row.kind: row for row in scores.rows}  # adapters may have any name
        mix, base, uniform = of_kind["mix"], of_kind["base"], of_kind.get("uniform")
        between = ", which is uniform," if uniform is None else ""
        beside = "" if uniform is None else f", their uniform mix {100 * uniform.accuracy:.1f} %"
        said = [
            f"The mix of {plural(len(rows), 'adapter')}{between} gets {100 * mix.accuracy:.1f} % of "
            f"{plural(scores.examples, 'example')} right{beside} and the base model alone {100 * base.accuracy:.1f} %."
        ]
        worst = min(rows, key=lambda row: row.change.mean)
        if worst.change.high < 0:
            said.append(
                f"The adapter that it needs most is {quoted(worst.name)}: without it the log-likelihood of an example "
                f"changes by {_between(worst.change)}."
            )
        else:
            said.append("No single adapter is shown to be needed: every interval of leaving one out reaches zero.")
        better = [quoted(row.name) for row in rows if row.change.low > 0]
        if better:
            said.append(f"It would predict better without {_listed(better)}.")
        if self.tested is not None:
            share = f"{100 * self.tested.accuracy:.1f} %"
            said.append(
                f"With its own head, {share} of {plural(self.tested.examples, 'test example')} "
                f"{'is' if self.tested.examples == 1 else 'are'} right."
            )
        said.append(
            f"{plural(len(rows), 'adapter was', 'adapters were')} tried on {plural(scores.examples, 'example')}: the "
            "intervals are for one adapter at a time, and the best of many looks better than it is."
        )
        return said

    def __str__(self) -> str:
        return "\n".join([one_line(self.title), *self.summary, "", str(self.scores)])

    def to_dict(self) -> dict[str, Any]:
        """Everything as values of JSON; `format` counts changes of its form."""
        found = asdict(self)
        found["scores"] = {**found["scores"], "rows": [asdict(row) for row in self.scores.rows]}
        return {"format": FORMAT, "summary": self.summary, **found}

    def to_markdown(self) -> str:
        """A section for a model card: the summary and a table of the adapters."""
        return markdown_of(self.to_dict())


def _between(change: Any) -> str:
    return f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"


def _listed(names: list[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
