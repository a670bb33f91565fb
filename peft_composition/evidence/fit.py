"""`fit_mixing_weights`: mixing weights from evidence, put into a composition in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..text import plural
from ..tuner.mixing import Mixing
from .batches import Collate
from .choices import Choices, choices
from .options import read_options
from .passes import (
    ALL_KINDS,
    Candidate,
    Composition,
    Kind,
    Passed,
    Precision,
    asking_own_heads,
    candidates,
    composition_in,
    passes,
    read_examples,
)
from .posterior import Answers, posterior
from .scores import LeftOut, bayesian_bootstrap, log_likelihoods, log_probabilities, margins
from .table import DRAWS, EvidenceReport, tabulate
from .weights import are_known, cautions, informed, nats, spread_uniform, stack, vote, vote_of_classes


Method = Literal["auto", "heads-and-vote", "likelihood-vote", "vote", "stacking", "posterior", "choices"]
METHODS = get_args(Method)
_WITHOUT_HEADS = {"heads-and-vote": "likelihood-vote", "own-heads": "uniform"}  # what is done where none can be asked
_NO_HEADS = "no two adapters have files here with a head that could be asked"
_MIXES: dict[str, tuple[Kind, ...]] = {
    "posterior": ("adapter", "uniform"),
    "choices": ("adapter", "uniform"),
    "own-heads": ("adapter",),
}
_OF_ANSWERS = ("posterior", "choices")


def fit_mixing_weights(
    model: nn.Module,
    data: Any,
    method: Method = "auto",
    *,
    adapter_name: str | None = None,
    head: str | nn.Module | None = None,
    collate: Collate | None = None,
    batch_size: int = 16,
    mixed_precision: Precision = "no",
    seed: int = 0,
) -> EvidenceReport:
    """Choose mixing weights by how well adapters predict examples that they were not fitted to; no validation set.

    Of a fixed composition these become its weights, of a learned one the weights that training starts from (and that
    weight decay pulls back to); what it had learned before is given up. Every module gets the same weights. A
    checkpoint that is saved afterwards has them.

    - `"heads-and-vote"` (classifiers): the weights by `"likelihood-vote"`, times what each adapter's own head tells of
      the classes of the examples (their mutual information with its output). What is within a factor of 1.65 of their
      geometric mean, or within two standard errors, counts alike, what exceeds it to the power 4 / sqrt(K). With one
      example of each class, of which none can be left out, the heads alone, and what tells less than 3% of log C, for
      C classes, counts as that. An adapter without a head in its files,
      or whose files are gone, counts as the mean of the others.
    - `"likelihood-vote"` (classifiers): the share of 500 Bayesian bootstraps of the examples in which an adapter tells
      a class best from all others, by leave-one-out predictions of class means: how likely it makes the class on its
      examples and how unlikely on the rest. It must be ahead of the uniform mix by half a standard error: what
      examples cannot tell apart stays uniform. The vote of a class of K examples counts for (K - 1) / K, the rest is
      the uniform mix's, and all classes count by their examples. On the share of the base model all n examples decide
      together, and it must be ahead by half an error and 8 / n: few of them say little of what is so different.
    - `"vote"` (classifiers): of all examples together, by leave-one-out margins, which are less steep; with the same
      caution.
    - `"stacking"` (classifiers): the mixture of these predictions that makes the examples most likely (Yao et al.
      2018).
    - `"posterior"` (causal and encoder-decoder models): the probability of each adapter given the answers.
    - `"choices"` (likewise, for models that do not generate: you compare the likelihoods of a few given answers): the
      posterior over the adapters that choose no worse among the answers in the examples. An adapter drops out if the
      right one is less likely among them than under the adapter that is best at this, by more than a standard error.
      Each of C different answers, at most 20, is put after each prompt: C times the passes of the posterior.

    In all but the last two the uniform mix and the base model are candidates, too. All adapters get the share of the
    uniform mix evenly; that of the base model is missing in the sum of the weights, so that adapters which harm are
    mixed in less, down to not at all. No weight is below 1e-4.

    Args:
        model: a model with a fixed or learned composition, neither merged nor disabled.
        data: the examples, as for `score_adapters`.
        method: one of the above. Default: `"posterior"` where labels are tokens, else `"heads-and-vote"`, or
            `"likelihood-vote"` where fewer than two adapters have a head.
        adapter_name: of the composition. Default: the active one.
        head: as for `score_adapters`.
        collate: as for `score_adapters`.
        batch_size: as for `score_adapters`.
        mixed_precision: as for `score_adapters`.
        seed: of the bootstraps. The same seed gives the same weights.

    Returns:
        The weights, the scores behind them, and why. With one example of each class and no heads to ask there is
        nothing to go by: then the weights are uniform, and `reason` says so.

    Raises:
        ValueError: as `score_adapters`; or a uniform composition, or a method for other labels, or for `"choices"`
            answers that cannot be compared. The composition is as it was.

    Example:
        >>> print(fit_mixing_weights(model, support_set))
        >>> Trainer(model, args, train_dataset=support_set).train()
    """
    started = time.perf_counter()
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    composition = composition_in(model, adapter_name)
    if composition.config.mixing == "uniform":
        raise ValueError(
            f'The composition {composition.name!r} has mixing="uniform", which has no weights to set. Compose with '
            'mixing="learned", or with mixing="fixed".'
        )
    examples = read_examples(composition.model, data, head, collate, batch_size)
    chosen, reason = _choose(method, examples.labels)
    options, count = None, len(examples)
    if chosen == "choices":
        options = read_options(composition.model, examples.batches)
        examples = replace(examples, batches=options.batches)
        reason = f"{len(options.answers)} different answers to {plural(count, 'example')}"
    names = composition.config.adapter_names
    scores, told, dropped = None, None, list[str]()
    weights = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    if chosen != "uniform":
        mixes = candidates(composition, _MIXES.get(chosen, ALL_KINDS))
        if chosen in _WITHOUT_HEADS:
            mixes = asking_own_heads(composition, mixes, examples.head)
        passed = passes(composition.model, mixes, examples, mixed_precision)
        if options is not None:
            passed = [replace(own, found=options.choices(cast(Answers, own.found))) for own in passed]
        scores = tabulate(mixes, passed, count, seed) if chosen != "own-heads" else None
        if chosen == "posterior":
            weights = _by_posterior(mixes, passed)
        elif chosen == "choices":
            weights, stayed = _by_choices(mixes, passed)
            dropped = [name for name, stays in zip(names, stayed.tolist()) if not stays]
        elif chosen != "own-heads":
            left = [cast(LeftOut, own.found) for own in passed]
            weights = weights_by(_WITHOUT_HEADS.get(chosen, chosen), left, seed)
        if chosen in _WITHOUT_HEADS:
            told = [own.information for own in passed[: len(names)]]
            weights = informed(weights, told, cast(Tensor, examples.labels))
            if not are_known(told):
                chosen, reason, told = _WITHOUT_HEADS[chosen], f"{reason}; {_NO_HEADS}", None
    put_weights(composition, weights.tolist())
    by_name = dict(zip(names, weights.tolist()))
    informations = None if told is None else dict(zip(names, nats(told)))
    return EvidenceReport(chosen, by_name, reason, scores, time.perf_counter() - started, informations, tuple(dropped))


def put_weights(composition: Composition, weights: Sequence[float]) -> None:
    """Give a composition other weights, the same in all modules: constants, or the start of those that train."""
    composition.config.follow(list(weights))
    for mixing in {id(own): own for own in map(_mixing_of(composition.name), composition.layers.values())}.values():
        mixing.restart(weights)
    for layer in composition.layers.values():  # what was folded with the old ones is given up
        layer.swap_mixing(composition.name, cast(Mixing, layer.composition_mixing[composition.name]))


def _mixing_of(name: str) -> Callable[[Any], Mixing]:
    return lambda layer: cast(Mixing, layer.composition_mixing[name])


def _choose(method: Method, labels: Tensor | None) -> tuple[str, str]:
    """The method, and why."""
    if labels is None:
        if method not in ("auto", *_OF_ANSWERS):
            raise ValueError(
                f'method={method!r} needs one class for each example; these labels are tokens: use "posterior", or '
                '"choices" where you compare a few given answers.'
            )
        return ("posterior" if method == "auto" else method), "labels are tokens of answers"
    if method in _OF_ANSWERS:
        raise ValueError(
            f'method="{method}" needs the tokens of answers as labels, shape (examples, positions); these labels are '
            'classes: use "heads-and-vote", "likelihood-vote", "vote" or "stacking".'
        )
    classes, counts = labels.unique(return_counts=True)
    if len(classes) == 1:
        raise ValueError(f"All {len(labels)} examples are of class {int(classes[0])}: nothing can be told apart.")
    most = int(counts.max())
    if most == 1:
        reason = "one example of each class: none can be left out and compared with others of its class"
        return ("own-heads" if method in ("auto", "heads-and-vote") else "uniform"), reason
    least = int(counts.min())
    return (
        "heads-and-vote" if method == "auto" else method
    ), f"{least if least == most else f'{least} to {most}'} of a class"


def weights_by(method: str, left: Sequence[LeftOut], seed: int) -> Tensor:
    """Mixing weights of a classifier's adapters.

    Args:
        method: `"likelihood-vote"`, `"vote"` or `"stacking"`.
        left: leave-one-out distances of each adapter alone, of their uniform mix and, last, of the base model.
        seed: of the bootstraps.

    Returns:
        Shape (N,), float64; what the sum lacks of 1 is the base model's.
    """
    bootstraps = bayesian_bootstrap(len(left[0].labels), DRAWS, seed)
    if method == "likelihood-vote":
        logs = torch.stack([log_probabilities(own) for own in left], dim=2)
        return spread_uniform(vote_of_classes(logs, left[0].labels, bootstraps))
    if method == "vote":
        values = torch.stack([margins(own) for own in left], dim=1)
        return spread_uniform(vote(values, bootstraps, len(left) - 2, cautions(*values.shape)))
    return spread_uniform(stack(torch.stack([log_likelihoods(own) for own in left], dim=1)))


def _by_posterior(mixes: Sequence[Candidate], passed: Sequence[Passed]) -> Tensor:
    adapters = [cast(Answers, own.found) for candidate, own in zip(mixes, passed) if candidate.kind == "adapter"]
    return posterior(torch.stack([own.nll for own in adapters], dim=1), adapters[0].tokens)


def _by_choices(mixes: Sequence[Candidate], passed: Sequence[Passed]) -> tuple[Tensor, Tensor]:
    """The weights, and which adapters stayed."""
    adapters = [cast(Choices, own.found) for candidate, own in zip(mixes, passed) if candidate.kind == "adapter"]
    nll, among = (torch.stack(own, dim=1) for own in zip(*((own.of_right, own.among) for own in adapters)))
    return choices(nll, adapters[0].tokens_of_right, among)
