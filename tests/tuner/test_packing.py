"""4-bit weights that bitsandbytes has packed for processors with AVX512-BF16, forced on every machine.

Weights are packed by bitsandbytes' own forward pass; its kernel, which only such processors have, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from peft_composition import CompositionConfig
from peft_composition.tuner import packing
from peft_composition.tuner.locating import composition_layers

from .. import tiny
from ..reference import relative_error


# Two blocks of scales in a row of the smallest weight, so that their order matters.
CONFIG = tiny.llama_config(64, 128, 256)
TARGETS = ["q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
Bases = Callable[[str], nn.Module]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = LlamaForCausalLM.from_pretrained(folder)
    saved = tmp_path_factory.mktemp("adapters")
    return [str(tiny.save_lora(saved / f"{n}", base, TARGETS, seed=n, r=n + 2)) for n in range(2)]


def quantized(folder: Path, kind: str) -> nn.Module:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **KINDS[kind])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


def composed(base: nn.Module, adapters: list[str]) -> PeftModel:
    return get_peft_model(base, CompositionConfig(adapters=list(adapters), task_type="CAUSAL_LM"))


def layers_of(model: nn.Module) -> dict[str, Linear4bit]:
    """The quantized layers by their names in the base model."""
    return {
        tiny.name_in_base(name.removeprefix("base_model.model.")): module
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def pack(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all layers packed, by a forward pass of each as on a processor with AVX512-BF16."""

    def without_kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None, quant_state: Any = None) -> Tensor:
        return x.new_zeros(*x.shape[:-1], quant_state.shape[0])

    mode = model.training
    model.eval()
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(bnb, "matmul_4bit", without_kernel)
        for layer in layers_of(model).values():
            patch.setattr(layer, "support_avx512bf16_for_cpu", True)
            layer(torch.zeros(1, layer.in_features))
            assert layer.weight.quant_state.packing_format_for_cpu
    model.train(mode)


def exact_weight(layer: Linear4bit) -> Tensor:
    """code * scale in float64, from the bytes as bitsandbytes stores them: the high half byte first."""
    state, codes = layer.weight.quant_state, layer.weight.data.flatten().long()
    scales = state.absmax.double()
    if state.nested:
        levels, outer = state.state2.code.double(), state.state2.absmax.double()
        scales = levels[state.absmax.long()] * outer.repeat_interleave(state.state2.blocksize)[: scales.numel()]
        scales = scales + state.offset.double()
    halves = torch.stack([codes >> 4, codes & 15], 1).flatten()
    return (state.code.double()[halves] * scales.repeat_interleave(state.blocksize)).reshape(state.shape)


def stored(layer: Linear4bit) -> dict[str, Tensor]:
    """What a checkpoint has of a layer."""
    return {key: tensor.clone() for key, tensor in layer.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def theta_gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@each_kind
def test_reading_the_weight_unpacks_it_first(
    kind: str, folder: Path, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = composed(quantized(folder, kind), adapters)
    exact = {name: exact_weight(layer) for name, layer in layers_of(model).items()}
    pack(model, monkeypatch)
    for name, layer in composition_layers(model.get_base_model()):
        assert relative_error(layer.get_base_weight(), exact[name]) < 1e-6
    for name, layer in layers_of(model).items():  # also of what is not composed, and what a checkpoint gets
        layer.state_dict()
        assert relative_error(exact_weight(layer), exact[name]) < 1e-15


@each_kind
def test_packing_again_and_again_changes_nothing(
    kind: str, folder: Path, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = composed(quantized(folder, kind), adapters)
    before = {name: stored(layer) for name, layer in layers_of(model).items()}
    for _ in range(3):
        pack(model, monkeypatch)
        theta_gradients(model.train())
        for name, layer in layers_of(model).items():
            assert not layer.weight.quant_state.packing_format_for_cpu
            assert_same(stored(layer), before[name])


@each_kind
def test_a_weight_packed_before_it_was_composed_gets_the_scales_of_the_packed_kernel(
    kind: str, folder: Path, adapters: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = quantized(folder, kind)
    exact = {name: exact_weight(layer) for name, layer in layers_of(base).items()}
    pack(base, monkeypatch)
    model = composed(base, adapters)
    for name, layer in composition_layers(model.get_base_model()):
        error = (layer.get_base_weight().double() - exact[name]).abs()
        assert (error <= torch.finfo(torch.bfloat16).eps / 2 * 1.001 * exact[name].abs() + 1e-12).all()
    model.unload().save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, layer in layers_of(again).items():
        assert relative_error(exact_weight(layer), exact[name]) < torch.finfo(torch.bfloat16).eps / 2


@each_kind
@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_every_layer_through_packed_weights(
    kind: str, training: bool, folder: Path, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through layers that nothing is composed with; in eval mode where the input has a gradient."""
    expected = theta_gradients(composed(quantized(folder, kind), adapters).train())
    model = composed(quantized(folder, kind), adapters)
    pack(model, monkeypatch)
    model.train(training)
    if not training:  # the first layers would use the packed kernel
        model.enable_input_require_grads()

    gradients = theta_gradients(model)

    assert len(gradients) == 4
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, wanted)
        assert gradient.abs().max() > 0


@each_kind
def test_merging_and_unmerging_packed_weights(
    kind: str, folder: Path, adapters: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The numbers of a model that was never packed, whose merge `test_quantized.py` compares with float64."""
    plain, model = (composed(quantized(folder, kind), adapters) for _ in range(2))
    for step in ("merge_adapter", "unmerge_adapter"):
        pack(model, monkeypatch)
        for each in (plain, model):
            getattr(each, step)()
        for name, layer in layers_of(model).items():
            assert_same(stored(layer), stored(layers_of(plain)[name]))
    pack(model, monkeypatch)
    for each, saved in ((plain, "plain"), (model, "packed")):
        each.merge_and_unload().save_pretrained(tmp_path / saved)
    merged = [layers_of(AutoModelForCausalLM.from_pretrained(tmp_path / saved)) for saved in ("plain", "packed")]
    for name, layer in merged[0].items():
        assert_same(stored(layer), stored(merged[1][name]))


@each_kind
def test_saving_leaves_the_base_as_it_was(
    kind: str, folder: Path, adapters: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = composed(quantized(folder, kind), adapters)
    exact = {name: exact_weight(layer) for name, layer in layers_of(model).items()}
    for _ in range(2):
        pack(model, monkeypatch)
        model.save_pretrained(tmp_path / "composed")
        for name, layer in layers_of(model).items():
            assert relative_error(exact_weight(layer), exact[name]) < 1e-15


@each_kind
def test_moving_a_model_unpacks_it_first(
    kind: str, folder: Path, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = composed(quantized(folder, kind), adapters)
    before = {name: stored(layer) for name, layer in layers_of(model).items()}
    pack(model, monkeypatch)
    model._apply(lambda tensor: tensor)
    for name, layer in layers_of(model).items():
        assert not layer.weight.quant_state.packing_format_for_cpu
        assert_same(stored(layer), before[name])


def test_other_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(3, 3), nn.ReLU())
    packing.watch(model)
    packing.unpack_all(model)
    for module in model:
        packing.unpack(module)
        assert not module._forward_pre_hooks
