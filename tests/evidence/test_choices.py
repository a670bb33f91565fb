"""Who drops out as choosing worse among given answers, and the posterior of those left: by hand, in float64."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest
import torch

from peft_composition.evidence.choices import Choices, choices, stay
from peft_composition.evidence.posterior import posterior


def by_hand(nll: list[list[float]], tokens: list[float], among: list[list[float]]) -> tuple[list[float], list[bool]]:
    """Weights and who stayed, by a loop; nll and among are (examples, adapters)."""
    of_adapters = list(zip(*among))
    best = min(of_adapters, key=fmean)
    stayed, scores = [], []
    for number, own in enumerate(of_adapters):
        behind = [mine - others for mine, others in zip(own, best)]
        stayed.append(fmean(behind) <= stdev(behind) / math.sqrt(len(behind)))
        scores.append(-sum(min(1.0, 2 / count) * row[number] for count, row in zip(tokens, nll)))
    top = max(score for score, stays in zip(scores, stayed) if stays)
    odds = [math.exp(score - top) if stays else 0.0 for score, stays in zip(scores, stayed)]
    raised = [max(value / sum(odds), 1e-4) for value in odds]
    return [value / sum(raised) for value in raised], stayed


@pytest.mark.parametrize("seed", range(6))
def test_the_rule_by_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    among = torch.rand(7, 5, dtype=torch.float64, generator=generator) + 0.3 * torch.arange(5)[torch.randperm(5)]
    nll = among + torch.rand(7, 5, dtype=torch.float64, generator=generator)
    tokens = torch.tensor([1.0, 2.0, 5.0, 1.0, 3.0, 2.0, 8.0])
    weights, stayed = choices(nll, tokens, among)
    expected, staying = by_hand(nll.tolist(), tokens.tolist(), among.tolist())
    assert weights.tolist() == pytest.approx(expected, rel=1e-9)
    assert stayed.tolist() == staying
    assert 1 <= sum(staying) < 5


def test_who_chooses_better_wins_over_who_says_the_answers() -> None:
    """The first adapter holds the words of the answers likely, but is wrong; the posterior takes it."""
    among = torch.tensor([[0.9, 0.2], [0.8, 0.3], [1.1, 0.2], [0.9, 0.1]])
    form = torch.tensor([[0.1, 2.0]])
    nll, tokens = among + form, torch.ones(4)
    weights, stayed = choices(nll, tokens, among)
    assert stayed.tolist() == [False, True]
    assert weights.tolist() == pytest.approx([1e-4 / 1.0001, 1 / 1.0001], rel=1e-9)
    assert posterior(nll, tokens)[0] > 0.98


def test_where_the_examples_do_not_tell_who_chooses_better_the_form_decides() -> None:
    among = torch.tensor([[0.9, 0.2], [0.2, 0.8], [0.7, 0.1], [0.3, 0.9]])  # a mean difference of 0.025
    nll, tokens = among + torch.tensor([[0.1, 2.0]]), torch.tensor([1.0, 4.0, 1.0, 2.0])
    weights, stayed = choices(nll, tokens, among)
    assert stayed.tolist() == [True, True]
    assert weights.tolist() == posterior(nll, tokens).tolist()
    assert weights[0] > 0.9


@pytest.mark.parametrize(("errors", "stays"), [(0.9, False), (1.1, True)])
def test_one_standard_error_is_the_limit(errors: float, stays: bool) -> None:
    behind = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)
    scale = fmean(behind.tolist()) / (stdev(behind.tolist()) / math.sqrt(3))  # so many standard errors behind
    among = torch.stack([torch.zeros(3), behind], 1)
    assert stay(among, scale * errors).tolist() == [True, stays]


def test_an_adapter_just_like_the_best_one_stays() -> None:
    among = torch.tensor([[0.1, 0.1, 0.5], [0.3, 0.3, 0.6]])
    assert stay(among).tolist() == [True, True, False]


def test_scores_among_the_answers_by_hand() -> None:
    found = Choices(
        torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.25, 3.0]], dtype=torch.float64),
        torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]], dtype=torch.float64),
        torch.tensor([1, 1]),
    )
    assert found.of_right.tolist() == [2.0, 0.25]
    assert found.tokens_of_right.tolist() == [3.0, 3.0]
    assert found.is_right.tolist() == [False, True]
    expected = [
        -math.log(math.exp(-right) / sum(math.exp(-own) for own in row))
        for right, row in ((2.0, (1.0, 2.0, 4.0)), (0.25, (0.5, 0.25, 3.0)))
    ]
    assert found.among.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_likelihood_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        choices(torch.tensor([[0.0, math.inf], [0.0, 1.0]]), torch.ones(2), torch.ones(2, 2))


@pytest.mark.parametrize("examples", range(3, 12))
def test_behind_on_one_example_alone_stays_however_many_there_are(examples: int) -> None:
    among = torch.full((examples, 2), 0.5, dtype=torch.float64)
    among[0, 1] = 0.8  # a mean of 0.3 / n, which is one standard error for every n
    assert stay(among).tolist() == [True, True]
