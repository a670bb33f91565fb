"""Few-shot training on a real 4-bit base: SmolLM2-135M, NF4, real sentences, the plain Trainer, on the CPU."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from smollm2 import model_folder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments
from vader import load_domain

from peft_composition import CompositionConfig

from .. import tiny, warm


MODULES = 2 * 30  # query and value of every block
K = 4

RELOAD = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import peft_composition

base, composed, inputs, output = sys.argv[1:]
torch.set_num_threads(1)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), composed).eval()
with torch.no_grad():
    torch.save(model(torch.load(inputs)).logits, output)
"""


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as 4-bit codes; quantized once, because that takes longer than training a step."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,  # few processors compute in bfloat16
    )
    folder = tmp_path_factory.mktemp("smollm2-4bit")
    source = model_folder()
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def sentences(tokenizer: Any, domain: str) -> list[dict[str, Tensor]]:
    """K sentences of one domain as inputs of a causal model, cut to 16 tokens."""
    rows = (tokenizer(example.text)["input_ids"] for example in load_domain(domain))
    ids = torch.tensor([row[:16] for row in rows if len(row) >= 16][:K])
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model: nn.Module, data: list[dict[str, Tensor]], folder: Path, **settings: Any) -> list[float]:
    """Train on the same K sentences in every step; returns the loss of every step."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=K,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        lr_scheduler_type="constant",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_real_4_bit_model_learns_the_mix_and_reloads_in_another_process(base_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    train(lora, sentences(tokenizer, "amazon"), tmp_path, max_steps=5, learning_rate=5e-3)
    relevant = tmp_path / "relevant"
    lora.save_pretrained(str(relevant))
    adapters = [str(relevant), *(str(tiny.randomised(relevant, tmp_path / f"random{n}", n)) for n in (1, 2))]

    base = lora.unload()
    codes = base.get_submodule("model.layers.0.self_attn.q_proj").weight
    before = codes.detach().clone()
    model = get_peft_model(base, CompositionConfig(adapters=adapters, task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters()[0] == MODULES * len(adapters)
    losses = train(model, sentences(tokenizer, "movies"), tmp_path, max_steps=6, learning_rate=5e-3)

    assert all(after < before for before, after in pairwise(losses)), losses
    assert losses[-1] < losses[0] - 0.1, losses
    weights = model.mixing_weights()
    assert len(weights) == MODULES
    assert all(max(abs(weight - 1 / 3) for weight in row.values()) > 1e-3 for row in weights.values())
    mean = sum(row["relevant"] for row in weights.values()) / MODULES
    assert mean > 0.38, mean  # from 1/3
    assert torch.equal(codes, before)

    model.save_pretrained(tmp_path / "composed")
    ids = torch.stack([row["input_ids"] for row in sentences(tokenizer, "nyt")])
    torch.save(ids, tmp_path / "ids.pt")
    with torch.no_grad():
        expected = model.eval()(ids).logits
    arguments = [base_folder, tmp_path / "composed", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    done = warm.run("-c", RELOAD, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
