"""Evidence for models that answer in tokens: the likelihood of the answers under each adapter, which never saw them.

Pure functions on tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import FLOOR, floored


IGNORED = -100
MOST_TOKENS = 2.0
"""As so many tokens a long answer counts: its tokens give similar evidence, and are many where a model is unsure."""


class Answers(NamedTuple):
    """A model's scores for the answers of n examples.

    Attributes:
        nll: negative log-likelihood of each answer, summed over its tokens, shape (n,), float64.
        tokens: number of tokens of each answer, shape (n,), float64.
        is_right: whether every token was the most likely one, shape (n,).
    """

    nll: Tensor
    tokens: Tensor
    is_right: Tensor


def answers(logits: Tensor, labels: Tensor, is_shifted: bool) -> Answers:
    """Score the answers of a batch, on the CPU.

    Args:
        logits: shape (n, positions, vocabulary).
        labels: shape (n, positions); -100 at positions outside the answer.
        is_shifted: whether the logits at a position are those of the next token, as in a causal model.

    Returns:
        Likelihoods over the whole vocabulary, computed in float32 or wider and summed in float64.

    Raises:
        ValueError: shapes do not fit, or an example has no answer.
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
    chosen, targets = logits[is_answer], labels[is_answer].long()  # first, because a whole vocabulary is large
    wide = torch.promote_types(chosen.dtype, torch.float32)
    of_token = F.cross_entropy(chosen.to(wide), targets, reduction="none").cpu().double()
    rows = is_answer.nonzero()[:, 0].cpu()
    nll = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, rows, of_token)
    wrong = torch.zeros(len(labels), dtype=torch.int64).index_add_(
        0, rows, (chosen.argmax(-1) != targets).cpu().long()
    )
    return Answers(nll, tokens.cpu().double(), wrong == 0)


def posterior(nll: Tensor, tokens: Tensor, temper: float | None = None, floor: float = FLOOR) -> Tensor:
    """The probability of each adapter given the answers, if one adapter produced them all: softmax_n(-sum_i NLL_n(i)).

    The tokens of one answer give similar evidence, and with many of them the least difference between two adapters
    would decide. So an answer of more than two tokens counts as two: its log-likelihood is their mean, times two.

    Args:
        nll: negative log-likelihoods of the answers, shape (examples, adapters).
        tokens: numbers of tokens of the answers, shape (examples,).
        temper: factor for log-likelihoods, whatever the number of tokens; 1 counts every token.
        floor: the smallest weight.

    Returns:
        Weights, shape (adapters,), float64, sum 1.

    Raises:
        ValueError: a value is not finite.
    """
    return floored(log_evidence(nll, tokens, temper).softmax(0), floor)


def log_evidence(nll: Tensor, tokens: Tensor, temper: float | None = None) -> Tensor:
    """What the answers say for each adapter: -sum_i NLL_n(i), long answers as in `posterior`; shape (adapters,)."""
    wide = nll.double()
    if not bool(wide.isfinite().all()):
        raise ValueError("the likelihoods of the answers are not finite")
    factors = (MOST_TOKENS / tokens.double()).clamp(max=1.0)
    if temper is not None:
        factors = torch.full_like(factors, temper)
    return -(factors[:, None] * wide).sum(0)
