"""Answers of 10 to 25 tokens from an encoder-decoder model that is trained here: is evidence as sure as it should be?

A made language. A question names up to eight things, its answer says two words for each; an adapter is a dictionary.
How far the dictionary of a new task agrees with those of the adapters is known, and its prompt is new to all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from peft_composition import CompositionConfig, mixing_weights
from peft_composition.evidence.fit import put_weights
from peft_composition.evidence.passes import composition_in
from peft_composition.evidence.posterior import IGNORED, answers
from peft_composition.tuner.single import mixed_by, one_adapter

from .answers import POOL, Seen
from .bench import Draw


THINGS, KINDS, WORDS, PROMPTS = 8, 6, 16, 16  # a thing is of one of several kinds; either of its words is one of 16
PAD, END, PROMPT = 0, 1, 2
THING = PROMPT + PROMPTS
PLACE = THING + THINGS * KINDS  # what comes before the words for a thing
FIRST = PLACE + THINGS
SECOND = FIRST + WORDS
VOCABULARY = SECOND + WORDS
KNOWN, ADAPTERS, NEW_PROMPT = 8, 4, PROMPTS - 1  # dictionaries of the model, adapters
TEST = 100
NAMES = [f"dictionary {number}" for number in range(ADAPTERS)]
TASKS = {"one": [6, 0, 0, 0], "two": [4, 4, 0, 0], "none": [0, 0, 0, 0]}  # words of 8 that an adapter knows
STEPS, RATE = 20, 1e-2  # of mixing weights


@dataclass(frozen=True)
class Rows:
    """Questions, shape (n, places), and a right and a wrong answer to each, (n, 2, tokens); padded."""

    asked: Tensor
    told: Tensor

    def __getitem__(self, chosen: Any) -> Rows:
        return Rows(self.asked[chosen], self.told[chosen])

    @property
    def given(self) -> dict[str, Tensor]:
        """As a model takes them, with the right answers."""
        return {
            "input_ids": self.asked,
            "attention_mask": (self.asked != PAD).long(),
            "labels": self.told[:, 0].contiguous(),
        }


def dictionary(generator: torch.Generator) -> Tensor:
    """The two words for every thing and kind, shape (things, kinds, 2)."""
    shape = (THINGS, KINDS, 2)
    return torch.randint(WORDS, shape, generator=generator) + torch.tensor([FIRST, SECOND])


def agreeing(own: Sequence[Tensor], eighths: Sequence[int], generator: torch.Generator) -> Tensor:
    """A dictionary with so many eighths of the words of each of others; the rest is new."""
    found = dictionary(generator).flatten(0, 1)
    order = torch.randperm(len(found), generator=generator)
    start = 0
    for words, count in zip(own, eighths):
        chosen = order[start : start + count * len(found) // 8]
        found[chosen] = words.flatten(0, 1)[chosen]
        start += len(chosen)
    return found.unflatten(0, (THINGS, KINDS))


def questions(words: Tensor, prompt: int, count: int, generator: torch.Generator) -> Rows:
    """Questions about three to eight things, answered by a dictionary, and wrongly by a new one."""
    asked = torch.full((count, THINGS + 2), PAD)
    told = torch.full((count, 2, 3 * THINGS + 1), IGNORED)
    other = dictionary(generator)
    for row in range(count):
        number = int(torch.randint(3, THINGS + 1, (1,), generator=generator))
        things = torch.randperm(THINGS, generator=generator)[:number].sort().values
        kinds = torch.randint(KINDS, (number,), generator=generator)
        asked[row, : number + 2] = torch.tensor([PROMPT + prompt, *(THING + things * KINDS + kinds), END])
        for place, own in enumerate((words, other)):
            said = torch.cat([(PLACE + things)[:, None], own[things, kinds]], 1).flatten()
            told[row, place, : 3 * number + 1] = torch.tensor([*said, END])
    return Rows(asked, told)


def train(model: nn.Module, rows: Rows, steps: int, rate: float, batch: int, generator: torch.Generator) -> None:
    """Train what is trainable with AdamW, the rate falling to zero along a line."""
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], rate)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    for _ in range(steps):
        loss = model(**rows[torch.randint(len(rows.asked), (batch,), generator=generator)].given).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        falling.step()


class MadeBench:
    """A new task of the made language, measured as `AnswerBench` measures real ones.

    Args:
        target: one of `TASKS`.
        base: the model.
        folders: of the adapters, by name.
        own: the adapters' dictionaries.
    """

    parts = 100

    def __init__(self, target: str, base: nn.Module, folders: dict[str, Path], own: Sequence[Tensor]) -> None:
        self.facts = {"scenario": "long-answers", "target": target}
        self.names = list(folders)
        generator = torch.Generator().manual_seed(1000 + list(TASKS).index(target))
        words = agreeing(own, TASKS[target], generator)
        self.pool, self.test = (questions(words, NEW_PROMPT, count, generator) for count in (POOL, TEST))
        adapters: list[Any] = [{"path": str(folder), "name": name} for name, folder in folders.items()]
        self.model: PeftModel = get_peft_model(
            base, CompositionConfig(adapters=adapters, mixing="learned", weight_sharing="model")
        )
        self._of_pool: list[tuple[Tensor, Tensor, Tensor]] = []
        self._judged: dict[tuple[float, ...], dict[str, float]] = {}

    def support(self, draw: Draw) -> Tensor:
        """The examples of a draw, K in all, as places in the pool."""
        k, seed = draw
        return torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))[:k]

    def seen(self, draw: Draw) -> Seen:
        """What each adapter alone and their uniform mix make of the support set."""
        count = len(self.names)
        if not self._of_pool:
            mixes = [*range(count), [1 / count] * count]
            self._of_pool = [self._scores(mix, self.pool) for mix in mixes]
        chosen = self.support(draw)
        *alone, mixed = (nll[chosen] for nll, _, _ in self._of_pool)
        labels = torch.zeros(len(chosen), dtype=torch.int64)
        return Seen(torch.stack(alone, 1), self._of_pool[0][1][chosen], labels, mixed)

    def judged(self, weights: Sequence[float] | int) -> dict[str, float]:
        """How a mix answers the test questions; a number is an adapter alone."""
        mix = (
            one_hot(weights, len(self.names)) if isinstance(weights, int) else tuple(round(own, 6) for own in weights)
        )
        if mix not in self._judged:
            self._judged[mix] = self._judge(mix)
        return self._judged[mix]

    def pool_accuracy(self, weights: Sequence[float] | int) -> float:
        """How many of the examples that support sets are drawn from a mix answers rightly, in percent."""
        nll, *_ = self._scores(weights, self.pool)
        return round(100 * float((nll.argmin(1) == 0).double().mean()), 4)

    def _judge(self, mix: Sequence[float]) -> dict[str, float]:
        nll, tokens, said = self._scores(mix, self.test)
        return {
            "accuracy": round(100 * float((nll.argmin(1) == 0).double().mean()), 4),
            "exact": round(100 * float(said[:, 0].mean()), 4),
            "nll": round(-float((-nll).log_softmax(1)[:, 0].mean()), 5),
            "nll_token": round(float((nll[:, 0] / tokens[:, 0]).mean()), 5),
        }

    def learned(self, draw: Draw, start: Sequence[float], scratch: Path) -> tuple[dict[str, float], Any]:
        """Weights trained on the support set: what they answer, and which they are."""
        put_weights(composition_in(self.model, None), start)
        rows = self.pool[self.support(draw)]
        trained = [own for own in self.model.parameters() if own.requires_grad]
        optimizer = torch.optim.AdamW(trained, RATE)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimizer.zero_grad()
            self.model(**rows.given).loss.backward()
            optimizer.step()
        shared = next(iter(mixing_weights(self.model).values()))
        found = [float(shared[name]) for name in self.names]
        return self.judged(found), found

    @torch.no_grad()
    def _scores(self, weights: Sequence[float] | int, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        composition = composition_in(self.model, None)
        layers = list(composition.layers.values())
        if isinstance(weights, int):
            mix = one_adapter(layers, composition.name, weights)
        else:
            mix = mixed_by(layers, composition.name, list(weights))
        with mix:
            found = [
                answers(self.model(**{**rows.given, "labels": told.contiguous()}).logits, told, is_shifted=False)
                for told in rows.told.unbind(1)
            ]
        nll, tokens, right = (torch.stack([own[part] for own in found], 1) for part in range(3))
        return nll, tokens, right.double()


def one_hot(number: int, count: int) -> tuple[float, ...]:
    """All weight on one adapter."""
    return tuple(float(other == number) for other in range(count))


def open_made_benches(folder: Path, steps: tuple[int, int] = (500, 150)) -> Iterator[MadeBench]:
    """Train the model and its adapters, and give the new tasks.

    Args:
        folder: where both are kept; what is there is not trained again.
        steps: of the model and of every adapter.
    """
    kept = folder / f"long-answers-{steps[0]}-{steps[1]}"
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    known, own = ([dictionary(generator) for _ in range(count)] for count in (KNOWN, ADAPTERS))
    model, folders = kept / "model", {name: kept / name.replace(" ", "-") for name in NAMES}
    if not model.is_dir():
        sizes: Any = {"decoder_start_token_id": PAD, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128}
        base = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, num_layers=2, dropout_rate=0.0, **sizes))
        parts = [questions(words, prompt, 300, generator) for prompt, words in enumerate(known)]
        rows = Rows(torch.cat([part.asked for part in parts]), torch.cat([part.told for part in parts]))
        train(base, rows, steps[0], 5e-3, 64, generator)
        base.save_pretrained(str(model))
    for number, (words, place) in enumerate(zip(own, folders.values())):
        if not place.is_dir():
            lora: Any = LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
            adapted = get_peft_model(T5ForConditionalGeneration.from_pretrained(str(model)), lora)
            drawn = torch.Generator().manual_seed(1 + number)
            train(adapted, questions(words, KNOWN + number, 400, drawn), steps[1], 5e-3, 32, drawn)
            adapted.save_pretrained(str(place))
    for target in TASKS:
        yield MadeBench(target, T5ForConditionalGeneration.from_pretrained(str(model)).eval(), folders, own)
