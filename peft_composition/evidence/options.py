"""Every answer that some examples have, after every prompt: batches from which the likelihoods of all are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import Tensor, nn

from ..text import plural, quoted
from .batches import Batch, is_encoder_decoder
from .choices import Choices
from .posterior import IGNORED, Answers


MOST = 20
"""More different answers are no choice among a few; every one of them costs a pass."""
_Told = tuple[int, ...]


@dataclass(frozen=True)
class Options:
    """Examples with each of the answers that occur among them.

    Attributes:
        answers: their tokens, in the order in which they first occur.
        batches: of each batch of the examples one with every answer in turn.
        sizes: numbers of rows of the batches of the examples.
        right: the number of each example's own answer, shape (n,).
    """

    answers: Sequence[_Told]
    batches: Sequence[Batch]
    sizes: Sequence[int]
    right: Tensor

    def choices(self, found: Answers) -> Choices:
        """What a pass over the batches gave, example by example."""

        def by_example(values: Tensor) -> Tensor:
            parts = iter(values.split([size for size in self.sizes for _ in self.answers]))
            return torch.cat([torch.stack([next(parts) for _ in self.answers], 1) for _ in self.sizes])

        return Choices(by_example(found.nll), by_example(found.tokens), self.right)


def read_options(model: nn.Module, batches: Sequence[Batch]) -> Options:
    """Put every answer that occurs among some examples after each of their prompts.

    A causal model's prompt is what comes before the answer, and stays where it is, with the padding before it; what
    comes after the answer, which its likelihood does not depend on, is left out. An encoder-decoder model gets other
    labels.

    Args:
        model: causal or encoder-decoder, without wrappers.
        batches: the examples, with answers as labels.

    Raises:
        ValueError: the answers are no choice among a few, or cannot be replaced by each other.
    """
    is_seq2seq = is_encoder_decoder(model)
    numbers = [0, *accumulate(len(batch["labels"]) for batch in batches)]  # of the batches' first examples
    prepared = [
        _of_encoder_decoder(model, batch) if is_seq2seq else _of_causal(batch, first)
        for batch, first in zip(batches, numbers)
    ]
    places = [_places(own, first, not is_seq2seq) for own, first in zip(prepared, numbers)]
    told = [
        tuple(row[start:end].tolist())
        for own, of_batch in zip(prepared, places)
        for row, (start, end) in zip(own["labels"], of_batch)
    ]
    answers = list(dict.fromkeys(told))
    _require_choice(answers, told)
    if not is_seq2seq:
        _require_room(model, batches, max(start for own in places for start, _ in own) + max(map(len, answers)))
    found = [
        {**own, "labels": torch.tensor([answer] * len(of_batch))}
        if is_seq2seq
        else _after_prompts(own, answer, of_batch)
        for own, of_batch in zip(prepared, places)
        for answer in answers
    ]
    return Options(answers, found, [len(own) for own in places], torch.tensor([answers.index(own) for own in told]))


def _require_choice(different: Sequence[_Told], told: Sequence[_Told]) -> None:
    answers, examples = len(different), len(told)
    if answers == 1:
        raise ValueError(
            f'method="choices" compares answers, but all {examples} examples have the same one: give examples of each '
            "answer that there is, two or more of some"
        )
    ordered = sorted(different)
    for short, long in pairwise(ordered):  # what begins others comes right before one of them
        if long[: len(short)] == short:
            raise ValueError(
                f'method="choices" compares whole answers, but that of example {told.index(short)}, '
                f"{plural(len(short), 'token')}, is the beginning of that of example {told.index(long)}, "
                f"{plural(len(long), 'token')}, and so never less likely. End all answers by the token that ends a "
                "text, cut none off, and set the labels of padding to -100"
            )
    if answers == examples:
        raise ValueError(
            f'method="choices" compares a few answers that repeat, but each of the {examples} examples has one of its '
            "own. Give two or more examples of an answer, mind that the labels of prompts must be -100, or use "
            'method="posterior"'
        )
    if answers > MOST:
        raise ValueError(
            f'method="choices" compares at most {MOST} answers, but the {examples} examples have {answers} different '
            'ones, each of which would cost a pass. Use method="posterior"'
        )


def _require_room(model: nn.Module, batches: Sequence[Batch], longest: int) -> None:
    """Refuse rows that have more places than the model's learned positions; there are none for more."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    given = max(batch["labels"].shape[1] for batch in batches)
    if not isinstance(limit, int) or longest <= limit or given > limit:
        return
    words = getattr(model, "get_input_embeddings", lambda: None)()
    of_words = set() if words is None else set(words.modules())
    tables = [own for own in model.modules() if isinstance(own, nn.Embedding) and own not in of_words]
    if any(limit <= own.num_embeddings <= limit + 2 for own in tables):  # some architectures leave out two places
        raise ValueError(
            f'method="choices" puts the longest answer after the longest prompt, with the padding before it, which is '
            f"at place {longest}, but the model has {limit} positions. Shorten the prompts, or pad them to the "
            "longest one and not to a fixed length"
        )


def _of_causal(batch: Batch, first: int) -> Batch:
    ids, mask, labels = batch.get("input_ids"), batch.get("attention_mask"), batch["labels"]
    if not isinstance(ids, Tensor) or ids.shape != labels.shape:
        got = f"of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else "none"
        raise ValueError(
            'method="choices" puts other answers after the prompts, which needs input_ids of the shape of the labels, '
            f"{tuple(labels.shape)}; there are {got}"
        )
    others = [
        name
        for name, value in batch.items()
        if isinstance(value, Tensor)
        and name not in ("input_ids", "attention_mask", "labels")
        and _is_as_long(value, labels)
    ]
    if others or (isinstance(mask, Tensor) and mask.shape != labels.shape):
        named = others[0] if others else "attention_mask"
        raise ValueError(
            f'method="choices" puts other answers after the prompts, for which {quoted(named)} of shape '
            f"{tuple(batch[named].shape)} cannot be made longer. Leave it out of the batches, or use "
            'method="posterior"'
        )
    wrong = ((labels != IGNORED) & (labels != ids.to(labels.device))).nonzero()
    if len(wrong):
        row, place = wrong[0].tolist()
        raise ValueError(
            f'method="choices" needs the tokens of an answer as labels where they stand in input_ids, but example '
            f"{first + row} has label {int(labels[row, place])} at place {place}, where input_ids has "
            f"{int(ids[row, place])}"
        )
    return batch


def _is_as_long(value: Tensor, labels: Tensor) -> bool:
    """Whether an input has something for each token: by row or, as positions, for all rows or with more axes."""
    count, width = labels.shape
    if value.shape[:2] == labels.shape:
        return True
    is_by_row = value.shape == (count,)
    return bool(value.dim()) and not value.is_floating_point() and value.shape[-1] == width and not is_by_row


def _of_encoder_decoder(model: nn.Module, batch: Batch) -> Batch:
    given = batch.get("decoder_input_ids")
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if isinstance(given, Tensor) and make is not None:
        made = cast(Tensor, make(labels=batch["labels"]))
        if made.shape == given.shape and bool(
            (made.to(given.device) == given).all()
        ):  # as DataCollatorForSeq2Seq does
            batch = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    others = [name for name, value in batch.items() if name.startswith("decoder_") and value is not None]
    if others:
        raise ValueError(
            f'method="choices" gives the decoder other answers, to which {quoted(others[0])} would not belong. Leave '
            "it out of the batches: the model makes it from the labels"
        )
    return batch


def _places(batch: Batch, first: int, needs_prompt: bool) -> list[tuple[int, int]]:
    """Where the answers of a batch start and end; `first` is the number of its first example."""
    mask = batch.get("attention_mask")
    found = []
    for row, labels in enumerate(batch["labels"]):
        start, end = _place(labels, first + row)
        if needs_prompt and not (bool(mask[row, :start].any()) if isinstance(mask, Tensor) else start > 0):
            raise ValueError(
                f'method="choices" compares answers to a prompt, but the labels of example {first + row} begin at its '
                "first token. Set those of the prompt to -100"
            )
        found.append((start, end))
    return found


def _place(labels: Tensor, number: int) -> tuple[int, int]:
    """Where an answer starts and ends."""
    places = (labels != IGNORED).nonzero()[:, 0].tolist()
    if not places:
        raise ValueError(f"example {number} has no answer: its labels are all -100. Was it cut off?")
    start, end = places[0], places[-1] + 1
    if end - start > len(places):
        raise ValueError(
            f'method="choices" replaces one answer by another, but example {number} has an answer in '
            f"{plural(len(places), 'token')} that do not follow each other, from place {start} to {end - 1}. Give one "
            'answer for each example, or use method="posterior"'
        )
    return start, end


def _after_prompts(batch: Batch, answer: _Told, places: Sequence[tuple[int, int]]) -> Batch:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    width = max(start for start, _ in places) + len(answer)
    new = {
        "input_ids": ids.new_full((len(ids), width), answer[-1]),
        "labels": batch["labels"].new_full((len(ids), width), IGNORED),
    }
    if isinstance(mask, Tensor):
        new["attention_mask"] = mask.new_zeros(len(ids), width)
    for row, (start, _) in enumerate(places):
        end = start + len(answer)
        new["input_ids"][row, :start] = ids[row, :start]
        new["input_ids"][row, start:end] = ids.new_tensor(answer)
        new["labels"][row, start:end] = batch["labels"].new_tensor(answer)
        if isinstance(mask, Tensor):
            new["attention_mask"][row, :start] = mask[row, :start]
            new["attention_mask"][row, start:end] = 1
    return {**batch, **new}
