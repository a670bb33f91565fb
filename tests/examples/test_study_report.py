"""The study's tables and figures, from results that are written by hand so that every number in them is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from few_shot_transfer import scenario as scenarios
from few_shot_transfer.analysis import by_setting, scores
from few_shot_transfer.downstream import Outcome, describe
from few_shot_transfer.report import write
from few_shot_transfer.summary import agreement_table, agreements, cases, comparisons_table
from few_shot_transfer.tables import gap_table, overlap_table, rank_tables


EXAMPLES = 200
QUERY, VALUE = "layer.0.query", "layer.0.value"


def _final(
    method: str,
    right: int,
    seed: int,
    upstream: Sequence[str],
    target: str = "new",
    rank: int = 16,
    k: int | str = 5,
    weights: dict[str, dict[str, float]] | None = None,
    adapter: str | None = None,
) -> dict[str, Any]:
    """A final run that has the first `right` of 200 examples right."""
    outcome = Outcome([i < right for i in range(EXAMPLES)], 50.0, 10, 7, weights, 1.0)
    setting = {"target": target, "upstream": list(upstream), "rank": rank, "label": None}
    run = {"method": method, "adapter": adapter, "k": k, "seed": seed, "learning_rate": 0.1}
    return {"phase": "final", **setting, **run, **describe(outcome), "cpu_seconds": 1.0, "date": "2026-01-02"}


def _scored(records: Sequence[dict[str, Any]]) -> dict[Any, Any]:
    return {key: scores(own) for key, own in by_setting(records).items()}


def _row(table: str, start: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ranks_across_as_in_table_5() -> None:
    right = {("lora", 4): (100, 110), ("lora", 8): (120, 120), ("learned", 4): (130, 140), ("learned", 8): (150, 146)}
    records = [
        _final(method, count, seed, ["a", "b"], target="food101", rank=rank, k="all")
        for (method, rank), counts in right.items()
        for seed, count in enumerate(counts)
    ]
    ((title, table),) = rank_tables(scenarios.load("food101-ranks"), _scored(records))
    assert title == "food101, K = all, by rank"
    assert table.splitlines()[0] == "| Method | r=4 | r=8 |"
    assert _row(table, "LoRA") == ["LoRA", "52.5 ± 3.5", "60.0 ± 0.0"]
    assert _row(table, "Learned composition") == ["Learned composition", "67.5 ± 3.5", "74.0 ± 1.4"]
    assert _row(table, "*LoRA, paper*") == ["*LoRA, paper*", "*84.21 ± 0.17*", "*84.24 ± 0.12*"]
    ((_, twin),) = rank_tables(scenarios.load("newsgroups-ranks"), _scored(records))
    assert "paper" not in twin, "the paper's numbers stand beside the paper's own setting alone"


def test_weights_beside_shared_labels_as_in_table_4() -> None:
    upstream = ["c1-25", "c26-50", "c51-75", "c76-100"]
    rows = {QUERY: (0.1, 0.5, 0.2, 0.2), VALUE: (0.3, 0.25, 0.25, 0.2)}
    weights = {module: dict(zip(upstream, row)) for module, row in rows.items()}
    records = [
        _final(method, 150, seed, upstream, target="new-15-40", k="all", weights=own)
        for method, own in (("uniform", None), ("learned", weights))
        for seed in range(2)
    ]
    table = overlap_table(scenarios.load("cifar100-entangled"), by_setting(records), _scored(records))
    found = _row(table, "new-15-40")
    # Labels 14 to 38 counted from 0: eleven are in the first task, fourteen in the second.
    assert found[2:6] == ["**0.200** (44%)", "**0.375** (56%)", "0.225", "0.200"]
    assert found[6:] == ["1 of 2", "75.0 ± 0.0", "75.0 ± 0.0"]
    assert _row(table, "*new-15-40, paper*")[2:] == ["*0.24*", "*0.46*", "*0.19*", "*0.11*", "", "*93.8*", "*95.9*"]


def test_no_table_where_no_labels_are_shared() -> None:
    records = [_final(method, 150, 0, ["amazon", "nyt"], target="movies") for method in ("uniform", "learned")]
    assert overlap_table(scenarios.load("vader-domains"), by_setting(records), _scored(records)) == ""


def test_the_gap_over_the_number_of_adapters() -> None:
    gains = {("a",): 0, ("a", "b"): 2, ("a", "c"): 6, ("a", "b", "c"): 10}
    records = [
        _final(method, 100 + (gain if method == "learned" else 0), seed, upstream)
        for upstream, gain in gains.items()
        for method in ("uniform", "learned")
        for seed in range(2)
    ]
    table = gap_table(_scored(records))
    assert "| K | N=2 | N=3 |" in table
    # Two sets of two: 1 and 3 points. One set of three: 5 points, its interval of the 200 examples alone, 10 of
    # which differ: 5 - 1.96 * sqrt(0.05 * 0.95 / 199) * 100 = 1.97.
    assert _row(table, "5") == ["5", "+2.0 ± 1.4 (2 sets)", "+5.0 [+2.0, +8.0]"]


def test_all_scenarios_at_a_glance() -> None:
    def of_target(target: str, learned: int, lora: int) -> list[dict[str, Any]]:
        own = [_final("learned", learned, seed, ["a", "b"], target) for seed in range(3)]
        return own + [_final("lora", lora, seed, ["a", "b"], target) for seed in range(3)]

    small = [_final(method, 200, seed, ["a"], "first") for method in ("learned", "lora") for seed in range(3)]
    found = cases("one", _scored([*small, *of_target("first", 140, 100), *of_target("second", 100, 101)]))
    found += cases("two", _scored(of_target("third", 60, 100)))
    assert [case.target for case in found] == ["first", "second", "third"]
    row = _row(comparisons_table(found), "Learned composition minus LoRA")
    assert row[1] == "-0.2 (1 / 1 / 1)"  # 20, -0.5 and -20 points: the first is met with all adapters, not with one


def test_agreement_with_cka_over_all_tasks() -> None:
    def runs(target: str, k: int, row: tuple[float, float, float]) -> list[dict[str, Any]]:
        weights = {QUERY: dict(zip("abc", row)), VALUE: dict(zip("abc", (0.5, 0.3, 0.2)))}
        return [_final("learned", 100, seed, ["a", "b", "c"], target, k=k, weights=weights) for seed in range(2)]

    groups = by_setting(
        [*runs("one", 1, (0.25, 0.3, 0.45)), *runs("one", 5, (0.4, 0.35, 0.25)), *runs("two", 1, (0, 0, 1))]
    )
    one, two = groups
    values = dict(zip("abc", (0.9, 0.8, 0.7)))
    found = agreements("x", groups, {one: {QUERY: values, VALUE: values}})
    assert [(own.target, own.k, own.rho, own.is_same_adapter) for own in found] == [
        ("one", 1, pytest.approx(0.0), True),  # opposite in the query, the same in the value
        ("one", 5, pytest.approx(1.0), True),
    ]
    table = agreement_table([*found, *agreements("x", groups, {two: {QUERY: values, VALUE: values}})])
    assert _row(table, "x: one") == ["x: one", "+0.00 (same)", "+1.00 (same)"]
    assert "(2 of 3)" in table


def test_the_page_and_its_figures_come_from_the_results_alone(tmp_path: Path) -> None:
    upstream = ["amazon", "nyt", "tweets"]
    cka = {
        module: dict(zip(upstream, row)) for module, row in {QUERY: (0.9, 0.5, 0.1), VALUE: (0.8, 0.5, 0.2)}.items()
    }
    weights = {QUERY: dict(zip(upstream, (0.5, 0.3, 0.2))), VALUE: dict(zip(upstream, (0.2, 0.3, 0.5)))}
    session = {"id": "s", "phase": "session", "cpu": "x", "cores": 2, "processes": 1, "command": "run"}
    versions = dict.fromkeys(("python", "torch", "transformers", "peft", "commit"), "1")
    setting = {"target": "movies", "upstream": upstream, "rank": 16, "label": None}
    records = [
        {**session, **versions, "date": "2026-01-02"},
        {"phase": "similarity", **setting, "cka": cka, "date": "2026-01-02"},
    ]
    for seed in range(3):
        for method, right in (("classifier", 100), ("lora", 110), ("uniform", 120), ("learned", 130 + seed)):
            own = weights if method == "learned" else None
            records.append(_final(method, right, seed, upstream, "movies", k=1, weights=own))
    lines = [json.dumps({"id": str(number), "session": "s", **record}) for number, record in enumerate(records)]
    (tmp_path / "vader-domains.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    page = write([scenarios.load("vader-domains")], tmp_path, tmp_path / "report").read_text(encoding="utf-8")
    assert "| Learned composition | **65.5 ± 0.5** | 7 |" in page
    # Spearman is 1 in the query and -1 in the value; the adapters' mean weights are all but equal.
    assert "| 1 | +0.00 (p=" in page
    for figure in (
        "summary.png",
        "vader-domains-movies.png",
        "vader-domains-gain.png",
        "vader-domains-movies-weights.png",
    ):
        assert f"({figure})" in page
        assert (tmp_path / "report" / figure).stat().st_size > 5000


def test_unfinished_results_are_refused(tmp_path: Path) -> None:
    records = [_final("lora", 100, 0, ["amazon"], "movies"), _final("lora", 100, 1, ["amazon"], "movies")]
    records.append(_final("learned", 100, 0, ["amazon"], "movies"))
    lines = [json.dumps({"id": str(number), **record}) for number, record in enumerate(records)]
    (tmp_path / "vader-domains.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"learned at K=5 has the seeds \[0\] of \[0, 1\]"):
        write([scenarios.load("vader-domains")], tmp_path, tmp_path / "report")
