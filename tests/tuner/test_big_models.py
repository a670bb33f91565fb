"""What large models need: offloaded and meta weights, memory while loading, 16 bits, recomputation, compiling, text.

Offloading needs no GPU: accelerate brings weights from disk or from another place in memory to the CPU for every call.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, init_empty_weights
from accelerate.state import AcceleratorState
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    pipeline,
)

from peft_composition import CompositionConfig, to_lora
from peft_composition.tuner.locating import composition_layers

from .. import loading_memory, tiny
from ..upstream_faults import composed_by_transformers


# Of the two blocks of the tiny Llama the second is on disk.
DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
PEFT_DEVICE_MAP = {f"base_model.model.{module}": device for module, device in DEVICE_MAP.items()}


def scramble(model: nn.Module) -> None:
    """Move the mixing weights away from where they start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "composition_mixing" in name:
                parameter += torch.randn(parameter.shape, generator=generator) / 40


def composed(name: str, adapters: list[str], **fields: Any) -> PeftModel:
    model = tiny.compose(name, adapters, **{"modules_to_save": None, "task_type": None, **fields})
    scramble(model)
    return model


def by_hand(model: PeftModel, name: str, adapters: list[str]) -> nn.Module:
    """The plain model whose weights are those of the formula, with the mixing weights that the model has."""
    names = model.peft_config["default"].adapter_names
    rows = model.base_model.mixing_weights()
    weights = {module: [row.get(name, 0.0) for name in names] for module, row in rows.items()}
    return tiny.composed_by_hand(tiny.build(name), adapters, weights)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def thetas(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "composition_mixing" in n}


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if "composition_factors" in n}


def train(model: nn.Module, name: str, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        result = model(**tiny.TINY[name].inputs())
        (result if isinstance(result, Tensor) else result.logits).square().mean().backward()
        optimizer.step()


class TestOffloaded:
    @pytest.fixture(autouse=True)
    def _in_a_folder_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)  # PEFT writes the merged index of a model on disk into the working directory

    @pytest.fixture
    def split(self, tmp_path: Path) -> Callable[[], nn.Module]:
        """Loads the tiny Llama with half of it on disk."""
        folder = tmp_path / "models--tiny--llama"
        tiny.build("llama").save_pretrained(str(folder))

        def load() -> nn.Module:
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), device_map=DEVICE_MAP, offload_folder=str(tmp_path / "offloaded")
            )
            assert model.model.layers[1].self_attn.q_proj.weight.is_meta
            return model.eval()

        return load

    @pytest.fixture
    def saved(self, pair: Callable[[str], list[str]], tmp_path: Path) -> tuple[PeftModel, str]:
        model = composed("llama", pair("llama"))
        model.save_pretrained(str(tmp_path / "saved"))
        return model, str(tmp_path / "saved")

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_new_composition_computes_and_trains_like_on_a_plain_model(
        self, low_cpu_mem_usage: bool, split: Callable[[], nn.Module], pair: Callable[[str], list[str]]
    ) -> None:
        plain = tiny.compose("llama", pair("llama"))
        config = CompositionConfig(adapters=pair("llama"), task_type="CAUSAL_LM")
        model = get_peft_model(split(), config, low_cpu_mem_usage=low_cpu_mem_usage)

        assert {p.device.type for p in (*factors(model).values(), *thetas(model).values())} == {"cpu"}
        train(model, "llama")
        train(plain, "llama")

        assert all(theta.abs().max() > 1e-4 for theta in thetas(model).values())
        for key, theta in thetas(plain).items():
            torch.testing.assert_close(thetas(model)[key], theta, rtol=1e-3, atol=0)
        close(tiny.output(model, "llama"), tiny.output(by_hand(model, "llama", pair("llama")), "llama"))
        assert model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight.is_meta

    def test_trainer_ends_with_the_same_weights(
        self, split: Callable[[], nn.Module], pair: Callable[[str], list[str]], tmp_path: Path
    ) -> None:
        plain = tiny.compose("llama", pair("llama"))
        model = get_peft_model(split(), CompositionConfig(adapters=pair("llama"), task_type="CAUSAL_LM"))
        for each in (plain, model):
            run_trainer(each, "llama", tmp_path)
        for key, theta in thetas(plain).items():
            assert theta.abs().max() > 1e-4
            torch.testing.assert_close(thetas(model)[key], theta, rtol=1e-4, atol=0)

    def test_a_new_composition_is_saved_with_all_its_values(
        self, split: Callable[[], nn.Module], pair: Callable[[str], list[str]], tmp_path: Path
    ) -> None:
        model = get_peft_model(split(), CompositionConfig(adapters=pair("llama"), task_type="CAUSAL_LM"))
        scramble(model)
        model.save_pretrained(str(tmp_path / "out"))

        loaded = PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "out"))

        close(tiny.output(loaded, "llama"), tiny.output(by_hand(model, "llama", pair("llama")), "llama"))

    def test_a_classifier_beside_blocks_on_disk_trains(self, pair: Callable[[str], list[str]], tmp_path: Path) -> None:
        base = tiny.build("bert")
        disk_offload(base.bert.encoder, str(tmp_path / "offloaded"), execution_device=torch.device("cpu"))
        model, plain = tiny.compose("bert", pair("bert"), base=base), tiny.compose("bert", pair("bert"))

        for each in (model, plain):
            train(each, "bert")

        expected = {key: p for key, p in plain.named_parameters() if p.requires_grad}
        assert {key.rpartition(".")[2] for key in expected} == {"weight", "bias"}
        found = dict(model.named_parameters())
        for key, parameter in expected.items():
            torch.testing.assert_close(found[key], parameter, rtol=1e-3, atol=1e-7)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_saved_composition_is_offloaded_like_its_base(
        self,
        low_cpu_mem_usage: bool,
        split: Callable[[], nn.Module],
        saved: tuple[PeftModel, str],
        pair: Callable[[str], list[str]],
        tmp_path: Path,
    ) -> None:
        expected = tiny.output(by_hand(saved[0], "llama", pair("llama")), "llama")

        model = PeftModel.from_pretrained(
            split(),
            saved[1],
            device_map=PEFT_DEVICE_MAP,
            offload_dir=str(tmp_path / "again"),
            low_cpu_mem_usage=low_cpu_mem_usage,
        )

        assert {key.split(".")[4]: p.device.type for key, p in factors(model).items()} == {"0": "cpu", "1": "meta"}
        for _ in range(2):
            close(tiny.output(model, "llama"), expected)
        assert all(p.is_meta for key, p in factors(model).items() if ".layers.1." in key)
        assert model.base_model.mixing_weights() == saved[0].base_model.mixing_weights()
        self._saves_and_exports(model, expected, tmp_path)
        self._merges_and_unmerges(model, expected)

    def test_a_second_composition_is_loaded_with_its_values(
        self,
        split: Callable[[], nn.Module],
        saved: tuple[PeftModel, str],
        pair: Callable[[str], list[str]],
    ) -> None:
        model = get_peft_model(split(), CompositionConfig(adapters=pair("llama"), mixing="uniform"))
        model.load_adapter(saved[1], "second")
        model.set_adapter("second")
        close(tiny.output(model, "llama"), tiny.output(by_hand(saved[0], "llama", pair("llama")), "llama"))

    def test_training_copies_of_offloaded_mixing_weights_is_refused(
        self, split: Callable[[], nn.Module], saved: tuple[PeftModel, str], tmp_path: Path
    ) -> None:
        model = PeftModel.from_pretrained(
            split(), saved[1], is_trainable=True, device_map=PEFT_DEVICE_MAP, offload_dir=str(tmp_path / "again")
        )
        with torch.no_grad():
            model(**tiny.TINY["llama"].inputs())
        with pytest.raises(RuntimeError, match=r"'default' are offloaded .* set_peft_model_state_dict"):
            model(**tiny.TINY["llama"].inputs())

    def test_a_saved_composition_trains_on_as_that_error_says(
        self, split: Callable[[], nn.Module], saved: tuple[PeftModel, str]
    ) -> None:
        config = PeftConfig.from_pretrained(saved[1])
        config.inference_mode = False  # saved configs say that nothing trains
        model = get_peft_model(split(), config)
        set_peft_model_state_dict(model, load_peft_weights(saved[1], device="cpu"))
        plain = PeftModel.from_pretrained(tiny.build("llama"), saved[1], is_trainable=True)
        for each in (model, plain):
            train(each, "llama")
        for key, theta in thetas(plain).items():
            torch.testing.assert_close(thetas(model)[key], theta, rtol=1e-3, atol=1e-7)
            assert not torch.equal(theta, thetas(saved[0])[key])

    def test_load_adapter_of_transformers_does_not_compute_without_the_factors(
        self, split: Callable[[], nn.Module], saved: tuple[PeftModel, str]
    ) -> None:
        """It leaves the weights of what is beside modules on disk on disk, and nothing brings them in."""
        model = split()
        model.load_adapter(saved[1])
        with pytest.raises(RuntimeError, match=r"'default'.* factors were never loaded"):
            tiny.output(model, "llama")

    @pytest.mark.parametrize("name", ["mlp", "conv", "embedding", "gpt2", "llama", "t5"])
    @pytest.mark.parametrize("where", ["memory", "disk"])
    def test_on_a_base_that_is_offloaded_as_a_whole(
        self, where: str, name: str, pair: Callable[[str], list[str]], tmp_path: Path
    ) -> None:
        model = composed(name, pair(name), base=offload(tiny.build(name), where, tmp_path / "offloaded"))
        expected = tiny.output(by_hand(model, name, pair(name)), name)
        close(tiny.output(model, name), expected)
        if where == "memory":
            self._merges_and_unmerges(model, expected, name)

    @pytest.mark.parametrize("sharing", ["module", "model"])
    @pytest.mark.parametrize("where", ["memory", "disk"])
    @pytest.mark.parametrize("name", ["conv", "llama"])
    def test_a_composition_that_is_offloaded_afterwards(
        self, name: str, where: str, sharing: str, pair: Callable[[str], list[str]], tmp_path: Path
    ) -> None:
        model = composed(name, pair(name), weight_sharing=sharing).requires_grad_(False)
        weights = model.base_model.mixing_weights()
        expected = tiny.output(by_hand(model, name, pair(name)), name)

        offload(model, where, tmp_path / "offloaded")

        for _ in range(2):
            close(tiny.output(model, name), expected)
        assert all(p.is_meta for p in model.parameters())
        assert not any(layer._folds._kept for _, layer in composition_layers(model))
        assert model.base_model.mixing_weights() == weights
        if name == "llama":
            self._saves_and_exports(model, expected, tmp_path)
        if where == "memory":
            self._merges_and_unmerges(model, expected, name)

    def _saves_and_exports(self, model: PeftModel, expected: Tensor, tmp_path: Path) -> None:
        model.save_pretrained(str(tmp_path / "whole"))
        to_lora(model).save_pretrained(str(tmp_path / "lora"))
        for folder in ("whole", "lora"):
            close(
                tiny.output(PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / folder)), "llama"), expected
            )

    def _merges_and_unmerges(self, model: PeftModel, expected: Tensor, name: str = "llama") -> None:
        untouched = tiny.output(tiny.build(name), name)
        model.merge_adapter()
        close(tiny.output(model, name), expected)
        with model.disable_adapter():
            close(tiny.output(model, name), untouched)
        close(tiny.output(model, name), expected)
        model.merge_adapter()
        model.unmerge_adapter()
        close(tiny.output(model, name), expected)
        close(tiny.output(model.merge_and_unload(), name), expected)


def offload(model: nn.Module, where: str, folder: Path) -> nn.Module:
    """Take all weights of a model away; its hooks bring them back for every call."""
    if where == "disk":
        return disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return cpu_offload(model, execution_device=torch.device("cpu"))


class TestMetaDevice:
    """The composition first, the weights of its base later."""

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("name", ["mlp", "conv", "gpt2", "llama", "t5", "vit"])
    def test_a_loaded_composition_has_its_values_before_the_base_has_any(
        self, name: str, low_cpu_mem_usage: bool, pair: Callable[[str], list[str]], tmp_path: Path
    ) -> None:
        model = composed(name, pair(name))
        model.save_pretrained(str(tmp_path))
        with init_empty_weights():
            base = tiny.TINY[name].build().eval()

        loaded = PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)

        for tensors in (factors, thetas):
            found, expected = tensors(loaded), tensors(model)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert loaded.base_model.mixing_weights() == model.base_model.mixing_weights()
        bring_in(loaded, tiny.build(name))
        close(tiny.output(loaded, name), tiny.output(by_hand(model, name, pair(name)), name))

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_new_one_and_a_second_that_is_loaded(
        self, low_cpu_mem_usage: bool, pair: Callable[[str], list[str]], tmp_path: Path
    ) -> None:
        second = composed("llama", pair("llama"))
        second.save_pretrained(str(tmp_path))
        with init_empty_weights():
            base = tiny.TINY["llama"].build().eval()

        model = get_peft_model(
            base, CompositionConfig(adapters=pair("llama")), low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        model.load_adapter(str(tmp_path), "second", low_cpu_mem_usage=low_cpu_mem_usage)
        bring_in(model, tiny.build("llama"))

        uniform = tiny.composed_by_hand(tiny.build("llama"), pair("llama"), [0.5, 0.5])
        close(tiny.output(model, "llama"), tiny.output(uniform, "llama"))
        model.set_adapter("second")
        close(tiny.output(model, "llama"), tiny.output(by_hand(second, "llama", pair("llama")), "llama"))

    def test_merging_into_nothing_is_refused(self, pair: Callable[[str], list[str]]) -> None:
        with init_empty_weights():
            base = tiny.TINY["mlp"].build()
        model = get_peft_model(base, CompositionConfig(adapters=pair("mlp")))
        with pytest.raises(RuntimeError, match=r"nothing to merge into.*Linear.* meta device"):
            model.merge_adapter()
        assert not any(layer.merged for _, layer in composition_layers(model))

    def test_saving_what_has_no_values_is_refused(self, pair: Callable[[str], list[str]], tmp_path: Path) -> None:
        model = tiny.compose("mlp", pair("mlp")).to("meta")
        with pytest.raises(ValueError, match=r"lin0\.composition_mixing.*meta device"):
            model.save_pretrained(str(tmp_path))


def bring_in(model: PeftModel, base: nn.Module) -> None:
    """Give the base model inside a composition its weights, where it has none."""
    for name, module in model.get_base_model().named_modules():
        if ".composition_" not in f".{name}" and any(p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
    if hasattr(base, "tie_weights"):
        model.get_base_model().tie_weights()
    set_base_model_state_dict(model, base.state_dict())


@pytest.fixture(scope="module")
def large_adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    loading_memory.write(folder)
    yield folder
    shutil.rmtree(folder)  # half a gigabyte


class TestMemoryOfLoading:
    """Peaks of resident memory in a new process; 32 MiB of adapters are mapped at a time, the rest is slack."""

    MAPPED = 36 << 20
    CASES = (
        *("compose float32", "compose bfloat16", "compose pickled"),
        *("load float32", "load bfloat16", "load low_cpu_mem_usage"),
    )

    @pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are measured on Linux")
    def test_is_about_the_size_of_the_factors(self, large_adapters: Path) -> None:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.loading_memory", str(large_adapters), *self.CASES],
            cwd=Path(__file__).parents[2],
            # Freed memory shall leave the process, so that no case uses that of another.
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
            check=True,
            timeout=180,
        )
        measured = json.loads(result.stdout.splitlines()[-1])

        assert list(measured) == [*self.CASES]
        count = loading_memory.ADAPTERS * loading_memory.RANK * loading_memory.LAYERS * 2 * loading_memory.WIDTH
        for case, found in measured.items():
            assert found["factors"] == count * (2 if "bfloat16" in case else 4)
            assert found["peak"] < 1.1 * found["factors"] + self.MAPPED, case
            assert found["end"] < 1.1 * found["factors"] + self.MAPPED / 4, case

    def test_loaded_factors_are_no_copies_and_later_ones_are(self, pair: Callable[[str], list[str]]) -> None:
        """The tensors of a checkpoint are taken over; into factors that have values, others are copied as always."""
        model = composed("mlp", pair("mlp"))
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        key = next(iter(factors(model)))
        config = copy.copy(model.peft_config["default"])
        config = PeftConfig.from_peft_type(**config.to_dict())
        loaded = get_peft_model(tiny.build("mlp"), config)
        assert loaded.load_state_dict(state, strict=False).missing_keys == []
        assert factors(loaded)[key].data_ptr() == state[key].data_ptr()
        other = {name: tensor + 1 for name, tensor in state.items()}
        loaded.load_state_dict(other)
        assert torch.equal(factors(loaded)[key], state[key])
        assert torch.equal(factors(loaded)[key], other[key])


class TestPrecision:
    """What test_model.py does not cover: loading, half, the Trainer and accelerate."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    def test_loaded_factors_take_the_dtype_of_the_base_and_mixing_weights_stay_exact(
        self,
        low_cpu_mem_usage: bool,
        autocast_adapter_dtype: bool,
        dtype: torch.dtype,
        pair: Callable[[str], list[str]],
        tmp_path: Path,
    ) -> None:
        """Saved in 16 bits; and loaded once as they are, once saved in float32 and rounded on loading."""
        options = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
        for saved_as in (dtype, torch.float32):
            model = composed("llama", pair("llama"), base=tiny.build("llama").to(saved_as))
            model.save_pretrained(str(tmp_path))
            base = tiny.build("llama").to(dtype)
            loaded = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True, **options)
            loaded.load_adapter(str(tmp_path), "second", **options)
            self._is_in(loaded, dtype)
            for key, theta in thetas(model).items():
                assert torch.equal(thetas(loaded)[key], theta)
                assert torch.equal(thetas(loaded)[key.replace("default", "second")], theta)

    @pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16], ids=["half", "bfloat16"])
    def test_casting_by_name(self, cast: Callable[[nn.Module], nn.Module], pair: Callable[[str], list[str]]) -> None:
        model = composed("llama", pair("llama"))
        before = thetas(model)
        cast(model)
        self._is_in(model, torch.float16 if cast is nn.Module.half else torch.bfloat16)
        assert all(torch.equal(theta, before[key]) for key, theta in thetas(model).items())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_trainer(self, dtype: torch.dtype, pair: Callable[[str], list[str]], tmp_path: Path) -> None:
        trained = {}
        for bf16 in (False, True):
            model = tiny.compose("llama", pair("llama"), base=tiny.build("llama").to(dtype if bf16 else torch.float32))
            run_trainer(model, "llama", tmp_path, bf16=bf16)
            self._is_in(model, dtype if bf16 else torch.float32)
            trained[bf16] = thetas(model)
        self._moved_alike(trained[False], trained[True])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_accelerate(self, dtype: torch.dtype, pair: Callable[[str], list[str]], fresh_accelerator: None) -> None:
        plain = tiny.compose("llama", pair("llama"))
        model = tiny.compose("llama", pair("llama"), base=tiny.build("llama").to(dtype))
        train(plain, "llama", steps=3)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            logits = model(**tiny.TINY["llama"].inputs()).logits
            assert logits.dtype == torch.float32  # so accelerate hands out what was computed in 16 bits
            accelerator.backward(logits.square().mean())
            optimizer.step()
        self._is_in(model, dtype)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        self._moved_alike(thetas(plain), thetas(model))

    @pytest.fixture
    def fresh_accelerator(self) -> Iterator[None]:
        AcceleratorState._reset_state(True)
        yield
        AcceleratorState._reset_state(True)

    def _is_in(self, model: nn.Module, dtype: torch.dtype) -> None:
        assert {p.dtype for p in factors(model).values()} == {dtype}
        assert {p.dtype for p in thetas(model).values()} == {torch.float32}

    def _moved_alike(self, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        """AdamW takes steps of about the learning rate whatever the gradients are, so only noise is left."""
        for key, theta in expected.items():
            assert theta.abs().max() > 1e-4
            torch.testing.assert_close(found[key], theta, rtol=0, atol=2e-4)


class Tokens(Dataset):
    """The fixed input of a tiny model, one row at a time."""

    def __init__(self, name: str) -> None:
        self.rows = tiny.TINY[name].inputs()["input_ids"]
        self.is_classified = name == "bert"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = self.rows[number]
        return {"input_ids": row, "labels": row[0] % 2 if self.is_classified else row}


def run_trainer(model: nn.Module, name: str, folder: Path, **more: Any) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_strategy="no",
        seed=0,
        **more,
    )
    Trainer(model=model, args=arguments, train_dataset=Tokens(name)).train()


class TestRecomputation:
    """Gradient checkpointing as the Trainer switches it on; the kinds themselves are in test_model.py."""

    @pytest.mark.parametrize("name", ["llama", "bert"])
    def test_trainer_ends_with_the_same_weights(
        self, name: str, pair: Callable[[str], list[str]], tmp_path: Path
    ) -> None:
        trained, calls = {}, {}
        for kind in (None, True, False):
            model = tiny.compose(name, pair(name))
            counted: list[int] = []
            _, layer = next(composition_layers(model))
            layer.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
            options = {} if kind is None else {"gradient_checkpointing_kwargs": {"use_reentrant": kind}}
            run_trainer(model, name, tmp_path, gradient_checkpointing=kind is not None, **options)
            trained[kind] = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
            calls[kind] = len(counted)
        assert calls[None] * 2 == calls[True] == calls[False]
        for kind in (True, False):
            for key, parameter in trained[None].items():
                torch.testing.assert_close(trained[kind][key], parameter, rtol=1e-4, atol=1e-7)

    @composed_by_transformers
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_in_a_model_of_transformers(self, use_reentrant: bool, pair: Callable[[str], list[str]]) -> None:
        """Composed by transformers' own add_adapter, which knows no PeftModel."""
        gradients = []
        for recomputes in (False, True):
            model = tiny.build("llama")
            model.add_adapter(CompositionConfig(adapters=pair("llama")))
            if recomputes:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.train()(**tiny.TINY["llama"].inputs()).logits.square().mean().backward()
            gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
        for key, gradient in gradients[0].items():
            assert gradient.abs().max() > 0
            close(gradients[1][key], gradient)


class TestCompiled:
    """Whole models, each as one graph; single layers are in test_forms.py."""

    def test_a_model_is_one_graph_that_stays_when_the_mixing_weights_move(
        self, pair: Callable[[str], list[str]]
    ) -> None:
        torch.compiler.reset()
        model = composed("llama", pair("llama"))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for stance in ("default", "fail_on_recompile"):
            with torch.compiler.set_stance(stance):
                found = tiny.output(compiled, "llama")
            close(found, tiny.output(by_hand(model, "llama", pair("llama")), "llama"))
            scramble(model)

    def test_a_compiled_model_learns_the_same(self, pair: Callable[[str], list[str]]) -> None:
        torch.compiler.reset()
        model = composed("bert", pair("bert"))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        gradients = []
        for each in (model, compiled):
            model.zero_grad()
            each(**tiny.TINY["bert"].inputs()).logits.square().mean().backward()
            gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
        for key, gradient in gradients[0].items():
            assert gradient.abs().max() > 0
            close(gradients[1][key], gradient, 1e-4)

    def test_one_graph_serves_all_lengths(self, pair: Callable[[str], list[str]]) -> None:
        torch.compiler.reset()
        model = composed("llama", pair("llama"))
        plain = by_hand(model, "llama", pair("llama"))
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        with torch.no_grad():
            for length in (7, 9, 8):  # not the rank, 5: equal sizes are guarded
                tokens = tiny.TINY["llama"].inputs()["input_ids"][:, :length].clone()
                with torch.compiler.set_stance("default" if length == 7 else "fail_on_recompile"):
                    logits = compiled(input_ids=tokens).logits
                close(logits, plain(input_ids=tokens).logits)


SAMPLED = {"do_sample": True, "top_k": 0}
GENERATION: dict[str, dict[str, Any]] = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": SAMPLED,
    "sampled beams": {**SAMPLED, "num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


class TestGenerate:
    @pytest.mark.parametrize("way", GENERATION)
    @pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
    def test_writes_what_the_plain_model_of_the_formula_writes(
        self, name: str, way: str, pair: Callable[[str], list[str]]
    ) -> None:
        model = composed(name, pair(name))
        # One row: looking up the prompt is for one.
        inputs = {"input_ids": tiny.TINY[name].inputs()["input_ids"][:1]}
        found = write(model, **inputs, **GENERATION[way])
        assert found == write(by_hand(model, name, pair(name)), **inputs, **GENERATION[way])
        assert len(found[0]) > 3

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_a_batch_with_padding_on_the_left(self, name: str, pair: Callable[[str], list[str]]) -> None:
        """Each row is what the model writes for it alone."""
        model = composed(name, pair(name))
        plain = by_hand(model, name, pair(name))
        tokens = tiny.TINY[name].inputs()["input_ids"]
        lengths = [3, 9, 6, 1]
        mask = torch.tensor([[0] * (9 - length) + [1] * length for length in lengths])
        found = write(model, input_ids=tokens * mask, attention_mask=mask)
        for row, length in enumerate(lengths):
            alone = write(plain, input_ids=tokens[row : row + 1, 9 - length :])[0]
            assert found[row][9 : 9 + len(alone) - length] == alone[length:]

    def test_with_an_assistant(self, pair: Callable[[str], list[str]]) -> None:
        model = composed("llama", pair("llama"))
        tokens = tiny.TINY["llama"].inputs()["input_ids"][:1]
        found = write(model, input_ids=tokens, assistant_model=tiny.build("llama", seed=1))
        assert found == write(by_hand(model, "llama", pair("llama")), input_ids=tokens)

    def test_on_weights_that_are_on_disk(self, pair: Callable[[str], list[str]], tmp_path: Path) -> None:
        model = composed("llama", pair("llama"), base=offload(tiny.build("llama"), "disk", tmp_path))
        tokens = tiny.TINY["llama"].inputs()["input_ids"]
        assert write(model, input_ids=tokens) == write(by_hand(model, "llama", pair("llama")), input_ids=tokens)


def write(model: nn.Module, **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    options = {"attention_mask": torch.ones_like(options["input_ids"]), "do_sample": False, **options}
    return model.eval().generate(**options, max_new_tokens=8, pad_token_id=0).tolist()


@contextmanager
def complaints() -> Iterator[list[str]]:
    """What transformers and PEFT say as a warning or worse."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield heard
    heard += [str(warning.message) for warning in caught]
    for logger in loggers:
        logger.removeHandler(handler)


class TestPipelines:
    @pytest.fixture
    def tokenizer(self) -> PreTrainedTokenizerFast:
        words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{n}": n for n in range(4, 60)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
        )

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_text_generation(
        self, name: str, tokenizer: PreTrainedTokenizerFast, pair: Callable[[str], list[str]]
    ) -> None:
        model = composed(name, pair(name), task_type="CAUSAL_LM")
        plain = by_hand(model, name, pair(name))

        def run(model: nn.Module) -> list[Any]:
            generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
            return generator(["w5 w6 w7", "w9"], batch_size=2, max_new_tokens=4, do_sample=False)

        expected = run(plain)
        with complaints() as heard:
            assert run(model) == expected
        assert heard == []

    def test_text_classification(self, tokenizer: PreTrainedTokenizerFast, pair: Callable[[str], list[str]]) -> None:
        model = composed("bert", pair("bert"), task_type="SEQ_CLS")
        plain = by_hand(model, "bert", pair("bert"))
        expected = pipeline("text-classification", model=plain, tokenizer=tokenizer)("w5 w6 w7", top_k=None)
        with complaints() as heard:
            found = pipeline("text-classification", model=model, tokenizer=tokenizer)("w5 w6 w7", top_k=None)
        same_labels(found, expected)
        assert heard == []

    @pytest.mark.parametrize("way", ["base model", "folder"])
    def test_image_classification(self, way: str, pair: Callable[[str], list[str]], tmp_path: Path) -> None:
        """transformers calls every PeftModel unsupported here; the base model inside is composed all the same."""
        base = tiny.build("vit")
        base.save_pretrained(str(tmp_path / "base"))
        base.name_or_path = str(tmp_path / "base")
        model = composed("vit", pair("vit"), base=base)
        plain = by_hand(model, "vit", pair("vit"))
        model.save_pretrained(str(tmp_path / "composed"))
        processor = ViTImageProcessor(size={"height": 16, "width": 16})
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))

        expected = pipeline("image-classification", model=plain, image_processor=processor)(image)
        with complaints() as heard:
            given = model.get_base_model() if way == "base model" else str(tmp_path / "composed")
            found = pipeline("image-classification", model=given, image_processor=processor)(image)

        same_labels(found, expected)
        assert heard == []

    def test_stock_lora_is_called_unsupported_for_images_too(self) -> None:
        model = get_peft_model(tiny.build("vit"), LoraConfig(target_modules=["q_proj"]))
        with complaints() as heard:
            pipeline("image-classification", model=model, image_processor=ViTImageProcessor())
        assert len(heard) == 1
        assert "'PeftModel' is not supported" in heard[0]


def same_labels(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], rel=1e-5)
