"""Likelihoods of answers token by token, and the posterior by hand."""

from __future__ import annotations

import math

import pytest
import torch

from peft_composition.evidence.posterior import answers, posterior


def by_hand(logits: list[float], target: int) -> float:
    return -math.log(math.exp(logits[target]) / sum(math.exp(value) for value in logits))


LOGITS = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[-100, -100, 3, 6, -100], [-100, 1, 0, 2, 5]])


def test_likelihoods_of_a_causal_model_come_from_the_position_before() -> None:
    found = answers(LOGITS, LABELS, is_shifted=True)
    expected = [
        sum(
            by_hand(LOGITS[row, place - 1].tolist(), int(LABELS[row, place]))
            for place in range(5)
            if LABELS[row, place] >= 0
        )
        for row in range(2)
    ]
    assert found.nll.tolist() == pytest.approx(expected, rel=1e-12)
    assert found.tokens.tolist() == [2, 4]


def test_likelihoods_of_a_decoder_come_from_the_same_position() -> None:
    found = answers(LOGITS, LABELS, is_shifted=False)
    expected = [
        sum(
            by_hand(LOGITS[row, place].tolist(), int(LABELS[row, place]))
            for place in range(5)
            if LABELS[row, place] >= 0
        )
        for row in range(2)
    ]
    assert found.nll.tolist() == pytest.approx(expected, rel=1e-12)


def test_an_answer_is_right_when_all_its_tokens_are() -> None:
    logits = torch.zeros(2, 5, 7)
    for row in range(2):
        for place in range(1, 5):
            if LABELS[row, place] >= 0:
                logits[row, place - 1, LABELS[row, place]] = 5.0
    assert answers(logits, LABELS, is_shifted=True).is_right.tolist() == [True, True]
    logits[1, 2, 6] = 9.0  # one token of the second answer
    assert answers(logits, LABELS, is_shifted=True).is_right.tolist() == [True, False]


def test_half_precision_is_scored_in_float32() -> None:
    narrow = answers(LOGITS.bfloat16(), LABELS, is_shifted=True)
    wide = answers(LOGITS.bfloat16().double(), LABELS, is_shifted=True)
    torch.testing.assert_close(narrow.nll, wide.nll, rtol=1e-6, atol=1e-6)


def test_labels_of_any_integer_type_are_scored_alike() -> None:
    wide = answers(LOGITS, LABELS, is_shifted=True)
    narrow = answers(LOGITS, LABELS.int(), is_shifted=True)
    assert [part.tolist() for part in narrow] == [part.tolist() for part in wide]


def test_an_example_without_an_answer_is_refused() -> None:
    labels = torch.tensor([[-100, -100, 3, 6, -100], [4, -100, -100, -100, -100]])
    answers(LOGITS, labels, is_shifted=False)
    with pytest.raises(ValueError, match="example 1 of a batch has no answer"):  # the first token follows nothing
        answers(LOGITS, labels, is_shifted=True)


def test_posterior_by_hand() -> None:
    nll = torch.tensor([[1.0, 2.0], [0.5, 0.25], [3.0, 3.5]])
    tokens = torch.ones(3)
    odds = math.exp(-(1 + 0.5 + 3)), math.exp(-(2 + 0.25 + 3.5))
    expected = [value / sum(odds) for value in odds]
    assert posterior(nll, tokens).tolist() == pytest.approx(expected, rel=1e-12)
    assert posterior(nll, 4 * tokens, temper=1.0).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_long_answer_counts_as_two_tokens_and_a_short_one_as_it_is() -> None:
    nll = torch.tensor([[10.0, 20.0], [0.5, 0.25], [1.0, 1.5]])
    tokens = torch.tensor([10.0, 1.0, 2.0])
    odds = math.exp(-(2 + 0.5 + 1)), math.exp(-(4 + 0.25 + 1.5))
    assert posterior(nll, tokens).tolist() == pytest.approx([value / sum(odds) for value in odds], rel=1e-12)


def test_no_weight_of_a_posterior_is_zero() -> None:
    weights = posterior(torch.tensor([[0.0, 1e6]]), torch.ones(1))
    assert weights.tolist() == pytest.approx([1 / 1.0001, 1e-4 / 1.0001], rel=1e-12)
    with pytest.raises(ValueError, match="not finite"):
        posterior(torch.tensor([[0.0, math.nan]]), torch.ones(1))
