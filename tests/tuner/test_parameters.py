"""Compositions of bare parameters and of `nn.MultiheadAttention`: what the matrices over tiny models do not reach."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_composition import AdapterError, CompositionConfig, add_to_checkpoint, to_lora
from peft_composition.analysis.inspection import inspect_adapters
from peft_composition.names import block_of
from peft_composition.tuner.locating import composition_layers
from peft_composition.tuner.parameters import ParameterWrapper
from peft_composition.tuner.wrapping import attention_output_times

from .. import tiny
from ..reference import Reference, mixing_weights, read_lora, relative_error
from ..reference import attention_output_times as merged_times


TARGETS = ["inner", "holder.table", "holder.stack", "flipped.stack", "attn"]
GAIN = 8.0


class Holder(nn.Module):
    """A matrix and a stack of matrices beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 5))
        self.stack = nn.Parameter(torch.randn(3, 7, 5))
        self.inner = nn.Linear(5, 5)
        self.label = "holder"

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).tanh()
        return torch.cat([x @ self.table.t(), torch.einsum("...i,eoi->...o", x, self.stack)], dim=-1)


class Flipped(nn.Module):
    """A stack of matrices stored as (in, out)."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 13, 8))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * torch.einsum("...i,eio->...o", x, self.stack)


class Net(nn.Module):
    """Every kind of parameter, one wrapped module with a composed layer inside it, and an attention in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder()
        self.flipped = Flipped()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)})])

    def forward(self, x: Tensor) -> Tensor:
        h = self.flipped(self.holder(x).tanh(), scale=0.5)
        return self.blocks[0]["attn"](h, h, h)[0]


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def x_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three LoRAs that touch all, some and one of the parameters, with ranks and scales by pattern."""
    folder = tmp_path_factory.mktemp("parameters")
    settings: list[tuple[list[str], dict[str, Any]]] = [
        (TARGETS, {"r": 2, "lora_alpha": 6, "rank_pattern": {"attn": 3}, "alpha_pattern": {"attn": 5}}),
        (["inner", "holder.stack", "attn"], {"r": 3, "lora_alpha": 2, "use_rslora": True}),
        (["flipped.stack"], {"r": 4, "lora_alpha": 8}),
    ]
    return [
        str(tiny.save_lora(folder / f"{number}", net(), targets, seed=number, **lora))
        for number, (targets, lora) in enumerate(settings)
    ]


def compose(base: nn.Module, folders: list[str], **fields: Any) -> PeftModel:
    return get_peft_model(base, CompositionConfig(adapters=folders, gain=GAIN, **fields))


def scrambled(base: nn.Module, folders: list[str], **fields: Any) -> tuple[PeftModel, dict[str, Tensor]]:
    """A composition whose weights have left their start, and theta of every module as a float64 leaf."""
    model = compose(base, folders, **fields)
    generator = torch.Generator().manual_seed(3)
    thetas = {}
    for name, layer in composition_layers(model.get_base_model()):
        theta = layer.composition_mixing["default"].weight
        theta.data = torch.randn(theta.shape, generator=generator).to(theta.dtype) / GAIN
        thetas[name] = theta.detach().double().requires_grad_()
    return model, thetas


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(x_of())


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_output_and_gradients_are_those_of_composed_parameters(dtype: torch.dtype, folders: list[str]) -> None:
    model, thetas = scrambled(net().to(dtype), folders)
    x, exact_x = x_of(dtype).requires_grad_(), x_of(torch.float64).requires_grad_()
    y = model(x)
    y.square().sum().backward()

    reference = Reference(net().to(dtype), folders)
    assert list(model.base_model.mixing_weights()) == reference.modules
    weights = {name: mixing_weights([1 / 3] * 3, theta, GAIN, "softmax") for name, theta in thetas.items()}
    expected = reference(weights, exact_x)
    expected.square().sum().backward()

    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    assert relative_error(y, expected) < tolerance
    assert relative_error(x.grad, exact_x.grad) < tolerance
    for name, layer in composition_layers(model.get_base_model()):
        assert relative_error(layer.composition_mixing["default"].weight.grad, thetas[name].grad) < tolerance, name
        w = weights[name].detach()
        assert relative_error(layer.get_delta_weight("default"), reference.delta(name, w)) < tolerance, name


@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_adapter_is_that_adapter_in_peft(number: int, folders: list[str]) -> None:
    alone = output(PeftModel.from_pretrained(net(), folders[number]).eval())
    close(output(compose(net(), [folders[number]])), alone)
    assert (alone - output(net())).abs().max() > 0.1


@pytest.mark.parametrize("fields", [{"mixing": "uniform"}, {"weight_sharing": "block"}, {"weight_sharing": "model"}])
def test_other_mixings(fields: dict[str, str], folders: list[str]) -> None:
    model = compose(net(), folders, **fields)
    reference = Reference(net(), folders)
    expected = reference(dict.fromkeys(reference.modules, torch.full((3,), 1 / 3).double()), x_of(torch.float64))
    close(output(model), expected.detach().float())
    shared = {id(layer.composition_mixing["default"]) for _, layer in composition_layers(model.get_base_model())}
    assert len(shared) == {"block": 5, "model": 1}.get(fields.get("weight_sharing", ""), 6)


def test_the_projections_of_an_attention_are_in_its_block() -> None:
    assert block_of("blocks.0.attn.in_proj_weight") == block_of("blocks.0.attn.out_proj") == "blocks.0"
    assert block_of("model.layers.1.mlp.experts.gate_up_proj") == "model.layers.1"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_the_sum_is_rounded_once(dtype: torch.dtype, folders: list[str]) -> None:
    model = compose(net().to(dtype), folders, mixing="uniform")
    reference = Reference(net().to(dtype), folders)
    for name, layer in composition_layers(model.get_base_model()):
        if hasattr(layer, "composed_weight"):
            composed = layer.composed_weight()
            delta = reference.delta(name, torch.full((3,), 1 / 3).double())
            expected = layer._parameter().double() + delta
            # Half a unit in the last place of the sum; A, B with its scale and weight are rounded before.
            eps = torch.finfo(dtype).eps
            error = (composed.double() - expected).abs()
            assert composed.dtype == dtype
            assert (error <= eps / 2 * expected.abs() * 1.01 + 8 * eps * delta.abs().max()).all(), name


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_and_unloading_reach_what_is_inside_a_wrapped_module(safe_merge: bool, folders: list[str]) -> None:
    model, _ = scrambled(net(), folders)
    expected, base = output(model), net()
    model.merge_adapter(safe_merge=safe_merge)
    close(output(model), expected)
    with model.disable_adapter():
        close(output(model), output(base))
    close(output(model), expected)
    for unloaded, wanted in (
        (copy.deepcopy(model).merge_and_unload(safe_merge=safe_merge), expected),
        (copy.deepcopy(model).unload(), output(base)),
    ):
        close(output(unloaded), wanted)
        assert [(n, type(m)) for n, m in unloaded.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
        assert unloaded.state_dict().keys() == base.state_dict().keys()


def test_a_safe_merge_of_values_that_are_not_finite_changes_nothing(folders: list[str]) -> None:
    model = compose(net(), folders)
    model.get_base_model().holder.composed_parameters["stack"].composition_factors["default"].A.data[0, 0, 0] = (
        math.inf
    )
    before = model.get_base_model().holder.base_layer.stack.clone()
    with pytest.raises(ValueError, match="merged weights are not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.get_base_model().holder.base_layer.stack, before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("save_adapters", [False, True])
def test_a_checkpoint_loads_where_other_modules_are_wrapped(
    low_cpu_mem_usage: bool, save_adapters: bool, folders: list[str], tmp_path: Path
) -> None:
    """A layer inside a wrapped module has another path than in a model where that module is not wrapped."""
    inner = str(tiny.save_lora(tmp_path / "inner", net(), ["inner"], seed=5))
    model = compose(net(), [inner], save_adapters=save_adapters)
    alone = output(model)
    model.add_adapter("all", CompositionConfig(adapters=folders, save_adapters=save_adapters))
    model.base_model.set_adapter(["default", "all"])
    both = output(model)
    close(output(copy.deepcopy(model).merge_and_unload()), both)
    model.set_adapter("default")
    close(output(model), alone)
    model.save_pretrained(str(tmp_path / "saved"))

    loaded = PeftModel.from_pretrained(net(), str(tmp_path / "saved"), low_cpu_mem_usage=low_cpu_mem_usage)
    close(output(loaded), alone)
    result = loaded.load_adapter(str(tmp_path / "saved" / "all"), "all", low_cpu_mem_usage=low_cpu_mem_usage)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    loaded.base_model.set_adapter(["default", "all"])
    close(output(loaded), both)
    if save_adapters:
        export = to_lora(model, "default")
        again = add_to_checkpoint(tmp_path / "saved")
        assert {key: t.tolist() for key, t in again.state_dict.items()} == {
            key: t.tolist() for key, t in export.state_dict.items()
        }


def test_the_config_records_names_that_can_be_read(folders: list[str], tmp_path: Path) -> None:
    compose(net(), folders).save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["composed_modules"] == {
        "holder.table": [2, 0, 0],
        "holder.stack": [2, 3, 0],
        "holder.inner": [2, 3, 0],
        "flipped.stack": [2, 0, 4],
        "blocks.0.attn.in_proj_weight": [3, 3, 0],
        "blocks.0.attn.out_proj": [3, 3, 0],
    }


class TestExport:
    def test_is_exact_and_stock_peft_gives_the_same(self, folders, tmp_path) -> None:
        model, thetas = scrambled(net(), folders)
        export = to_lora(model)
        export.save_pretrained(tmp_path)
        reference, exported = Reference(net(), folders), read_lora(tmp_path)
        assert exported.keys() == thetas.keys() == export.ranks.keys()
        for name, theta in thetas.items():
            expected = reference.delta(name, mixing_weights([1 / 3] * 3, theta.detach(), GAIN, "softmax"))
            expected = expected.mT if name == "flipped.stack" else expected
            assert relative_error(exported[name].delta(), expected) < 1e-6, name
        with pytest.warns(UserWarning, match="ranks"):
            own = to_lora(model, one_rank=False)
        assert own.ranks["holder.stack"] == 5
        assert set(export.ranks.values()) == {max(own.ranks.values())}
        close(output(PeftModel.from_pretrained(net(), str(tmp_path)).eval()), output(model))

    @pytest.mark.parametrize("rank", [1, 4])
    def test_truncates_every_matrix_of_a_stack_by_itself(self, rank, folders, tmp_path) -> None:
        model, thetas = scrambled(net().double(), folders)
        export = to_lora(model, rank=rank)
        export.save_pretrained(tmp_path)
        reference, exported = Reference(net(), folders), read_lora(tmp_path)
        lost, norms = [], []
        for name, theta in thetas.items():
            delta = reference.delta(name, mixing_weights([1 / 3] * 3, theta.detach(), GAIN, "softmax"))
            delta = delta.mT if name == "flipped.stack" else delta
            U, S, Vh = np.linalg.svd(delta.numpy(), full_matrices=False)
            nearest = (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]
            assert np.linalg.norm(exported[name].delta().numpy() - nearest) < 1e-9 * np.linalg.norm(nearest), name
            lost.append(np.linalg.norm(S[..., rank:]))
            norms.append(np.linalg.norm(S))
            assert export.errors[name] == pytest.approx(lost[-1] / norms[-1], abs=1e-9), name
        assert export.total_error == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(norms), abs=1e-9)

    @pytest.mark.parametrize("energy", [0.5, 0.9])
    def test_energy_is_counted_over_all_matrices_of_a_stack(self, energy, folders) -> None:
        model, thetas = scrambled(net().double(), folders)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about ranks that differ
            export = to_lora(model, energy=energy, one_rank=False)
        reference = Reference(net(), folders)
        for name in ("holder.stack", "flipped.stack", "holder.table"):
            weights = mixing_weights([1 / 3] * 3, thetas[name].detach(), GAIN, "softmax")
            values = np.linalg.svd(reference.delta(name, weights).numpy(), compute_uv=False) ** 2
            share = np.cumsum(values.reshape(-1, values.shape[-1]).sum(0))
            assert export.ranks[name] == 1 + int((share < energy * share[-1]).sum()), name
            assert export.errors[name] <= math.sqrt(1 - energy)

    def test_round_rank(self, folders, tmp_path) -> None:
        model, _ = scrambled(net(), folders)
        export = to_lora(model, round_rank=True)
        assert set(export.ranks.values()) == {8}
        export.save_pretrained(tmp_path)
        close(output(PeftModel.from_pretrained(net(), str(tmp_path)).eval()), output(model))

    def test_half_an_attention_gets_zeros_for_the_other_half(self, tmp_path) -> None:
        half = str(tiny.save_lora(tmp_path / "half", net(), ["inner", "attn.in_proj_weight"], seed=4))
        model = compose(net(), [half])
        assert list(model.base_model.mixing_weights()) == ["holder.inner", "blocks.0.attn.in_proj_weight"]
        to_lora(model).save_pretrained(tmp_path / "lora")
        assert not read_lora(tmp_path / "lora")["blocks.0.attn.out_proj"].delta().any()
        expected = output(PeftModel.from_pretrained(net(), half).eval())
        close(output(PeftModel.from_pretrained(net(), str(tmp_path / "lora")).eval()), expected)
        close(output(model), expected)

    def test_what_peft_has_in_no_lora_is_refused(self, folders, tmp_path) -> None:
        base = nn.ModuleDict({"holder": Holder(), "conv": tiny.build("gpt2").transformer.h[0].attn.c_attn})
        base["lin"] = nn.Linear(4, 4)
        stack = tiny.save_lora(tmp_path / "stack", base, ["holder.stack"])
        biased = tiny.save_lora(tmp_path / "biased", base, ["lin"], lora_bias=True)
        conv = tiny.save_lora(tmp_path / "conv", base, ["conv"], fan_in_fan_out=True)
        for other, message in ((biased, r"touches a parameter directly \(here 'holder.stack'"), (conv, "Conv1D")):
            model = compose(copy.deepcopy(base), [str(stack), str(other)])
            with pytest.raises(ValueError, match=message):
                to_lora(model)


class TestAttention:
    def test_peft_adds_the_output_projection_as_often_as_it_says(self) -> None:
        assert attention_output_times() == merged_times()
        attention_output_times.cache_clear()
        state = torch.get_rng_state()
        with init_empty_weights(), torch.device("meta"):
            assert attention_output_times() == merged_times()
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_kernels_of_an_encoder_see_the_composition(self, tmp_path) -> None:
        """In eval mode the encoder layer takes the weights of its attention instead of calling it."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        folder = str(tiny.save_lora(tmp_path / "a", base, ["self_attn"], seed=1))
        model = compose(copy.deepcopy(base), [folder])
        x = torch.randn(2, 5, 8)
        weights = dict.fromkeys(read_lora(folder), torch.ones(1, dtype=torch.float64))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = Reference(base, [folder])(weights, x.double()).detach().float()
            close(model(x).detach(), expected)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        for is_needed in (True, False):
            with torch.set_grad_enabled(is_needed):
                close(model(x).detach(), expected)
                close(model(x, src_key_padding_mask=torch.zeros(2, 5, dtype=torch.bool)).detach(), expected)
        with model.disable_adapter():
            close(model(x).detach(), base(x).detach())
        model.train()
        assert model(x).requires_grad

    def test_a_lora_on_the_output_projection_alone_is_refused(self, tmp_path) -> None:
        base = tiny.build("attention")
        folder = str(tiny.save_lora(tmp_path / "a", base, ["lin", "out_proj"], seed=1))
        with pytest.raises(
            AdapterError, match=r"never calls its out_proj.*exclude_modules, or train a LoRA on 'attn'"
        ):
            compose(base, [folder])
        model = compose(base, [folder], exclude_modules=["out_proj"])
        assert list(model.base_model.mixing_weights()) == ["lin"]

    def test_weights_of_their_own_for_keys_and_values_are_refused(self, tmp_path) -> None:
        folder = str(tiny.save_lora(tmp_path / "a", tiny.build("attention"), ["attn"], seed=1))
        base = tiny.build("attention")
        base.attn = nn.MultiheadAttention(12, 2, kdim=6, vdim=6)
        with pytest.raises(AdapterError, match=r"MultiheadAttention.in_proj_weight.*separate weights"):
            compose(base, [folder])

    def test_a_bias_that_peft_ignores_is_dropped_if_it_is_zero(self, tmp_path) -> None:
        base = tiny.build("attention")
        folder = tiny.save_lora(tmp_path / "a", base, ["lin", "attn"], seed=1, lora_bias=True)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        with pytest.raises(AdapterError, match="'attn' has a LoRA bias"):
            compose(base, [str(folder)])
        zeros = {key: t.zero_() if "attn" in key and key.endswith("lora_B.bias") else t for key, t in tensors.items()}
        save_file(zeros, file)
        model = compose(base, [str(folder)])
        assert model.peft_config["default"].biased_modules == ["lin"]
        to_lora(model).save_pretrained(tmp_path / "lora")
        plain = PeftModel.from_pretrained(tiny.build("attention"), str(tmp_path / "lora")).eval()
        close(tiny.output(plain, "attention"), tiny.output(model.eval(), "attention"))


class TestNaming:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"target_modules": ["table"]}, ["holder.table"]),
            ({"target_modules": ["holder"]}, ["holder.table", "holder.stack"]),
            ({"target_modules": ["attn"]}, ["blocks.0.attn.in_proj_weight", "blocks.0.attn.out_proj"]),
            ({"target_modules": r".*stack"}, ["holder.stack", "flipped.stack"]),
            (
                {"exclude_modules": ["holder", "inner", "flipped.stack"]},
                ["blocks.0.attn.in_proj_weight", "blocks.0.attn.out_proj"],
            ),
            ({"exclude_modules": ["stack", "attn", "inner"]}, ["holder.table"]),
            ({"target_modules": "all-linear"}, ["holder.inner"]),
        ],
        ids=str,
    )
    def test_narrowing_by_module_and_by_parameter(self, fields, expected, folders) -> None:
        assert list(compose(net(), folders, **fields).base_model.mixing_weights()) == expected

    @pytest.mark.parametrize("adapter_name", ["stack", "table", "composed_parameters", "in_proj_weight"])
    def test_a_composition_cannot_be_named_like_a_parameter(self, adapter_name, folders) -> None:
        base = net()
        with pytest.raises(ValueError, match=f"cannot be named '{adapter_name}'"):
            get_peft_model(base, CompositionConfig(adapters=folders), adapter_name=adapter_name)
        assert type(base.holder) is Holder

    def test_a_parameter_of_a_linear_layer_is_that_layer(self, tmp_path) -> None:
        base = tiny.build("embedding")
        module = str(tiny.save_lora(tmp_path / "module", base, ["lin"], seed=1, r=2))
        parameter = str(tiny.save_lora(tmp_path / "parameter", base, ["lin.weight"], seed=2, r=3))
        model = compose(base, [module, parameter])
        assert model.peft_config["default"].composed_modules == {"lin": [2, 3]}
        one, other = (
            PeftModel.from_pretrained(tiny.build("embedding"), f).merge_and_unload() for f in (module, parameter)
        )
        merged = model.merge_and_unload()
        close(merged.lin.weight, (one.lin.weight + other.lin.weight) / 2)

    def test_a_module_and_its_parameter_are_refused_together(self, tmp_path) -> None:
        base = tiny.build("embedding")
        module = str(tiny.save_lora(tmp_path / "module", base, ["emb"], seed=1))
        parameter = str(tiny.save_lora(tmp_path / "parameter", base, ["emb.weight"], seed=2))
        assert list(compose(tiny.build("embedding"), [parameter]).base_model.mixing_weights()) == ["emb.weight"]
        with pytest.raises(ValueError, match=r"touch the module 'emb' and others its parameter emb\.weight"):
            compose(base, [module, parameter])

    def test_state_dict_chooses_the_modules(self, folders) -> None:
        model = compose(net(), folders)
        state = get_peft_model_state_dict(model)
        state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
        injected = inject_adapter_in_model(CompositionConfig(adapters=folders), net(), "default", state_dict=state)
        close(output(injected), output(model))


class TestWrapper:
    def test_looks_like_the_module_with_composed_parameters(self, folders) -> None:
        model, _ = scrambled(net(), folders)
        merged = copy.deepcopy(model).merge_and_unload()
        holder = model.get_base_model().holder
        assert isinstance(holder, ParameterWrapper)
        close(holder.stack.detach(), merged.holder.stack)
        assert (holder.label, holder.inner) == ("holder", holder.base_layer.inner)
        attention = model.get_base_model().blocks[0]["attn"]
        close(attention.in_proj_weight.detach(), merged.blocks[0]["attn"].in_proj_weight)
        close(attention.out_proj.weight.detach(), merged.blocks[0]["attn"].out_proj.weight)
        assert attention.out_proj.bias is attention.base_layer.out_proj.bias
        assert attention.embed_dim == 8
        with pytest.raises(AttributeError, match="nothing"):
            _ = holder.nothing
        with pytest.raises(AttributeError, match="_hf_hook"):
            _ = holder._hf_hook

    def test_copies_and_pickles(self, folders) -> None:
        model, _ = scrambled(net(), folders)
        expected = output(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            close(output(twin), expected)
            twin.merge_adapter()
            close(output(twin), expected)
            assert twin.get_base_model().holder.base_layer is not model.get_base_model().holder.base_layer
        close(output(model), expected)

    def test_what_is_kept_follows_every_change(self, folders) -> None:
        model, _ = scrambled(net(), folders)
        holder = model.eval().get_base_model().holder
        site = holder.composed_parameters["stack"]
        assert site.composition_factors["default"].merged_is_kept is True
        with torch.no_grad():
            first = holder.stack
            assert holder.stack is first
            holder.base_layer.stack += 1
            close(holder.stack, first + 1)
            site.composition_mixing["default"].weight += torch.tensor([0.5, 0.0, 0.0])
            moved = holder.stack
            assert not torch.allclose(moved, first + 1)
            site.merge()
            close(holder.stack, moved)

    def test_what_is_too_large_is_not_kept(self, tmp_path) -> None:
        base = nn.ModuleDict({"flipped": Flipped()})
        base["flipped"].stack = nn.Parameter(torch.randn(2, 48, 40))
        folder = tiny.save_lora(tmp_path / "a", base, ["flipped.stack"], r=2)
        model = compose(copy.deepcopy(base), [str(folder)])
        flipped = model.get_base_model()["flipped"]
        with torch.no_grad():
            assert flipped.stack is not flipped.stack
            delta = Reference(base, [folder]).delta("flipped.stack", torch.ones(1).double())
            assert relative_error(flipped.stack, base["flipped"].stack + delta.detach()) < 1e-6

    def test_gradients_reach_a_base_that_trains(self, folders) -> None:
        model = compose(net(), folders, mixing="uniform")
        stack = model.get_base_model().holder.base_layer.stack.requires_grad_()
        model(x_of()).sum().backward()
        assert stack.grad.abs().max() > 0

    def test_a_module_whose_parameters_are_elsewhere_is_refused(self, folders) -> None:
        """Hooks of accelerate would put the base's own values in the place of the composed ones."""
        model = compose(net(), folders)
        offloaded = cpu_offload(model.get_base_model().flipped.base_layer)
        assert offloaded.stack.is_meta
        with pytest.raises(RuntimeError, match=r"Flipped\.stack is offloaded .*merge"):
            model(x_of())
        with model.disable_adapter():
            close(model(x_of()).detach(), output(net()))

    def test_compiles_to_one_graph(self, folders) -> None:
        torch.compiler.reset()
        model, _ = scrambled(net(), folders)
        holder = model.get_base_model().holder
        compiled = torch.compile(holder, fullgraph=True, backend="aot_eager")
        x = x_of()
        close(compiled(x).detach(), holder(x).detach())
        with torch.no_grad():
            close(compiled(x), holder(x))

    def test_what_is_saved_for_backward_does_not_grow_with_the_adapters(self, folders) -> None:
        def saved_bytes(count: int) -> int:
            adapters = [{"path": folders[0], "name": f"a{number}"} for number in range(count)]
            model = get_peft_model(net(), CompositionConfig(adapters=adapters, target_modules=["stack"]))
            known = {p.untyped_storage().data_ptr() for p in model.parameters()}
            seen: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known and tensor.is_floating_point():
                    seen[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(x_of())
            return sum(seen.values())

        assert saved_bytes(20) - saved_bytes(2) <= 3 * 2 * 18 * (2 + 1) * 4  # vectors of length N and R alone


class TestRefusals:
    def refuse(self, base: nn.Module, folder: str | Path, message: str) -> None:
        before = [(name, type(module)) for name, module in base.named_modules()]
        with pytest.raises(AdapterError, match=re.escape(message)):
            compose(base, [str(folder)])
        assert [(name, type(module)) for name, module in base.named_modules()] == before

    def edited(self, folders: list[str], tmp_path: Path, change: Callable[[dict, dict], None]) -> Path:
        config = json.loads(Path(folders[0], "adapter_config.json").read_text())
        tensors = load_file(Path(folders[0], "adapter_model.safetensors"))
        change(config, tensors)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    def test_of_another_shape(self, folders) -> None:
        base = net()
        base.holder.stack = nn.Parameter(torch.randn(3, 7, 4))
        self.refuse(
            base,
            folders[1],
            "holder.lora_A.weight has shape (9, 5), but Holder.stack in the model needs (9, 4)",
        )

    def test_of_another_number_of_matrices(self, folders) -> None:
        base = net()
        base.holder.stack = nn.Parameter(torch.randn(4, 7, 5))
        self.refuse(base, folders[1], "'holder.stack': its config says rank 3 for 4 experts, but lora_A has 9 rows")

    def test_of_another_order_of_dimensions(self, folders) -> None:
        base = net()
        base.flipped.is_transposed = False
        self.refuse(
            base, folders[2], "flipped.lora_A.weight has shape (8, 13), but Flipped.stack in the model needs (8, 8)"
        )

    def test_of_parameters_that_cannot_be_told_apart(self, folders, tmp_path) -> None:
        def forget(config: dict, tensors: dict) -> None:
            config["target_parameters"] = ["holder.table", "flipped.stack"]

        message = "module 'holder': its config targets the parameters table, but its weights hold 2 pairs of factors"
        self.refuse(net(), self.edited(folders, tmp_path, forget), message)

    def test_of_a_parameter_that_does_not_exist(self, folders) -> None:
        base = net()
        del base.flipped.stack
        self.refuse(base, folders[2], "targets the parameter 'stack', which module 'flipped' does not have")

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
    def test_of_a_quantized_parameter(self, dtype, folders) -> None:
        base = net()
        base.flipped.stack = nn.Parameter(torch.zeros(2, 13, 8).to(dtype), requires_grad=False)
        self.refuse(base, folders[2], f"its values are quantized ({dtype})")

    def test_of_one_transposed_matrix(self, tmp_path) -> None:
        base = nn.ModuleDict({"flipped": Flipped()})
        base["flipped"].stack = nn.Parameter(torch.randn(1, 8, 8))
        folder = tiny.save_lora(tmp_path / "a", base, ["flipped.stack"])
        self.refuse(base, folder, "PEFT adds the update of a single transposed expert the wrong way round")


class TestInspection:
    def test_of_an_adapter_with_parameters(self, folders) -> None:
        references = CompositionConfig(adapters=folders).references
        for model in (net(), None):
            reports = inspect_adapters(references, model)
            assert [report.reason for report in reports[::2]] == [None, None]
            assert [report.ranks for report in reports] == [(2, 3), (3, 3), (4, 4)]

    def test_of_one_that_does_not_fit(self, folders) -> None:
        base = net()
        base.holder.stack = nn.Parameter(torch.randn(3, 7, 4))
        (report,) = inspect_adapters(CompositionConfig(adapters=folders[1:2]).references, base)
        assert "Holder.stack in the model needs (9, 4)" in report.reason


def test_config_of_a_lora_names_the_parameters(folders: list[str]) -> None:
    config = to_lora(compose(net(), folders)).config
    assert isinstance(config, LoraConfig)
    assert config.target_modules == ["attn", "inner"]
    assert config.target_parameters == ["stack", "table"]
