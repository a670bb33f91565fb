"""Results as Markdown tables in the paper's layout and as plots, from the JSON lines alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from peft_composition.report import Similarities, plot_weights, plot_weights_and_similarity, rank_correlations

from . import plots
from .analysis import (
    BEST_SINGLE,
    MEAN_SINGLE,
    ORACLE_SINGLE,
    QUESTIONS,
    Scores,
    SettingKey,
    Shots,
    by_adapter,
    by_setting,
    difference,
    mean_weights,
    scores,
    similarities_by_setting,
)
from .records import Record, read
from .scenario import METHODS, Scenario


PAPER = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))
NAMES = {
    "zero-shot": "Zero-shot",
    "classifier": "Classifier tuning",
    "full": "Full fine-tuning",
    "lora": "LoRA",
    "uniform": "Uniform composition",
    "learned": "Learned composition",
    "learned-free": "Learned, free weights",
    MEAN_SINGLE: "Mean single adapter",
    BEST_SINGLE: "Best single adapter (by validation)",
    ORACLE_SINGLE: "Best single adapter (oracle, by test)",
    "random-uniform": "Random LoRAs, uniform",
    "random-learned": "Random LoRAs, learned",
    "lorahub": "LoraHub",
}
ROWS = [name for name in NAMES if name in METHODS or "single" in name]


def write(scenarios: Sequence[Scenario], results: Path, folder: Path) -> Path:
    """Writes `results.md` and its plots.

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
    sections = []
    for scenario in scenarios:
        records = read(results / f"{scenario.name}.jsonl")
        if any(record["phase"] == "final" for record in records):
            sections.append(_section(scenario, records, folder))
    if not sections:
        raise ValueError(f"no finished runs in {results}")
    page = folder / "results.md"
    head = (
        "# Results of the study\n\nAccuracy in percent on test examples, mean ± standard deviation over the seeds; "
        "the best of each column bold, without the oracle. |Θ|: trainable parameters besides the head.\n"
    )
    page.write_text("\n".join([head, *sections]), encoding="utf-8")
    return page


def _section(scenario: Scenario, records: Sequence[Record], folder: Path) -> str:
    groups = by_setting(records)
    scored = {key: scores(own) for key, own in groups.items()}
    parts = [f"## {scenario.title}", f"`{scenario.name}`, {scenario.scale}. {scenario.notes}".strip()]
    parts.append(_upstream_table(records))
    several = len(groups) > 8  # all subsets of adapters: the plot says it better than a table each
    similarities = similarities_by_setting(records)
    for key, own in groups.items():
        if several and len(key.upstream) < max(len(other.upstream) for other in groups):
            continue
        title = ", ".join(
            [key.target, *([key.label] if key.label else []), f"N = {len(key.upstream)}", f"r = {key.rank}"]
        )
        parts += [f"### {title}", accuracy_table(scored[key], own, _paper_numbers(scenario, key))]
        parts += [_questions_table(scored[key]), _weights_table(own), _agreement_table(own, similarities.get(key))]
    if len({key.rank for key in groups}) > 1:
        parts += [f"### {title}\n\n{table}" for title, table in _rank_tables(scenario, scored)]
    for name, figure in _figures(scenario, groups, scored, similarities):
        figure.savefig(folder / f"{name}.png")
        parts.append(f"![{name}]({name}.png)")
    parts += [_costs(records), _sessions(records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def accuracy_table(own: Scores, records: Sequence[Record], paper: Mapping[str, Any] | None = None) -> str:
    """Methods down, K across, as in tables 2, 3, 6 and 7; the paper's numbers in italics below ours.

    Args:
        own: the scores of one setting.
        records: its runs, for the trainable parameters.
        paper: the paper's numbers by method and K, where it has the same setting.
    """
    shots = list(dict.fromkeys(k for _, k in own))
    trainable = {record["method"]: record["trainable"] for record in records}
    rows = []
    for method in ROWS:
        cells = [_cell(own, method, k, is_best=_best(own, k) == method) for k in shots]
        if any(cells):
            count = trainable.get(method, 0)
            rows.append([NAMES[method], *cells, f"{count:,}"])
        if paper and method in paper:
            cells = [_paper_cell(paper[method].get(k)) for k in shots]
            rows.append([f"*{NAMES[method]}, paper*", *cells, ""])
    return _markdown(["Method", *(f"K={k}" for k in shots), "\\|Θ\\|"], rows)


def _questions_table(own: Scores) -> str:
    shots = list(dict.fromkeys(k for _, k in own))
    rows = []
    for question, pairs in QUESTIONS.items():
        for ours, theirs in pairs:
            cells = []
            for k in shots:
                if (ours, k) in own and (theirs, k) in own:
                    found = difference(own[ours, k], own[theirs, k])
                    text = f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
                    p = "" if np.isnan(found.p) else f" p={found.p:.2f}"
                    cells.append(f"**{text}**{p}" if found.is_clear else f"{text}{p}")
            if len(cells) == len(shots):
                rows.append([question, f"{NAMES[ours]} minus {NAMES[theirs]}", *cells])
    if not rows:
        return ""
    note = (
        "Paired differences in points with 95% intervals (over seeds and test examples; bold where zero is outside) "
        "and the p of a paired t-test over the seeds. Not corrected for their number."
    )
    return note + "\n\n" + _markdown(["Question", "Difference", *(f"K={k}" for k in shots)], rows)


def _weights_table(records: Sequence[Record]) -> str:
    shots = list(dict.fromkeys(record["k"] for record in records))
    rows = []
    header: list[str] = []
    for method in ("learned", "learned-free", "random-learned", "lorahub"):
        for k in shots:
            weights = by_adapter(mean_weights(records, method, k))
            if weights:
                header = list(weights)
                rows.append([NAMES[method], str(k), *(f"{weight:.3f}" for weight in weights.values())])
    return "Mean weights over modules and seeds:\n\n" + _markdown(["Method", "K", *header], rows) if rows else ""


def _agreement_table(records: Sequence[Record], similarities: Similarities | None) -> str:
    """Whether learned weights, averaged over the seeds, follow CKA (section 6.5): Spearman's rho for every K."""
    if similarities is None:
        return ""
    rows = []
    for k in dict.fromkeys(record["k"] for record in records):
        weights = mean_weights(records, "learned", k)
        if weights and len(next(iter(weights.values()))) > 1:
            by_module = rank_correlations(weights, similarities)[-1]
            whole = rank_correlations(weights, similarities, by="model")[-1]
            found = [f"{entry.rho:+.2f} (p={entry.p_value:.2f})" for entry in (by_module, whole)]
            rows.append([str(k), *found])
    means = ", ".join(f"{name} {value:.3f}" for name, value in by_adapter(similarities).items())
    note = (
        f"Mean CKA of the upstream adapters with a LoRA of all of the new task's data: {means}. Spearman's "
        "correlation of the learned weights with it, and the p of permuting the adapters:"
    )
    return note + "\n\n" + _markdown(["K", "mean over modules", "of the means over the model"], rows) if rows else ""


def _rank_tables(scenario: Scenario, scored: Mapping[SettingKey, Scores]) -> Iterator[tuple[str, str]]:
    """Methods down, ranks across, as in table 5: a title and a table for every target and K."""
    for target in dict.fromkeys(key.target for key in scored):
        of_rank = {key.rank: own for key, own in scored.items() if key.target == target}
        paper = PAPER["table5"].get(target, {}) if scenario.scale == "hub" else {}
        for k in dict.fromkeys(k for own in of_rank.values() for _, k in own):
            rows = []
            for method in ROWS:
                if any((method, k) in own for own in of_rank.values()):
                    rows.append([NAMES[method], *(_cell(own, method, k, is_best=False) for own in of_rank.values())])
                    if method in paper:
                        cells = [_paper_cell(paper[method].get(rank)) for rank in of_rank]
                        rows.append([f"*{NAMES[method]}, paper*", *cells])
            yield f"{target}, K = {k}, by rank", _markdown(["Method", *(f"r={rank}" for rank in of_rank)], rows)


def _upstream_table(records: Sequence[Record]) -> str:
    rows = [
        [
            r["task"],
            str(r["rank"]),
            f"{r['examples']:,}",
            str(r["steps"]),
            f"{r['accuracy']:.1f}",
            f"{r['seconds']:.0f}",
        ]
        for r in records
        if r["phase"] == "upstream"
    ]
    header = ["Upstream adapter", "r", "Examples", "Steps", "Accuracy on its own task", "Seconds"]
    return _markdown(header, rows) if rows else ""


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


def _best(own: Scores, k: Shots) -> str:
    means = {
        m: float(s.mean()) for (m, shots), s in own.items() if shots == k and m not in (ORACLE_SINGLE, MEAN_SINGLE)
    }
    return max(means, key=lambda method: means[method])


def _cell(own: Scores, method: str, k: Shots, is_best: bool) -> str:
    if (method, k) not in own:
        return ""
    mean, deviation = plots.mean_and_deviation(own[method, k])
    text = f"{mean:.1f} ± {deviation:.1f}"
    return f"**{text}**" if is_best else text


def _paper_cell(numbers: Sequence[float | None] | None) -> str:
    if numbers is None:
        return ""
    mean, deviation = numbers
    return f"*{mean}*" if deviation is None else f"*{mean} ± {deviation}*"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
