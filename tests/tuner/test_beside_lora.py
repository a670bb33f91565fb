"""A fresh LoRA put on a composition: trained together, saved apart, loaded again with the same outputs."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from peft_composition import CompositionConfig, to_lora

from .. import tiny
from ..reference import TOLERANCE, Reference, read_lora, relative_error


INPUTS = tiny.TINY["llama"].inputs()
HALF = torch.tensor([0.5, 0.5], dtype=torch.float64)
# Modules of both, of the composition alone (q_proj, lm_head and v_proj), and of the fresh LoRA alone (o_proj).
TARGETS = {
    "same modules": ["q_proj", "v_proj"],
    "one shared, one alone": ["v_proj", "o_proj"],
    "none shared": ["o_proj"],
}


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return tiny.save_pair(tmp_path, "llama")


@pytest.fixture(params=TARGETS.values(), ids=TARGETS)
def both(request: pytest.FixtureRequest, folders: list[str]) -> tuple[PeftModel, PeftModel]:
    """A composition, and the same model with a fresh LoRA on it."""
    return with_fresh(tiny.compose("llama", folders), request.param)


def with_fresh(composed: PeftModel, targets: list[str], **fields: object) -> tuple[PeftModel, PeftModel]:
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, **fields)
    return composed, get_peft_model(composed, config, adapter_name="fresh").eval()


def output(model: torch.nn.Module) -> Tensor:
    return tiny.output(model, "llama")


def expected(fresh: str | Path, folders: list[str], weights: Tensor = HALF) -> Tensor:
    """The base with both updates, in float64, from the files of the fresh LoRA and of the composed ones."""
    base = tiny.build("llama").double()
    for name, lora in read_lora(fresh).items():
        base.get_submodule(name.removeprefix("base_model.model.")).weight.data += lora.delta()
    reference = Reference(base, folders)
    return reference(dict.fromkeys(reference.modules, weights), **INPUTS)


def test_both_compute_together_and_are_saved_apart(both, folders: list[str], tmp_path: Path) -> None:
    composed, model = both
    composed.save_pretrained(tmp_path / "composed")
    model.save_pretrained(tmp_path / "outer")
    target = expected(tmp_path / "outer" / "fresh", folders)

    assert relative_error(output(model), target) < TOLERANCE[torch.float32]
    alone = load_file(tmp_path / "composed" / "adapter_model.safetensors")
    assert not any(".base_layer." in key or key.startswith("base_model.model.base_model") for key in alone)
    assert all(".composition_" in key for key in alone)
    assert all(".lora_" in key for key in load_file(tmp_path / "outer" / "fresh" / "adapter_model.safetensors"))
    again = load_file(tmp_path / "outer" / "adapter_model.safetensors")  # the composition, saved from outside
    assert again.keys() == alone.keys()
    assert all(torch.equal(again[key], alone[key]) for key in alone)

    for place in ("composed", "outer"):
        reloaded = PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / place)).eval()
        plain = Reference(tiny.build("llama"), folders)
        assert relative_error(output(reloaded), plain(dict.fromkeys(plain.modules, HALF), **INPUTS)) < 1e-5
        reloaded = PeftModel.from_pretrained(reloaded, str(tmp_path / "outer" / "fresh"), adapter_name="fresh").eval()
        assert torch.equal(output(reloaded), output(model))


def test_a_checkpoint_with_the_path_of_the_lora_in_its_keys_loads(both, tmp_path: Path) -> None:
    """Saved from under a LoRA before this was cared for."""
    composed, model = both
    composed.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {re.sub(r"(?=\.composition_)", ".base_layer", key): value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    reloaded = PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path)).eval()

    with model.disable_adapter():
        base = output(model)
    assert torch.equal(base, output(tiny.build("llama")))
    assert relative_error(output(reloaded), output(to_plain(composed)).double()) < TOLERANCE[torch.float32]


def to_plain(composed: PeftModel) -> PeftModel:
    """The composition without what lies on it, as the LoRA that stock PEFT makes of its export."""
    lora = to_lora(composed)
    stock = get_peft_model(tiny.build("llama"), lora.config)
    set_peft_model_state_dict(stock, lora.state_dict)
    return stock.eval()


def test_merging(both, folders: list[str], tmp_path: Path) -> None:
    composed, model = both
    model.save_pretrained(tmp_path)
    target = expected(tmp_path / "fresh", folders)
    before = output(tiny.build("llama"))

    model.base_model.merge_adapter()
    assert relative_error(output(model), target) < TOLERANCE[torch.float32]
    model.base_model.unmerge_adapter()
    assert relative_error(output(model), target) < TOLERANCE[torch.float32]
    with model.disable_adapter():
        assert relative_error(output(model), before.double()) < TOLERANCE[torch.float32]

    copied = copy.deepcopy(composed)
    merged = composed.merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name or "composition" in name for name, _ in merged.named_parameters())
    assert relative_error(output(merged), target) < TOLERANCE[torch.float32]
    assert relative_error(output(copied.base_model.unload()), before.double()) < TOLERANCE[torch.float32]


def test_a_plain_trainer_trains_both(folders: list[str], tmp_path: Path) -> None:
    composed, model = with_fresh(tiny.compose("llama", folders), ["v_proj", "o_proj"])
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3].partition("_")[0] for name in start} == {"lora", "composition"}
    ids = INPUTS["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()
    model.eval()

    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters() if name in start)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    weights = composed.base_model.mixing_weights("default")
    assert set(weights) == {f"model.layers.{layer}.self_attn.{x}_proj" for layer in (0, 1) for x in "qv"}
    model.save_pretrained(tmp_path / "saved")
    reloaded = PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "saved"))
    reloaded = PeftModel.from_pretrained(reloaded, str(tmp_path / "saved" / "fresh"), adapter_name="fresh").eval()
    assert torch.equal(output(reloaded), output(model))


def test_the_composition_goes_first(folders: list[str]) -> None:
    lora = get_peft_model(tiny.build("llama"), LoraConfig(target_modules=["q_proj"]), adapter_name="fresh")
    before = output(lora)

    with pytest.raises(ValueError, match=r"q_proj' already has .* Compose or load the composition first"):
        get_peft_model(lora, CompositionConfig(adapters=folders))

    assert torch.equal(output(lora), before)


def test_what_is_no_composition_has_no_mixing_weights(folders: list[str]) -> None:
    composed, _ = with_fresh(tiny.compose("llama", folders), ["q_proj"])
    with pytest.raises(ValueError, match=r"no composition 'fresh'; there are \['default'\]"):
        composed.base_model.mixing_weights("fresh")
