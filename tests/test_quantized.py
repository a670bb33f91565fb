"""Compositions on bases quantized by real bitsandbytes, in 4 and 8 bit, on the CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peft_composition import CompositionConfig, to_lora

from . import tiny


QUANTIZATIONS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def saved_base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapters(saved_base: Path, tmp_path: Path) -> list[str]:
    base = LlamaForCausalLM.from_pretrained(saved_base)
    return [str(tiny.save_lora(tmp_path / f"{n}", base, ["q_proj", "v_proj"], seed=n, r=n + 2)) for n in range(2)]


def quantized(saved_base: Path, kind: str) -> nn.Module:
    config = BitsAndBytesConfig(**QUANTIZATIONS[kind])
    return AutoModelForCausalLM.from_pretrained(saved_base, quantization_config=config, dtype=torch.float32).eval()


def tokens() -> Tensor:
    return torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))


def uniform_delta(adapters: list[str]) -> Tensor:
    """The mean of s B A over the adapters for MODULE, in float64, from their files."""
    total = torch.zeros(64, 64, dtype=torch.float64)
    for folder in adapters:
        factors = load_file(f"{folder}/adapter_model.safetensors")
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        a, b = (factors[f"base_model.model.{MODULE}.lora_{part}.weight"].double() for part in "AB")
        total += config["lora_alpha"] / config["r"] * (b @ a) / len(adapters)
    return total


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_layer_adds_the_composition_to_the_quantized_output(kind: str, saved_base: Path, adapters: list[str]) -> None:
    model = get_peft_model(quantized(saved_base, kind), CompositionConfig(adapters=adapters))
    layer = model.base_model.model.get_submodule(MODULE)
    x = torch.randn(3, 64)
    added = (layer(x) - layer.base_layer(x)).double()
    expected = x.double() @ uniform_delta(adapters).T
    assert torch.linalg.norm(added - expected) <= 1e-5 * torch.linalg.norm(expected)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_training_step_moves_the_weights_and_reloads_bit_equal(
    kind: str, saved_base: Path, adapters: list[str], tmp_path: Path
) -> None:
    model = get_peft_model(quantized(saved_base, kind), CompositionConfig(adapters=adapters, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(abs(w - 0.5) > 1e-3 for row in model.mixing_weights().values() for w in row.values())
    model.save_pretrained(tmp_path / "saved")
    reloaded = PeftModel.from_pretrained(quantized(saved_base, kind), tmp_path / "saved", low_cpu_mem_usage=True)
    with torch.no_grad():
        assert torch.equal(reloaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_merge_dequantizes_first_and_says_what_it_costs(kind: str, saved_base: Path, adapters: list[str]) -> None:
    """A merge into the codes themselves would be garbage; a right one is off by the rounding of the new weights."""
    model = get_peft_model(quantized(saved_base, kind), CompositionConfig(adapters=adapters))
    layer = model.base_model.model.get_submodule(MODULE)
    before = layer.get_base_weight().double().clone()
    with pytest.warns(UserWarning, match="rounds them again"):
        model.merge_adapter()
    after = layer.get_base_weight().double()
    expected = before + uniform_delta(adapters)
    # Widest gap of the grid, in units of the largest weight: FP4's levels end in 2/3 and 1, int8 has 127 a side.
    step = {"4bit": 1 / 3, "8bit": 1 / 127}[kind] * expected.abs().max()
    assert (after - expected).abs().max() <= step / 2 * (1 + 1e-3)
    assert math.isfinite(model(tokens()).logits.sum().item())


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_export_to_a_plain_lora_never_looks_at_the_quantized_weights(
    kind: str, saved_base: Path, adapters: list[str], tmp_path: Path
) -> None:
    model = get_peft_model(quantized(saved_base, kind), CompositionConfig(adapters=adapters, task_type="CAUSAL_LM"))
    export = to_lora(model.eval())
    A, B = (export.state_dict[f"base_model.model.{MODULE}.lora_{factor}.weight"].double() for factor in "AB")
    expected = uniform_delta(adapters)
    assert torch.linalg.norm(B @ A - expected) <= 1e-6 * torch.linalg.norm(expected)
    export.save_pretrained(tmp_path / "lora")
    plain = PeftModel.from_pretrained(quantized(saved_base, kind), tmp_path / "lora").eval()
    with torch.no_grad():
        assert torch.allclose(plain(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-5)
