"""What one step computes and keeps, counted on the meta device from configs written out here: no weights, no data."""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from sentence_classifier import SentenceClassifier
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.memory import SavedBytes
from peft_composition import CompositionConfig

from .counting import Body
from .models import HEAD, NO_DROPOUT, small_vit
from .scenario import CAUSAL, LANGUAGE, ModelSpec


SIDE = 28  # of the images that small models are pretrained on
CLASSES = 100  # of a head; how many there are hardly matters beside the body
FLAN: dict[str, Any] = {"decoder_start_token_id": 0, "tie_word_embeddings": False}
# What the config.json of each says that counts here.
SHAPES: dict[str, tuple[Any, Any]] = {
    "google/vit-base-patch32-224-in21k": (ViTForImageClassification, ViTConfig(patch_size=32)),
    "google/flan-t5-large": (
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=32128,
            d_model=1024,
            d_kv=64,
            d_ff=2816,
            num_layers=24,
            num_heads=16,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            **FLAN,
        ),
    ),
    "minilm": (
        SentenceClassifier,
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, **NO_DROPOUT),
    ),
    "smollm2": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
    ),
}


@dataclass(frozen=True)
class Footprint:
    """What training takes.

    Attributes:
        forward: FLOPs of an example's forward pass; a multiplication and an addition are two.
        step: FLOPs of its forward and backward pass.
        weights: bytes of parameters and buffers, trained or not.
        trainable: parameters that are trained.
        activations: bytes that a batch keeps for its backward pass.
    """

    forward: float
    step: float
    weights: int
    trainable: int
    activations: int

    @property
    def memory(self) -> int:
        """Bytes of weights, activations, and of what AdamW needs in float32: a gradient and two averages."""
        return self.weights + self.activations + 3 * 4 * self.trainable


@cache
def footprint(spec: ModelSpec, body: Body, batch: int, tokens: tuple[int, int]) -> Footprint:
    """Counts one training step of a model.

    Args:
        spec: the scenario's model.
        body: what trains; "bare" is counted as if it did.
        batch: examples of a step.
        tokens: of a text or question, and of an answer; images have none.

    Raises:
        ValueError: if the model's shape is not known.
    """
    if body.kind == "bare":
        return footprint(spec, Body("full"), batch, tokens)
    # All layers are alike, so models of one and of two tell what every further one adds.
    one, two = (astuple(_counted(spec, body, batch, tokens, layers)) for layers in (1, 2))
    further = _layers(spec) - 1
    return Footprint(*(first + further * (second - first) for first, second in zip(one, two)))


def _counted(spec: ModelSpec, body: Body, batch: int, tokens: tuple[int, int], layers: int) -> Footprint:
    model = build(spec, body, layers).train()
    kept = SavedStorages(model)
    with FlopCounterMode(display=False) as counter:
        with kept.counting():
            loss = model(**_batch(spec, batch, tokens)).loss
        forward = counter.get_total_flops()
        loss.backward()
        step = counter.get_total_flops()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Footprint(forward / batch, step / batch, _bytes(model), trainable, kept.total)


def build(spec: ModelSpec, body: Body, layers: int) -> nn.Module:
    """The model, with so many layers, on the meta device, as `methods.build` makes it of real weights.

    Raises:
        ValueError: if the model's shape is not known.
    """
    base = _bare(spec, layers)
    if body.kind in ("bare", "full"):
        return base
    if body.kind == "lora":
        return _lora(base, spec, body.rank)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the upstream head, which is not used
        lora = _lora(_bare(spec, layers), spec, body.rank)
        zeros = {name: torch.zeros(tensor.shape) for name, tensor in get_peft_model_state_dict(lora).items()}
        save_file(zeros, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
        lora.peft_config["default"].save_pretrained(folder)
        adapters: list[Any] = [{"path": folder, "name": f"upstream{number}"} for number in range(body.adapters)]
        return get_peft_model(base, CompositionConfig(adapters=adapters, **_peft_options(spec))).to("meta")


class SavedStorages(SavedBytes):
    """Counts what autograd keeps on any device.

    Storages are told apart by what they are, not by where their data lie: on the meta device these lie nowhere.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen: list[torch.UntypedStorage] = []  # a storage that is gone would give its place to the next one
        super().__init__(model)

    def _identity(self, storage: torch.UntypedStorage) -> int:
        self._seen.append(storage)
        return storage._cdata


def _layers(spec: ModelSpec) -> int:
    if spec.pretraining is not None:
        return spec.pretraining.layers
    layers: int = _shape(spec)[1].num_hidden_layers
    return layers


def _shape(spec: ModelSpec) -> tuple[Any, Any]:
    if spec.path not in SHAPES:
        raise ValueError(f"the shape of {spec.path!r} is not known: add it to SHAPES of {Path(__file__).name}")
    return SHAPES[spec.path]


def _bare(spec: ModelSpec, layers: int) -> PreTrainedModel:
    with torch.device("meta"):
        if spec.pretraining is not None:
            return small_vit(replace(spec, pretraining=replace(spec.pretraining, layers=layers)), CLASSES, SIDE)
        kind, shape = _shape(spec)
        config = copy.deepcopy(shape)
        config.num_hidden_layers = layers
        if spec.kind == "text-to-text":
            config.num_decoder_layers = layers
        if spec.kind not in LANGUAGE:
            config.num_labels = CLASSES
        # Written-out attention keeps more than a fused one: what is counted is the upper bound, on every device.
        model: PreTrainedModel = kind._from_config(config, attn_implementation="eager")
    return model


def _lora(base: nn.Module, spec: ModelSpec, rank: int) -> Any:
    config = LoraConfig(r=rank, target_modules=list(spec.target_modules), **_peft_options(spec))
    return get_peft_model(base, config).to("meta")


def _peft_options(spec: ModelSpec) -> dict[str, Any]:
    return {} if spec.kind in LANGUAGE else {"modules_to_save": [HEAD]}


def _batch(spec: ModelSpec, batch: int, tokens: tuple[int, int]) -> dict[str, Tensor]:
    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device="meta")

    if spec.kind == "image":
        side = 224 if spec.pretraining is None else SIDE
        return {"pixel_values": torch.zeros(batch, 3, side, side, device="meta"), "labels": integers(batch)}
    question, answer = tokens
    if spec.kind == "text-to-text":
        return {"input_ids": integers(batch, question), "labels": integers(batch, answer)}
    if spec.kind in CAUSAL:
        return {"input_ids": integers(batch, question + answer), "labels": integers(batch, question + answer)}
    texts = integers(batch, question)
    return {"input_ids": texts, "attention_mask": torch.ones_like(texts), "labels": integers(batch)}


def _bytes(model: nn.Module) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
