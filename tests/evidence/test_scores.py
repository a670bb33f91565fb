"""Leave-one-out scores against a loop that really leaves one example out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peft_composition.evidence.scores import (
    BETAS,
    bayesian_bootstrap,
    interval,
    leave_one_out_distances,
    log_likelihoods,
    margins,
)


LABELS = {
    "three of each": [0, 0, 0, 1, 1, 1],
    "two of each": [5, 2, 5, 2],
    "uneven": [0, 1, 1, 2, 0, 1, 2, 0, 0],
    "one alone": [3, 0, 0, 1, 1],
}


def features_of(labels: list[int], width: int = 4) -> Tensor:
    return torch.randn(len(labels), width, dtype=torch.float64, generator=torch.Generator().manual_seed(len(labels)))


def distances_by_loop(features: Tensor, labels: list[int]) -> tuple[list[list[float]], list[int]]:
    """Each example that has another of its class: squared distances to the means of all *other* examples, by class."""
    rows, found = [], []
    for i, label in enumerate(labels):
        others = [j for j in range(len(labels)) if j != i]
        if not any(labels[j] == label for j in others):
            continue
        rows.append(i)
        found.append([])
        for of_class in sorted(set(labels)):
            members = [features[j] for j in others if labels[j] == of_class]
            mean = [sum(float(x[d]) for x in members) / len(members) for d in range(features.shape[1])]
            found[-1].append(sum((float(features[i][d]) - mean[d]) ** 2 for d in range(len(mean))))
    return found, rows


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_distances_are_those_to_means_without_the_example(labels) -> None:
    features = features_of(labels)
    expected, rows = distances_by_loop(features, labels)
    left = leave_one_out_distances(features, torch.tensor(labels))
    assert left.rows.tolist() == rows
    assert [sorted(set(labels))[column] for column in left.labels] == [labels[row] for row in rows]
    torch.testing.assert_close(left.distances, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_distances_keep_their_digits_beside_a_large_common_mean() -> None:
    labels = LABELS["uneven"]
    near = leave_one_out_distances(features_of(labels), torch.tensor(labels)).distances
    far = leave_one_out_distances(features_of(labels) + 1e6, torch.tensor(labels)).distances
    torch.testing.assert_close(far, near, rtol=1e-7, atol=1e-9)


def test_distances_of_half_precision_are_computed_in_float64() -> None:
    labels = LABELS["uneven"]
    halves = (100 + features_of(labels)).to(torch.bfloat16)
    expected, _ = distances_by_loop(halves.double(), labels)
    left = leave_one_out_distances(halves, torch.tensor(labels))
    torch.testing.assert_close(left.distances, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_margins_and_likelihoods_by_hand(labels) -> None:
    features = features_of(labels)
    expected, rows = distances_by_loop(features, labels)
    own = [sorted(set(labels)).index(labels[row]) for row in rows]
    left = leave_one_out_distances(features, torch.tensor(labels))

    by_hand = []
    for g, y in zip(expected, own):
        nearest = min(value for column, value in enumerate(g) if column != y)
        by_hand.append((nearest - g[y]) / (nearest + g[y]))
    torch.testing.assert_close(margins(left), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-12, atol=1e-13)

    scale = sum(g[y] for g, y in zip(expected, own)) / len(own)
    by_beta = []
    for beta in BETAS.tolist():
        terms = [[math.exp(-beta * value / scale) for value in g] for g in expected]
        by_beta.append([math.log(row[y] / sum(row)) for row, y in zip(terms, own)])
    best = max(by_beta, key=sum)
    torch.testing.assert_close(log_likelihoods(left), torch.tensor(best, dtype=torch.float64), rtol=1e-9, atol=1e-10)


def test_betas_are_thirteen_steps_of_one_factor() -> None:
    assert len(BETAS) == 13
    assert float(BETAS[0]) == pytest.approx(0.16, rel=1e-12)
    assert float(BETAS[-1]) == pytest.approx(48, rel=1e-12)
    torch.testing.assert_close(BETAS[1:] / BETAS[:-1], torch.full((12,), 300 ** (1 / 12), dtype=torch.float64))


def test_examples_that_are_all_the_same_say_nothing() -> None:
    left = leave_one_out_distances(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
    assert margins(left).tolist() == [0.0] * 4
    torch.testing.assert_close(log_likelihoods(left), torch.full((4,), math.log(0.5), dtype=torch.float64))


def test_classes_without_spread_are_told_apart_for_sure() -> None:
    left = leave_one_out_distances(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([0, 0, 1, 1]))
    assert margins(left).tolist() == [1.0] * 4
    assert log_likelihoods(left).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.ones(3, 2), [0, 1, 2], "each of the 3 classes has only one example"),
        (torch.ones(3, 2), [4, 4, 4], "all 3 examples have the same class"),
        (torch.tensor([[1.0], [math.nan], [math.inf], [0.0]]), [0, 0, 1, 1], "2 of 4 features are NaN or infinite"),
        (torch.ones(3, 2, 2), [0, 0, 1], r"got \(3, 2, 2\) and \(3,\)"),
        (torch.ones(3, 2), [0, 0], r"got \(3, 2\) and \(2,\)"),
    ],
)
def test_refusals(features, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        leave_one_out_distances(features, torch.tensor(labels))


def test_bootstraps_are_dirichlet_and_the_same_for_a_seed() -> None:
    draws = bayesian_bootstrap(4, 20_000, seed=3)
    assert torch.equal(draws, bayesian_bootstrap(4, 20_000, seed=3))
    assert not torch.equal(draws[:5], bayesian_bootstrap(4, 5, seed=4))
    torch.testing.assert_close(draws.sum(1), torch.ones(20_000, dtype=torch.float64))
    # Dirichlet(1, 1, 1, 1): means 1/4, variances (1/4)(3/4)/5; five standard errors of 20,000 draws
    assert float((draws.mean(0) - 0.25).abs().max()) < 5 * math.sqrt(0.0375 / 20_000)
    assert float((draws.var(0) - 0.0375).abs().max()) < 0.002


def test_interval_holds_the_middle_of_the_bootstraps() -> None:
    values = torch.tensor([0.0, 1.0], dtype=torch.float64)
    shares = torch.linspace(0, 1, 201, dtype=torch.float64)
    assert interval(values, torch.stack([1 - shares, shares], dim=1)) == pytest.approx((0.025, 0.975))
