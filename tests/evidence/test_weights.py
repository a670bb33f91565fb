"""Stacking against a generic optimiser, the vote's shares by enumeration, and how shares become weights."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import optimize

from peft_composition.evidence.fit import weights_by
from peft_composition.evidence.scores import bayesian_bootstrap, leave_one_out_distances, log_likelihoods
from peft_composition.evidence.weights import (
    FLOOR,
    floored,
    spread_uniform,
    stack,
    vote,
    vote_of_classes,
)


def generic_stacking(log_likelihoods: np.ndarray) -> float:
    """The largest mean of log sum_c w_c p_ic over the simplex, by scipy."""
    likelihoods = np.exp(log_likelihoods)
    count = likelihoods.shape[1]

    def loss(weights: np.ndarray) -> float:
        return -float(np.log(likelihoods @ weights).mean())

    def slope(weights: np.ndarray) -> np.ndarray:
        return -(likelihoods / (likelihoods @ weights)[:, None]).mean(0)

    found = optimize.minimize(
        loss,
        np.full(count, 1 / count),
        jac=slope,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": lambda weights: np.ones(count)},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert found.success, found.message
    return -float(found.fun)


@pytest.mark.parametrize(("examples", "candidates"), [(4, 3), (10, 5), (40, 5), (40, 2), (5, 20)])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_stacking_reaches_what_a_generic_optimiser_reaches(examples, candidates, spread) -> None:
    generator = torch.Generator().manual_seed(100 * examples + candidates)
    logits = spread * torch.randn(examples, candidates, dtype=torch.float64, generator=generator)
    log_likelihoods = torch.nn.functional.logsigmoid(logits)
    weights = stack(log_likelihoods)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert float(weights.min()) >= 0
    reached = float((log_likelihoods.exp() @ weights).log().mean())
    assert reached == pytest.approx(generic_stacking(log_likelihoods.numpy()), abs=1e-6)


def test_stacking_of_two_by_hand() -> None:
    # log(.8 w + .2 (1-w)) + log(.1 w + .6 (1-w)): derivative .6 / (.2 + .6 w) = .5 / (.6 - .5 w), so w = 13/30
    weights = stack(torch.tensor([[0.8, 0.2], [0.1, 0.6]], dtype=torch.float64).log())
    assert weights.tolist() == pytest.approx([13 / 30, 17 / 30], abs=1e-4)


def test_stacking_gives_equal_candidates_equal_shares() -> None:
    column = torch.tensor([-0.1, -2.0, -0.5], dtype=torch.float64)
    other = torch.tensor([-2.0, -0.2, -3.0], dtype=torch.float64)
    weights = stack(torch.stack([column, other, column], dim=1))
    assert float(weights[0]) == pytest.approx(float(weights[2]), abs=1e-12)
    pair = stack(torch.stack([column, other], dim=1))
    assert float(weights[0] + weights[2]) == pytest.approx(float(pair[0]), abs=1e-5)


def test_stacking_with_impossible_classes() -> None:
    none = -math.inf
    assert stack(torch.tensor([[0.0, none], [none, 0.0]])).tolist() == pytest.approx([0.5, 0.5])
    assert stack(torch.tensor([[none, none], [0.0, none]])).tolist() == pytest.approx([1.0, 0.0])
    assert stack(torch.tensor([[none, none]])).tolist() == pytest.approx([0.5, 0.5])
    assert stack(torch.tensor([[-2000.0, -2001.0]])).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("broken", [[[math.nan, 0.0]], [[math.inf, 0.0]]])
def test_stacking_refuses_broken_likelihoods(broken) -> None:
    with pytest.raises(ValueError, match="finite"):
        stack(torch.tensor(broken))
    with pytest.raises(ValueError, match=r"\(examples, candidates\)"):
        stack(torch.zeros(0, 3))


def test_votes_by_enumeration() -> None:
    """All multiplicities of 3 examples drawn 3 times, counted with exact fractions."""
    margins = [[0.5, 0.25, 0.0], [-0.5, 0.25, 0.0], [0.25, -0.25, 0.25]]
    draws = [(a, b, c) for a in range(4) for b in range(4) for c in range(4) if a + b + c == 3]
    won: Counter[int] = Counter()
    for draw in draws:
        means = [sum(Fraction(m[c]) * n for m, n in zip(margins, draw)) for c in range(3)]
        winners = [c for c in range(3) if means[c] == max(means)]
        for c in winners:
            won[c] += Fraction(1, len(winners))
    assert any(value.denominator > 1 for value in won.values())  # there are ties among them
    expected = [float(won[c] / len(draws)) for c in range(3)]
    assert vote(torch.tensor(margins), torch.tensor(draws).double() / 3).tolist() == pytest.approx(expected, abs=1e-15)


def test_votes_of_two_examples_are_lengths_of_intervals() -> None:
    # With weights (a, 1 - a), a uniform: candidate 0 has a - 0 (1 - a) = a, 1 has .3, 2 has .8 - a
    margins = torch.tensor([[1.0, 0.3, -0.2], [0.0, 0.3, 0.8]])
    # 2 leads while .8 - a > max(a, .3), up to a = .4; then 0, which is above .3 there
    draws = 40_000
    shares = vote(margins, bayesian_bootstrap(2, draws, seed=0))
    error = 5 * math.sqrt(0.4 * 0.6 / draws)
    assert shares.tolist() == pytest.approx([0.6, 0.0, 0.4], abs=error)


def test_equal_candidates_share_votes() -> None:
    column = torch.tensor([0.1, -0.3, 0.7])
    margins = torch.stack([column, column, column - 0.1], dim=1)
    assert vote(margins, bayesian_bootstrap(3, 500, seed=1)).tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_a_cautious_vote_by_a_loop() -> None:
    """Each candidate less the reference, example by example, less half a standard error of that difference."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    bootstraps = bayesian_bootstrap(7, 200, seed=1)
    won = [0.0] * 4
    for draw in bootstraps.tolist():
        ahead = []
        for c in range(4):
            differences = [float(row[c] - row[2]) for row in values]
            error = statistics.stdev(differences) / math.sqrt(7)
            ahead.append(sum(a * d for a, d in zip(draw, differences)) - 0.5 * error)
        assert ahead[2] == 0
        won[ahead.index(max(ahead))] += 1 / 200
    assert sum(share > 0 for share in won) == 3
    assert vote(values, bootstraps, reference=2).tolist() == pytest.approx(won, abs=1e-12)
    assert vote(values, bootstraps)[2] < won[2] < vote(values, bootstraps, reference=2, caution=2.0)[2]


@pytest.mark.parametrize(("examples", "lead"), [(4, 3.0), (10, 0.9), (100, 0.3)])
def test_the_fewer_examples_the_further_the_base_model_must_be_ahead(examples: int, lead: float) -> None:
    """Of the uniform mix, by 8 / n standard errors more than half of one; all examples decide on it together."""
    generator = torch.Generator().manual_seed(examples)
    values = torch.randn(examples, 4, dtype=torch.float64, generator=generator)
    values[:, 3] += lead
    bootstraps = bayesian_bootstrap(examples, 200, seed=1)
    needed = [0.5, 0.5, 0.5, 0.5 + 8 / examples]
    won = 0.0
    for draw in bootstraps.tolist():
        ahead = []
        for c in range(4):
            differences = [float(row[c] - row[2]) for row in values]
            error = statistics.stdev(differences) / math.sqrt(examples)
            ahead.append(sum(a * d for a, d in zip(draw, differences)) - needed[c] * error)
        won += (max(ahead) == ahead[3]) / 200
    found = vote_of_classes(values, torch.arange(examples) % 2, bootstraps)
    assert float(found[3]) == pytest.approx(won, abs=1e-12)
    assert 0 < found[3] < vote(values, bootstraps, reference=2)[3]
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)


def test_a_base_model_that_merely_prefers_a_class_has_no_share() -> None:
    """It makes the examples of one class likelier and those of the other less likely, by more."""
    labels = torch.arange(12) % 2
    values = torch.zeros(12, 3, dtype=torch.float64)
    values[:, 2] = torch.where(labels == 0, 2.0, -6.0)
    values += 0.1 * torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert vote_of_classes(values, labels, bayesian_bootstrap(12, 200, seed=1))[2] == 0


@pytest.mark.parametrize(("loss", "share"), [(6.0, 0.0), (2.4, 0.5)])
def test_an_adapter_that_is_clearly_behind_over_all_examples_wins_no_class(loss: float, share: float) -> None:
    """It makes one class likelier and the other less likely, by more; a little more is no clear difference."""
    labels = torch.arange(40) % 2
    values = torch.zeros(40, 4, dtype=torch.float64)
    values[:, 0] = torch.where(labels == 0, 2.0, -loss)
    values[:, 1] = -1.0
    values[:, 3] = -9.0
    values += 0.1 * torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    differences = [float(row[0] - row[2]) for row in values]
    error = statistics.stdev(differences) / math.sqrt(40)
    assert (statistics.mean(differences) < -2 * error) == (share == 0)
    shares = vote_of_classes(values, labels, bayesian_bootstrap(40, 200, seed=1))
    assert shares.tolist() == [share, 0.0, 1 - share, 0.0]


@pytest.mark.parametrize("count", [2, 5, 20])
def test_adapters_must_be_further_ahead_where_a_class_has_few_examples(count: int) -> None:
    """Of the uniform mix, by half a standard error and 1 / K more, by a loop."""
    values = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    values[:, 0] += values[:, 1].mean() - values[:, 0].mean() + {2: 1.0, 5: 0.6, 20: 0.25}[count]
    bootstraps = bayesian_bootstrap(count, 200, seed=1)
    differences = [float(row[0] - row[1]) for row in values]
    needed = (0.5 + 1 / count) * statistics.stdev(differences) / math.sqrt(count)
    won = [sum(a * d for a, d in zip(draw, differences)) > needed for draw in bootstraps.tolist()]
    values[:, 2] = -10.0
    found = vote_of_classes(values, torch.zeros(count), bootstraps)
    assert float(found[0]) == pytest.approx(sum(won) / 200, abs=1e-12)
    assert 0 < sum(won) < 200


def test_adapters_that_know_a_class_each_share_the_weight() -> None:
    """One makes the first class likelier and the second less likely, the other the reverse, but by less."""
    generator = torch.Generator().manual_seed(0)
    first = (torch.arange(40) % 2 == 0)[:, None]
    values = torch.cat(
        [torch.where(first, 3.0, -1.0), torch.where(first, -1.0, 1.0), 0 * first, -3 + 0 * first], dim=1
    )
    values = values.double() + 0.1 * torch.randn(values.shape, dtype=torch.float64, generator=generator)
    bootstraps, labels = bayesian_bootstrap(40, 200, seed=1), torch.arange(40) % 2
    assert vote_of_classes(values, labels, bootstraps).tolist() == [0.5, 0.5, 0.0, 0.0]
    assert vote(values, bootstraps, reference=2)[0] > 0.95, "where all vote at once, the larger one takes all"
    fewer = torch.cat([torch.arange(40)[labels == 0], torch.arange(40)[labels == 1][:10]])
    shares = vote_of_classes(values[fewer], labels[fewer], bayesian_bootstrap(30, 200, seed=1))
    assert shares.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=1e-12)


def test_a_candidate_that_is_always_ahead_wins_and_one_that_is_behind_never_does() -> None:
    values = torch.tensor([[0.0, 1.0, -1.0], [0.1, 1.1, -0.9], [0.3, 1.3, -0.7]])
    assert vote(values, bayesian_bootstrap(3, 50, seed=0), reference=0).tolist() == [0.0, 1.0, 0.0]
    equal = values[:, [0, 0, 2]]
    assert vote(equal, bayesian_bootstrap(3, 50, seed=0), reference=0).tolist() == [0.5, 0.5, 0.0]


def test_shares_of_the_uniform_mix_go_to_all_evenly_above_a_floor() -> None:
    weights = spread_uniform(torch.tensor([0.7, 0.0, 0.0, 0.3, 0.0]))
    assert weights.tolist() == pytest.approx([0.8, 0.1, 0.1])
    certain = spread_uniform(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]))
    total = 1 + 2 * FLOOR
    assert certain.tolist() == pytest.approx([1 / total, FLOOR / total, FLOOR / total], rel=1e-12)
    assert float(floored(torch.tensor([1.0, 0.0])).sum()) == pytest.approx(1, abs=1e-15)


def test_the_share_of_the_base_is_missing_in_the_sum() -> None:
    assert spread_uniform(torch.tensor([0.5, 0.0, 0.2, 0.3])).tolist() == pytest.approx([0.6, 0.1])
    assert spread_uniform(torch.tensor([0.5, 0.4, 0.095, 0.005])).tolist() == pytest.approx(  # too small to keep
        [0.5475 / 0.995, 0.4475 / 0.995]
    )
    assert spread_uniform(torch.tensor([0.0, 0.0, 0.0, 1.0])).tolist() == pytest.approx([FLOOR, FLOOR])
    half = spread_uniform(torch.tensor([0.5, 0.0, 0.0, 0.5]))
    assert half.tolist() == pytest.approx([0.5, FLOOR], abs=1e-4)
    assert float(half.sum()) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(("examples", "lead"), [(6, 1.4), (7, 1.4), (40, 0.8)])
def test_weights_by_the_vote_by_a_loop(examples: int, lead: float) -> None:
    """Two adapters, their uniform mix and the base model, which must be further ahead; what it wins is missing."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(examples) % 2
    apart = labels[:, None] * torch.tensor([1.0, 0.9, 0.7, lead])  # of the classes, under each candidate
    noise = torch.randn(examples, 4, 3, dtype=torch.float64, generator=generator)
    features = noise + apart[..., None]
    left = [leave_one_out_distances(features[:, number], labels) for number in range(4)]
    values = torch.stack([log_likelihoods(own) for own in left], dim=1).tolist()
    draws = bayesian_bootstrap(examples, 500, seed=3).tolist()

    def winners(rows: list[int], needed: list[float]) -> list[float]:
        """The share of bootstraps of some examples that each candidate wins."""
        won = [0.0] * len(needed)
        for draw in draws:
            whole = sum(draw[row] for row in rows)
            ahead = []
            for c, errors in enumerate(needed):
                differences = [values[row][c] - values[row][2] for row in rows]
                error = statistics.stdev(differences) / math.sqrt(len(rows))
                ahead.append(sum(draw[row] / whole * own for row, own in zip(rows, differences)) - errors * error)
            won[ahead.index(max(ahead))] += 1 / 500
        return won

    base = winners([*range(examples)], [0.5, 0.5, 0.5, 0.5 + 8 / examples])[3]
    assert 0.1 < base < 0.9
    expected = [0.0, 0.0]
    for label in (0, 1):
        rows = [*range(label, examples, 2)]
        of_class = winners(rows, [0.5 + 1 / len(rows)] * 3)
        for n in (0, 1):
            expected[n] += (of_class[n] + of_class[2] / 2) * (1 - base) * len(rows) / examples
    assert weights_by("likelihood-vote", left, seed=3).tolist() == pytest.approx(expected, abs=2 * FLOOR)
