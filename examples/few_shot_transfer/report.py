"""Results as Markdown tables in the paper's layout and as plots, from the JSON lines alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from peft_composition.analysis.report import Similarities, plot_weights, plot_weights_and_similarity

from . import plots, summary
from .analysis import Scores, SettingKey, by_setting, mean_weights, scores, similarities_by_setting
from .records import Record, read
from .scenario import Scenario
from .tables import (
    PAPER,
    accuracy_table,
    agreement_table,
    gap_table,
    overlap_table,
    questions_table,
    rank_tables,
    upstream_table,
    weights_table,
)


def write(scenarios: Sequence[Scenario], results: Path, folder: Path) -> Path:
    """Writes `results.md` and its plots: all scenarios at a glance, then one by one.

    Args:
        scenarios: those without results are left out.
        results: folder of the JSON lines.
        folder: where to write; made where it does not exist.

    Returns:
        The path of the page.

    Raises:
        ValueError: if no scenario has results, or a study has not finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections: list[str] = []
    found: list[summary.Case] = []
    agreed: list[summary.Agreement] = []
    for scenario in scenarios:
        records = read(results / f"{scenario.name}.jsonl")
        if any(record["phase"] == "final" for record in records):
            groups = by_setting(records)
            scored = {key: scores(own) for key, own in groups.items()}
            found += summary.cases(scenario.name, scored)
            agreed += summary.agreements(scenario.name, groups, similarities_by_setting(records))
            sections.append(_section(scenario, records, groups, scored, folder))
    if not sections:
        raise ValueError(f"no finished runs in {results}")
    page = folder / "results.md"
    head = (
        "# Results of the study\n\nAccuracy in percent on test examples, mean ± standard deviation over the seeds; "
        "the best of each column bold, without the oracle. |Θ|: trainable parameters besides the head.\n"
    )
    page.write_text("\n".join([head, summary.write(found, agreed, folder), *sections]), encoding="utf-8")
    return page


def _section(
    scenario: Scenario,
    records: Sequence[Record],
    groups: Mapping[SettingKey, Sequence[Record]],
    scored: Mapping[SettingKey, Scores],
    folder: Path,
) -> str:
    parts = [f"## {scenario.title}", f"`{scenario.name}`, {scenario.scale}. {scenario.notes}".strip()]
    parts.append(upstream_table(records))
    several = len(groups) > 8  # all subsets of adapters: the plot says it better than a table each
    similarities = similarities_by_setting(records)
    for key, own in groups.items():
        if several and len(key.upstream) < max(len(other.upstream) for other in groups):
            continue
        title = ", ".join(
            [key.target, *([key.label] if key.label else []), f"N = {len(key.upstream)}", f"r = {key.rank}"]
        )
        parts += [f"### {title}", accuracy_table(scored[key], own, _paper_numbers(scenario, key))]
        parts += [_rates(own), questions_table(scored[key])]
        parts += [weights_table(own), agreement_table(own, similarities.get(key))]
    if len({key.rank for key in groups}) > 1:
        parts += [f"### {title}\n\n{content}" for title, content in rank_tables(scenario, scored)]
    parts += [gap_table(scored), overlap_table(scenario, groups, scored)]
    for name, figure in _figures(scenario, groups, scored, similarities):
        figure.savefig(folder / f"{name}.png")
        parts.append(f"![{name}]({name}.png)")
    if scenario.plot == "adapters":
        parts.append(
            "Bars are standard deviations over the sets of adapters of one size, or over the seeds where there is one "
            "set; dots are single sets."
        )
    parts += [_costs(records), _sessions(records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rates(records: Sequence[Record]) -> str:
    """What the grid search chose. Single adapters share one rate."""
    chosen = {record["method"]: record["learning_rate"] for record in records if record["learning_rate"]}
    return "Learning rates: " + ", ".join(f"{method} {rate:g}" for method, rate in chosen.items()) + "."


def _costs(records: Sequence[Record]) -> str:
    seconds: dict[str, list[float]] = {}
    for record in records:
        if record["phase"] == "final" and record["cpu_seconds"]:  # a shared outcome costs nothing
            seconds.setdefault(record["method"], []).append(record["cpu_seconds"])
    means = ", ".join(f"{method} {np.mean(own):.1f}" for method, own in seconds.items())
    total = sum(record.get("seconds", 0.0) for record in records)
    return f"CPU seconds per final run: {means}. All runs and upstream trainings: {total / 60:.0f} minutes."


def _sessions(records: Sequence[Record]) -> str:
    """On what the runs were made, once for every machine, command, commit and set of versions."""
    lines = []
    for session in (record for record in records if record["phase"] == "session"):
        of_session = [record["date"] for record in records if record.get("session") == session["id"]]
        hardware = (
            f"{session.get('gpu', session['cpu'])}, {session['cores']} cores, {session['processes']} process(es)"
        )
        versions = ", ".join(f"{name} {session[name]}" for name in ("python", "torch", "transformers", "peft"))
        dates = " to ".join(dict.fromkeys([min(of_session), max(of_session)]))
        lines.append(f"- `{session['command']}`, {dates}: {hardware}; {versions}; commit {session['commit']}")
    return "\n".join(dict.fromkeys(lines))


def _figures(
    scenario: Scenario,
    groups: Mapping[SettingKey, Sequence[Record]],
    scored: Mapping[SettingKey, Scores],
    similarities: Mapping[SettingKey, Similarities],
) -> Iterator[tuple[str, Figure]]:
    name, title = scenario.name, scenario.title
    largest = {key.target: key for key in sorted(scored, key=lambda key: len(key.upstream))}
    shots = list(dict.fromkeys(k for _, k in next(iter(scored.values()))))
    if scenario.plot == "shots":
        for target, key in largest.items():
            yield f"{name}-{target}", plots.over_shots(f"{title}: {target}", scored[key])
        by_target = {target: scored[key] for target, key in largest.items()}
        if any(method == "classifier" for own in by_target.values() for method, _ in own):
            yield f"{name}-gain", plots.gain_over_classifier(f"{title}, K = {shots[0]}", by_target, shots[0])
    if scenario.plot == "adapters":
        for target in largest:
            for k in shots:
                by_count: dict[int, list[Scores]] = {}
                for key, own in scored.items():
                    if key.target == target:
                        by_count.setdefault(len(key.upstream), []).append(own)
                yield f"{name}-{target}-k{k}", plots.over_adapters(f"{title}: {target}, K = {k}", by_count, k)
    for target, key in largest.items():
        weights = mean_weights(groups[key], "learned", shots[-1])
        if weights and len(key.upstream) > 1:
            title = f"{target}, K = {shots[-1]}"
            if key in similarities:
                figure = plot_weights_and_similarity(weights, similarities[key], title=title)
            else:
                figure = plot_weights(weights, title=title)
            yield f"{name}-{target}-weights", figure


def _paper_numbers(scenario: Scenario, key: SettingKey) -> Mapping[str, Any] | None:
    """Only where the setting is the paper's own."""
    if scenario.scale != "hub" or scenario.paper not in PAPER or scenario.paper == "table5":
        return None
    numbers: Mapping[str, Any] | None = PAPER[scenario.paper].get(key.target)
    return numbers
