"""How likely a language model holds each answer a question could have: one pass over the question for all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from peft_composition.evidence.posterior import Answers, answers

from .language_model import IGNORED, LanguageModel


BATCH = 20


@torch.no_grad()
def option_scores(model: nn.Module, language: LanguageModel, rows: Dataset) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihoods of all options over the whole vocabulary, the token that ends an answer included.

    Args:
        model: the language model, or a PEFT model of it.
        language: says how questions and answers become tokens.
        rows: of `input` and `options`, equally many in every row.

    Returns:
        Their sums over tokens, the numbers of tokens, and whether greedy generation would give just this option; all
        of shape (rows, options), float64.
    """
    model.eval()
    questions, told = rows["input"][:], rows["options"][:]
    order = np.argsort([len(text) for text in questions], kind="stable").tolist()  # similar lengths side by side
    nll = torch.zeros(len(questions), len(told[0]), dtype=torch.float64)
    tokens, said = torch.zeros_like(nll), torch.zeros_like(nll)
    score = _of_causal if language.is_causal else _of_encoder_decoder
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        options = [
            [language.told(told[row][place]) for row in chosen] for place in range(nll.shape[1])
        ]  # (options, rows, tokens)
        found = score(model, language.asked([questions[row] for row in chosen]), options)
        for place, own in enumerate(found):
            nll[chosen, place], tokens[chosen, place] = own.nll, own.tokens
            said[chosen, place] = own.is_right.double()
    return nll, tokens, said


def _of_causal(
    model: nn.Module, asked: dict[str, Tensor], options: Sequence[Sequence[Sequence[int]]]
) -> list[Answers]:
    mask = asked["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp_min(0)
    start: Any = model(**asked, position_ids=places, use_cache=True, logits_to_keep=1)
    found = []
    for told in options:
        labels = _padded(told)
        logits = start.logits
        if labels.shape[1] > 1:
            given = labels[:, :-1].clamp_min(0)
            further: Any = model(
                input_ids=given,
                attention_mask=torch.cat([mask, torch.ones_like(given)], 1),
                position_ids=places[:, -1:] + 1 + torch.arange(given.shape[1]),
                past_key_values=copy.deepcopy(start.past_key_values),
            )
            logits = torch.cat([logits, further.logits], 1)
        found.append(answers(logits, labels, is_shifted=False))
    return found


def _of_encoder_decoder(
    model: nn.Module, asked: dict[str, Tensor], options: Sequence[Sequence[Sequence[int]]]
) -> list[Answers]:
    found: list[Answers] = []
    read = None
    for told in options:
        labels = _padded(told)
        # The first call reads the question, the others get what its encoder gave.
        given: dict[str, Any] = asked if read is None else {"encoder_outputs": read, **asked, "input_ids": None}
        output: Any = model(**given, labels=labels)
        read = (output.encoder_last_hidden_state,)
        found.append(answers(output.logits, labels, is_shifted=False))
    return found


def _padded(told: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, told))
    return torch.tensor([[*ids, *[IGNORED] * (longest - len(ids))] for ids in told])
