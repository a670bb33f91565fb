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
from peft_composition.evidence.scores import (
    bayesian_bootstrap,
    leave_one_out_distances,
    log_likelihoods,
    log_probabilities,
)
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


def of_two_classes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, shape (examples, 2, candidates), from how likely each candidate finds the own class."""
    logs = torch.stack([logits, -logits], dim=1).double()
    return torch.nn.functional.logsigmoid(torch.where((labels == 0)[:, None, None], logs, logs.flip(1)))


@pytest.mark.parametrize(("examples", "lead"), [(4, 4.0), (10, 1.6), (100, 0.25)])
def test_the_fewer_examples_the_further_the_base_model_must_be_ahead(examples: int, lead: float) -> None:
    """Of the uniform mix, by 8 / n standard errors more than half of one; all examples decide on it together."""
    generator = torch.Generator().manual_seed(examples)
    logits = torch.randn(examples, 4, dtype=torch.float64, generator=generator)
    logits[:, 3] += lead
    labels = torch.arange(examples) % 2
    logs = of_two_classes(logits, labels)
    values = logs[torch.arange(examples), labels]
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
    found = vote_of_classes(logs, labels, bootstraps)
    assert float(found[3]) == pytest.approx(won, abs=1e-12)
    assert 0 < found[3] < vote(values, bootstraps, reference=2)[3]
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("counts", [(4, 4), (2, 5, 9), (2, 2, 2, 2, 2)])
def test_votes_of_classes_by_a_loop(counts: tuple[int, ...]) -> None:
    """Each by its examples and, half and half, by how unlikely it is for all others; the uniform mix has 1 / K."""
    generator = torch.Generator().manual_seed(sum(counts))
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    logits = 2 * torch.randn(len(labels), len(counts), 5, dtype=torch.float64, generator=generator)
    logits[torch.arange(len(labels)), labels] += torch.tensor([1.0, 0.6, 0.3, 0.8, -9.0])  # the last: the base model
    logs = logits.log_softmax(1)
    bootstraps = bayesian_bootstrap(len(labels), 200, seed=1)
    expected = [0.0] * 4
    for label, count in enumerate(counts):
        own = [row for row in range(len(labels)) if labels[row] == label]
        others = [row for row in range(len(labels)) if labels[row] != label]
        won = [0.0] * 4
        for draw in bootstraps.tolist():
            ahead = []
            for c in range(4):
                mean = variance = 0.0
                for rows, is_own in ((own, True), (others, False)):
                    values = []
                    for row in rows:
                        likely = [float(logs[row, label, n].exp()) for n in (c, 3)]
                        first, uniform = likely if is_own else [1 - value for value in likely]
                        values.append(math.log(first) - math.log(uniform))
                    whole = sum(draw[row] for row in rows)
                    mean += 0.5 * sum(draw[row] / whole * value for row, value in zip(rows, values))
                    variance += 0.25 * statistics.variance(values) / len(rows)
                ahead.append(mean - 0.5 * math.sqrt(variance))
            won[ahead.index(max(ahead))] += 1 / 200
        for c in range(4):
            expected[c] += won[c] * (count - 1) / len(labels) + (c == 3) / len(labels)
    found = vote_of_classes(logs, labels, bootstraps)
    assert found.tolist() == pytest.approx([*expected, 0.0], abs=1e-9)
    assert sum(share > 1e-3 for share in expected) >= 3


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("candidate", [0, 2], ids=["adapter", "base"])
def test_who_merely_prefers_a_class_has_no_share(candidate: int, classes: int) -> None:
    """It makes a class likelier wherever it is asked: on the examples of that class, and on all others."""
    labels = torch.arange(10 * classes) % classes
    logits = 3 * torch.nn.functional.one_hot(labels, classes).double()[..., None].repeat(1, 1, 3)
    logits += 0.1 * torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[:, 0, candidate] += 6
    logits[:, :, [0, 2][candidate == 0]] = 0  # the other one knows nothing
    logs = logits.log_softmax(1)
    assert bool((logs[labels == 0, 0, candidate] > logs[labels == 0, 0, 1]).all())
    assert vote_of_classes(logs, labels, bayesian_bootstrap(len(labels), 200, seed=1)).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("each", [2, 5, 20])
def test_adapters_that_know_a_class_each_share_the_weight(each: int) -> None:
    """The first tells the first class from the rest, the second, by less, the second; each mixes up the others."""
    labels = torch.arange(3 * each) % 3
    logits = 0.1 * torch.randn(3 * each, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(each))
    for adapter, known in ((0, 6.0), (1, 3.0)):
        logits[:, adapter, adapter] += torch.where(labels == adapter, known, -known)
        for label, mistaken in ((1 - adapter, 2), (2, 1 - adapter)):
            logits[labels == label, mistaken, adapter] += 0.6
    logits[torch.arange(3 * each), labels, 2] += 0.5  # the uniform mix knows all, a little
    logs, bootstraps = logits.log_softmax(1), bayesian_bootstrap(3 * each, 200, seed=1)
    of_class = (each - 1) / each / 3
    shares = vote_of_classes(logs, labels, bootstraps)
    assert shares.tolist() == pytest.approx([of_class, of_class, 1 - 2 * of_class, 0.0], abs=1e-12)


def test_a_class_with_one_example_has_no_vote() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1])
    logs = of_two_classes(torch.tensor([[4.0, 0.0, 1.0, 0.0]]).repeat(5, 1), labels)
    shares = vote_of_classes(logs, labels, bayesian_bootstrap(5, 200, seed=1))
    assert shares.tolist() == pytest.approx([0.6, 0.0, 0.4, 0.0], abs=1e-12)
    assert vote_of_classes(logs[:4], labels[:4], bayesian_bootstrap(4, 200, seed=1))[0] == pytest.approx(0.75)


def test_a_certain_candidate_does_not_decide_by_one_example() -> None:
    """That it held a class impossible counts as 1e-12, and it may be certain without a share of NaN."""
    labels = torch.arange(8) % 2
    logits = torch.tensor([[5.0, 800.0, 1.0, 0.0]]).repeat(8, 1)
    logits[0, 1] = -800.0
    shares = vote_of_classes(of_two_classes(logits, labels), labels, bayesian_bootstrap(8, 200, seed=1))
    assert bool(shares.isfinite().all())
    assert shares[0] > 0.7


def test_a_candidate_that_is_always_ahead_wins_and_one_that_is_behind_never_does() -> None:
    values = torch.tensor([[0.0, 1.0, -1.0], [0.1, 1.1, -0.9], [0.3, 1.3, -0.7]])
    assert vote(values, bayesian_bootstrap(3, 50, seed=0), reference=0).tolist() == [0.0, 1.0, 0.0]
    equal = values[:, [0, 0, 2]]
    assert vote(equal, bayesian_bootstrap(3, 50, seed=0), reference=0).tolist() == [1.0, 0.0, 0.0], "not ahead"


def test_what_all_tell_perfectly_stays_with_the_uniform_mix() -> None:
    """Certain candidates are level, and the base model among them takes nothing from the adapters."""
    labels = torch.arange(8) % 2
    logs = of_two_classes(torch.tensor([[900.0, 900.0, 900.0, 900.0, 900.0]]).repeat(8, 1), labels)
    shares = vote_of_classes(logs, labels, bayesian_bootstrap(8, 200, seed=1))
    assert shares.tolist() == pytest.approx([0.0, 0.0, 0.0, 1.0, 0.0], abs=1e-12)


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
    logs = torch.stack([log_probabilities(own) for own in left], dim=2)
    values = torch.stack([log_likelihoods(own) for own in left], dim=1).tolist()
    draws = bayesian_bootstrap(examples, 500, seed=3)
    won = 0.0
    for draw in draws.tolist():
        ahead = []
        for c, errors in enumerate([0.5, 0.5, 0.5, 0.5 + 8 / examples]):
            differences = [row[c] - row[2] for row in values]
            error = statistics.stdev(differences) / math.sqrt(examples)
            ahead.append(sum(weight * own for weight, own in zip(draw, differences)) - errors * error)
        won += (ahead.index(max(ahead)) == 3) / 500
    assert 0.1 < won < 0.9
    first, second, uniform, base = vote_of_classes(logs, labels, draws).tolist()
    assert base == pytest.approx(won, abs=1e-12)
    expected = [first + uniform / 2, second + uniform / 2]
    assert logs.exp().sum(1) == pytest.approx(np.ones((examples, 4)))
    assert weights_by("likelihood-vote", left, seed=3).tolist() == pytest.approx(expected, abs=2 * FLOOR)
