"""All scenarios at a glance: the paper's claims and the controls' questions, counted over the downstream tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_composition.analysis.correlation import rank_correlations
from peft_composition.analysis.report import Similarities

from . import plots
from .analysis import BEST_SINGLE, Difference, Scores, SettingKey, Shots, by_adapter, difference, mean_weights
from .markdown import NAMES, table
from .records import Record
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


@dataclass(frozen=True)
class Agreement:
    """Whether learned weights, averaged over the seeds, follow CKA in one case at one K.

    Attributes:
        scenario: the scenario's name.
        target: the downstream task.
        k: examples per class.
        rho: Spearman's correlation over the adapters, averaged over the modules.
        is_same_adapter: whether the adapter with the largest mean weight has the largest mean CKA.
    """

    scenario: str
    target: str
    k: Shots
    rho: float
    is_same_adapter: bool


def agreements(
    scenario: str, groups: Mapping[SettingKey, Sequence[Record]], similar: Mapping[SettingKey, Similarities]
) -> list[Agreement]:
    """One entry for every setting that has CKA, at every K."""
    found = []
    for key, of_modules in similar.items():
        closest = _largest(by_adapter(of_modules))
        for k in dict.fromkeys(record["k"] for record in groups[key]):
            weights = mean_weights(groups[key], "learned", k)
            if weights:
                rho = rank_correlations(weights, of_modules)[-1].rho
                found.append(Agreement(scenario, key.target, k, rho, _largest(by_adapter(weights)) == closest))
    return found


def cases(scenario: str, scored: Mapping[SettingKey, Scores]) -> list[Case]:
    """One case for every downstream task: the one with most adapters, of the largest rank."""
    chosen: dict[str, SettingKey] = {}
    for key in scored:
        if key.target not in chosen or _size(key) > _size(chosen[key.target]):
            chosen[key.target] = key
    return [Case(scenario, target, scored[key]) for target, key in chosen.items()]


def write(found: Sequence[Case], agreed: Sequence[Agreement], folder: Path) -> str:
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
            *([agreement_table(agreed)] if agreed else []),
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


def agreement_table(agreed: Sequence[Agreement]) -> str:
    """Claim 5 over all downstream tasks: tasks down, K across."""
    shots = _sorted_shots(entry.k for entry in agreed)
    rows = []
    for scenario, target in dict.fromkeys((entry.scenario, entry.target) for entry in agreed):
        own = {entry.k: entry for entry in agreed if (entry.scenario, entry.target) == (scenario, target)}
        cells = [
            f"{round(own[k].rho, 2) + 0.0:+.2f}{' (same)' if own[k].is_same_adapter else ''}" if k in own else ""
            for k in shots
        ]
        rows.append([f"{scenario}: {target}", *cells])
    mean = sum(entry.rho for entry in agreed) / len(agreed)
    same = sum(entry.is_same_adapter for entry in agreed)
    note = (
        "Spearman's correlation of learned weights with CKA, averaged over the modules; (same) where the adapter with "
        f"the largest mean weight has the largest mean CKA, too ({same} of {len(agreed)}). Mean: {mean:+.2f}."
    )
    return note + "\n\n" + table(["Task", *(f"K={k}" for k in shots)], rows)


def _differences(found: Sequence[Case], pair: tuple[str, str]) -> dict[Shots, list[tuple[Case, Difference]]]:
    ours, theirs = pair
    by_k: dict[Shots, list[tuple[Case, Difference]]] = {}
    for case in found:
        for k in _sorted_shots(k for _, k in case.scores):
            if (ours, k) in case.scores and (theirs, k) in case.scores:
                own = difference(case.scores[ours, k], case.scores[theirs, k])
                by_k.setdefault(k, []).append((case, own))
    return {k: by_k[k] for k in _sorted_shots(by_k)}


def _largest(values: Mapping[str, float]) -> str:
    return max(values, key=lambda name: values[name])


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
