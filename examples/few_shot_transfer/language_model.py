"""Language models: questions to tokens, and answers by greedy generation that must match exactly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from .models import Collate, resolve
from .scenario import CAUSAL, ModelSpec


EVALUATION_BATCH = 16
IGNORED = -100  # labels that the loss leaves out


class LanguageModel:
    """A foundation model that answers in words, read once; every run gets a copy of its own.

    Attributes:
        name: what adapters name as their base model: the Hub id where there is one.
    """

    def __init__(self, spec: ModelSpec) -> None:
        path, self.name = resolve(str(spec.path))
        self.spec = spec
        self.is_causal = spec.kind in CAUSAL
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.truncation_side = "left"  # the question and its options come last
        kind = transformers.AutoModelForCausalLM if self.is_causal else transformers.AutoModelForSeq2SeqLM
        self._model: transformers.PreTrainedModel = kind.from_pretrained(path, dtype=torch.float32)
        for module in self._model.modules():  # small support sets; and a frozen model answers alike in training
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self._model.name_or_path = self.name
        self._model.config._name_or_path = self.name

    def build(self, classes: int, seed: int) -> nn.Module:
        """A copy of the model; nothing of it depends on the number of classes or on a seed."""
        return copy.deepcopy(self._model)

    def encode(self, data: Dataset) -> Dataset:
        """Rows of `input` and `answer` as training examples, in the same order."""
        return Dataset.from_list([self._example(*pair) for pair in zip(data["input"][:], data["answer"][:])])

    def sort_by_length(self, data: Dataset) -> Dataset:
        """The rows with similar lengths side by side, which saves padding."""
        return data.select(np.argsort([len(text) for text in data["input"][:]], kind="stable"))

    @property
    def collate(self) -> Collate:
        """Makes a batch of encoded rows."""
        collator: Collate = transformers.DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        return collator

    @torch.no_grad()
    def correct(self, model: Any, data: Dataset) -> list[bool]:
        """Whether the generated answers match exactly, but for what `normal` leaves out; shared among processes.

        Args:
            model: anything with `generate`: the model, or a PEFT model of it.
            data: rows of `input` and `answer`.
        """
        accelerator = Accelerator()
        rows: Any = list(enumerate(data["input"][:]))
        loader = accelerator.prepare(DataLoader(rows, batch_size=EVALUATION_BATCH, collate_fn=self._prompts))
        model = model.to(accelerator.device).eval()
        answers = [normal(answer) for answer in data["answer"][:]]
        found: list[bool] = []
        for indices, prompts in loader:
            tokens = model.generate(**prompts, do_sample=False, max_new_tokens=self.spec.max_new_tokens)
            if self.is_causal:
                tokens = tokens[:, prompts["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            right = torch.tensor([normal(text) == answers[row] for text, row in zip(texts, indices.tolist())])
            found += accelerator.gather_for_metrics(right.to(accelerator.device)).tolist()
        return found

    def asked(self, questions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Questions as a batch of tokens; where an answer follows them, they are padded on the left."""
        side = "left" if self.is_causal else "right"
        encoded = self._tokens(questions, padding=True, padding_side=side, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def told(self, answer: str) -> list[int]:
        """The tokens of an answer, and the one that ends it."""
        ids: list[int] = (
            self.tokenizer(answer + self.tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            if self.is_causal
            else self.tokenizer(answer)["input_ids"]
        )
        return ids

    def _example(self, question: str, answer: str) -> dict[str, Any]:
        asked, told = self._tokens([question])["input_ids"][0], self.told(answer)
        if not self.is_causal:
            return {"input_ids": asked, "labels": told}
        return {"input_ids": asked + told, "labels": [IGNORED] * len(asked) + told}

    def _prompts(self, rows: Sequence[tuple[int, str]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.tensor([row for row, _ in rows]), self.asked([text for _, text in rows])

    def _tokens(self, questions: Sequence[str], **options: Any) -> Any:
        """The questions as a causal model with a chat template was tuned to be asked; other models get them bare."""
        is_chat = self.spec.kind == "causal" and self.tokenizer.chat_template is not None
        asked: Any = list(questions)
        if is_chat:
            chats = [[{"role": "user", "content": question}] for question in questions]
            asked = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        length = self.spec.max_length
        return self.tokenizer(asked, truncation=True, max_length=length, add_special_tokens=not is_chat, **options)


def normal(answer: str) -> str:
    """An answer as it is compared: its first line, without case, outer spaces and a full stop at the end."""
    return answer.strip().split("\n")[0].strip().removesuffix(".").lower()
