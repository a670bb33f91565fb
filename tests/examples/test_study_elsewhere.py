"""Gains judged on examples that no test split had: which these are, and the interval over draws and examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_shot_transfer import elsewhere, evidence
from few_shot_transfer import scenario as scenarios
from few_shot_transfer.data import labels_of
from few_shot_transfer.downstream import correct_answers, packed
from few_shot_transfer.records import read
from few_shot_transfer.scenario import Scenario
from few_shot_transfer.training import fit_features

from .digits import digits


SMALL = "{shots: [2], seeds: 2, warmup_epochs: 2, epochs: 2, batch_size: 4, validation_size: 9, test_size: 21}"
ELSEWHERE = Path(__file__).parents[2] / "docs" / "study" / "elsewhere"


def tiny(folder: Path, ranks: str = "[16]") -> Scenario:
    upstream = f"{{max_steps: 4, batch_size: 8, learning_rate: 0.05, ranks: {ranks}}}"
    text = f"{digits()}upstream: {upstream}\ndownstream: {SMALL}\n"
    (folder / "digits.yaml").write_text(text, encoding="utf-8")
    return scenarios.load(str(folder / "digits.yaml"))


def test_every_draw_is_judged_on_examples_of_its_own_and_of_no_split(tmp_path: Path) -> None:
    (bench,) = evidence.open_benches(tiny(tmp_path), tmp_path, None, progress=False)
    draws, path = [(2, 0), (2, 1)], tmp_path / "elsewhere.jsonl"
    evidence.append(elsewhere.judge_elsewhere(bench, draws, 200, progress=False), path)
    records = read(path, key="method")
    assert len(records) == 4
    assert not list(elsewhere.judge_elsewhere(bench, draws, 200, records, progress=False))
    assert {(record["whole"], record["most"]) for record in records} == {(False, 200)}

    sample = elsewhere.others(bench, 200)
    whole = elsewhere.others(bench, 10_000)
    images = {bytes(np.asarray(image)) for image in bench.judged["test"]["input"]}
    images |= {bytes(np.asarray(image)) for image in bench.judged["validation"]["input"]}
    found = [bytes(np.asarray(image)) for image in whole.rows["input"]]
    assert len(found) == len(bench.task.test) - 21 + len(bench.task.train) == len(set(found))
    assert not images & set(found)
    assert len(sample.rows) == 200
    everything = {bytes(np.asarray(image)) for image in elsewhere.others(bench, 10_000, is_whole=True).rows["input"]}
    assert everything == {*found, *(bytes(np.asarray(image)) for image in bench.judged["test"]["input"])}

    for record in records:
        place = {int(place): number for number, place in enumerate(sample.places) if place >= 0}
        support = bench.support((2, record["seed"]))
        assert record["drawn"] == sorted(place[index] for index in support if index in place)
        right = np.delete(correct_answers(record), record["drawn"])
        assert record["accuracy"] == pytest.approx(100 * right.mean(), abs=1e-3)
    assert any(record["drawn"] for record in records)

    # One of them by hand: a head on the features of its mix, judged example by example.
    mixed = next(own for own in records if own["seed"] == 1 and own["method"] == evidence.WITH_HEADS)
    weights = [mixed["weights"][name] for name in bench.names]
    how = bench.scenario.downstream
    head = fit_features(bench.mixed(weights, (2, 1)), bench.labels((2, 1)), bench.classes, how, 1)
    with torch.no_grad():
        said = head(bench.mixed(weights, sample.rows)).argmax(1)
    expected = (said == torch.tensor(labels_of(sample.rows))).numpy()
    assert (expected == correct_answers(mixed)).mean() > 0.98  # weights are written with four digits


def test_of_the_whole_the_test_sample_stands_before_the_others(tmp_path: Path) -> None:
    (bench,) = evidence.open_benches(tiny(tmp_path), tmp_path, None, progress=False)
    draws, path = [(2, 0), (2, 1)], tmp_path / "elsewhere.jsonl"
    for size, is_whole in ((200, False), (200, True), (300, True)):
        known = read(path, key="method")
        evidence.append(elsewhere.judge_elsewhere(bench, draws, size, known, False, is_whole), path)
        assert not list(elsewhere.judge_elsewhere(bench, draws, size, read(path, key="method"), False, is_whole))
    records = read(path, key="method")
    of_rest, of_whole, of_more = (
        {(own["seed"], own["method"]): own for own in records if (own["most"], own["whole"]) == sample}
        for sample in ((200, False), (200, True), (300, True))
    )
    for key, own in of_whole.items():
        assert own["examples"] == 221 == of_more[key]["examples"] - 100
        assert own["drawn"] == [21 + place for place in of_rest[key]["drawn"]]
        assert correct_answers(own)[21:].tolist() == correct_answers(of_rest[key]).tolist()
    assert any(own["drawn"] for own in of_whole.values())

    # The test sample's own answers: the head of a draw, judged as the study judges it.
    uniform = of_whole[1, "uniform"]
    how = bench.scenario.downstream
    head = fit_features(bench.features("uniform", (2, 1)), bench.labels((2, 1)), bench.classes, how, 1)
    with torch.no_grad():
        right = head(bench.features("uniform", "test")).argmax(1) == bench.judged_labels["test"]
    assert correct_answers(uniform)[:21].tolist() == right.tolist()

    rows = elsewhere.elsewhere_table(records).splitlines()[2:]
    judged = [row.split(" | ")[3] for row in rows]
    assert len(rows) == 3
    assert [" of all" in cell for cell in judged] == [False, True, True]
    assert float(judged[2].split()[0]) > float(judged[1].split()[0]) + 90


def test_adapters_of_each_rank_are_a_task_of_their_own(tmp_path: Path) -> None:
    benches = list(evidence.open_benches(tiny(tmp_path, "[2, 4]"), tmp_path, None, progress=False))
    assert [own.facts["target"] for own in benches] == ["new, rank 2", "new, rank 4"]
    assert [own.setting.rank for own in benches] == [2, 4]
    (record, *_) = evidence.compare(benches[1], [(2, 0)], [], progress=False)
    assert record["target"] == "new, rank 4"


def test_the_interval_over_both_covers_where_that_over_draws_does_not() -> None:
    generator = np.random.default_rng(0)
    inside = {"draws": 0, "both": 0}
    for _ in range(300):
        rows, columns = generator.normal(0, 2, (20, 1)), generator.normal(0, 20, (1, 200))
        table = 1.0 + rows + columns + generator.normal(0, 60, (20, 200))
        table[generator.random((20, 200)) < 0.05] = np.nan
        found = elsewhere.crossed(table)
        inside["draws"] += found.over_draws[0] <= 1.0 <= found.over_draws[1]
        inside["both"] += found.over_both[0] <= 1.0 <= found.over_both[1]
    assert inside["both"] / 300 > 0.93
    assert inside["draws"] / 300 < 0.85


def test_the_interval_over_draws_is_that_of_the_gains() -> None:
    table = np.random.default_rng(1).normal(2, 5, (6, 40))
    means = table.mean(1)
    margin = 2.570582 * means.std(ddof=1) / 6**0.5  # Student's t at five degrees of freedom
    found = elsewhere.crossed(table)
    assert found.mean == pytest.approx(means.mean())
    assert found.over_draws == pytest.approx((means.mean() - margin, means.mean() + margin), rel=1e-5)


def test_the_table_pairs_by_draw_and_example() -> None:
    def record(seed: int, method: str, right: list[int], drawn: list[int]) -> dict[str, Any]:
        facts = {"scenario": "s", "target": "t", "k": 2, "seed": seed, "method": method, "drawn": drawn}
        facts |= {"most": 5, "whole": False}
        return {**facts, **packed([bool(value) for value in right])}

    records = [
        record(0, "uniform", [1, 0, 0, 1, 0], [4]),
        record(0, evidence.WITH_HEADS, [1, 1, 0, 1, 1], [4]),  # + 25 points on the first four
        record(1, "uniform", [1, 0, 1, 1, 0], []),
        record(1, evidence.WITH_HEADS, [1, 1, 1, 0, 1], []),  # + 20
    ]
    found = elsewhere.gain_of(records, evidence.WITH_HEADS, 2)
    assert found is not None
    assert found.mean == pytest.approx(22.5)
    assert elsewhere.gain_of(records, evidence.WITH_HEADS, 5) is None
    assert "| `s`: t | 2 | 2 | 4 | +22.5 |" in elsewhere.elsewhere_table(records)


@pytest.mark.parametrize(
    "path", sorted(ELSEWHERE.rglob("*.jsonl")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_committed_records_are_paired(path: Path) -> None:
    records = read(path, key="method")
    for cell in {(own["target"], own["k"], own["whole"], own["most"]) for own in records}:
        of_cell = [own for own in records if (own["target"], own["k"], own["whole"], own["most"]) == cell]
        runs = [(own["seed"], own["method"]) for own in of_cell]
        seeds = range(len(runs) // 2)
        assert len(seeds) >= 20
        assert sorted(runs) == sorted((seed, name) for seed in seeds for name in ("uniform", evidence.WITH_HEADS))
        for own in of_cell:
            assert own["accuracy"] == pytest.approx(
                100 * np.delete(correct_answers(own), own["drawn"]).mean(), abs=1e-3
            )
