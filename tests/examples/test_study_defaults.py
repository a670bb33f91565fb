"""The measurement of what users get who change nothing takes what is printed; its runs are in test_scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.few_shot_transfer.defaults import Inputs, adapted, readme_lines, without_evidence
from examples.few_shot_transfer.records import read


def test_the_readmes_lines_take_a_tasks_names() -> None:
    inputs = Inputs(Path("b"), [Path("x"), Path("y")], Path("d"), 7)
    lines = adapted(readme_lines(), inputs)
    assert "['x', 'y']" in lines
    assert lines.count("'b'") == lines.count("num_labels=7") == 2
    assert not any(name in lines for name in ("org/base-model", "me/lora-a", "num_labels=2"))
    with pytest.raises(ValueError, match='the README\'s lines have no "org/base-model"'):
        adapted(lines, inputs)


def test_the_control_leaves_out_the_line_that_chooses_weights() -> None:
    removed = set(readme_lines().splitlines()) - set(without_evidence(readme_lines()).splitlines())
    assert [line.partition("#")[0].strip() for line in removed] == ["print(fit_mixing_weights(model, train_dataset))"]
    with pytest.raises(ValueError, match="not exactly one"):
        without_evidence(without_evidence(readme_lines()))


def test_every_committed_run_is_there_once_and_has_its_uniform_mix() -> None:
    for name in ("real", "training"):
        records = read(Path(__file__).parents[2] / "docs" / "study" / "defaults" / f"{name}.jsonl", key="method")
        runs = [(r["scenario"], r["target"], r["k"], r["seed"], r["method"]) for r in records]
        assert len(set(runs)) == len(runs) > 0
        assert {(*run[:4], "uniform") for run in runs} <= set(runs)
        assert all(0 <= record["accuracy"] <= 100 for record in records)
