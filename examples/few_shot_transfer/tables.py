"""The tables of the report: what one scenario's runs say, in the paper's layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from peft_composition.analysis.correlation import rank_correlations
from peft_composition.analysis.report import Similarities

from . import plots
from .analysis import (
    MEAN_SINGLE,
    ORACLE_SINGLE,
    QUESTIONS,
    Difference,
    Scores,
    SettingKey,
    Shots,
    by_adapter,
    difference,
    mean_weights,
    scaled_lora,
)
from .markdown import NAMES, table
from .records import Record
from .scenario import ALL, FACTORS, SHARING, Scenario


PAPER = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))
NOT_CHOSEN = (ORACLE_SINGLE, MEAN_SINGLE, *map(scaled_lora, FACTORS))  # by anything but the test set
ROWS = list(NAMES)


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
    return table(["Method", *(f"K={k}" for k in shots), "\\|Θ\\|"], rows)


def questions_table(own: Scores) -> str:
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
    return note + "\n\n" + table(["Question", "Difference", *(f"K={k}" for k in shots)], rows)


def weights_table(records: Sequence[Record]) -> str:
    shots = list(dict.fromkeys(record["k"] for record in records))
    rows = []
    header: list[str] = []
    for method in (
        "learned",
        "learned-free",
        "random-learned",
        "lorahub",
        "evidence",
        "cold",
        *SHARING,
        "evidence-learned",
    ):
        for k in shots:
            weights = by_adapter(mean_weights(records, method, k))
            if weights:
                header = list(weights)
                rows.append([NAMES[method], str(k), *(f"{weight:.3f}" for weight in weights.values())])
    return "Mean weights over modules and seeds:\n\n" + table(["Method", "K", *header], rows) if rows else ""


def agreement_table(records: Sequence[Record], similarities: Similarities | None) -> str:
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
    return note + "\n\n" + table(["K", "mean over modules", "of the means over the model"], rows) if rows else ""


def rank_tables(scenario: Scenario, scored: Mapping[SettingKey, Scores]) -> Iterator[tuple[str, str]]:
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
            yield f"{target}, K = {k}, by rank", table(["Method", *(f"r={rank}" for rank in of_rank)], rows)


def gap_table(scored: Mapping[SettingKey, Scores]) -> str:
    """How far learned weights are ahead of uniform ones, over the number of adapters (figures 5 and 6)."""
    by_count: dict[int, list[Scores]] = {}
    for key, own in scored.items():
        by_count.setdefault(len(key.upstream), []).append(own)
    if len(by_count) < 2:
        return ""
    counts = sorted(count for count in by_count if count > 1)  # a single adapter has no weights to learn
    shots = list(dict.fromkeys(k for own in scored.values() for _, k in own))
    rows = [[str(k), *(_gap([_learned_minus_uniform(own, k) for own in by_count[n]]) for n in counts)] for k in shots]
    note = "Learned minus uniform composition in points; of several sets of adapters, mean ± standard deviation:"
    return note + "\n\n" + table(["K", *(f"N={count}" for count in counts)], rows)


def overlap_table(
    scenario: Scenario, groups: Mapping[SettingKey, Sequence[Record]], scored: Mapping[SettingKey, Scores]
) -> str:
    """Learned weights where upstream tasks have labels of the new one, as in table 4."""
    header: list[str] = []
    rows = []
    for key, records in groups.items():
        shares = {name: scenario.shared_classes(key.target, name) for name in key.upstream}
        if not any(shares.values()):
            continue
        header = list(key.upstream)
        most = max(shares, key=lambda name: shares[name])
        for k in dict.fromkeys(record["k"] for record in records):
            weights = mean_weights(records, "learned", k)
            largest = sum(max(row, key=lambda name: row[name]) == most for row in weights.values())
            cells = [_share_and_weight(shares[name], weight) for name, weight in by_adapter(weights).items()]
            accuracies = [_cell(scored[key], method, k, is_best=False) for method in ("uniform", "learned")]
            rows.append([key.target, str(k), *cells, f"{largest} of {len(weights)}", *accuracies])
        rows += _paper_overlap(scenario, key)
    if not rows:
        return ""
    note = (
        "Mean weights of the upstream tasks (in brackets the share of the new labels that each has), and in how many "
        "modules the one with most of them has the largest weight:"
    )
    return note + "\n\n" + table(["New task", "K", *header, "Largest in", "Uniform", "Learned"], rows)


def upstream_table(records: Sequence[Record]) -> str:
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
    return table(header, rows) if rows else ""


def _best(own: Scores, k: Shots) -> str:
    means = {m: float(s.mean()) for (m, shots), s in own.items() if shots == k and m not in NOT_CHOSEN}
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


def _learned_minus_uniform(own: Scores, k: Shots) -> Difference:
    return difference(own["learned", k], own["uniform", k])


def _gap(found: Sequence[Difference]) -> str:
    if len(found) == 1:
        return f"{found[0].mean:+.1f} [{found[0].low:+.1f}, {found[0].high:+.1f}]"
    means = [entry.mean for entry in found]
    return f"{np.mean(means):+.1f} ± {np.std(means, ddof=1):.1f} ({len(means)} sets)"


def _share_and_weight(share: float, weight: float) -> str:
    return f"**{weight:.3f}** ({share:.0%})" if share else f"{weight:.3f}"


def _paper_overlap(scenario: Scenario, key: SettingKey) -> list[list[str]]:
    paper = PAPER["table4"].get(key.target) if scenario.scale == "hub" and scenario.paper == "table4" else None
    if paper is None:
        return []
    weights = [f"*{paper['weights'][name]}*" for name in key.upstream]
    accuracies = [_paper_cell(paper[method][ALL]) for method in ("uniform", "learned")]
    return [[f"*{key.target}, paper*", "*all*", *weights, "", *accuracies]]
