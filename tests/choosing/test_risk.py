"""The chance that a pick is worse than the base: against its formula in plain loops, scipy, and simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from peft_composition.choosing.risk import Gains, chance_of_harm, students_t


def gains(first: np.ndarray, last: np.ndarray, places: list[int], pick: int) -> Gains:
    return Gains(torch.from_numpy(first), torch.from_numpy(last), torch.tensor(places), pick)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 39, 400, 2001])
def test_students_distribution_is_scipy_s(degrees: int) -> None:
    values = [-40.0, -3.3, -0.7, 0.0, 0.02, 1.9, 12.0]
    assert np.allclose([students_t(value, degrees) for value in values], stats.t.cdf(values, degrees), atol=1e-13)


def chance_by_loops(first: list[list[float]], last: list[list[float]], places: list[int], pick: int, prior: float,
                    are_left_out: bool) -> float:  # fmt: skip
    """What the docstring says, number by number."""

    def variance(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / (len(values) - 1)

    def share(examples: int) -> float:
        return 1 / examples + (1 / (examples - 1) if are_left_out else 0)

    count, n_first, n = len(first), len(first[0]), len(last[0])
    of_all = [sum(row[j] for row in first) / count for j in range(n_first)]
    of_finalists = [sum(row[j] for row in last) / len(last) for j in range(n)]
    deviations = [[row[j] - of_all[j] for j in range(n_first)] for row in first]
    noise = sum(variance(row) for row in deviations) / (count - 1) * share(n_first)
    means = [sum(row) / n_first for row in first]
    spread = max(0.0, variance(means) - noise)
    lead = sum(means[place] for place in places) / len(places) - sum(means) / count
    centre = sum(of_finalists) / n - (spread / (spread + noise) * lead if spread else 0.0)
    own = last[pick]
    beside = [own[j] - of_finalists[j] for j in range(n)]
    chance = variance(beside) * len(last) / (len(last) - 1) * share(n)
    part = spread / (spread + chance) if spread else 0.0
    mean = part * sum(own) / n + (1 - part) * centre
    error = max((variance(own) * (n - 1) + prior) / (n - 1 + prior),
                (variance(of_finalists) * (n - 1) + prior) / (n - 1 + prior)) * share(n)  # fmt: skip
    return float(stats.t.cdf(-mean / math.sqrt(error), n - 1))


@pytest.mark.parametrize("are_left_out", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_formula_by_loops(seed: int, are_left_out: bool) -> None:
    generator = np.random.default_rng(seed)
    count, finalists, n_first, n = 5, 3, 4, 9
    worth = generator.normal(0, 0.4 if seed % 2 else 0.05, count)
    scores = worth[:, None] + generator.normal(0, 0.3, (count, n))
    answers = generator.integers(-1, 2, (count, n)).astype(float)
    places = [3, 0, 4][:finalists]
    expected = [
        chance_by_loops(own[:, :n_first].tolist(), own[places].tolist(), places, 1, prior, are_left_out)
        for own, prior in ((scores, 0.0), (answers, 1.0))
    ]
    found = chance_of_harm(
        gains(scores[:, :n_first], scores[places], places, 1), gains(answers[:, :n_first], answers[places], places, 1),
        are_left_out,
    )  # fmt: skip
    assert found == pytest.approx(sum(expected) / 2, abs=1e-12)


def test_of_a_single_candidate_it_is_the_paired_t_test() -> None:
    own = np.array([[0.2, -0.1, 0.4, 0.3]])
    answers = np.array([[1.0, 0.0, 1.0, 0.0]])
    alone = gains(own, own, [0], 0)
    of_scores = stats.ttest_1samp(own[0], 0, alternative="greater").pvalue
    prior = math.sqrt((answers.var(ddof=1) * 3 + 1) / 4 / 4)
    of_answers = stats.t.cdf(-answers.mean() / prior, 3)
    expected = (of_scores + of_answers) / 2
    assert chance_of_harm(alone, gains(answers, answers, [0], 0), False) == pytest.approx(expected, rel=1e-9)
    wider = math.sqrt((1 / 4 + 1 / 3) * 4)  # each was left out
    expected = stats.t.cdf(-own.mean() / (own.std(ddof=1) / 2 * wider), 3) / 2
    expected += stats.t.cdf(-answers.mean() / (prior * wider), 3) / 2
    assert chance_of_harm(alone, gains(answers, answers, [0], 0), True) == pytest.approx(expected, rel=1e-9)


def test_too_few_examples_and_equal_ones() -> None:
    one = gains(np.ones((2, 1)), np.ones((2, 1)), [0, 1], 0)
    assert chance_of_harm(one, one, False) == 0.5
    nothing = gains(np.zeros((3, 6)), np.zeros((3, 6)), [0, 1, 2], 0)
    assert chance_of_harm(nothing, nothing, True) == 0.5
    better = gains(np.full((3, 6), 0.2), np.full((3, 6), 0.2), [0, 1, 2], 0)
    assert chance_of_harm(better, nothing, True) == 0.25  # certain by scores; right answers do not tell


def simulated(mean: float, spread: float, pools: int, seed: int, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """What is stated of picks, and what their true gains are: 40 examples, of which 4 and then 12 drop candidates."""
    generator = np.random.default_rng(seed)
    stated, true = [], []
    for _ in range(pools):
        worth = generator.normal(mean, spread, count) if spread else np.full(count, mean)
        found = worth[:, None] + generator.normal(0, 0.15, 40) + generator.normal(0, 0.4, (count, 40))
        alive = np.argsort(-found[:, :4].mean(1))[:10]
        alive = alive[np.argsort(-found[alive, :12].mean(1))][:8]
        pick = int(found[alive].mean(1).argmax())
        own = gains(found[:, :4], found[alive], alive.tolist(), pick)
        stated.append(chance_of_harm(own, own, False))
        true.append(worth[alive[pick]])
    return np.array(stated), np.array(true)


def test_where_no_candidate_differs_from_the_base_it_is_rarely_small() -> None:
    stated, _ = simulated(0.0, 0.0, 500, seed=1)
    assert (stated < 0.05).mean() < 0.12  # by chance alone 5%; of what was stated before, 20%
    assert np.mean((stated - 0.5) ** 2) < 0.1


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 0.05), (-0.05, 0.15), (0.05, 0.1)])
def test_it_comes_true_about_as_often_as_it_says(mean: float, spread: float) -> None:
    stated, true = simulated(mean, spread, 500, seed=2)
    assert abs(stated.mean() - (true < 0).mean()) < 0.15
    assert np.mean((stated - (true < 0)) ** 2) < 0.12


def test_where_picks_are_near_the_base_it_is_right_on_average_and_tells_no_more_than_a_coin() -> None:
    """40% of picks are worse, all by little. To state 0.5 of each has a Brier score of 0.25, and this has 0.265."""
    stated, true = simulated(-0.05, 0.05, 500, seed=2)
    assert abs(stated.mean() - (true < 0).mean()) < 0.05
    assert np.mean((stated - (true < 0)) ** 2) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("first", [12, 40])
@pytest.mark.parametrize(("mean", "spread"), [(-0.05, 0.05), (0.0, 0.05), (-0.1, 0.1)])
def test_of_40_candidates_one_is_left(mean: float, spread: float, first: int) -> None:
    """The best on the first round's examples; those beside it broke later. It is no surer for that."""
    generator = np.random.default_rng(3)
    stated, true = [], []
    for _ in range(400):
        worth = generator.normal(mean, spread, 40)
        found = worth[:, None] + generator.normal(0, 0.15, 40) + generator.normal(0, 0.4, (40, 40))
        pick = int(found[:, :first].mean(1).argmax())
        own = gains(found[:, :first], found[pick : pick + 1], [pick], 0)
        stated.append(chance_of_harm(own, own, False))
        true.append(worth[pick] < 0)
    assert -0.05 < np.mean(stated) - np.mean(true) < 0.2  # cautious rather than sure
    assert np.mean((np.array(stated) - true) ** 2) < 0.25
