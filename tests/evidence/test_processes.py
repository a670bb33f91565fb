"""Two real processes over gloo: they share the candidates, and both get what one process gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .. import tiny, warm
from . import worker


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the adapters, and what each process found."""
    folder = tmp_path_factory.mktemp("evidence")
    tiny.save_pair(folder, "bert")
    (folder / "answers").mkdir()
    tiny.save_pair(folder / "answers", "llama")
    arguments = ("-m", "tests.evidence.worker", folder)
    done = warm.run(*arguments, processes=2, timeout=worker.SECONDS + 60, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-6000:]
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    assert [of_rank["world"] for of_rank in found] == [2, 2]
    return folder, found


def test_both_get_what_one_process_gets(results) -> None:
    folder, (first, second) = results
    table, weights = worker.one_process(folder)
    assert first["table"] == second["table"] == table  # bit for bit: each candidate is scored by one process
    assert first["weights"] == second["weights"] == weights
    assert first["wrapped"] == second["wrapped"] == weights  # by DDP


def test_both_choose_among_answers_as_one_process_does(results) -> None:
    folder, (first, second) = results
    expected = worker.chosen(folder)
    assert first["chosen"] == second["chosen"] == expected
    assert [row[0] for row in expected["table"]] == ["first", "second", "uniform"]


def test_they_share_the_passes(results) -> None:
    _, found = results
    # Four candidates, two for each process, on three batches
    assert [of_rank["counted"] for of_rank in found] == [6, 6]


def test_both_score_the_same_order_of_a_shuffling_loader(results) -> None:
    folder, (first, second) = results
    assert first["shuffled"] == second["shuffled"]
    for row, expected in zip(first["shuffled"], worker.one_process(folder)[0]):
        assert row[0] == expected[0]
        assert row[1] == pytest.approx(expected[1], abs=1e-5)


def test_an_error_of_one_process_is_raised_in_both(results) -> None:
    _, found = results
    for of_rank in found:
        assert "adapter 'second' alone" in of_rank["broken"]["error"]
        assert "labels" in of_rank["no labels"]["error"]


def test_a_loader_that_accelerate_prepared_is_refused(results) -> None:
    _, found = results
    for of_rank in found:
        assert "the DataLoader before accelerate prepared it" in of_rank["prepared"]["error"]


def test_a_sharded_model_gives_the_same(results) -> None:
    folder, (first, second) = results
    table, weights = worker.one_process(folder)
    assert first["sharded"] == second["sharded"]
    for row, expected in zip(first["sharded"]["table"], table):
        assert row == (expected[0], *(pytest.approx(value, abs=1e-5) for value in expected[1:]))
    assert first["sharded"]["report"] == pytest.approx(weights["report"], abs=1e-5)


def test_heads_that_one_process_has_are_asked_in_both(results) -> None:
    _, (first, second) = results
    assert first["without files"] == second["without files"]
    assert first["without files"]["method"] == "own-heads"
    assert all(own is not None for own in first["without files"]["told"].values())
