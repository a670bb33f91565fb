"""All scenarios at a glance: the paper's claims and the controls' questions, counted over the downstream tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import plots
from .analysis import BEST_SINGLE, Difference, Scores, SettingKey, Shots, difference
from .markdown import NAMES, table
from .scenario import ALL


# What is compared in all scenarios: the first of each pair against the second.
PAIRS = [
    ("uniform", "lora"),
    ("uniform", "full"),
    ("learned", "lora"),
    ("learned", "full"),
    ("learned", "classifier"),
    ("learned", "uniform"),
    ("learned-free", "learned"),
    ("learned", BEST_SINGLE),
    ("learned", "random-learned"),
    ("random-learned", "classifier"),
    ("random-learned", "lora"),
    ("learned", "lorahub"),
]
DRAWN = [pair for pair in PAIRS if pair[0] != "learned-free" and pair[1] not in ("classifier", "lorahub")]


@dataclass(frozen=True)
class Case:
    """A downstream task with all the adapters that it is met with.

    Attributes:
        scenario: the scenario's name.
        target: the downstream task.
        scores: as `analysis.scores` gives them.
    """

    scenario: str
    target: str
    scores: Scores


def cases(scenario: str, scored: Mapping[SettingKey, Scores]) -> list[Case]:
    """One case for every downstream task: the one with most adapters, of the largest rank."""
    chosen: dict[str, SettingKey] = {}
    for key in scored:
        if key.target not in chosen or _size(key) > _size(chosen[key.target]):
            chosen[key.target] = key
    return [Case(scenario, target, scored[key]) for target, key in chosen.items()]


def write(found: Sequence[Case], folder: Path) -> str:
    """The section's Markdown; its figure goes into the folder."""
    panels = {}
    for pair in DRAWN:
        by_k = _differences(found, pair)
        if by_k:
            panels[_name(pair)] = {k: [(case.scenario, own) for case, own in entries] for k, entries in by_k.items()}
    if panels:
        plots.differences(panels).savefig(folder / "summary.png")
    return "\n\n".join(
        [
            "## At a glance",
            "Every downstream task with all of its adapters is one case; scenarios share some of their data, so the "
            "cases are not independent. A cell gives the mean difference in points over the cases and, in brackets, "
            "in how many of them the first method is clearly ahead, undecided, and clearly behind (95% interval over "
            "seeds and test examples; not corrected for their number).",
            comparisons_table(found),
            *(["![summary](summary.png)"] if panels else []),
        ]
    )


def comparisons_table(found: Sequence[Case]) -> str:
    """Pairs of methods down, K across."""
    shots = _sorted_shots(k for case in found for _, k in case.scores)
    rows = []
    for pair in PAIRS:
        by_k = _differences(found, pair)
        if by_k:
            rows.append([_name(pair), *(_cell([own for _, own in by_k.get(k, [])]) for k in shots)])
    return table(["Difference", *(f"K={k}" for k in shots)], rows)


def _differences(found: Sequence[Case], pair: tuple[str, str]) -> dict[Shots, list[tuple[Case, Difference]]]:
    ours, theirs = pair
    by_k: dict[Shots, list[tuple[Case, Difference]]] = {}
    for case in found:
        for k in _sorted_shots(k for _, k in case.scores):
            if (ours, k) in case.scores and (theirs, k) in case.scores:
                own = difference(case.scores[ours, k], case.scores[theirs, k])
                by_k.setdefault(k, []).append((case, own))
    return {k: by_k[k] for k in _sorted_shots(by_k)}


def _name(pair: tuple[str, str]) -> str:
    return f"{NAMES[pair[0]]} minus {NAMES[pair[1]]}"


def _cell(own: Sequence[Difference]) -> str:
    if not own:
        return ""
    ahead, behind = sum(entry.low > 0 for entry in own), sum(entry.high < 0 for entry in own)
    mean = sum(entry.mean for entry in own) / len(own)
    return f"{mean:+.1f} ({ahead} / {len(own) - ahead - behind} / {behind})"


def _sorted_shots(shots: object) -> list[Shots]:
    return sorted(set(shots), key=lambda k: (k == ALL, k))  # type: ignore[call-overload]


def _size(key: SettingKey) -> tuple[int, int]:
    return len(key.upstream), key.rank
