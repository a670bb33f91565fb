"""The models that are measured, with random weights (speed does not depend on their values), and LoRAs for them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from peft_composition.references import AdapterReference


RANK = 16
# Beyond this many the same folders are read again under other names.
DISTINCT_ADAPTERS = 64

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Architecture:
    """A model, what LoRA targets in it, and an input.

    Attributes:
        name: for the reader of a table.
        size: of its batch, in words.
        build: makes it, with random weights.
        targets: PEFT's `target_modules`.
        head: PEFT's `modules_to_save`.
        task_type: PEFT's task type.
        batch_size: of a training step and a forward pass.
        inputs: batch size -> keyword arguments of the model.
        labels: batch size -> those that make it return a loss.
    """

    name: str
    size: str
    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    head: tuple[str, ...]
    task_type: str | None
    batch_size: int
    inputs: Callable[[int], dict[str, Tensor]]
    labels: Callable[[int], dict[str, Tensor]]


def _vit(config: ViTConfig, name: str, batch_size: int) -> Architecture:
    size, classes = config.image_size, config.num_labels
    assert isinstance(size, int)
    assert classes is not None
    return Architecture(
        name=name,
        size=f"batch of {batch_size}",
        build=lambda: ViTForImageClassification(config),
        targets=("q_proj", "k_proj", "v_proj"),
        head=("classifier",),
        task_type=None,
        batch_size=batch_size,
        inputs=lambda count: {"pixel_values": torch.randn(count, 3, size, size)},
        labels=lambda count: {"labels": torch.randint(classes, (count,))},
    )


def _tokens(vocabulary: int, length: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randint(3, vocabulary, (count, length))


def _t5(config: T5Config, name: str, batch_size: int, length: int) -> Architecture:
    tokens = _tokens(config.vocab_size, length)
    return Architecture(
        name=name,
        size=f"batch of {batch_size} x {length} tokens in and out",
        build=lambda: T5ForConditionalGeneration(config),
        targets=("q", "k", "v"),
        head=(),
        task_type="SEQ_2_SEQ_LM",
        batch_size=batch_size,
        inputs=lambda count: {"input_ids": tokens(count), "decoder_input_ids": tokens(count)},
        labels=lambda count: {"labels": tokens(count)},
    )


def _llama(config: LlamaConfig, name: str, batch_size: int, length: int) -> Architecture:
    tokens = _tokens(config.vocab_size, length)
    return Architecture(
        name=name,
        size=f"batch of {batch_size} x {length} tokens",
        build=lambda: LlamaForCausalLM(config),
        targets=("q_proj", "k_proj", "v_proj"),
        head=(),
        task_type="CAUSAL_LM",
        batch_size=batch_size,
        inputs=lambda count: {"input_ids": tokens(count)},
        labels=lambda count: {"labels": tokens(count)},
    )


ARCHITECTURES: dict[str, Architecture] = {
    "vit": _vit(ViTConfig(patch_size=32), "ViT-B/32", 32),
    "t5": _t5(
        T5Config(dropout_rate=0.0, decoder_start_token_id=0),  # type: ignore[call-arg]  # a field of all configs
        "T5-small",
        4,
        64,
    ),
    "llama": _llama(
        LlamaConfig(
            vocab_size=16384,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=2,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
        "two layers of Llama-3.2-1B's shape",
        2,
        64,
    ),
    "tiny-vit": _vit(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        ),
        "a tiny ViT (to try the programs)",
        4,
    ),
    "tiny-llama": _llama(
        LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        "a tiny Llama (to try the programs)",
        4,
        16,
    ),
}


class Workbench:
    """One base model, its inputs, and its LoRA adapters in folders as PEFT saves them.

    Args:
        architecture: of the model.
        folder: where the adapters are written; made here.
        device: where the model lives.
        dtype: of the model.
    """

    def __init__(self, architecture: Architecture, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.architecture = architecture
        self.device, self.dtype = device, dtype
        self.base = self.architecture.build().to(device=device, dtype=dtype).eval().requires_grad_(False)
        if isinstance(self.base, PreTrainedModel) and self.base.can_generate():
            self.base.generation_config.eos_token_id = None  # every generation has its full length
        self._folder = folder
        self._folders: list[Path] = []
        self._peft_models: dict[int, PeftModel] = {}

    def batch(self, size: int | None = None, labels: bool = False) -> dict[str, Tensor]:
        """The same random input at every call, on the device.

        Args:
            size: of the batch. Default: the architecture's.
            labels: whether the model shall return a loss.
        """
        size = self.architecture.batch_size if size is None else size
        torch.manual_seed(1)
        entries = {**self.architecture.inputs(size), **(self.architecture.labels(size) if labels else {})}
        return {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in entries.items()
        }

    def shared_base(self) -> nn.Module:
        """A base model of its own modules that shares the frozen tensors; only the head is a copy."""
        model = share(self.base)
        for name in self.architecture.head:
            model.set_submodule(name, copy.deepcopy(self.base.get_submodule(name)))
        return model

    def own_base(self) -> nn.Module:
        """A base model that shares nothing, for weights that change."""
        return copy.deepcopy(self.base)

    def train_head(self, model: nn.Module) -> None:
        """Let the head train in a model made by `shared_base`."""
        for name in self.architecture.head:
            model.get_submodule(name).requires_grad_()

    def lora_config(self) -> LoraConfig:
        """A LoRA on the targets, without a head."""
        return LoraConfig(
            r=RANK, target_modules=list(self.architecture.targets), task_type=self.architecture.task_type
        )

    def references(self, count: int) -> list[AdapterReference]:
        """N saved adapters with names of their own; beyond 64 the same folders come again."""
        for number in range(len(self._folders), min(count, DISTINCT_ADAPTERS)):
            self._folders.append(self._write_adapter(number))
        return [
            {"path": str(self._folders[number % DISTINCT_ADAPTERS]), "name": f"adapter-{number}"}
            for number in range(count)
        ]

    def peft_model(self, count: int) -> PeftModel:
        """A PEFT model with N LoRAs loaded and active, its modules and factors its own, its base weights shared.

        PEFT takes long to load many adapters, so a model with fewer is kept and goes on from there.
        """
        if count not in self._peft_models:
            fewer = max((loaded for loaded in self._peft_models if loaded < count), default=0)
            model = share(self._peft_models[fewer]) if fewer else None
            self._peft_models[count] = load_into_peft(self.shared_base(), self.references(count), model)
        model = copy.deepcopy(self._peft_models[count], _memo(self.base))
        names = [reference["name"] for reference in self.references(count)]
        model.base_model.set_adapter(names)  # type: ignore[operator]  # PeftModel.set_adapter takes one name only
        return model

    def _write_adapter(self, number: int) -> Path:
        """The first is saved by PEFT; the others are files of the same keys with values of their own."""
        folder, first = self._folder / str(number), self._folder / "0"
        if number == 0:
            get_peft_model(share(self.base), self.lora_config()).save_pretrained(str(folder))
        else:
            folder.mkdir()
            shutil.copy(first / "adapter_config.json", folder)
        generator = torch.Generator().manual_seed(number)
        factors = load_file(first / "adapter_model.safetensors")
        for tensor in factors.values():
            tensor.normal_(std=0.02, generator=generator)
        save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder


def load_into_peft(base: nn.Module, references: list[AdapterReference], model: PeftModel | None = None) -> PeftModel:
    """Load LoRAs as PEFT does, one after the other, in the dtype of the base model.

    Args:
        base: the base model; not used where `model` is given.
        references: the adapters.
        model: a model that has the first of them already.

    Returns:
        The model with all of them.
    """
    loaded = 0 if model is None else len(model.peft_config)
    for reference in references[loaded:]:
        path, name = reference["path"], reference["name"]
        if model is None:
            model = PeftModel.from_pretrained(base, path, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
    assert model is not None
    return model


def share(model: Model) -> Model:
    """A copy of the modules that has the same tensors."""
    return copy.deepcopy(model, _memo(model))


def _memo(model: nn.Module) -> dict[int, Tensor]:
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
