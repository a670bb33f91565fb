"""Exports to a plain LoRA: against float64 sums over the upstream files, numpy's SVD of them, and stock PEFT."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention as LoraAttention
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from peft_composition import (
    AdapterError,
    CompositionConfig,
    LoraExport,
    add_to_checkpoint,
    lora_from_checkpoint,
    to_lora,
)

from .. import tiny
from ..hub_server import HubServer, as_the_hub, environment_of
from ..reference import Reference, mixing_weights, read_lora, relative_error


CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
AUTO_CLASSES = {
    "bert": AutoModelForSequenceClassification,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "vit": AutoModelForImageClassification,
    "mixtral": AutoModelForCausalLM,
    "gpt_oss": AutoModelForCausalLM,
}
LOGITS = 1e-5  # what an exact export may be off in float32
every_model = pytest.mark.parametrize("name", list(tiny.TINY))
served_model = pytest.mark.parametrize("name", [name for name in tiny.TINY if name not in tiny.WITH_PARAMETERS])


def base_of(name: str) -> nn.Module:
    """A tiny model with weights so large that its logits depend on every composed module.

    PEFT's LoRA runs dilated convolutions with the wrong shape; here there are none.
    """
    base = tiny.build(name)
    if name in AUTO_CLASSES:
        for module in base.modules():
            if isinstance(module, nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.3)
    if name == "conv":
        base.conv2.dilation = (1, 1)
    return base


def composed(name: str, adapters: Sequence[str], base: nn.Module | None = None, **fields: Any) -> PeftModel:
    """A composition whose weights differ from module to module and whose head has left its start."""
    model = tiny.compose(name, adapters, base_of(name) if base is None else base, **fields)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) / 40
    return model.eval()


def thetas(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameter of every composed module, in float64."""
    return {
        tiny.name_in_base(name.removesuffix(".composition_mixing.default")): module.weight.detach().double()
        for name, module in model.named_modules()
        if name.endswith(".composition_mixing.default")
    }


def composed_deltas(model: PeftModel, adapters: Sequence[str], gain: float = 40) -> dict[str, Tensor]:
    """sum_n w_n s_n B_n A_n of a learned composition, from the upstream files and theta, in float64."""
    base = model.get_base_model()
    reference = [read_lora(folder) for folder in adapters]
    deltas: dict[str, Tensor] = {}
    for module, theta in thetas(base).items():
        w = mixing_weights([1 / len(adapters)] * len(adapters), theta, gain, "softmax")
        terms = [weight * lora[module].delta() for weight, lora in zip(w, reference) if module in lora]
        deltas[module] = torch.stack(terms).sum(0)
    return deltas


def exported_deltas(folder: Path) -> dict[str, Tensor]:
    """The updates that a saved LoRA stands for, read as its config says."""
    return {module: lora.delta() for module, lora in read_lora(folder).items()}


def saved(export: LoraExport, folder: Path) -> Path:
    export.save_pretrained(folder)
    return folder


def loaded(name: str, folder: Path, base: nn.Module | None = None) -> PeftModel:
    """An export in stock PEFT, without a warning of any kind but two.

    One is transformers' own; the other says of parameters that patterns do not apply to them, which they do.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        if name in tiny.WITH_PARAMETERS:
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        return PeftModel.from_pretrained(base_of(name) if base is None else base, str(folder)).eval()


def lora_ranks(model: nn.Module) -> dict[str, int]:
    """The rank of every LoRA layer in a model, by its name in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        lora_name(path, module): module.r["default"]
        for path, module in base.named_modules()
        if isinstance(module, LoraLayer)
    }


def lora_name(path: str, layer: LoraLayer) -> str:
    """The name in the base model of the module or parameter that a LoRA layer is for."""
    parameter = getattr(layer, "parameter_name", "in_proj_weight" if isinstance(layer, LoraAttention) else None)
    return tiny.name_in_base(path) + (f".{parameter}" if parameter else "")


def matrix(delta: Tensor) -> np.ndarray:
    return delta.flatten(1).numpy()


def largest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


class TestExact:
    @every_model
    @pytest.mark.parametrize("one_rank", [True, False])
    def test_products_are_the_formula_and_stock_peft_gives_the_same_logits(
        self, name, one_rank, pair, tmp_path
    ) -> None:
        model = composed(name, pair(name))
        with nullcontext() if one_rank else pytest.warns(UserWarning, match=r"ranks 2 to 5.*llama\.cpp and diffusers"):
            export = to_lora(model, one_rank=one_rank)
        folder = saved(export, tmp_path / "lora")

        deltas = composed_deltas(model, pair(name))
        actual = exported_deltas(folder)
        assert actual.keys() == deltas.keys() == export.ranks.keys()
        for module, delta in deltas.items():
            assert relative_error(actual[module], delta) < 1e-6, module

        ranks = {
            module: sum(read_lora(f)[module].rank for f in pair(name) if module in read_lora(f)) for module in deltas
        }
        assert set(ranks.values()) == {2, 5}
        if one_rank:
            ranks = dict.fromkeys(ranks, 5)
        plain = loaded(name, folder)
        assert lora_ranks(plain) == ranks == export.ranks
        expected = tiny.output(model, name)
        assert largest_difference(tiny.output(plain, name), expected) <= LOGITS
        with plain.disable_adapter():
            assert largest_difference(tiny.output(plain, name), expected) > 1e-2
        assert export.total_error == 0
        assert set(export.errors.values()) == {0}

    @served_model
    @pytest.mark.parametrize("options", [{}, {"rank": 4}, {"energy": 0.9}, {"round_rank": True}, {"one_rank": False}])
    def test_every_rule_of_scaling_gives_the_formula(self, name, options, pair, tmp_path) -> None:
        """PEFT reads patterns; vLLM divides alpha by r of the config, llama.cpp and diffusers by a tensor's rank."""
        model = composed(name, pair(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = saved(to_lora(model, **options), tmp_path / "lora")
        config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
        tolerance = 1.0 if {"rank", "energy"} & options.keys() else 1e-6  # a scale of 5 / 2 is off by more than 1
        wrong: dict[str, list[str]] = {"vllm": [], "llama.cpp": []}
        exact = composed_deltas(model, pair(name))
        for module, delta in exported_deltas(folder).items():
            assert relative_error(delta, exact[module]) < tolerance
            prefix = f"base_model.model.{module}.lora_"
            A, B = (
                next(tensor for key, tensor in tensors.items() if key.startswith(prefix) and f"_{factor}" in key)
                for factor in "AB"
            )
            product = (B.double().flatten(1) @ A.double().flatten(1)).reshape(delta.shape)
            rules = {"vllm": config["lora_alpha"] / config["r"], "llama.cpp": config["lora_alpha"] / A.shape[0]}
            for reader, scale in rules.items():
                if relative_error(scale * product, delta) > 1e-6:
                    wrong[reader].append(module)
        assert not wrong["vllm"]
        assert bool(wrong["llama.cpp"]) == ("one_rank" in options)  # what the warning says

    @pytest.mark.parametrize(
        ("name", "auto"),
        [
            ("bert", AutoPeftModelForSequenceClassification),
            ("gpt2", AutoPeftModelForCausalLM),
            ("t5", AutoPeftModelForSeq2SeqLM),
            ("vit", AutoPeftModel),
            ("mixtral", AutoPeftModelForCausalLM),
            ("gpt_oss", AutoPeftModelForCausalLM),
        ],
        ids=["bert", "gpt2", "t5", "vit", "mixtral", "gpt_oss"],
    )
    def test_auto_classes_find_the_base_and_transformers_loads_it(self, name, auto, pair, tmp_path) -> None:
        base_of(name).save_pretrained(str(tmp_path / "base"))
        base = AUTO_CLASSES[name].from_pretrained(str(tmp_path / "base")).eval()
        model = composed(name, pair(name), base)
        folder = saved(to_lora(model), tmp_path / "lora")
        assert largest_difference(tiny.output(auto.from_pretrained(folder), name), tiny.output(model, name)) <= LOGITS
        plain = base_of(name)
        plain.load_adapter(str(folder))
        assert largest_difference(tiny.output(plain, name), tiny.output(model, name)) <= LOGITS

    @pytest.mark.parametrize("one_rank", [True, False])
    @pytest.mark.filterwarnings("ignore:The modules of this LoRA have ranks")
    def test_all_modules_of_a_deep_model(self, one_rank, tmp_path) -> None:
        """PEFT condenses lists of 20 and more target modules; the export must still select the composed alone."""
        base = nn.ModuleDict({f"layer{n}": tiny.MLP() for n in range(15)})
        base["other"] = nn.ModuleDict({"lin0": nn.Linear(2, 2)})
        targets = [f"layer{n}.lin{k}" for n in range(15) for k in (0, 1) if (n, k) != (3, 1)]
        lora = tiny.save_lora(tmp_path / "a", base, targets, seed=1, rank_pattern={"layer7.lin0": 2})
        model = get_peft_model(copy.deepcopy(base), CompositionConfig(adapters=[str(lora)]))
        folder = saved(to_lora(model, one_rank=one_rank), tmp_path / "lora")
        plain = PeftModel.from_pretrained(base, str(folder))
        assert lora_ranks(plain) == {
            target: 4 if one_rank or target != "layer7.lin0" else 2
            for target in sorted(targets, key=lambda target: list(dict(base.named_modules())).index(target))
        }
        expected = read_lora(lora)
        for module, delta in exported_deltas(folder).items():
            assert relative_error(delta, expected[module].delta()) < 1e-6

    def test_a_mix_of_conv1d_and_linear(self, tmp_path) -> None:
        base = base_of("gpt2")
        adapters = [str(tiny.save_lora(tmp_path / "a", base, ["c_attn", "lm_head"], seed=1))]
        model = composed("gpt2", adapters, task_type="CAUSAL_LM")
        folder = saved(to_lora(model), tmp_path / "lora")
        plain = PeftModel.from_pretrained(base_of("gpt2"), str(folder)).eval()
        assert largest_difference(tiny.output(plain, "gpt2"), tiny.output(model, "gpt2")) <= LOGITS

    def test_conv1d_is_named_as_such(self, pair) -> None:
        assert to_lora(composed("gpt2", pair("gpt2"))).config.fan_in_fan_out is True
        assert to_lora(composed("llama", pair("llama"))).config.fan_in_fan_out is False

    def test_with_the_embeddings_that_peft_saves(self, tmp_path) -> None:
        """Where lm_head is composed, PEFT saves the embeddings of the base with the adapter."""
        base = base_of("llama")
        adapters = [str(tiny.save_lora(tmp_path / "a", base, ["q_proj", "lm_head"], seed=1))]
        model = composed("llama", adapters)
        folder = saved(to_lora(model), tmp_path / "lora")
        assert largest_difference(tiny.output(loaded("llama", folder), "llama"), tiny.output(model, "llama")) <= LOGITS

    def test_the_export_does_not_follow_the_model(self, pair) -> None:
        model = composed("mlp", pair("mlp"))
        export = to_lora(model)
        before = copy.deepcopy(export.state_dict)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
        assert same_tensors(export.state_dict, before)

    @pytest.mark.parametrize("name", ["mlp", "gpt2"])
    def test_convert_to_lora_of_peft_finds_the_same_at_full_rank(self, name, pair) -> None:
        model = composed(name, pair(name))
        export = to_lora(model)
        _, converted = convert_to_lora(model, rank=5)
        for module in export.ranks:
            one, other = (
                state[f"base_model.model.{module}.lora_B.weight"] @ state[f"base_model.model.{module}.lora_A.weight"]
                for state in (export.state_dict, converted)
            )
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


class TestWithoutThePlugin:
    SCRIPT = """
import sys
sys.modules["peft_composition"] = None
try:
    import peft_composition
    raise SystemExit("the plugin can be imported")
except ImportError:
    pass
import json, torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
outputs = {}
for key, (auto, base, adapter, subfolder, inputs) in json.loads(sys.argv[1]).items():
    base = getattr(transformers, auto).from_pretrained(base)
    model = PeftModel.from_pretrained(base, adapter, subfolder=subfolder).eval()
    with torch.no_grad():
        outputs[key] = model(**load_file(inputs)).logits
assert "COMPOSITION" not in list(__import__("peft").PeftType)
save_file(outputs, sys.argv[2])
"""

    def test_stock_peft_loads_the_subfolder_of_a_checkpoint_and_of_a_repository(self, pair, tmp_path) -> None:
        expected: dict[str, Tensor] = {}
        jobs: dict[str, list[str]] = {}
        with HubServer() as hub:
            for name, auto in AUTO_CLASSES.items():
                base_of(name).save_pretrained(str(tmp_path / name / "base"))
                save_file(tiny.TINY[name].inputs(), tmp_path / name / "inputs.safetensors")
                folder = tmp_path / name / "composed"
                model = composed(name, pair(name), auto.from_pretrained(str(tmp_path / name / "base")).eval())
                model.save_pretrained(str(folder))
                add_to_checkpoint(folder)
                files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
                hub.push(f"me/{name}", files)
                for key, adapter in ((f"{name} here", str(folder)), (f"{name} on the Hub", f"me/{name}")):
                    paths = [
                        str(tmp_path / name / "base"),
                        adapter,
                        "lora",
                        str(tmp_path / name / "inputs.safetensors"),
                    ]
                    jobs[key] = [auto.__name__, *paths]
                    expected[key] = tiny.output(model, name)
            environment = {
                **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
                **environment_of(hub, tmp_path / "hf_home"),
            }
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", self.SCRIPT, json.dumps(jobs), str(tmp_path / "outputs")],
                cwd=tmp_path,
                env=environment,
                check=True,
                timeout=180,
            )
        outputs = load_file(tmp_path / "outputs")
        assert outputs.keys() == expected.keys()
        for key, logits in expected.items():
            assert largest_difference(outputs[key], logits) <= LOGITS, key


@pytest.mark.filterwarnings("ignore:The modules of this LoRA have ranks")
class TestTruncated:
    """In float64, against numpy's SVD of the dense update (Eckart and Young)."""

    @pytest.fixture
    def wide_pair(self, tmp_path: Path) -> Callable[[str], list[str]]:
        """Two LoRAs of rank 11 and 13: their sum is more than the MLP's layers have rows or columns."""

        def folders(name: str) -> list[str]:
            base, targets = tiny.build(name), tiny.TINY[name].targets
            return [
                str(tiny.save_lora(tmp_path / f"{r}", base, targets, seed=r, r=r, lora_alpha=2 * r)) for r in (11, 13)
            ]

        return folders

    @pytest.mark.parametrize("name", ["mlp", "gpt2", "conv", "embedding"])
    @pytest.mark.parametrize("kind", ["pair", "wide_pair"])
    @pytest.mark.parametrize("rank", [1, 3, 14])
    def test_is_the_nearest_of_its_rank(self, name, kind, rank, request, tmp_path) -> None:
        adapters = request.getfixturevalue(kind)(name)
        model = composed(name, adapters, base_of(name).double())
        export = to_lora(model, rank=rank, one_rank=False)
        actual = exported_deltas(saved(export, tmp_path / "lora"))
        lost, norms = [], []
        for module, delta in composed_deltas(model, adapters).items():
            U, S, Vh = np.linalg.svd(matrix(delta), full_matrices=False)
            kept = min(rank, int((S / S[0] > 1e-9).sum()))
            nearest = U[:, :kept] * S[:kept] @ Vh[:kept]
            assert export.ranks[module] == min(rank, len(S), export_rank(adapters, module))
            assert np.linalg.norm(matrix(actual[module]) - nearest) < 1e-9 * np.linalg.norm(nearest), module
            lost.append(np.linalg.norm(S[kept:]) if kept < len(S) else 0.0)
            norms.append(np.linalg.norm(S))
            assert export.errors[module] == pytest.approx(lost[-1] / norms[-1], abs=1e-9)
        assert export.total_error == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(norms), abs=1e-9)

    @pytest.mark.parametrize("name", ["mlp", "gpt2"])
    @pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
    def test_energy_takes_the_least_rank_that_reaches_it(self, name, energy, wide_pair) -> None:
        model = composed(name, wide_pair(name), base_of(name).double())
        export = to_lora(model, energy=energy, one_rank=False)
        for module, delta in composed_deltas(model, wide_pair(name)).items():
            share = np.cumsum(np.linalg.svd(matrix(delta), compute_uv=False) ** 2)
            expected = 1 + int((share < energy * share[-1] * (1 - 1e-13)).sum())
            assert export.ranks[module] == expected, module
            assert export.errors[module] <= math.sqrt(1 - energy) + 1e-7
        if energy in (0.9, 0.999):
            assert len(set(export.ranks.values())) > 1

    def test_all_energy_leaves_out_what_is_zero_or_double(self, tmp_path) -> None:
        base = tiny.build("mlp")
        one, other = (str(tiny.save_lora(tmp_path / f"{n}", base, ["lin0", "lin1"], seed=n, r=3)) for n in (1, 2))
        for adapters, weights in (([one, one], [0.5, 0.5]), ([one, other], [1.0, 0.0])):
            references = [{"path": path, "name": f"{n}"} for n, path in enumerate(adapters)]
            model = tiny.compose("mlp", references, mixing="fixed", weights=weights)
            export = to_lora(model, energy=1.0)
            assert export.ranks == {"lin0": 3, "lin1": 3}
            assert to_lora(model).ranks == {"lin0": 6, "lin1": 6}
            for module, delta in exported_deltas(saved(export, tmp_path / "lora")).items():
                assert relative_error(delta, read_lora(one)[module].delta()) < 1e-6

    def test_reloads_in_stock_peft_with_its_ranks(self, wide_pair, tmp_path) -> None:
        model = composed("bert", wide_pair("bert"))
        export = to_lora(model, energy=0.9, one_rank=False)
        assert len(set(export.ranks.values())) > 1
        plain = loaded("bert", saved(export, tmp_path / "lora"))
        assert lora_ranks(plain) == export.ranks
        deltas = {
            name: layer.get_delta_weight("default").double()
            for name, layer in plain.get_base_model().named_modules()
            if isinstance(layer, LoraLayer)
        }
        for module, delta in composed_deltas(model, wide_pair("bert")).items():
            assert relative_error(deltas[module], delta) == pytest.approx(export.errors[module], rel=1e-4)

    def test_a_composition_of_nothing(self, pair, tmp_path) -> None:
        model = tiny.compose("mlp", pair("mlp"), mixing="fixed", weights=[0.0, 0.0], normalization="none")
        for options in ({}, {"rank": 1}, {"energy": 0.5}):
            export = to_lora(model, **options)
            assert export.total_error == 0
            plain = loaded("mlp", saved(export, tmp_path / "lora"), tiny.build("mlp"))
            torch.testing.assert_close(tiny.output(plain, "mlp"), tiny.output(model, "mlp"), rtol=0, atol=0)


def export_rank(adapters: Sequence[str], module: str) -> int:
    """The sum of the ranks of the adapters in a module, from their files."""
    return sum(lora[module].rank for lora in map(read_lora, adapters) if module in lora)


class TestServedRanks:
    def test_all_modules_get_one_rank_filled_with_zeros(self, pair, tmp_path) -> None:
        model = composed("mlp", pair("mlp"))
        export = to_lora(model, round_rank=True)
        assert export.ranks == {"lin0": 8, "lin1": 8}
        assert (export.config.r, export.config.lora_alpha) == (8, 8)
        assert export.config.rank_pattern == export.config.alpha_pattern == {}
        assert export.total_error == 0
        plain = loaded("mlp", saved(export, tmp_path / "lora"))
        assert largest_difference(tiny.output(plain, "mlp"), tiny.output(model, "mlp")) <= LOGITS
        A = export.state_dict["base_model.model.lin0.lora_A.weight"]
        assert A.shape == (8, 10)
        assert not A[2:].any()

    def test_what_was_truncated_fills_the_room(self, tmp_path) -> None:
        base = tiny.build("mlp").double()
        adapters = [str(tiny.save_lora(tmp_path / "a", base, ["lin1"], seed=1, r=12))]
        model = composed("mlp", adapters, base)
        assert to_lora(model, rank=5, round_rank=True).ranks == {"lin1": 8}
        S = np.linalg.svd(matrix(composed_deltas(model, adapters)["lin1"]), compute_uv=False)
        error = np.linalg.norm(S[8:]) / np.linalg.norm(S)
        assert error > 0.01
        for options in ({"rank": 5}, {"energy": 0.5}):
            export = to_lora(model, round_rank=True, **options)
            assert export.ranks == {"lin1": 8}
            assert export.errors["lin1"] == pytest.approx(error)
        assert to_lora(model, rank=9, round_rank=True).errors == {"lin1": 0}
        with pytest.raises(ValueError, match=r"round_rank.*one_rank=False"):
            to_lora(model, round_rank=True, one_rank=False)

    def test_the_room_of_a_smaller_module_is_used(self, tmp_path) -> None:
        """With an energy modules need different ranks; given that of the largest, none loses more than alone."""
        base = tiny.build("mlp").double()
        adapters = [str(tiny.save_lora(tmp_path / "a", base, ["lin0", "lin1"], seed=1, r=10))]
        model = composed("mlp", adapters, base)
        with pytest.warns(UserWarning, match="ranks"):
            own = to_lora(model, energy=0.8, one_rank=False)
        export = to_lora(model, energy=0.8)
        assert export.ranks == dict.fromkeys(own.ranks, max(own.ranks.values()))
        for module, delta in composed_deltas(model, adapters).items():
            S = np.linalg.svd(matrix(delta), compute_uv=False)
            expected = np.linalg.norm(S[export.ranks[module] :]) / np.linalg.norm(S)
            assert export.errors[module] == pytest.approx(expected, abs=1e-9)
        assert export.total_error < own.total_error

    @pytest.mark.parametrize(("rank", "served"), [(8, 8), (9, 16), (65, 128), (257, 320), (321, 512)])
    def test_are_those_of_vllm(self, rank, served, tmp_path) -> None:
        base = nn.ModuleDict({"lin": nn.Linear(4, 4)})
        adapter = str(tiny.save_lora(tmp_path / "a", base, ["lin"], r=rank))
        model = get_peft_model(base, CompositionConfig(adapters=[adapter]))
        assert to_lora(model, round_rank=True).ranks == {"lin": served}

    def test_more_than_servers_accept_is_refused(self, tmp_path) -> None:
        base = nn.ModuleDict({"lin": nn.Linear(4, 4)})
        adapter = str(tiny.save_lora(tmp_path / "a", base, ["lin"], r=513))
        model = get_peft_model(base, CompositionConfig(adapters=[adapter]))
        with pytest.raises(ValueError, match=r"largest rank is 513, but servers accept 512 at most.*energy"):
            to_lora(model, round_rank=True)
        assert to_lora(model, round_rank=True, energy=1.0).ranks == {"lin": 8}


class TestNames:
    """Modules whose names end alike: PEFT matches targets and patterns by the end of a name."""

    @pytest.fixture
    def nested(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"lin": nn.Linear(6, 6), "block": nn.ModuleDict({"lin": nn.Linear(6, 6)})})

    def export(self, base: nn.Module, folder: Path, **lora: Any) -> tuple[Path, PeftModel]:
        adapter = str(tiny.save_lora(folder / "a", base, seed=1, **lora))
        model = get_peft_model(copy.deepcopy(base), CompositionConfig(adapters=[adapter]))
        export = to_lora(model, one_rank=False)
        return Path(adapter), PeftModel.from_pretrained(base, str(saved(export, folder / "lora")))

    @pytest.mark.parametrize("ranks", [(2, 3), (3, 2)])
    @pytest.mark.filterwarnings("ignore:The modules of this LoRA have ranks")
    def test_each_keeps_its_rank(self, ranks, nested, tmp_path) -> None:
        pattern = {"^lin": ranks[0], r"^block\.lin": ranks[1]}
        adapter, plain = self.export(nested, tmp_path, targets=["lin"], rank_pattern=pattern)
        assert lora_ranks(plain) == {"lin": ranks[0], "block.lin": ranks[1]}
        tensors = load_file(adapter / WEIGHTS)
        for module in ("lin", "block.lin"):
            B, A = (tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "BA")
            expected = B @ A * 8 / A.shape[0]
            torch.testing.assert_close(
                plain.get_submodule(f"base_model.model.{module}").get_delta_weight("default"),
                expected,
                rtol=0,
                atol=1e-6,
            )

    @pytest.mark.parametrize(("target", "other"), [("^lin$", "block.lin"), (r"block\.lin", "lin")])
    def test_only_the_composed_is_touched(self, target, other, nested, tmp_path) -> None:
        _, plain = self.export(nested, tmp_path, targets=target)
        assert list(lora_ranks(plain)) == [name for name in ("lin", "block.lin") if name != other]

    def test_the_dots_of_a_regex_are_dots(self, tmp_path) -> None:
        lin = [nn.ModuleDict({"lin": nn.Linear(6, 6)}) for _ in range(2)]
        base = nn.ModuleDict({"a": lin[0], "b": nn.ModuleDict({"a": lin[1]}), "a_lin": nn.Linear(6, 6)})
        _, plain = self.export(base, tmp_path, targets=r"a\.lin")
        assert list(lora_ranks(plain)) == ["a.lin"]

    def test_targets_are_short_where_they_can_be(self, pair, tmp_path) -> None:
        assert to_lora(composed("t5", pair("t5"))).config.target_modules == ["q", "v"]
        base = tiny.build("t5")
        adapter = str(tiny.save_lora(tmp_path / "a", base, r".*encoder.*\.q", seed=1))
        plain_targets = to_lora(tiny.compose("t5", [adapter])).config.target_modules
        assert all(target.endswith("q") for target in plain_targets)
        assert "q" not in plain_targets


class TestBias:
    def test_goes_along_in_stock_peft(self, tmp_path) -> None:
        base = tiny.build("mlp")
        first = str(tiny.save_lora(tmp_path / "a", base, ["lin0", "lin1"], seed=1, r=2, lora_bias=True))
        second = str(tiny.save_lora(tmp_path / "b", base, ["lin1"], seed=2, r=3, lora_alpha=6))
        for adapters in (
            [first, second],
            [second, str(tiny.save_lora(tmp_path / "c", base, ["lin0"], lora_bias=True))],
        ):
            model = composed("mlp", adapters)
            for options in ({}, {"round_rank": True}):
                export = to_lora(model, **options)
                assert export.config.lora_bias is True
                plain = loaded("mlp", saved(export, tmp_path / "lora"))
                assert largest_difference(tiny.output(plain, "mlp"), tiny.output(model, "mlp")) <= LOGITS
                reference = Reference(tiny.build("mlp"), adapters)
                lora = read_lora(tmp_path / "lora")
                for module, theta in thetas(model.get_base_model()).items():
                    w = mixing_weights([0.5, 0.5], theta, 40, "softmax")
                    expected = reference.delta_bias(module, w)
                    actual = lora[module].bias
                    assert not actual.any() if expected is None else relative_error(actual, expected) < 1e-6

    def test_of_a_convolution(self, tmp_path) -> None:
        base = base_of("conv")
        adapters = [str(tiny.save_lora(tmp_path / "a", base, ["conv1", "conv2"], seed=1, lora_bias=True))]
        model = composed("conv", adapters)
        plain = loaded("conv", saved(to_lora(model, rank=3), tmp_path / "lora"))
        assert lora_ranks(plain) == {"conv1": 3, "conv2": 3}
        plain = loaded("conv", saved(to_lora(model), tmp_path / "lora"))
        assert largest_difference(tiny.output(plain, "conv"), tiny.output(model, "conv")) <= LOGITS

    def test_beside_an_embedding_is_refused(self, tmp_path) -> None:
        base = tiny.build("embedding")
        adapters = [
            str(tiny.save_lora(tmp_path / "a", base, ["lin"], lora_bias=True)),
            str(tiny.save_lora(tmp_path / "b", base, ["emb"])),
        ]
        with pytest.raises(ValueError, match=r"has biases \(here in 'lin'\) and touches an embedding.*'emb'"):
            to_lora(tiny.compose("embedding", adapters))


class TestHead:
    def test_goes_along(self, pair, tmp_path) -> None:
        model = composed("bert", pair("bert"))
        export = to_lora(model)
        assert export.config.task_type == "SEQ_CLS"
        head = model.get_base_model().classifier.modules_to_save["default"]
        assert torch.equal(export.state_dict["base_model.model.classifier.weight"], head.weight)
        assert export.head == {}
        plain = loaded("bert", saved(export, tmp_path / "lora"))
        assert torch.equal(plain.get_base_model().classifier.modules_to_save["default"].weight, head.weight)

    @pytest.mark.parametrize("name", ["mlp", "bert"])
    def test_in_a_file_of_its_own(self, name, pair, tmp_path) -> None:
        model = composed(name, pair(name))
        folder = saved(to_lora(model, include_head="separate"), tmp_path / "lora")
        assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS, HEAD]
        assert json.loads((folder / CONFIG).read_text())["modules_to_save"] is None
        assert all(".lora_" in key for key in load_file(folder / WEIGHTS))

        base = base_of(name)
        result = base.load_state_dict(load_file(folder / HEAD), strict=False)
        assert result.unexpected_keys == []
        plain = loaded(name, folder, base)
        assert largest_difference(tiny.output(plain, name), tiny.output(model, name)) <= LOGITS

    @pytest.mark.parametrize("name", ["mlp", "bert"])
    def test_left_out(self, name, pair, tmp_path) -> None:
        model = composed(name, pair(name))
        folder = saved(to_lora(model, include_head=False), tmp_path / "lora")
        assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
        assert all(".lora_" in key for key in load_file(folder / WEIGHTS))
        plain = loaded(name, folder)
        head = tiny.TINY[name].head[0]
        model.get_base_model().get_submodule(head).modules_to_save["default"].load_state_dict(
            base_of(name).get_submodule(head).state_dict()
        )
        assert largest_difference(tiny.output(plain, name), tiny.output(model, name)) <= LOGITS

    def test_none_makes_no_file(self, pair, tmp_path) -> None:
        export = to_lora(composed("gpt2", pair("gpt2")), include_head="separate")
        assert sorted(os.listdir(saved(export, tmp_path / "lora"))) == [CONFIG, WEIGHTS]

    def test_of_a_composed_lm_head_keeps_the_names_of_the_base(self, tmp_path) -> None:
        base = base_of("llama")
        adapters = [str(tiny.save_lora(tmp_path / "a", base, ["q_proj", "lm_head"], seed=1))]
        export = to_lora(composed("llama", adapters), include_head="separate")
        assert export.head.keys() <= base.state_dict().keys()


class TestFromACheckpoint:
    @every_model
    def test_equals_the_export_of_the_model(self, name, pair, tmp_path) -> None:
        model = composed(name, pair(name))
        model.save_pretrained(str(tmp_path / "saved"))
        for options in ({}, {"rank": 2}, {"energy": 0.9, "round_rank": True, "include_head": "separate"}):
            one, other = to_lora(model, **options), lora_from_checkpoint(tmp_path / "saved", **options)
            assert same_tensors(one.state_dict, other.state_dict)
            assert same_tensors(one.head, other.head)
            assert one.config == other.config
            assert (one.ranks, one.errors, one.total_error) == (other.ranks, other.errors, other.total_error)

    @pytest.mark.parametrize(
        "fields",
        [
            {"weight_sharing": "block"},
            {"weight_sharing": "model"},
            {"mixing": "uniform"},
            {"mixing": "fixed", "weights": [0.75, 0.25]},
            {"weights": [1.0, 0.0]},
            {"normalization": "none", "weights": [1.5, -0.5], "gain": 3},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_whatever_the_settings(self, fields, dtype, pair, tmp_path) -> None:
        model = composed("bert", pair("bert"), base_of("bert").to(dtype), **fields)
        model.save_pretrained(str(tmp_path / "saved"))
        one, other = to_lora(model), lora_from_checkpoint(tmp_path / "saved")
        assert same_tensors(one.state_dict, other.state_dict)
        assert one.config == other.config
        lora = saved(other, tmp_path / "lora")
        if dtype == torch.float32:
            plain = loaded("bert", lora)
            assert largest_difference(tiny.output(plain, "bert"), tiny.output(model, "bert")) <= LOGITS

    def test_a_loaded_composition_exports_the_same(self, pair, tmp_path) -> None:
        model = composed("bert", pair("bert"))
        model.save_pretrained(str(tmp_path))
        one, other = to_lora(model), to_lora(PeftModel.from_pretrained(base_of("bert"), str(tmp_path)))
        assert same_tensors(one.state_dict, other.state_dict)
        assert one.config == other.config  # though PEFT has added its heads to modules_to_save once more

    def test_as_a_pickle(self, pair, tmp_path) -> None:
        model = composed("mlp", pair("mlp"))
        model.save_pretrained(str(tmp_path), safe_serialization=False)
        assert same_tensors(lora_from_checkpoint(tmp_path).state_dict, to_lora(model).state_dict)

    def test_add_to_checkpoint_leaves_the_checkpoint_as_it_was(self, pair, tmp_path) -> None:
        model = composed("mlp", pair("mlp"))
        model.save_pretrained(str(tmp_path))
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        export = add_to_checkpoint(tmp_path, rank=2)
        after = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
        assert b'subfolder="lora"' not in before.pop("README.md")
        assert b'subfolder="lora"' in after.pop("README.md")
        assert after == before
        assert lora_ranks(loaded("mlp", tmp_path / "lora")) == export.ranks == {"lin0": 2, "lin1": 2}
        add_to_checkpoint(str(tmp_path), "plain/exact")
        assert lora_ranks(loaded("mlp", tmp_path / "plain" / "exact")) == {"lin0": 5, "lin1": 5}
        again = PeftModel.from_pretrained(base_of("mlp"), str(tmp_path))
        torch.testing.assert_close(tiny.output(again, "mlp"), tiny.output(model, "mlp"), rtol=0, atol=0)

    def test_without_the_factors_it_says_what_to_do(self, pair, tmp_path) -> None:
        model = composed("mlp", pair("mlp"), save_adapters=False)
        model.save_pretrained(str(tmp_path))
        with pytest.raises(ValueError, match=r"save_adapters=False .* to_lora\(model\)"):
            add_to_checkpoint(tmp_path)
        assert not (tmp_path / "lora").exists()
        plain = loaded("mlp", saved(to_lora(model), tmp_path / "lora"))
        assert largest_difference(tiny.output(plain, "mlp"), tiny.output(model, "mlp")) <= LOGITS

    def test_what_is_no_composition_is_refused(self, pair, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"is not a saved composition: it has no adapter_config\.json"):
            lora_from_checkpoint(tmp_path)
        with pytest.raises(ValueError, match=r"is not a saved composition: it is a plain LoRA"):
            lora_from_checkpoint(pair("mlp")[0])

    @pytest.mark.parametrize("damage", ["factor", "theta", "rank", "record", "weights", "bytes"])
    def test_damage_is_refused(self, damage, pair, tmp_path) -> None:
        composed("mlp", pair("mlp")).save_pretrained(str(tmp_path))
        config, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
        expected = {
            "factor": r"'base_model\.model\.lin1\.composition_factors\.B' is missing",
            "theta": r"'base_model\.model\.lin0\.composition_mixing\.weight' is missing",
            "rank": r"module 'lin1' is composed with ranks \[2, 4\] in the config, composed with ranks \[2, 3\]",
            "record": "does not record its modules",
            "weights": "has neither adapter_model.safetensors nor adapter_model.bin",
            "bytes": "is not a readable safetensors file",
        }[damage]
        if damage == "factor":
            del tensors["base_model.model.lin1.composition_factors.B"]
        if damage == "theta":
            del tensors["base_model.model.lin0.composition_mixing.weight"]
        if damage == "rank":
            config["composed_modules"]["lin1"] = [2, 4]
        if damage == "record":
            config["lora_layout"] = None
        save_file(tensors, tmp_path / WEIGHTS)
        if damage == "weights":
            (tmp_path / WEIGHTS).unlink()
        if damage == "bytes":
            (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-8])
        (tmp_path / CONFIG).write_text(json.dumps(config))
        with pytest.raises((ValueError, AdapterError), match=expected):
            lora_from_checkpoint(tmp_path)


class TestNumbers:
    def test_the_dtype_is_that_of_the_factors_or_as_asked(self, pair) -> None:
        model = composed("bert", pair("bert"), base_of("bert").bfloat16())
        for asked, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
            state = to_lora(model, dtype=asked).state_dict
            assert {tensor.dtype for key, tensor in state.items() if ".lora_" in key} == {expected}

    def test_wider_than_the_factors_it_is_the_sum_of_the_stored_factors(self, pair, tmp_path) -> None:
        """bfloat16 factors, exported in float32: as near as float32 is to the sum of what the model holds."""
        model = composed("mlp", pair("mlp"), base_of("mlp").bfloat16())
        actual = exported_deltas(saved(to_lora(model, dtype=torch.float32), tmp_path / "lora"))
        for module, theta in thetas(model.get_base_model()).items():
            factors = model.get_base_model().get_submodule(module).composition_factors["default"]
            w = mixing_weights([0.5, 0.5], theta, 40, "softmax")
            u = torch.cat([weight.expand(rank) for weight, rank in zip(w, factors.ranks)])
            assert relative_error(actual[module], (factors.B.double() * u) @ factors.A.double()) < 1e-6

    def test_overflow_is_refused_with_the_module(self, tmp_path) -> None:
        base = tiny.build("mlp")
        adapter = str(tiny.save_lora(tmp_path / "a", base, ["lin0"], lora_alpha=2**40))
        model = tiny.compose("mlp", [adapter])
        with pytest.raises(
            ValueError, match=r"module 'lin0': lora_[AB]\.weight: .* overflow in torch\.float16.*float32"
        ):
            to_lora(model, dtype=torch.float16)
        assert to_lora(model, dtype=torch.bfloat16).ranks == {"lin0": 4}

    @pytest.mark.parametrize("options", [{}, {"rank": 1}, {"energy": 0.5}], ids=str)
    def test_weights_that_are_not_finite_are_refused_with_the_module(self, options, pair) -> None:
        model = composed("mlp", pair("mlp"))
        with torch.no_grad():
            model.get_base_model().lin1.composition_mixing["default"].weight[0] = math.nan
        with pytest.raises(ValueError, match="module 'lin1': mixing weights: not all values are finite"):
            to_lora(model, **options)


class TestWhichComposition:
    @pytest.fixture
    def two(self, pair: Callable[[str], list[str]]) -> PeftModel:
        model = composed("mlp", pair("mlp"))
        model.add_adapter("second", CompositionConfig(adapters=pair("mlp")[1:], modules_to_save=["head"]))
        return model

    def test_the_active_one_or_the_named(self, two, tmp_path) -> None:
        for active, other in (("default", "second"), ("second", "default")):
            two.set_adapter(active)
            expected = tiny.output(two, "mlp")
            plain = loaded("mlp", saved(to_lora(two), tmp_path / "lora"))
            assert largest_difference(tiny.output(plain, "mlp"), expected) <= LOGITS
            two.set_adapter(other)
            plain = loaded("mlp", saved(to_lora(two, active), tmp_path / "lora"))
            assert largest_difference(tiny.output(plain, "mlp"), expected) <= LOGITS
        assert to_lora(two, "second").ranks == {"lin1": 3}

    def test_several_active_ones_are_refused(self, pair) -> None:
        model = composed("mlp", pair("mlp"), modules_to_save=None)
        model.add_adapter("second", CompositionConfig(adapters=pair("mlp")))
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match=r"which composition to export: \['default', 'second'\] are active"):
            to_lora(model)

    def test_an_unknown_name_is_refused(self, two) -> None:
        with pytest.raises(ValueError, match=r"no composition 'third'; there are \['default', 'second'\]"):
            to_lora(two, "third")

    def test_merged_it_is_the_same(self, pair) -> None:
        model = composed("mlp", pair("mlp"))
        before = to_lora(model)
        model.merge_adapter()
        assert same_tensors(to_lora(model).state_dict, before.state_dict)
        assert model.get_base_model().lin0.merged

    def test_any_wrapper_gives_the_same(self, pair) -> None:
        model = composed("bert", pair("bert"))
        expected = to_lora(model)
        for wrapped in (model.base_model, model.get_base_model(), torch.compile(model)):
            export = to_lora(wrapped)
            assert same_tensors(export.state_dict, expected.state_dict)
            assert export.config == expected.config

    def test_injected_without_peft_model(self, pair, tmp_path) -> None:
        model = inject_adapter_in_model(CompositionConfig(adapters=pair("gpt2")), base_of("gpt2"))
        plain = loaded("gpt2", saved(to_lora(model), tmp_path / "lora"))
        assert largest_difference(tiny.output(plain, "gpt2"), tiny.output(model.eval(), "gpt2")) <= LOGITS

    def test_what_is_no_composition_is_refused(self, pair) -> None:
        with pytest.raises(ValueError, match=r"\(MLP\) holds no composition: it has no adapter"):
            to_lora(tiny.build("mlp"))
        lora = get_peft_model(tiny.build("mlp"), LoraConfig(target_modules=["lin0"]))
        with pytest.raises(ValueError, match=r"\(MLP\) holds no composition: its adapters are of type LORA"):
            to_lora(lora)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
            ({"rank": 2.5}, "rank must be a whole number of at least 1, got 2.5"),
            ({"rank": True}, "rank must be a whole number of at least 1, got True"),
            ({"energy": 0}, "energy must be a share above 0 and at most 1, got 0"),
            ({"energy": 1.5}, "energy must be a share above 0 and at most 1, got 1.5"),
            ({"energy": math.nan}, "energy must be a share above 0 and at most 1, got nan"),
            ({"rank": 4, "energy": 0.9}, r"give rank=\.\.\. or energy=\.\.\., not both: got rank=4 and energy=0\.9"),
            ({"include_head": "apart"}, "include_head must be True, False or \"separate\", got 'apart'"),
            ({"dtype": torch.int8}, "dtype must be a floating point dtype of at least 16 bits, got torch.int8"),
        ],
        ids=str,
    )
    def test_options_without_a_meaning_are_refused(self, options, message, pair, tmp_path) -> None:
        model = composed("mlp", pair("mlp"))
        model.save_pretrained(str(tmp_path))
        with pytest.raises(ValueError, match=message):
            to_lora(model, **options)
        with pytest.raises(ValueError, match=message):
            add_to_checkpoint(tmp_path, **options)
        assert not (tmp_path / "lora").exists()


class TestSaving:
    def test_a_save_that_fails_leaves_the_earlier_export(self, pair, tmp_path) -> None:
        model = composed("mlp", pair("mlp"))
        saved(to_lora(model, include_head="separate"), tmp_path)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        broken = to_lora(model, rank=1)
        broken.config.revision = object()  # cannot be written; the weights come before
        with pytest.raises(TypeError):
            broken.save_pretrained(tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    def test_a_head_of_an_earlier_export_goes(self, pair, tmp_path) -> None:
        model = composed("mlp", pair("mlp"))
        (tmp_path / "README.md").write_text("mine")
        saved(to_lora(model, include_head="separate"), tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, WEIGHTS, HEAD]
        saved(to_lora(model), tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, WEIGHTS]

    def test_the_same_export_is_the_same_files(self, pair, tmp_path) -> None:
        model = composed("bert", pair("bert"))
        one, other = (saved(to_lora(model), tmp_path / folder) for folder in ("one", "other"))
        assert all((one / name).read_bytes() == (other / name).read_bytes() for name in (CONFIG, WEIGHTS))
        config = json.loads((one / CONFIG).read_text())
        assert config["peft_type"] == "LORA"
        assert config["target_modules"] == ["key", "query", "value"]
        assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (5, 5, True)
        assert config["rank_pattern"] == config["alpha_pattern"]
        assert not any("omposition" in value for value in map(str, config.values()))

    def test_says_which_base_it_is_for(self, pair, tmp_path) -> None:
        model = composed("mlp", pair("mlp"), revision="v2")
        model.peft_config["default"].base_model_name_or_path = "org/base"
        model.save_pretrained(str(tmp_path))
        for export in (to_lora(model), lora_from_checkpoint(tmp_path)):
            assert (export.config.base_model_name_or_path, export.config.revision) == ("org/base", "v2")

    def test_says_what_it_is(self, pair) -> None:
        model = composed("mlp", pair("mlp"))
        assert str(to_lora(model)) == "Plain LoRA of 2 modules, rank 5: exact"
        with pytest.warns(UserWarning, match="ranks 2 to 5"):
            assert str(to_lora(model, one_rank=False)) == "Plain LoRA of 2 modules, ranks 2 to 5: exact"
        export = to_lora(model, rank=2)
        assert str(export) == (
            f"Plain LoRA of 2 modules, rank 2: relative error {export.total_error:.3g}, "
            f"at most {export.errors['lin1']:.3g} (lin1)"
        )


class TestPushing:
    @pytest.fixture
    def hub(self, tmp_path: Path) -> Iterator[HubServer]:
        with HubServer() as server, as_the_hub(server, tmp_path / "cache"):
            yield server

    @pytest.mark.parametrize("subfolder", [None, "lora"])
    def test_puts_the_files_into_a_repository(self, subfolder, hub, pair, tmp_path) -> None:
        export = to_lora(composed("mlp", pair("mlp")), include_head="separate")
        folder = saved(export, tmp_path / "lora")
        if subfolder:
            hub.push("me/composed", {"README.md": b"a card"})
        commit = export.push_to_hub("me/composed", subfolder=subfolder, token=hub.token, private=True)
        repository = hub.repositories["me/composed"]
        assert repository.refs["main"] == commit.oid
        files = dict(repository.commits[commit.oid])
        files.pop(".gitattributes", None)
        if subfolder:
            assert files.pop("README.md") == b"a card"
        else:
            assert repository.private
        prefix = f"{subfolder}/" if subfolder else ""
        assert files == {f"{prefix}{file.name}": file.read_bytes() for file in folder.iterdir()}


def test_what_an_interactive_session_shows_of_an_export_is_one_line(tmp_path: Path) -> None:
    export = to_lora(tiny.compose("bert", tiny.save_pair(tmp_path, "bert")))
    assert repr(export) == "<LoraExport: Plain LoRA of 6 modules, rank 5: exact>"
