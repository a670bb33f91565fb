"""Evidence of answers in tokens, from rows as users have them: of unequal lengths, padded, one by one, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_composition import fit_mixing_weights, score_adapters

from .. import tiny


ROWS = torch.randint(1, 60, (6, 14), generator=torch.Generator().manual_seed(3))
SIZES = [(4, 1), (2, 5), (6, 3), (3, 8), (5, 2), (7, 4)]  # tokens of each question and of its answer
NAMES = ["llama", "gpt2", "t5"]


def rows(name: str) -> list[dict[str, list[int]]]:
    """Questions and answers of unequal lengths, as lists of tokens."""
    found = []
    for row, (asked, told) in zip(ROWS.tolist(), SIZES):
        question, answer = row[:asked], row[asked : asked + told]
        if name == "t5":
            found.append({"input_ids": question, "labels": answer})
        else:
            found.append({"input_ids": question + answer, "labels": [-100] * asked + answer})
    return found


def padded(own: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch padded on the right, labels by -100."""

    def filled(name: str, value: int) -> Tensor:
        longest = max(len(row[name]) for row in own)
        return torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in own])

    ids, lengths = filled("input_ids", 0), [len(row["input_ids"]) for row in own]
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": filled("labels", -100)}


def one_by_one(name: str) -> list[dict[str, Tensor]]:
    return [padded([row]) for row in rows(name)]


def likelihoods_by_hand(name: str, folders: list[str]) -> list[list[float]]:
    """Log-likelihoods of every token of every answer under each adapter alone, in float64: (adapters, answers)."""
    found: list[list[Any]] = []
    for number in range(len(folders)):
        alone = [float(other == number) for other in range(len(folders))]
        model = tiny.composed_by_hand(tiny.build(name), folders, alone).double().eval().requires_grad_(False)
        found.append([])
        for row, (asked, told) in zip(rows(name), SIZES):
            ids = torch.tensor([row["input_ids"]])
            answer = [token for token in row["labels"] if token != -100]
            if name == "t5":
                start = model.config.decoder_start_token_id
                given = torch.tensor([[start, *answer[:-1]]])
                logits = model(input_ids=ids, decoder_input_ids=given).logits[0]
            else:
                logits = model(input_ids=ids).logits[0, asked - 1 : asked + told - 1]
            found[-1].append([float(logits[i].log_softmax(-1)[token]) for i, token in enumerate(answer)])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_gives_what_single_examples_give(name: str, pair: Any) -> None:
    model = tiny.compose(name, pair(name))
    whole = score_adapters(model, rows(name), collate=padded, batch_size=6)
    parts = score_adapters(model, rows(name), collate=padded, batch_size=4)
    single = score_adapters(model, one_by_one(name))
    for row, other, third in zip(whole, parts, single):
        assert row.score == pytest.approx(third.score, abs=1e-5)
        assert other.score == pytest.approx(third.score, abs=1e-5)
        assert row.accuracy == other.accuracy == third.accuracy
    assert whole[0].score != pytest.approx(whole[1].score, abs=1e-3)  # the adapters differ


@pytest.mark.parametrize("name", NAMES)
def test_posterior_from_rows_by_hand_in_float64(name: str, pair: Any) -> None:
    """An answer of more than two tokens counts as two: a posterior of sums would be another."""
    tokens = likelihoods_by_hand(name, pair(name))
    means = torch.tensor([[sum(of_answer) / len(of_answer) for of_answer in own] for own in tokens]).double()
    sums = torch.tensor([[sum(of_answer) for of_answer in own] for own in tokens]).double()
    counted = torch.tensor([min(told, 2) for _, told in SIZES]).double()
    expected, other = (counted * means).sum(1).softmax(0), sums.sum(1).softmax(0)
    model = tiny.compose(name, pair(name)).double()
    report = fit_mixing_weights(model, rows(name), collate=padded)
    assert list(report.weights.values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert list(report.weights.values()) != pytest.approx(other.tolist(), abs=1e-3)
    assert report.scores is not None
    assert [row.score for row in report.scores[:2]] == pytest.approx(means.mean(1).tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_rows_of_unequal_lengths_without_a_collator_are_told_what_to_do(name: str, pair: Any) -> None:
    model = tiny.compose(name, pair(name), mixing="fixed", weights=[0.7, 0.3])
    first, second = (len(row["input_ids"]) for row in rows(name)[:2])
    message = rf"input_ids has {first} entries in row 0 and {second} in row 1.*DataCollatorForSeq2Seq\(tokenizer\)"
    for call in (fit_mixing_weights, score_adapters):
        with pytest.raises(ValueError, match=message):
            call(model, rows(name))
