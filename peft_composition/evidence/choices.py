"""Evidence where a few given answers are compared: who chooses worse among them drops out, then the posterior decides.

Pure functions on tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .posterior import log_evidence
from .weights import FLOOR, floored


ERRORS = 1.0
"""By more than so many standard errors an adapter must choose worse than the best one to drop out. Chosen on nine
tasks of the study."""


class Choices(NamedTuple):
    """A model's scores for C answers to each of n examples.

    Attributes:
        nll: negative log-likelihoods of the answers, summed over their tokens, shape (n, C), float64.
        tokens: numbers of tokens of the answers, shape (n, C), float64.
        right: the number of the right one, shape (n,).
    """

    nll: Tensor
    tokens: Tensor
    right: Tensor

    @property
    def of_right(self) -> Tensor:
        """Negative log-likelihood of the right answer, over the whole vocabulary, shape (n,)."""
        return self._at_right(self.nll)

    @property
    def among(self) -> Tensor:
        """Negative log-likelihood of the right answer if it must be one of the C, shape (n,)."""
        return -self._at_right((-self.nll).log_softmax(1))

    @property
    def tokens_of_right(self) -> Tensor:
        """Number of tokens of the right answer, shape (n,)."""
        return self._at_right(self.tokens)

    @property
    def is_right(self) -> Tensor:
        """Whether the right answer is the likeliest of the C, shape (n,)."""
        return self.nll.argmin(1) == self.right

    def _at_right(self, values: Tensor) -> Tensor:
        return values.gather(1, self.right[:, None])[:, 0]


def stay(among: Tensor, errors: float = ERRORS) -> Tensor:
    """Which adapters the examples do not show to choose worse than the best one.

    The best one is that under which right answers are likeliest among the given ones, on the mean of the examples. An
    adapter drops out if its mean is worse by more than some standard errors of the difference, paired by example.

    Args:
        among: negative log-likelihoods of the right answers among the given ones, shape (examples, adapters); two
            examples or more.
        errors: how many standard errors.

    Returns:
        Shape (adapters,); True for the best one, and for one that predicts just as it does.
    """
    wide = among.double()
    behind = wide - wide[:, [int(wide.mean(0).argmin())]]
    # Behind on one example alone lies exactly on the limit of one error: rounding must not decide.
    return behind.mean(0) <= errors * behind.std(0) / len(wide) ** 0.5 * (1 + 1e-9)


def choices(nll: Tensor, tokens: Tensor, among: Tensor, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """The posterior of the whole answers over the adapters that do not choose worse among the given ones.

    A likelihood has two parts: that the answer is one of those given, in their words and at that place (its form), and
    which of them. Where examples tell that an adapter is worse at the second, its form does not make up for it; where
    they do not, the form decides.

    Args:
        nll: negative log-likelihoods of the right answers, shape (examples, adapters).
        tokens: numbers of their tokens, shape (examples,).
        among: negative log-likelihoods of the right answers among the given ones, shape (examples, adapters).
        floor: the smallest weight.

    Returns:
        Weights, shape (adapters,), float64, sum 1; and which adapters stayed.
    """
    stayed = stay(among)
    return floored(log_evidence(nll, tokens).masked_fill(~stayed, -torch.inf).softmax(0), floor), stayed
