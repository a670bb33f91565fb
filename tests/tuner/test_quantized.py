"""Compositions on quantized bases, on the CPU: real bitsandbytes, torchao and compressed-tensors.

The packages that the tests do not install (HQQ, GPTQ, AWQ, AQLM, optimum-quanto) are tried where they are.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)
from transformers.integrations.bitnet import BitLinear
from transformers.integrations.eetq import EetqLinear
from transformers.integrations.gemma_quant import QuantizedLinear

from peft_composition import AdapterError, CompositionConfig, to_lora
from peft_composition.tuner import packing
from peft_composition.tuner.layer import CompositionLayer

from .. import tiny


class Kind(NamedTuple):
    """A way to quantize, and the widest gap of its grid in units of the largest weight."""

    config: Callable[[], Any]
    gap: float
    dtype: torch.dtype = torch.float32


def four_bit(**settings: Any) -> Callable[[], BitsAndBytesConfig]:
    return lambda: BitsAndBytesConfig(load_in_4bit=True, **settings)


FP4_GAP = 1 / 3  # the levels end in 2/3 and 1
NF4_GAP = 1 - 0.6961928  # between the first two levels (QLoRA, arXiv 2305.14314, appendix E)
KINDS = {
    "fp4": Kind(four_bit(bnb_4bit_compute_dtype=torch.float32), FP4_GAP),
    "nf4": Kind(four_bit(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32), NF4_GAP),
    "nf4-double": Kind(four_bit(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), NF4_GAP),
    "nf4-bf16": Kind(
        four_bit(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16), NF4_GAP, torch.bfloat16
    ),
    "fp4-fp16": Kind(four_bit(bnb_4bit_compute_dtype=torch.float16), FP4_GAP, torch.float16),
    "8bit": Kind(lambda: BitsAndBytesConfig(load_in_8bit=True), 1 / 127),
    "torchao-int8": Kind(lambda: TorchAoConfig(Int8WeightOnlyConfig()), 1 / 127),
    "torchao-int4": Kind(lambda: TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32))), 1 / 7),
    "torchao-float8": Kind(lambda: TorchAoConfig(Float8WeightOnlyConfig()), 1 / 8),
}
MODULE = "model.layers.0.self_attn.q_proj"
TARGETS = ["q_proj", "v_proj"]

each_kind = pytest.mark.parametrize("kind", KINDS)
main_kinds = pytest.mark.parametrize("kind", ["nf4", "8bit", "torchao-int8"])


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(tiny.llama_config(64, 64, 128)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(saved_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = LlamaForCausalLM.from_pretrained(saved_base)
    folder = tmp_path_factory.mktemp("adapters")
    return [str(tiny.save_lora(folder / f"{n}", base, TARGETS, seed=n, r=n + 2)) for n in range(2)]


def quantized(saved_base: Path, kind: str) -> nn.Module:
    config = KINDS[kind].config()
    return AutoModelForCausalLM.from_pretrained(saved_base, quantization_config=config, dtype=torch.float32).eval()


def composed(saved_base: Path, kind: str, adapters: list[str], **fields: Any) -> PeftModel:
    config = CompositionConfig(adapters=list(adapters), task_type="CAUSAL_LM", **fields)
    return get_peft_model(quantized(saved_base, kind), config).eval()


def tokens() -> Tensor:
    return torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def layer_of(model: nn.Module, module: str = MODULE) -> CompositionLayer:
    return model.base_model.model.get_submodule(module)


def uniform_delta(adapters: list[str], module: str = MODULE) -> Tensor:
    """The mean of s B A over the adapters for a module, in float64, from their files."""
    total = torch.zeros((), dtype=torch.float64)
    for folder in adapters:
        factors = load_file(f"{folder}/adapter_model.safetensors")
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        a, b = (factors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
        total = total + config["lora_alpha"] / config["r"] * (b @ a) / len(adapters)
    return total


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected))


@each_kind
def test_layer_adds_the_composition_to_the_quantized_output(kind: str, saved_base: Path, adapters: list[str]) -> None:
    layer = layer_of(composed(saved_base, kind, adapters))
    dtype = KINDS[kind].dtype
    assert layer.composition_factors["default"].A.dtype == dtype  # the compute dtype
    assert layer.composition_mixing["default"].weight.dtype == torch.float32
    x = torch.randn(3, 64)
    added = layer(x) - layer.base_layer(x)
    # Factors, input and product are each rounded to the compute dtype.
    assert relative_error(added, x.double() @ uniform_delta(adapters).T) <= max(1e-5, 3 * torch.finfo(dtype).eps)


@each_kind
def test_training_moves_the_weights_and_reloads_bit_equal(
    kind: str, saved_base: Path, adapters: list[str], tmp_path: Path
) -> None:
    model = composed(saved_base, kind, adapters)
    composition = {name: p for name, p in model.named_parameters() if ".composition_" in name}
    before = {name: parameter.detach().clone() for name, parameter in composition.items()}
    with model.disable_adapter():
        base_logits = logits(model)
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
    moved = {name for name, parameter in composition.items() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in composition if ".composition_mixing." in name}
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)
    model.save_pretrained(tmp_path / "saved")
    for low_cpu_mem_usage in (False, True):
        base = quantized(saved_base, kind)
        reloaded = PeftModel.from_pretrained(base, tmp_path / "saved", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(reloaded), logits(model))


@each_kind
def test_merge_dequantizes_first_and_says_what_it_costs(kind: str, saved_base: Path, adapters: list[str]) -> None:
    """A merge into the codes themselves would be garbage; a right one is off by the rounding of the new weights."""
    model = composed(saved_base, kind, adapters)
    layer = layer_of(model)
    before = layer.get_base_weight().double().clone()
    with pytest.warns(UserWarning, match="rounds them again"):
        model.merge_adapter()
    expected = before + uniform_delta(adapters)
    half_gap = KINDS[kind].gap / 2 * expected.abs().max() * 1.02  # the scales of 4 and of 8 bit are rounded, too
    assert (layer.get_base_weight().double() - expected).abs().max() <= half_gap
    assert math.isfinite(logits(model).sum().item())
    model.unmerge_adapter()
    assert (layer.get_base_weight().double() - before).abs().max() <= 2 * half_gap


@each_kind
def test_one_adapter_is_what_peft_makes_of_it(kind: str, saved_base: Path, adapters: list[str]) -> None:
    """Beside the base, merged, unmerged, and merged for good: the numbers of PEFT's LoRA on the same base."""
    lora = PeftModel.from_pretrained(quantized(saved_base, kind), adapters[0]).eval()
    ours = composed(saved_base, kind, adapters[:1])
    # LoRA keeps its factors in float32, here they have the compute dtype.
    tolerance = max(1e-5, 4 * torch.finfo(KINDS[kind].dtype).eps)

    def assert_same_weights() -> None:
        left, right = (model.base_model.model.get_submodule(MODULE).get_base_layer().weight for model in (lora, ours))
        assert type(left) is type(right)
        left, right = (dequantized(model.base_model.model.get_submodule(MODULE)) for model in (lora, ours))
        # A weight between two levels may fall to either side.
        differs = (left - right).abs() > tolerance * left.abs().max()
        assert differs.float().mean() <= (1e-3 if KINDS[kind].dtype == torch.float32 else 0.1)

    packing.watch(lora)  # PEFT reads the codes of 4 bit as they lie, packed for the CPU or not
    assert relative_error(logits(ours), logits(lora).double()) <= tolerance
    packing.unpack_all(lora)
    lora.merge_adapter()
    ours.merge_adapter()
    assert_same_weights()
    packing.unpack_all(lora)
    lora.unmerge_adapter()
    ours.unmerge_adapter()
    assert_same_weights()
    packing.unpack_all(lora)
    lora, ours = lora.merge_and_unload(), ours.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, BaseTunerLayer) for module in ours.modules())
    assert type(ours.get_submodule(MODULE)) is type(lora.get_submodule(MODULE))
    if KINDS[kind].dtype == torch.float32:
        assert relative_error(logits(ours), logits(lora).double()) <= 0.02


def dequantized(layer: BaseTunerLayer) -> Tensor:
    """The weight of a layer's base, from its answers to the unit vectors, so that no dequantization is trusted."""
    base = layer.get_base_layer()
    with torch.no_grad():
        return base(torch.eye(64)).double()


@main_kinds
def test_disabled_the_base_answers_again(kind: str, saved_base: Path, adapters: list[str]) -> None:
    base = logits(quantized(saved_base, kind))
    model = composed(saved_base, kind, adapters)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert not torch.allclose(logits(model), base, atol=1e-2)


@main_kinds
def test_a_safe_merge_of_what_is_not_finite_changes_nothing(kind: str, saved_base: Path, adapters: list[str]) -> None:
    model = composed(saved_base, kind, adapters)
    layer_of(model).composition_factors["default"].B.data[0, 0] = float("inf")
    before = layer_of(model).get_base_weight().clone()
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer_of(model).get_base_weight(), before)
    assert not layer_of(model).merged


@main_kinds
def test_several_compositions(kind: str, saved_base: Path, adapters: list[str]) -> None:
    model = composed(saved_base, kind, adapters[:1])
    first = logits(model)
    model.add_adapter("other", CompositionConfig(adapters=adapters[1:], task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert torch.allclose(logits(model), logits(composed(saved_base, kind, adapters[1:])), rtol=0, atol=1e-6)
    model.base_model.set_adapter(["default", "other"])
    layer, x = layer_of(model), torch.randn(3, 64)
    both = 2 * uniform_delta(adapters)  # active ones add up
    assert relative_error(layer(x) - layer.base_layer(x), x.double() @ both.T) <= 1e-5
    model.base_model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "8bit"])
def test_gradient_checkpointing_after_preparation(
    kind: str, use_reentrant: bool, saved_base: Path, adapters: list[str]
) -> None:
    def gradients(prepare: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
        base = prepare(quantized(saved_base, kind))
        model = get_peft_model(base, CompositionConfig(adapters=list(adapters), task_type="CAUSAL_LM")).train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    expected = gradients(lambda base: base)
    checkpointed = gradients(
        lambda base: prepare_model_for_kbit_training(
            base, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
    )
    assert len(expected) == 4
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for plain, again in zip(expected, checkpointed, strict=True):
        assert torch.allclose(plain, again, rtol=1e-4, atol=1e-9)


@main_kinds
def test_export_to_a_plain_lora_never_looks_at_the_quantized_weights(
    kind: str, saved_base: Path, adapters: list[str], tmp_path: Path
) -> None:
    model = composed(saved_base, kind, adapters)
    export = to_lora(model)
    A, B = (export.state_dict[f"base_model.model.{MODULE}.lora_{factor}.weight"].double() for factor in "AB")
    assert relative_error(B @ A, uniform_delta(adapters)) <= 1e-6
    export.save_pretrained(tmp_path / "lora")
    plain = PeftModel.from_pretrained(quantized(saved_base, kind), tmp_path / "lora").eval()
    assert torch.allclose(logits(plain), logits(model), rtol=0, atol=1e-5)


# What PEFT has no way to merge into


def swapped(build: Callable[[nn.Linear], nn.Module], model: nn.Module, block: str) -> nn.Module:
    """The model with a quantized twin in the place of each target in one block."""
    for name, linear in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in TARGETS and f".{block}." in name:
            setattr(model.get_submodule(parent), leaf, build(linear))
    return model


def of_gemma(linear: nn.Linear) -> nn.Module:
    """Int8 codes and a scale, in a subclass of nn.Linear that PEFT takes for a plain one."""
    layer = QuantizedLinear(linear.in_features, linear.out_features, num_bits=8)
    scale = linear.weight.data.abs().amax(1, keepdim=True) / 127
    layer.weight.data = (linear.weight.data / scale).round().to(torch.int8)
    layer.weight_scale.data = scale
    return layer


def of_torchao(linear: nn.Linear) -> nn.Module:
    """Quantized without transformers: nothing tells how to quantize again."""
    quantize_(holder := nn.Sequential(linear), Int8WeightOnlyConfig())
    return holder[0]


def with_compressed_tensors(model: nn.Module, block: str) -> nn.Module:
    """As checkpoints for vLLM load: plain nn.Linear whose weights are gone until the first forward pass."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    scheme = QuantizationScheme(
        targets=[rf"re:.*\.{block}\..*\.{target}" for target in TARGETS],
        weights=QuantizationArgs(num_bits=4, group_size=32, strategy="group"),
    )
    config = QuantizationConfig(config_groups={"all": scheme}, quantization_status="frozen", format="pack-quantized")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.data.unflatten(1, (-1, 32)).abs().amax(-1) / 7)
    ModelCompressor(quantization_config=config).compress_model(model)
    return model


def of_quanto(linear: nn.Linear) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    holder = nn.Sequential(linear)
    quanto.quantize(holder, weights=quanto.qint8)
    quanto.freeze(holder)
    return holder[0]


def of_gptq(linear: nn.Linear) -> nn.Module:
    gptq = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    shape = {"in_features": linear.in_features, "out_features": linear.out_features}
    layer = gptq.TorchLinear(bits=4, group_size=32, sym=True, desc_act=False, **shape)
    scales = linear.weight.data.unflatten(1, (-1, 32)).abs().amax(-1) / 7
    groups = torch.arange(linear.in_features, dtype=torch.int32) // 32
    layer.pack_original(copy.deepcopy(linear), scales, torch.full_like(scales, 8), groups)
    layer.post_init()
    return layer.eval()


def of_awq(linear: nn.Linear) -> nn.Module:
    awq = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq")
    shape = {"in_features": linear.in_features, "out_features": linear.out_features}
    layer = awq.AwqTorchLinear(bits=4, group_size=32, sym=True, desc_act=False, register_buffers=True, **shape)
    layer.qweight.random_(-(2**31), 2**31 - 1, generator=torch.Generator().manual_seed(0))
    layer.qzeros.fill_(0x77777777)
    layer.scales.fill_(0.01)
    layer.post_init()
    return layer.eval()


FOREIGN: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "gemma-int8": partial(swapped, of_gemma),
    "torchao-direct": partial(swapped, of_torchao),
    "compressed-tensors": with_compressed_tensors,
    "quanto": partial(swapped, of_quanto),
    "gptq": partial(swapped, of_gptq),
    "awq": partial(swapped, of_awq),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_cannot_be_merged_trains_and_is_refused_before_a_layer_is_changed(
    foreign: str, saved_base: Path, adapters: list[str]
) -> None:
    base = FOREIGN[foreign](LlamaForCausalLM.from_pretrained(saved_base).eval(), "1")
    model = get_peft_model(base, CompositionConfig(adapters=list(adapters), task_type="CAUSAL_LM"))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    module = MODULE.replace("0", "1")
    layer, x = layer_of(model, module), torch.randn(3, 64)
    added = layer(x) - layer.base_layer(x)
    assert relative_error(added, x.double() @ uniform_delta(adapters, module).T) <= 1e-2  # AWQ computes in fp16

    model.eval()
    before, plain = logits(model), layer_of(model).base_layer.weight.clone()  # block 0 could be merged
    type_name = type(layer.base_layer).__name__
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=rf"'{module}': The composition 'default' cannot be .*{type_name}"):
            merge()
        assert torch.equal(layer_of(model).base_layer.weight, plain)
        assert torch.equal(logits(model), before)
    assert isinstance(model.unload().get_submodule(module), type(layer.base_layer))


def test_a_composition_beside_others_that_cannot_be_merged(saved_base: Path, adapters: list[str]) -> None:
    """Only layers that the merged composition touches count."""
    base = swapped(of_gemma, LlamaForCausalLM.from_pretrained(saved_base).eval(), "1")
    config = CompositionConfig(adapters=list(adapters), layers_to_transform=[0], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.add_adapter("everywhere", CompositionConfig(adapters=list(adapters), task_type="CAUSAL_LM"))
    expected = layer_of(model).base_layer.weight.double() + uniform_delta(adapters)
    model.merge_adapter(["default"])
    assert relative_error(layer_of(model).base_layer.weight, expected) <= 1e-6


def test_hqq_merges_as_peft_does(saved_base: Path, adapters: list[str]) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")

    def build(linear: nn.Linear) -> nn.Module:
        config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
        return hqq.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")

    def base() -> nn.Module:
        return swapped(build, LlamaForCausalLM.from_pretrained(saved_base).eval(), "0")

    lora = PeftModel.from_pretrained(base(), adapters[0]).eval()
    ours = get_peft_model(base(), CompositionConfig(adapters=adapters[:1], task_type="CAUSAL_LM")).eval()
    assert relative_error(logits(ours), logits(lora).double()) <= 1e-5
    ours(input_ids=tokens(), labels=tokens()).loss.backward()
    for step in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
        lora, ours = (getattr(model, step)() or model for model in (lora, ours))
        assert relative_error(logits(ours), logits(lora).double()) <= 1e-3


@pytest.mark.parametrize("cls", [bnb.nn.Embedding4bit, bnb.nn.Embedding8bit])
def test_a_quantized_embedding_is_composed_but_not_merged(
    cls: type[nn.Embedding], saved_base: Path, tmp_path: Path
) -> None:
    plain = LlamaForCausalLM.from_pretrained(saved_base).eval()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        folder = tiny.save_lora(tmp_path / "lora", plain, ["embed_tokens"], r=4)
    codes = cls(64, 64)
    codes.load_state_dict({"weight": plain.model.embed_tokens.weight.data.clone()})
    plain.model.embed_tokens = codes.to("cpu")  # quantizes
    model = get_peft_model(plain, CompositionConfig(adapters=[str(folder)], task_type="CAUSAL_LM"))
    layer = layer_of(model, "model.embed_tokens")
    factors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    A, B = (factors[f"{prefix}{part}"].double() for part in "AB")
    delta = config["lora_alpha"] / config["r"] * (B @ A).T
    added = layer(tokens()) - layer.base_layer(tokens())
    assert relative_error(added, delta[tokens()]) <= 1e-5
    with pytest.raises(TypeError, match=f"cannot be merged into a base layer of type .*{cls.__name__}"):
        model.merge_adapter()


@pytest.mark.parametrize(
    "build",
    [
        lambda: BitLinear(64, 64, bias=False),
        lambda: EetqLinear(64, 64),
        lambda: torch.ao.nn.quantized.dynamic.Linear(64, 64),
    ],
    ids=["bitnet", "eetq", "torch-dynamic"],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_layer_that_peft_does_not_take_is_refused_by_module_and_type(
    build: Callable[[], nn.Module], saved_base: Path, adapters: list[str]
) -> None:
    base = LlamaForCausalLM.from_pretrained(saved_base).eval()
    base.model.layers[1].self_attn.q_proj = odd = build()
    before = [type(module) for module in base.modules()]
    name = f"{type(odd).__module__}.{type(odd).__qualname__}"
    with pytest.raises(AdapterError, match=rf"'model.layers.1.self_attn.q_proj' .* cannot be composed: .*{name}"):
        get_peft_model(base, CompositionConfig(adapters=list(adapters), task_type="CAUSAL_LM"))
    assert [type(module) for module in base.modules()] == before
