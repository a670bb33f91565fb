"""Simulated pools: their candidates against their definition, and the tables against a count by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from few_shot_transfer.markdown import filled
from few_shot_transfer.pools import _accuracy, _candidates, _select, tables
from few_shot_transfer.records import read
from few_shot_transfer.stand_in import Corners


def corners(count: int, seed: int = 0) -> tuple[Corners, torch.Tensor]:
    """Two classes that two adapters of three tell apart, and the base does hardly."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    base = torch.randn(count, 24, generator=generator)
    shift = torch.zeros(24)
    shift[0] = 3.0
    sides = (2.0 * labels - 1)[:, None]
    adapters = torch.stack([base + size * sides * shift for size in (0.5, 1.0, 2.0)])
    return Corners(adapters, adapters.mean(0), base), labels


def test_weak_pools_change_the_features_and_tell_nothing_of_the_class() -> None:
    drawn, labels = corners(40)
    tests, truth = corners(2000, seed=1)
    generator = np.random.default_rng(0)
    weak = _candidates(drawn, 30, "weak", generator)
    mixed = _candidates(drawn, 30, "mixed", generator)
    found = [[_accuracy(change(drawn), labels, change(tests), truth) for change in pool] for pool in (weak, mixed)]
    assert all(not torch.equal(change(drawn), drawn.base) for change in weak)
    assert np.median(found[0]) < 0.75
    assert max(found[1]) > 0.9


def test_the_pick_of_a_pool_is_the_best_and_its_chance_is_stated() -> None:
    drawn, labels = corners(40)
    changes = [lambda own: own.base, lambda own: own.adapters[2], lambda own: own.base - 1]
    pick, stated = _select(drawn, changes, labels, seed=0)
    assert pick == 1
    assert stated < 0.01
    many = [changes[1] if number == 17 else changes[2] for number in range(40)]
    assert _select(drawn, many, labels, seed=0)[0] == 17


def record(target: str, stated: list[float], gain: list[float], **facts: Any) -> dict[str, Any]:
    default = {"scenario": "vader-domains", "k": 5, "candidates": 20, "pool": "weak"}
    return {**default, "target": target, "stated": stated, "gain": gain, **facts}


def test_tables_count_what_comes_true() -> None:
    found = tables(
        [
            record("movies", [0.02, 0.03, 0.5, 1.0], [0.1, -0.1, 0.0, -0.2]),
            record("tweets", [0.07, 0.3], [-0.1, 0.2]),
            record("amazon", [0.9], [-0.1], k=20, pool="mixed"),
        ]
    )
    assert "| 0 to 5% | 2 | 2% | 50% |" in found["risk-chose"]
    assert "| 40 to 60% | 1 | 50% | 50% |" in found["risk-chose"]  # equal counts as half
    assert "| 60 to 100% | 1 | 100% | 100% |" in found["risk-chose"]
    assert found["risk-others"].splitlines()[-1] == "| all | 3 | 42% | 67% |"
    assert "| K = 5 | 2 | 18% | 50% | 1 | 7% | 100% |" in found["risk-by"]
    assert "| mixed pools | 1 | 90% | 100% | 0 | - | - |" in found["risk-by"]


def test_the_page_is_what_the_command_makes_of_the_committed_pools() -> None:
    docs = Path(__file__).parents[2] / "docs"
    records = [own for file in sorted((docs / "study" / "pools").glob("*.jsonl")) for own in read(file, "stated")]
    page = (docs / "how-to" / "choose-adapters.md").read_text(encoding="utf-8")
    assert filled(page, tables(records)) == page
    pairs = [pair for own in records for pair in zip(own["stated"], own["gain"])]
    assert len(pairs) > 1000
    # What the page promises: a chance below 5% came true of one pick in ten at most.
    small = [gain < 0 for stated, gain in pairs if stated < 0.05]
    assert len(small) > 50
    assert np.mean(small) < 0.1
