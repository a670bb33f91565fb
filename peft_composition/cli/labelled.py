"""What commands on labelled examples are given, read: the examples, and the base model that fits them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PretrainedConfig

from ..checkpoint.base_models import Loader, base_config, is_encoder, loaders
from ..choosing import EncodedRows, LabelledData, adapters_in, load_processor
from ..references import AdapterReference
from ..text import one_line
from .inputs import task_and_loader


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


def load_task(
    base: str, data: LabelledData, references: Sequence[AdapterReference] = (), task: str | None = None
) -> Task:
    """Load a base model for examples, and encode these.

    Args:
        base: Hub id or folder.
        data: the examples.
        references: adapters that it must fit, where several classes could load it.
        task: PEFT's task type. Default: that of the examples.

    Raises:
        ValueError: the task needs other examples.
    """
    config = base_config(base)
    is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    task = task or task_of(data, is_encoder_decoder)
    if references:
        _, loader = task_and_loader(references, task, config, check_base=True, is_strict=False)
    else:
        loader = loaders(task, config)[0]
    require_examples(base, loader, data, config)
    processor = load_processor(base, data.kind)
    model, _ = load_base(loader, base, processor, num_labels=len(data.classes) or None, is_reported=not data.classes)
    return Task(model, EncodedRows(data, processor, is_encoder_decoder and not data.classes), task)


def load_base(loader: Loader, base: str, processor: Any, **options: Any) -> tuple[nn.Module, list[str]]:
    """Load a base model where it is to run: on the GPU of this process, if there is one, and with a token to pad with.

    Args:
        loader: the class.
        base: Hub id or folder.
        processor: its tokenizer or image processor.
        **options: of `Loader.from_pretrained`.

    Returns:
        As `Loader.from_pretrained`.
    """
    device = _device()
    model, new = loader.from_pretrained(base, **options)
    own = getattr(model, "config", None)
    if own is not None and getattr(own, "pad_token_id", None) is None:
        own.pad_token_id = getattr(processor, "pad_token_id", None)
    # bitsandbytes has put its weights on the device, and refuses to move those of 8 bits.
    return model if getattr(model, "quantization_method", None) == "bitsandbytes" else model.to(device), new


def require_examples(what: str, loader: Loader, data: LabelledData, config: PretrainedConfig) -> None:
    """Refuse classes for a model that answers, and answers for one that names classes or only reads."""
    if loader.is_classifier != (data.kind != "answer"):
        needs = "classes (--label)" if loader.is_classifier else "--prompt and --answer"
        raise ValueError(
            f"{one_line(what)} is loaded as a {loader.builds.__name__}, which needs {needs}; give them, or --task"
        )
    if data.kind == "answer" and is_encoder(config):
        raise ValueError(
            f"{one_line(what)} is an encoder ({one_line(config.model_type)}), which does not answer: give classes "
            "(--label), or a base that is a language model"
        )


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
