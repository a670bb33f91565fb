"""Evidence for models that answer in tokens: how likely each adapter, which never saw them, makes the answers.

Pure functions on tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import FLOOR, floored


IGNORED = -100


class Answers(NamedTuple):
    """What a model makes of the answers to n examples.

    Attributes:
        nll: minus the log-likelihood of each answer, the sum over its tokens, shape (n,), float64.
        tokens: the number of its tokens, shape (n,), float64.
        is_right: whether every token was the most likely one, shape (n,).
    """

    nll: Tensor
    tokens: Tensor
    is_right: Tensor


def answers(logits: Tensor, labels: Tensor, is_shifted: bool) -> Answers:
    """Score the answers of a batch, on the CPU.

    Args:
        logits: shape (n, positions, vocabulary).
        labels: shape (n, positions); -100 where no token of the answer is.
        is_shifted: whether the logits at a position are those of the next token, as in a causal model.

    Returns:
        Likelihoods over the whole vocabulary; single ones in float32 or wider, their sums in float64.

    Raises:
        ValueError: shapes that do not fit, or an example without an answer.
    """
    if labels.dim() != 2 or logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits of shape (examples, positions, vocabulary) need labels of shape (examples, positions), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if is_shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(logits.device)
    is_answer = labels != IGNORED
    tokens = is_answer.sum(1)
    if bool((tokens == 0).any()):
        raise ValueError(
            f"example {int((tokens == 0).nonzero()[0])} of a batch has no answer: its labels are all -100"
        )
    chosen, targets = logits[is_answer], labels[is_answer]  # before anything is made of a whole vocabulary
    wide = torch.promote_types(chosen.dtype, torch.float32)
    of_token = F.cross_entropy(chosen.to(wide), targets, reduction="none").cpu().double()
    rows = is_answer.nonzero()[:, 0].cpu()
    nll = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, rows, of_token)
    wrong = torch.zeros(len(labels), dtype=torch.int64).index_add_(
        0, rows, (chosen.argmax(-1) != targets).cpu().long()
    )
    return Answers(nll, tokens.cpu().double(), wrong == 0)


def posterior(nll: Tensor, tokens: Tensor, temper: float | None = None, floor: float = FLOOR) -> Tensor:
    """The probability of each adapter given the answers, if one of them made them all: softmax_n(-sum_i NLL_n(i)).

    Tokens of one answer tell much the same of an adapter. So the log-likelihood of a longer answer is divided by the
    number of its tokens: an answer counts as one token, however long it is.

    Args:
        nll: minus the log-likelihoods of the answers, shape (examples, adapters).
        tokens: their numbers of tokens, shape (examples,).
        temper: what log-likelihoods are multiplied by in place of that; 1 counts every token.
        floor: the least weight.

    Returns:
        Weights, shape (adapters,), float64, sum 1.

    Raises:
        ValueError: a value is not finite.
    """
    wide = nll.double()
    if not bool(wide.isfinite().all()):
        raise ValueError("the likelihoods of the answers are not finite")
    factors = 1 / tokens.double() if temper is None else torch.full_like(tokens, temper, dtype=torch.float64)
    return floored((-(factors[:, None] * wide).sum(0)).softmax(0), floor)
