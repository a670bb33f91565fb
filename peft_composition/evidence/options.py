"""Every answer that some examples have, after every prompt: batches from which the likelihoods of all are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..text import plural, quoted
from .batches import Batch
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
    is_seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    prepared = [_of_encoder_decoder(model, batch) if is_seq2seq else _of_causal(batch) for batch in batches]
    places = [[_place(row, number, not is_seq2seq) for number, row in enumerate(own["labels"])] for own in prepared]
    told = [
        tuple(row[start:end].tolist())
        for own, of_batch in zip(prepared, places)
        for row, (start, end) in zip(own["labels"], of_batch)
    ]
    answers = list(dict.fromkeys(told))
    _require_choice(len(answers), len(told))
    found = [
        {**own, "labels": torch.tensor([answer] * len(of_batch))}
        if is_seq2seq
        else _after_prompts(own, answer, of_batch)
        for own, of_batch in zip(prepared, places)
        for answer in answers
    ]
    return Options(answers, found, [len(own) for own in places], torch.tensor([answers.index(own) for own in told]))


def _require_choice(answers: int, examples: int) -> None:
    if answers == 1:
        raise ValueError(
            f'method="choices" compares answers, but all {examples} examples have the same one: give examples of each '
            "answer that there is, two or more of some"
        )
    if answers == examples:
        raise ValueError(
            f'method="choices" compares a few answers that repeat, but each of the {examples} examples has one of its '
            'own. Give two or more examples of an answer, or use method="posterior"'
        )
    if answers > MOST:
        raise ValueError(
            f'method="choices" compares at most {MOST} answers, but the {examples} examples have {answers} different '
            'ones, each of which would cost a pass. Use method="posterior"'
        )


def _of_causal(batch: Batch) -> Batch:
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
        and value.shape[:2] == labels.shape
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
            f"{row} of a batch has label {int(labels[row, place])} at place {place}, where input_ids has "
            f"{int(ids[row, place])}"
        )
    return batch


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


def _place(labels: Tensor, number: int, needs_prompt: bool) -> tuple[int, int]:
    """Where an answer starts and ends."""
    places = (labels != IGNORED).nonzero()[:, 0].tolist()
    if not places:
        raise ValueError(f"example {number} of a batch has no answer: its labels are all -100")
    start, end = places[0], places[-1] + 1
    if end - start > len(places):
        raise ValueError(
            f'method="choices" replaces one answer by another, but example {number} of a batch has an answer in '
            f"{plural(len(places), 'token')} that do not follow each other, from place {start} to {end - 1}. Give one "
            'answer for each example, or use method="posterior"'
        )
    if needs_prompt and start == 0:
        raise ValueError(
            f'method="choices" compares answers to a prompt, but the labels of example {number} of a batch begin at '
            "its first token. Set those of the prompt to -100"
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
