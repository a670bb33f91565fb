"""Compositions on disk: saved, loaded in every way that PEFT and transformers offer, cut short, moved and damaged."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from peft_composition import CompositionConfig, CompositionLayer

from .. import tiny, warm
from ..upstream_faults import composed_by_transformers, loaded_by_transformers


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
AUTO_CLASSES = {
    "bert": (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification),
    "gpt2": (AutoModelForCausalLM, AutoPeftModelForCausalLM),
    "llama": (AutoModelForCausalLM, AutoPeftModelForCausalLM),
    "t5": (AutoModelForSeq2SeqLM, AutoPeftModelForSeq2SeqLM),
    "vit": (AutoModelForImageClassification, None),
    "mixtral": (AutoModelForCausalLM, AutoPeftModelForCausalLM),
    "gpt_oss": (AutoModelForCausalLM, AutoPeftModelForCausalLM),
}

every_model = pytest.mark.parametrize("name", list(tiny.TINY))
every_transformer = pytest.mark.parametrize("name", list(AUTO_CLASSES))


@pytest.fixture
def own_pair(tmp_path: Path) -> Callable[[str], list[str]]:
    """Two LoRAs for a tiny model that a test may change or delete."""
    return lambda name: tiny.save_pair(tmp_path / "upstream", name)


def scramble(model: nn.Module, seed: int = 3) -> None:
    """Move all that trains away from where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) / 40


def composed(name: str, adapters: list[str], **fields: Any) -> PeftModel:
    """A composition whose trained parts have left their starting values."""
    model = tiny.compose(name, adapters, **fields)
    scramble(model)
    return model


def output(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.TINY[name].inputs().items()}
    with torch.no_grad():
        result = model.eval()(**inputs)
    return result if isinstance(result, Tensor) else result.logits


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def train(model: nn.Module, name: str, steps: int) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        result = model(**tiny.TINY[name].inputs())
        (result if isinstance(result, Tensor) else result.logits).square().mean().backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def sha256(folder: str) -> str:
    return hashlib.sha256(Path(folder, WEIGHTS).read_bytes()).hexdigest()


def saved_base(name: str, folder: Path) -> nn.Module:
    """A tiny transformer that knows the folder it was loaded from, as one from the Hub knows its id."""
    tiny.build(name).save_pretrained(str(folder))
    return AUTO_CLASSES[name][0].from_pretrained(str(folder)).eval()


class TestRoundTrip:
    @every_model
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_outputs_are_bit_equal(self, name, dtype, low_cpu_mem_usage, pair, tmp_path) -> None:
        model = composed(name, pair(name), base=tiny.build(name).to(dtype))
        model.save_pretrained(str(tmp_path))

        base = tiny.build(name).to(dtype)
        untouched = output(base, name, dtype)
        loaded = PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)

        assert not torch.equal(output(loaded, name, dtype), untouched)
        equal(output(loaded, name, dtype), output(model, name, dtype))
        assert same_state(state(loaded), state(model))
        assert {key: t.dtype for key, t in state(loaded).items()} == {key: t.dtype for key, t in state(model).items()}
        assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert not loaded.training

    @pytest.mark.parametrize("name", ["mlp", "bert", "t5"])
    @pytest.mark.parametrize(
        "fields",
        [
            {"weight_sharing": "block"},
            {"weight_sharing": "model"},
            {"weight_sharing": "block", "mixing": "uniform"},
            {"mixing": "fixed", "weights": [0.75, 0.25]},
            {"weights": [1.0, 0.0]},
            {"normalization": "none", "weights": [1.5, -0.5], "gain": 3},
            {"target_modules": r".*(1.*|v|value)"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_every_setting_comes_back(self, name, fields, low_cpu_mem_usage, pair, tmp_path) -> None:
        model = composed(name, pair(name), **fields)
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(tiny.build(name), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        equal(output(loaded, name), output(model, name))
        assert loaded.base_model.mixing_weights() == model.base_model.mixing_weights()
        assert loaded.get_nb_trainable_parameters()[1] == model.get_nb_trainable_parameters()[1]

        def sharing(model: PeftModel) -> list[list[str]]:
            groups: dict[int, list[str]] = {}
            for module, layer in model.named_modules():
                if isinstance(layer, CompositionLayer):
                    groups.setdefault(id(layer.composition_mixing["default"]), []).append(module)
            return list(groups.values())

        assert sharing(loaded) == sharing(model)

    @every_model
    def test_training_goes_on_as_if_never_saved(self, name, pair, tmp_path) -> None:
        model = tiny.compose(name, pair(name))
        train(model, name, steps=2)
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(tiny.build(name), str(tmp_path), is_trainable=True)
        before = state(loaded)
        train(model, name, steps=2)
        train(loaded, name, steps=2)
        assert same_state(state(loaded), state(model))
        changed = {key for key, tensor in state(loaded).items() if not torch.equal(tensor, before[key])}
        assert changed == {key for key in before if ".composition_mixing." in key or ".modules_to_save." in key}

    def test_trained_weights_survive_in_float32_beside_a_bfloat16_base(self, pair, tmp_path) -> None:
        model = composed("bert", pair("bert"), base=tiny.build("bert").bfloat16())
        model.save_pretrained(str(tmp_path))
        saved = load_file(tmp_path / WEIGHTS)
        for module in tiny.touched_modules(pair("bert")):
            theta = model.base_model.model.get_submodule(module).composition_mixing["default"].weight
            key = f"base_model.model.{module}.composition_mixing.weight"
            assert saved[key].dtype == torch.float32
            equal(saved[key], theta.detach())
            assert saved[key.replace("mixing.weight", "factors.A")].dtype == torch.bfloat16

    def test_saved_while_merged_it_is_the_same_composition(self, pair, tmp_path) -> None:
        model = composed("mlp", pair("mlp"))
        expected = output(model, "mlp")
        model.merge_adapter()
        model.save_pretrained(str(tmp_path))
        equal(output(PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path)), "mlp"), expected)

    @pytest.mark.parametrize("name", ["mlp", "bert"])
    def test_as_a_pickle(self, name, pair, tmp_path) -> None:
        model = composed(name, pair(name))
        model.save_pretrained(str(tmp_path), safe_serialization=False)
        assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, "adapter_model.bin"]
        loaded = PeftModel.from_pretrained(tiny.build(name), str(tmp_path))
        equal(output(loaded, name), output(model, name))

    def test_saved_again_after_loading_it_is_the_same_checkpoint(self, pair, tmp_path) -> None:
        composed("bert", pair("bert")).save_pretrained(str(tmp_path / "first"))
        loaded = PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path / "first"))
        loaded.save_pretrained(str(tmp_path / "second"))
        assert same_state(load_file(tmp_path / "first" / WEIGHTS), load_file(tmp_path / "second" / WEIGHTS))
        first, second = (json.loads((tmp_path / folder / CONFIG).read_text()) for folder in ("first", "second"))
        assert first == second

    @pytest.mark.parametrize("given", [None, ["pooler.dense", "classifier"]])
    def test_heads_are_listed_once_however_often_it_is_loaded(self, given, pair, tmp_path) -> None:
        """PEFT adds their names to the list on every load."""
        model = composed("bert", pair("bert"), modules_to_save=given)
        expected = list(dict.fromkeys([*(given or []), "classifier", "score"]))
        for number in range(3):
            assert model.peft_config["default"].modules_to_save == expected
            model.save_pretrained(str(tmp_path / str(number)))
            assert json.loads((tmp_path / str(number) / CONFIG).read_text())["modules_to_save"] == expected
            model = PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path / str(number)))
        model.load_adapter(str(tmp_path / "0"), "second")
        assert model.peft_config["second"].modules_to_save == expected
        config = CompositionConfig(adapters=pair("bert"), task_type="SEQ_CLS")
        for _ in range(2):
            get_peft_model(tiny.build("bert"), config)
        assert config.to_dict()["modules_to_save"] == ["classifier", "score"]


class TestFiles:
    @every_model
    def test_hold_the_composition_and_the_head_alone(self, name, pair, tmp_path) -> None:
        composed(name, pair(name)).save_pretrained(str(tmp_path))
        assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, WEIGHTS]
        modules = [f"base_model.model.{tiny.path_of(module)}" for module in tiny.touched_modules(pair(name))]
        expected = {f"{module}.composition_factors.{factor}" for module in modules for factor in "AB"}
        expected |= {f"{module}.composition_mixing.weight" for module in modules}
        expected.add(f"{modules[0]}.composition_fingerprint._extra_state")
        for head in tiny.TINY[name].head:
            expected |= {f"base_model.model.{head}.{leaf}" for leaf in ("weight", "bias")}
        assert set(load_file(tmp_path / WEIGHTS)) == expected

    def test_record_what_was_composed(self, pair, tmp_path) -> None:
        composed("mlp", pair("mlp")).save_pretrained(str(tmp_path))
        config = json.loads((tmp_path / CONFIG).read_text())
        assert config["peft_type"] == "COMPOSITION"
        assert config["composed_modules"] == {"lin0": [2, 0], "lin1": [2, 3]}
        assert [entry["name"] for entry in config["provenance"]] == ["first", "second"]
        assert [entry["path"] for entry in config["provenance"]] == ["./first", "./second"]
        assert [entry["sha256"] for entry in config["provenance"]] == [sha256(folder) for folder in pair("mlp")]

    def test_factors_on_disk_are_the_formula(self, pair, tmp_path) -> None:
        """B A of the uniform composition, from the file alone: rows 0-1 are the first adapter's, 2-4 the second's."""
        tiny.compose("mlp", pair("mlp")).save_pretrained(str(tmp_path))
        saved = load_file(tmp_path / WEIGHTS)
        A, B = (saved[f"base_model.model.lin1.composition_factors.{factor}"].double() for factor in "AB")
        base = tiny.build("mlp").double()
        for number, rows in enumerate((slice(0, 2), slice(2, 5))):
            expected = tiny.composed_by_hand(base, pair("mlp")[number:][:1], [1.0])
            torch.testing.assert_close(
                B[:, rows] @ A[rows], expected.lin1.weight - base.lin1.weight, atol=1e-6, rtol=0
            )


class TestStandingAlone:
    @every_model
    def test_loads_when_the_upstream_adapters_are_gone(self, name, own_pair, tmp_path) -> None:
        model = composed(name, own_pair(name))
        model.save_pretrained(str(tmp_path / "saved"))
        shutil.rmtree(tmp_path / "upstream")
        loaded = PeftModel.from_pretrained(tiny.build(name), str(tmp_path / "saved"))
        equal(output(loaded, name), output(model, name))

    def test_loads_in_another_process_and_folder_without_a_network(self, own_pair, tmp_path, monkeypatch) -> None:
        folders = own_pair("bert")
        monkeypatch.chdir(tmp_path)
        model = composed("bert", [os.path.relpath(folder) for folder in folders])
        model.save_pretrained("saved")
        shutil.rmtree(tmp_path / "upstream")
        (tmp_path / "elsewhere").mkdir()
        script = (
            "import sys, torch, peft_composition\n"
            "from peft import PeftModel\n"
            "from tests import tiny\n"
            "model = PeftModel.from_pretrained(tiny.build('bert'), sys.argv[1])\n"
            "torch.save(tiny.output(model, 'bert'), 'output.pt')\n"
        )
        warm.run("-c", script, tmp_path / "saved", cwd=tmp_path / "elsewhere").check_returncode()
        torch.testing.assert_close(torch.load("elsewhere/output.pt"), output(model, "bert"), rtol=0, atol=1e-6)


class TestWithoutTheAdapters:
    """`save_adapters=False`: names and hashes instead of factors."""

    @every_model
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_loads_again_from_the_folders(self, name, low_cpu_mem_usage, pair, tmp_path) -> None:
        model = composed(name, pair(name), save_adapters=False)
        model.save_pretrained(str(tmp_path))
        assert not any("factors" in key for key in load_file(tmp_path / WEIGHTS))
        loaded = PeftModel.from_pretrained(tiny.build(name), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        equal(output(loaded, name), output(model, name))
        assert same_state(state(loaded), state(model))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())

    def test_is_a_few_kilobytes(self, tmp_path) -> None:
        base = nn.ModuleDict({f"lin{n}": nn.Linear(128, 128) for n in range(12)})
        adapters = [
            str(tiny.save_lora(tmp_path / f"lora{n}", base, [f"lin{k}" for k in range(12)], seed=n, r=16))
            for n in range(2)
        ]
        sizes = {}
        for save_adapters in (True, False):
            config = CompositionConfig(adapters=adapters, save_adapters=save_adapters)
            get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path / str(save_adapters)))
            sizes[save_adapters] = [
                (tmp_path / str(save_adapters) / file).stat().st_size for file in (WEIGHTS, CONFIG)
            ]
        factors = 12 * 2 * 2 * 16 * 128 * 4
        assert sizes[True][0] > factors
        assert sum(sizes[False]) < 8_000

    def test_of_a_model_in_half_precision(self, pair, tmp_path) -> None:
        model = composed("bert", pair("bert"), base=tiny.build("bert").bfloat16(), save_adapters=False)
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(tiny.build("bert").bfloat16(), str(tmp_path))
        equal(output(loaded, "bert", torch.bfloat16), output(model, "bert", torch.bfloat16))

    def test_training_goes_on(self, pair, tmp_path) -> None:
        model = composed("mlp", pair("mlp"), save_adapters=False)
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path), is_trainable=True)
        train(model, "mlp", steps=2)
        train(loaded, "mlp", steps=2)
        assert same_state(state(loaded), state(model))

    def test_other_bytes_are_refused_with_both_hashes(self, own_pair, tmp_path) -> None:
        folders = own_pair("mlp")
        composed("mlp", folders, save_adapters=False).save_pretrained(str(tmp_path / "saved"))
        recorded = sha256(folders[1])
        tensors = load_file(Path(folders[1], WEIGHTS))
        next(iter(tensors.values())).view(-1)[0] += 1e-3
        save_file(tensors, Path(folders[1], WEIGHTS))

        base = tiny.build("mlp")
        before, modules = state(base), [type(module) for module in base.modules()]
        with pytest.raises(ValueError, match="adapter 'second'") as refusal:
            PeftModel.from_pretrained(base, str(tmp_path / "saved"))
        assert recorded in str(refusal.value)
        assert sha256(folders[1]) in str(refusal.value)
        assert same_state(state(base), before)
        assert [type(module) for module in base.modules()] == modules

    def test_a_missing_folder_is_refused(self, own_pair, tmp_path) -> None:
        folders = own_pair("mlp")
        composed("mlp", folders, save_adapters=False).save_pretrained(str(tmp_path / "saved"))
        shutil.rmtree(folders[0])
        base = tiny.build("mlp")
        before = state(base)
        with pytest.raises(ValueError, match=re.escape(f"adapter 'first': there is no folder {folders[0]}")):
            PeftModel.from_pretrained(base, str(tmp_path / "saved"))
        assert same_state(state(base), before)


class TestSeveral:
    def test_under_another_name(self, pair, tmp_path) -> None:
        model = composed("bert", pair("bert"))
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path), adapter_name="other")
        assert loaded.active_adapters == ["other"]
        equal(output(loaded, "bert"), output(model, "bert"))
        assert loaded.base_model.mixing_weights("other") == model.base_model.mixing_weights()
        loaded.save_pretrained(str(tmp_path / "again"))
        assert same_state(load_file(tmp_path / "again" / "other" / WEIGHTS), load_file(tmp_path / WEIGHTS))

    @pytest.mark.parametrize("name", ["mlp", "bert", "gpt2", "attention", "mixtral"])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("save_adapters", [False, True])
    def test_are_saved_and_loaded_beside_each_other(
        self, name, low_cpu_mem_usage, save_adapters, pair, tmp_path
    ) -> None:
        model = composed(name, pair(name), save_adapters=save_adapters)
        fields = {"task_type": tiny.TINY[name].task_type, "modules_to_save": tiny.TINY[name].head[:] or None}
        model.add_adapter(
            "second",
            CompositionConfig(adapters=pair(name)[1:], save_adapters=save_adapters, normalization="none", **fields),
        )
        outputs = {}
        for adapter_name in ("second", "default"):
            model.set_adapter(adapter_name)
            scramble(model, seed=len(adapter_name))
            outputs[adapter_name] = output(model, name)
        assert not torch.equal(outputs["default"], outputs["second"])
        model.save_pretrained(str(tmp_path))
        assert not any("second" in key for key in load_file(tmp_path / WEIGHTS))

        loaded = PeftModel.from_pretrained(tiny.build(name), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        result = loaded.load_adapter(str(tmp_path / "second"), "second", low_cpu_mem_usage=low_cpu_mem_usage)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        for adapter_name in ("default", "second"):
            loaded.set_adapter(adapter_name)
            equal(output(loaded, name), outputs[adapter_name])

        alone = PeftModel.from_pretrained(tiny.build(name), str(tmp_path / "second"))
        equal(output(alone, name), outputs["second"])

    @pytest.mark.parametrize("is_trainable", [False, True])
    def test_a_second_one_is_loaded_inactive(self, is_trainable, pair, tmp_path) -> None:
        composed("mlp", pair("mlp")).save_pretrained(str(tmp_path))
        model = tiny.compose("mlp", pair("mlp"))
        before = output(model, "mlp")
        trainable = {key for key, p in model.named_parameters() if p.requires_grad}
        model.load_adapter(str(tmp_path), "second", is_trainable=is_trainable)
        assert model.active_adapters == ["default"]
        equal(output(model, "mlp"), before)
        now = {key for key, p in model.named_parameters() if p.requires_grad}
        new = {f"base_model.model.lin{n}.composition_mixing.second.weight" for n in (0, 1)}
        new |= {f"base_model.model.head.modules_to_save.second.{leaf}" for leaf in ("weight", "bias")}
        assert now == trainable | (new if is_trainable else set())

    def test_a_chosen_one_is_saved_alone(self, pair, tmp_path) -> None:
        model = composed("mlp", pair("mlp"))
        model.add_adapter("second", CompositionConfig(adapters=pair("mlp")))
        model.save_pretrained(str(tmp_path), selected_adapters=["second"])
        assert sorted(os.listdir(tmp_path)) == ["README.md", "second"]


class TestOtherWaysIn:
    @loaded_by_transformers
    @every_transformer
    @pytest.mark.parametrize("save_adapters", [True, False])
    def test_load_adapter_of_transformers(self, name, save_adapters, pair, tmp_path) -> None:
        model = composed(name, pair(name), save_adapters=save_adapters)
        model.save_pretrained(str(tmp_path))
        plain = tiny.build(name)
        plain.load_adapter(str(tmp_path))
        equal(output(plain, name), output(model, name))
        assert not any(p.requires_grad for key, p in plain.named_parameters() if ".composition_" in key)

    @loaded_by_transformers
    @every_transformer
    @pytest.mark.parametrize("save_adapters", [True, False])
    def test_auto_model_from_the_folder_of_the_adapter(self, name, save_adapters, pair, tmp_path) -> None:
        base = saved_base(name, tmp_path / "base")
        model = composed(name, pair(name), base=base, save_adapters=save_adapters)
        model.save_pretrained(str(tmp_path / "saved"))
        loaded = AUTO_CLASSES[name][0].from_pretrained(str(tmp_path / "saved"))
        equal(output(loaded, name), output(model, name))

    @pytest.mark.parametrize("name", [name for name, (_, auto) in AUTO_CLASSES.items() if auto])
    @pytest.mark.parametrize("is_trainable", [True, False])
    def test_auto_peft_model(self, name, is_trainable, pair, tmp_path) -> None:
        base = saved_base(name, tmp_path / "base")
        model = composed(name, pair(name), base=base)
        model.save_pretrained(str(tmp_path / "saved"))
        loaded = AUTO_CLASSES[name][1].from_pretrained(str(tmp_path / "saved"), is_trainable=is_trainable)
        equal(output(loaded, name), output(model, name))
        assert any(parameter.requires_grad for parameter in loaded.parameters()) == is_trainable

    @composed_by_transformers
    @every_transformer
    def test_saved_by_transformers(self, name, pair, tmp_path) -> None:
        model = saved_base(name, tmp_path / "base")
        model.add_adapter(CompositionConfig(adapters=pair(name)))
        scramble(model)
        model.save_pretrained(str(tmp_path / "saved"))
        assert {CONFIG, WEIGHTS} <= set(os.listdir(tmp_path / "saved"))
        equal(output(PeftModel.from_pretrained(tiny.build(name), str(tmp_path / "saved")), name), output(model, name))
        loaded = AUTO_CLASSES[name][0].from_pretrained(str(tmp_path / "saved"))
        equal(output(loaded, name), output(model, name))

    @every_model
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_injected_from_the_saved_config_and_filled_by_hand(self, name, low_cpu_mem_usage, pair, tmp_path) -> None:
        model = composed(name, pair(name), modules_to_save=None, task_type=None)
        model.save_pretrained(str(tmp_path))
        plain = tiny.build(name)
        config = PeftConfig.from_pretrained(str(tmp_path))
        inject_adapter_in_model(config, plain, "mix", low_cpu_mem_usage=low_cpu_mem_usage)
        result = set_peft_model_state_dict(
            plain, load_file(tmp_path / WEIGHTS), adapter_name="mix", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert result.unexpected_keys == []
        equal(output(plain, name), output(model, name))


class TestWhatDoesNotFit:
    def test_a_model_that_lacks_a_module_is_refused_untouched(self, pair, tmp_path) -> None:
        composed("bert", pair("bert")).save_pretrained(str(tmp_path))
        base = tiny.build("bert")
        base.bert.encoder.layer = base.bert.encoder.layer[:1]
        before, modules = state(base), [type(module) for module in base.modules()]
        missing = r"module 'bert\.encoder\.layer\.1\.attention\.self\.\w+', which does not exist in the model"
        with pytest.raises(ValueError, match=missing):
            PeftModel.from_pretrained(base, str(tmp_path))
        assert same_state(state(base), before)
        assert [type(module) for module in base.modules()] == modules
        assert not hasattr(base, "peft_config")

        model = tiny.compose("mlp", pair("mlp"))
        before = state(model)
        with pytest.raises(ValueError, match="which does not exist in the model"):
            model.load_adapter(str(tmp_path), "second")
        assert same_state(state(model), before)
        assert list(model.peft_config) == ["default"]

    def test_a_model_of_another_size_is_refused(self, pair, tmp_path) -> None:
        composed("mlp", pair("mlp"), modules_to_save=None).save_pretrained(str(tmp_path))
        other = tiny.build("mlp")
        other.lin1 = nn.Linear(20, 17)
        with pytest.raises((RuntimeError, ValueError), match=r"lin1"):
            PeftModel.from_pretrained(other, str(tmp_path))


class TestConfigAlone:
    """`get_peft_model` with the config of a checkpoint builds layers whose factors never came."""

    @pytest.fixture
    def config(self, pair: Callable[[str], list[str]], tmp_path: Path) -> PeftConfig:
        composed("mlp", pair("mlp")).save_pretrained(str(tmp_path / "saved"))
        return PeftConfig.from_pretrained(str(tmp_path / "saved"))

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize(
        "use",
        [
            lambda model: output(model, "mlp"),
            lambda model: model.merge_adapter(),
            lambda model: model.merge_and_unload(),
            lambda model: model.base_model.mixing_weights(),
        ],
        ids=["forward", "merge", "merge_and_unload", "mixing_weights"],
    )
    def test_is_an_error_at_the_first_use(self, use, low_cpu_mem_usage, config) -> None:
        model = get_peft_model(tiny.build("mlp"), config, low_cpu_mem_usage=low_cpu_mem_usage)
        with pytest.raises(RuntimeError, match=r"'default' was built from a saved config.*from_pretrained"):
            use(model)

    def test_cannot_be_saved(self, config, tmp_path) -> None:
        model = get_peft_model(tiny.build("mlp"), config)
        with pytest.raises(RuntimeError, match="'default' was built from a saved config"):
            model.save_pretrained(str(tmp_path / "again"))

    def test_stays_an_error_after_another_composition_was_loaded(self, config, tmp_path) -> None:
        model = get_peft_model(tiny.build("mlp"), config)
        model.load_adapter(str(tmp_path / "saved"), "second")
        with pytest.raises(RuntimeError, match="'default' was built from a saved config"):
            output(model, "mlp")
        model.set_adapter("second")
        assert output(model, "mlp").isfinite().all()

    @pytest.mark.parametrize("factor", ["A", "B"])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_checkpoint_without_some_of_the_factors_is_the_same_error(
        self, factor, low_cpu_mem_usage, config, tmp_path
    ) -> None:
        saved = load_file(tmp_path / "saved" / WEIGHTS)
        del saved[f"base_model.model.lin1.composition_factors.{factor}"]
        save_file(saved, tmp_path / "saved" / WEIGHTS)
        with pytest.warns(UserWarning, match="missing adapter keys"):
            model = PeftModel.from_pretrained(
                tiny.build("mlp"), str(tmp_path / "saved"), low_cpu_mem_usage=low_cpu_mem_usage
            )
        with pytest.raises(RuntimeError, match="'default' was built from a saved config"):
            output(model, "mlp")

    def test_a_config_without_its_record_composes_anew(self, config, pair) -> None:
        config = dataclasses.replace(config, composed_modules=None, adapters=pair("mlp"))
        model = get_peft_model(tiny.build("mlp"), config)
        expected = tiny.composed_by_hand(tiny.build("mlp"), pair("mlp"), [0.5, 0.5])
        torch.testing.assert_close(output(model, "mlp"), output(expected, "mlp"), rtol=0, atol=1e-5)
        assert model.base_model.mixing_weights()["lin1"] == {"first": 0.5, "second": 0.5}


WIDTH = 1024
RANK = 4096  # 16 MiB a factor, 32 MiB a checkpoint


def wide_base() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"lin": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(2, 2)})


def set_version(model: nn.Module, version: float) -> None:
    """Put one number everywhere that trains, so that a checkpoint shows which save it comes from."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(version)


def save_again_and_again(folder: str, adapter: str, first: int, ready: Any) -> None:
    """What the process does that is killed: version after version into the same folder."""
    torch.set_num_threads(1)
    model = get_peft_model(wide_base(), CompositionConfig(adapters=[adapter], modules_to_save=["head"]))
    ready.set()
    for version in range(first, first + 10_000):
        set_version(model, version)
        model.save_pretrained(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
class TestCutShort:
    def test_a_killed_save_leaves_a_whole_checkpoint(self, tmp_path) -> None:
        """SIGKILL at random moments, and when an unfinished file is seen; the folder loads every time."""
        adapter = str(tiny.save_lora(tmp_path / "lora", wide_base(), ["lin"], r=RANK))
        factor = load_file(Path(adapter, WEIGHTS))["base_model.model.lin.lora_A.weight"]
        folder = tmp_path / "saved"
        model = get_peft_model(wide_base(), CompositionConfig(adapters=[adapter], modules_to_save=["head"]))
        set_version(model, 0)
        model.save_pretrained(str(folder))
        complete = (folder / WEIGHTS).stat().st_size
        assert complete > 20e6

        context = warm.context()
        chance = random.Random(0)
        last, unfinished = 0.0, 0
        for trial in range(6):
            ready = context.Event()
            process = context.Process(
                target=save_again_and_again, args=(str(folder), adapter, 100 * (trial + 1), ready), daemon=True
            )
            process.start()
            assert ready.wait(120)
            if trial % 2:
                time.sleep(chance.uniform(0, 0.3))
            else:
                wait_for_an_unfinished_file(folder, complete)
            process.kill()
            process.join()
            assert process.exitcode == -9
            unfinished += bool(unfinished_files(folder, complete))

            loaded = PeftModel.from_pretrained(wide_base(), str(folder))
            lin = loaded.base_model.model["lin"]
            equal(lin.composition_factors["default"].A, factor)
            versions = {lin.composition_mixing["default"].weight.item()}
            versions |= set(loaded.base_model.model["head"].modules_to_save["default"].weight.flatten().tolist())
            assert len(versions) == 1
            version = versions.pop()
            assert version == last or 100 * (trial + 1) <= version
            last = version
            for leftover in unfinished_files(folder, complete):
                leftover.unlink()
        assert unfinished >= 2, "too few of the kills came while a file was being written to show anything"


def unfinished_files(folder: Path, complete: int) -> list[Path]:
    """What a save has begun to write: files that a finished checkpoint has not, or not in this length."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # renamed since
            if path.name == WEIGHTS:
                is_unfinished = path.stat().st_size != complete
            else:
                is_unfinished = path.is_file() and path.name not in (CONFIG, "README.md")
            if is_unfinished:
                found.append(path)
    return found


def wait_for_an_unfinished_file(folder: Path, complete: int) -> None:
    deadline = time.monotonic() + 30
    while not unfinished_files(folder, complete):
        assert time.monotonic() < deadline, "no unfinished file was ever seen"
