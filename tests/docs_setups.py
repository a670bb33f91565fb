"""What the code blocks of the documentation run in: folders under the names that the pages use, and variables.

A page names its set-up in a comment, `<!-- setup: text -->`. Each is a context manager, entered in an empty folder.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from peft_composition import CompositionConfig

from . import tiny
from .hub_server import HubServer, as_the_hub
from .reference import read_lora
from .test_trainer import Sentences


Names = dict[str, Any]
WORDS = ["[UNK]", "[PAD]", "[EOS]", "the", "film", "shop", "was", "not", "good", "bad", "a", "and"]


@contextmanager
def text() -> Iterator[Names]:
    """A tiny BERT with a tokenizer, three LoRAs for it, a csv file of reviews, and tokens with labels to train on."""
    _text_base().save_pretrained("org/base-model")
    _tokenizer().save_pretrained("org/base-model")
    base = AutoModelForSequenceClassification.from_pretrained("org/base-model")
    for number, folder in enumerate(("me/lora-a", "you/lora-b", "lora-c"), start=1):
        targets = ["query", "value"] if number < 3 else ["query", "key"]
        tiny.save_lora(Path(folder), base, targets, seed=number, r=number, task_type="SEQ_CLS")
        _name_base(folder, "org/base-model")
    shutil.copytree("you/lora-b", "you/lora-b@v2")  # stands for a revision on the Hub
    with open("reviews.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([["the film was good", 1], ["the film was not good", 0], ["a good shop", 1], ["bad film", 0]])
    yield {"train_dataset": Sentences(32, seed=0)}


@contextmanager
def composed() -> Iterator[Names]:
    """The same with a composition of the three, and the folder that it was saved to."""
    with text() as names:
        yield {**names, **_composition()}


@contextmanager
def generation() -> Iterator[Names]:
    """A tiny Llama with a tokenizer, and two LoRAs for it."""
    _language_model()
    yield {}


@contextmanager
def quantized() -> Iterator[Names]:
    """The same, wide enough for the blocks of a quantization."""
    _language_model(hidden_size=64)
    yield {}


@contextmanager
def images() -> Iterator[Names]:
    """A tiny ViT with its image processor, two LoRAs for it, and photographs in a folder for each class."""
    base = tiny.build("vit")
    base.save_pretrained("org/vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("org/vit")
    for number, folder in enumerate(("me/flowers", "you/birds"), start=1):
        tiny.save_lora(Path(folder), base, ["q_proj", "v_proj"], seed=number, r=number)
    for name, color in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Path("photos", name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (20, 16), color).save(Path("photos", name, f"{number}.png"))
    yield {}


@contextmanager
def similarity() -> Iterator[Names]:
    """A composition, a LoRA that stands for one of the target task, another copy of the base, and batches."""
    with composed() as names:
        base = AutoModelForSequenceClassification.from_pretrained("org/base-model")
        tiny.save_lora(Path("me/lora-of-the-target"), base, ["query", "value"], seed=4)
        for name, parameter in names["model"].named_parameters():
            if ".composition_mixing." in name:
                nn.init.normal_(parameter, std=0.01)  # as if it had been trained
        yield {**names, "another_base": base, "loader": DataLoader(names["train_dataset"], batch_size=8)}


@contextmanager
def mlx() -> Iterator[Names]:
    """A LoRA as MLX writes it; converted it must be the one that it was made from."""
    _language_model()
    config = json.loads(Path("me/style-a/adapter_config.json").read_text())
    tensors = {}
    for key, value in load_file("me/style-a/adapter_model.safetensors").items():
        module = key.removeprefix("base_model.model.").removesuffix(".weight")
        name = module.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        tensors[name] = value.T.contiguous()
    Path("mlx-adapter").mkdir()
    save_file(tensors, "mlx-adapter/adapters.safetensors")
    parameters = {"rank": config["r"], "scale": config["lora_alpha"] / config["r"]}
    Path("mlx-adapter/adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": parameters})
    )
    yield {}
    expected, actual = read_lora("me/style-a"), read_lora("converted")
    assert actual.keys() == expected.keys()
    for module, lora in expected.items():
        torch.testing.assert_close(actual[module].delta(), lora.delta())
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base-lm"), "converted")


@contextmanager
def fsdp() -> Iterator[Names]:
    """A composition in a process group of one process, and a batch."""
    with composed() as names:
        store = torch.distributed.FileStore(str(Path("store").resolve()), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            rows = [names["train_dataset"][number] for number in range(8)]
            yield {**names, "batch": {key: torch.stack([row[key] for row in rows]) for key in rows[0]}}
        finally:
            torch.distributed.destroy_process_group()


@contextmanager
def hub() -> Iterator[Names]:
    """A composition, and a Hub that is a server of this process."""
    with composed() as names, HubServer() as server:
        with as_the_hub(server, "cache", server.token):
            yield names
        pushed = server.repositories["me/composed"]
        files = pushed.commits[pushed.refs["main"]]
        assert {"adapter_model.safetensors", "README.md", "lora/adapter_model.safetensors"} <= set(files)
        assert b"0.91" in files["README.md"]


@contextmanager
def search() -> Iterator[Names]:
    """A Hub that is a server of this process, with a base model and an adapter of it; nothing in the folder."""
    with HubServer() as server, as_the_hub(server, "cache"):
        config = {"peft_type": "LORA", "base_model_name_or_path": "org/base-model", "r": 8, "lora_alpha": 8}
        files = {"adapter_config.json": json.dumps({**config, "task_type": "SEQ_CLS"}).encode()}
        server.push("org/base-model", {"config.json": b"{}"})
        server.push("me/lora-a", {**files, "adapter_model.safetensors": b"weights"})
        server.repositories["me/lora-a"].tags = ["base_model:adapter:org/base-model", "license:apache-2.0"]
        yield {}
        found = json.loads(Path("candidates.json").read_text())
        assert [(own["id"], own["composable"]) for own in found["adapters"]] == [("me/lora-a", True)]


SETUPS: dict[str, Callable[[], AbstractContextManager[Names]]] = {
    setup.__name__: setup
    for setup in (text, composed, generation, quantized, images, similarity, mlx, fsdp, hub, search)
}


def _text_base() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]")


def _language_model(hidden_size: int = 16) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny.llama_config(60, hidden_size, 2 * hidden_size))
    base.save_pretrained("org/base-lm")
    _tokenizer().save_pretrained("org/base-lm")
    for number, folder in enumerate(("me/style-a", "you/style-b"), start=1):
        tiny.save_lora(Path(folder), base, ["q_proj", "v_proj"], seed=number, r=2 * number, task_type="CAUSAL_LM")
        _name_base(folder, "org/base-lm")


def _name_base(folder: str, base: str) -> None:
    config = PeftConfig.from_pretrained(folder)
    config.base_model_name_or_path = base
    config.save_pretrained(folder)


def _composition() -> Names:
    base = AutoModelForSequenceClassification.from_pretrained("org/base-model", num_labels=2)
    config = CompositionConfig(adapters=["me/lora-a", "you/lora-b", "./lora-c"], task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    model.save_pretrained("composed")
    plain = AutoModelForSequenceClassification.from_pretrained("org/base-model", num_labels=2)
    return {"base": plain, "config": config, "model": model}
