"""The table of gains that evidence brings in the study, by hand; and the committed draws behind `docs/study.md`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_shot_transfer import evidence
from few_shot_transfer.scenario import DownstreamSpec
from few_shot_transfer.training import fit_features
from scipy import stats

from peft_composition.evidence.scores import leave_one_out_distances


DRAWS = Path(__file__).parents[2] / "docs" / "study" / "evidence"


def record(method: str, seed: int, accuracy: float, adapter: str | None = None) -> dict[str, Any]:
    facts = {"scenario": "s", "target": "t", "k": 2, "seed": seed}
    return {**facts, "method": method, "accuracy": accuracy, "adapter": adapter}


def test_gains_are_paired_by_draw() -> None:
    uniform, vote = [50.0, 60.0, 70.0], [53.0, 61.0, 75.0]
    singles = {"a": [40.0, 80.0, 71.0], "b": [60.0, 60.0, 70.0]}
    records = [record("uniform", seed, value) for seed, value in enumerate(uniform)]
    records += [record("vote", seed, value) for seed, value in enumerate(vote)]
    records += [record("single", seed, v, name) for name, values in singles.items() for seed, v in enumerate(values)]
    lines = evidence.gains(records, ("vote",)).splitlines()
    assert lines[0] == "| `s`, t | K = 2 |"
    assert "| uniform, % | 60.0 |" in lines
    gains = np.subtract(vote, uniform)
    low, high = stats.t.interval(0.95, 2, gains.mean(), gains.std(ddof=1) / np.sqrt(3))
    assert f"| vote | +3.0 [{low:+.1f}, {high:+.1f}] |" in lines
    best = np.subtract(singles["a"], uniform)  # its mean is 63.7, that of the other 63.3
    assert any(line.startswith(f"| best single (by test) | {best.mean():+.1f} [") for line in lines)


def test_the_methods_are_those_of_the_library() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    noise = torch.randn(6, 4, generator=generator)
    apart = noise + 3 * labels[:, None]
    left = [leave_one_out_distances(features, labels) for features in (apart, noise, apart / 2 + noise / 2)]
    for method in evidence.METHODS:
        assert float(evidence.weights_by(method, left, seed=0)[0]) > 0.7


def test_a_head_on_features_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    features = torch.randn(40, 8, generator=generator) + 2 * labels[:, None]
    head = fit_features(features, labels, 2, DownstreamSpec(shots=(20,), batch_size=16), seed=0)
    assert float((head(features).argmax(-1) == labels).double().mean()) > 0.9
    again = fit_features(features, labels, 2, DownstreamSpec(shots=(20,), batch_size=16), seed=0)
    assert torch.equal(head.weight, again.weight)


@pytest.mark.parametrize("path", sorted(DRAWS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_committed_draws_are_whole(path: Path) -> None:
    records = evidence.read(path)
    for target in {own["target"] for own in records}:
        for k in (2, 5, 20):
            seeds = sorted(
                own["seed"] for own in records if (own["target"], own["k"], own["method"]) == (target, k, "uniform")
            )
            assert seeds == list(range(20))
