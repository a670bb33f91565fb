"""What commands on labelled examples are given, read: the examples, and the base model that fits them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from ..checkpoint.base_models import base_config, loaders
from ..choosing import EncodedRows, LabelledData, adapters_in, load_processor


@dataclass(frozen=True)
class Task:
    """A base model and examples as it reads them.

    Attributes:
        base: the model, with a new head where labels are classes.
        rows: the examples.
        type: PEFT's task type.
    """

    base: nn.Module
    rows: EncodedRows
    type: str


def load_task(base: str, data: LabelledData) -> Task:
    """Load a base model for examples, and encode these."""
    config = base_config(base)
    is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    task = task_of(data, is_encoder_decoder)
    processor = load_processor(base, data.kind)
    loader = loaders(task, config)[0]
    model, _ = loader.from_pretrained(base, num_labels=len(data.classes) or None, is_reported=not data.classes)
    own = getattr(model, "config", None)
    if own is not None and getattr(own, "pad_token_id", None) is None:
        own.pad_token_id = getattr(processor, "pad_token_id", None)
    return Task(model.to(_device()), EncodedRows(data, processor, is_encoder_decoder and not data.classes), task)


def task_of(data: LabelledData, is_encoder_decoder: bool) -> str:
    """PEFT's task type for examples: of classes, or of answers."""
    if data.kind != "answer":
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM"


def expanded(adapters: Sequence[str]) -> list[str]:
    """Adapters as they are; a folder that is none stands for those in it, if there are any."""
    found = []
    for adapter in adapters:
        try:
            found += adapters_in(adapter) if Path(adapter).is_dir() else [adapter]
        except ValueError:
            found.append(adapter)  # whoever reads it says what it is
    return found


def is_first() -> bool:
    """Whether this process is the one that prints; joins the others, if `torchrun` or `accelerate` started several."""
    return not _has_company() or _together().is_main_process


def _has_company() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _together() -> PartialState:
    return PartialState(cpu=not torch.accelerator.is_available())


def _device() -> torch.device:
    if _has_company():
        return _together().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
