"""Reading saved LoRA adapters: the right products from every format, a clear refusal of everything else, no waste."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from peft_composition import AdapterError, CompositionConfig, add_to_checkpoint, compat
from peft_composition.analysis.inspection import inspect_adapters
from peft_composition.tuner import base_model, preparation
from peft_composition.tuner.locating import composition_layers
from peft_composition.upstream import stacking, weights

from .. import tiny
from ..reference import Reference, relative_error


# Free weights, so that a wrong sign or a normalisation shows.
MIX = (0.75, -1.5, 0.5)
# Reading is checked in float64, where it is exact to rounding.
EXACT = 1e-12


def compose(base: nn.Module, *adapters: str | Path, **fields: Any) -> PeftModel:
    """A composition with the fixed weights MIX."""
    config = CompositionConfig(
        adapters=list(adapters), mixing="fixed", normalization="none", weights=list(MIX[: len(adapters)]), **fields
    )
    return get_peft_model(base, config)


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """The weight update of every composed module, by its name in the base model."""
    return {name: layer.get_delta_weight("default") for name, layer in composition_layers(model.get_base_model())}


def assert_products(model: PeftModel, reference: Reference) -> None:
    """All modules of the reference are composed, no other is, and their updates are sum_n w_n s_n B_n A_n."""
    found = deltas(model)
    assert list(found) == reference.modules
    weights = torch.tensor(MIX[: len(reference.adapters)], dtype=torch.float64)
    for module, delta in found.items():
        assert relative_error(delta, reference.delta(module, weights)) < EXACT, module


def ranks(model: PeftModel) -> dict[str, list[int]]:
    return model.peft_config["default"].composed_modules


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change entries of a saved `adapter_config.json`."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change the tensors of a saved adapter in place."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    return folder


def rename_keys(folder: Path, rename: Callable[[str], str]) -> Path:
    def edit(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[rename(key)] = tensors.pop(key)

    return edit_tensors(folder, edit)


def as_pickle(folder: Path) -> Path:
    """Make an adapter one of those with `adapter_model.bin` and no safetensors."""
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    return folder


def save_peft(folder: Path, base: nn.Module, config: PeftConfig) -> Path:
    """Save a fresh adapter of any PEFT method for a copy of `base`."""
    torch.manual_seed(0)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(str(folder))
    return folder


# The right products


ATTENTION = ["query", "value"]
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "ranks and alphas": (
        "bert",
        [
            {"targets": ATTENTION, "r": 1, "lora_alpha": 3},
            {"targets": ATTENTION, "r": 3, "lora_alpha": 16},
            {"targets": ATTENTION, "r": 16, "lora_alpha": 8},
        ],
    ),
    "rank and alpha patterns": (
        "bert",
        [
            {"targets": ATTENTION, "r": 2, "lora_alpha": 4, "rank_pattern": {"query": 5}},
            {"targets": ATTENTION, "r": 2, "lora_alpha": 4, "alpha_pattern": {"layer.0.attention.self.value": 7}},
            {
                "targets": ATTENTION,
                "rank_pattern": {"bert.encoder.layer.1.attention.self.query": 1, "value": 3},
                "alpha_pattern": {"query": 32},
            },
        ],
    ),
    "rsLoRA": (
        "bert",
        [
            {"targets": ATTENTION, "r": 3, "lora_alpha": 6, "use_rslora": True},
            {"targets": ATTENTION, "r": 9, "use_rslora": True, "rank_pattern": {"value": 2}},
            {"targets": ATTENTION, "r": 3, "lora_alpha": 6},
        ],
    ),
    "targets as list, regex and all-linear": (
        "bert",
        [
            {"targets": ["query", "intermediate.dense"]},
            {"targets": r".*\.layer\.1\..*(key|output\.dense)"},
            {"targets": "all-linear", "r": 2},
        ],
    ),
    "disjoint targets": ("bert", [{"targets": ["query"]}, {"targets": ["key"], "r": 1}]),
    "layers_to_transform": (
        "bert",
        [
            {"targets": ATTENTION, "layers_to_transform": [1]},
            {"targets": ATTENTION, "layers_to_transform": 0, "layers_pattern": "layer"},
        ],
    ),
    "fan_in_fan_out": ("gpt2", [{"targets": ["c_attn"]}, {"targets": ["c_attn", "c_fc"], "r": 2}]),
    "convolutions": ("conv", [{"targets": ["conv1", "conv2", "conv3"]}, {"targets": ["conv2"], "r": 1}]),
    "embedding": ("embedding", [{"targets": ["emb", "lin"]}, {"targets": ["emb"], "r": 3, "use_rslora": True}]),
    "encoder and decoder": ("t5", [{"targets": ["q", "v"]}, {"targets": ["wi", "o"], "r": 2}]),
}


@pytest.mark.parametrize("case", CASES)
def test_products_equal_the_formula_and_peft(case: str, tmp_path: Path) -> None:
    name, loras = CASES[case]
    base = tiny.build(name).double()
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    folders = [
        tiny.save_lora(tmp_path / str(number), base, seed=number, **fan, **lora) for number, lora in enumerate(loras)
    ]
    reference = Reference(base, folders)

    # PEFT's own reading of each adapter is a second witness.
    expected: dict[str, Tensor] = {}
    for weight, folder in zip(MIX, folders):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = PeftModel.from_pretrained(copy.deepcopy(base), folder).get_base_model()
        for module, layer in alone.named_modules():
            if isinstance(layer, LoraLayer):
                expected[module] = expected.get(module, 0) + weight * layer.get_delta_weight("default").detach()

    found = compose(base, *folders)

    assert_products(found, reference)
    assert set(expected) == set(reference.modules)
    for module, delta in deltas(found).items():
        assert relative_error(delta, expected[module]) < EXACT, module


def test_patterns_that_are_regular_expressions(tmp_path: Path) -> None:
    base = tiny.build("bert").double()
    folder = tiny.save_lora(
        tmp_path / "a",
        base,
        ["query", "key", "value"],
        r=2,
        lora_alpha=8,
        rank_pattern={r"layer\.1\.attention\.self\.(query|key)": 3, r"^bert\.encoder\.layer\.0.*value": 5},
        alpha_pattern={r"layer\.\d\.attention\.self\.key": 12},
    )
    expected_rank_and_scale = {
        "0.attention.self.query": (2, 8 / 2),
        "0.attention.self.key": (2, 12 / 2),
        "0.attention.self.value": (5, 8 / 5),
        "1.attention.self.query": (3, 8 / 3),
        "1.attention.self.key": (3, 12 / 3),
        "1.attention.self.value": (2, 8 / 2),
    }

    model = compose(base, folder)

    tensors = load_file(folder / "adapter_model.safetensors")
    found = deltas(model)
    assert len(found) == 6
    for end, (rank, scale) in expected_rank_and_scale.items():
        module = f"bert.encoder.layer.{end}"
        A = tensors[f"base_model.model.{module}.lora_A.weight"].double()
        B = tensors[f"base_model.model.{module}.lora_B.weight"].double()
        assert ranks(model)[module] == [rank]
        assert relative_error(found[module], MIX[0] * scale * (B @ A)) < EXACT


@pytest.mark.parametrize("name", ["bert", "conv"])
def test_lora_biases_are_scaled_and_weighted_like_the_products(name: str, tmp_path: Path) -> None:
    base = tiny.build(name).double()
    targets = {"bert": ATTENTION, "conv": ["conv1", "conv2"]}[name]
    folders = [
        tiny.save_lora(tmp_path / "a", base, targets, seed=1, r=2, lora_alpha=8, lora_bias=True),
        tiny.save_lora(tmp_path / "b", base, targets, seed=2, r=4, lora_alpha=8, lora_bias=True, use_rslora=True),
        tiny.save_lora(tmp_path / "c", base, targets[:1], seed=3),
    ]
    for folder in folders[:2]:  # save_lora leaves biases at zero where PEFT starts them
        edit_tensors(folder, lambda tensors: [t.normal_() for key, t in tensors.items() if key.endswith("B.bias")])
    reference = Reference(base, folders)

    model = compose(base, *folders)

    assert_products(model, reference)
    for module, layer in composition_layers(model.get_base_model()):
        inner = layer.get_base_layer()
        zeros = (
            torch.zeros(1, 16)
            if name == "bert"
            else torch.zeros(1, inner.in_channels, *[5] * (inner.weight.dim() - 2))
        )
        with torch.no_grad():
            added = layer(zeros.double()) - inner(zeros.double())
        bias = reference.delta_bias(module, torch.tensor(MIX, dtype=torch.float64))
        assert bias is not None
        shape = (1, -1) if name == "bert" else (1, -1, *[1] * (added.dim() - 2))
        assert relative_error(added, bias.reshape(shape).expand_as(added)) < EXACT


def test_a_pickled_adapter_gives_the_same_products(tmp_path: Path) -> None:
    base = tiny.build("mlp").double()
    folders = [tiny.save_lora(tmp_path / name, base, ["lin0", "lin1"], seed=seed) for seed, name in enumerate("ab")]
    reference = Reference(base, folders)
    as_pickle(folders[1])

    assert_products(compose(base, *folders), reference)


@pytest.mark.parametrize(
    "respell",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: f"_orig_mod.{key}",
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("layer.0.", "layer.0._orig_mod."),
        lambda key: key.replace("layer.0.", "layer.0._fsdp_wrapped_module.").replace(
            "model.bert", "model._fsdp_wrapped_module.bert"
        ),
        lambda key: key.replace("layer.0.", "layer.0._checkpoint_wrapped_module."),
        lambda key: f"module.{key}",
        lambda key: key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        # As old versions of PEFT saved an adapter named "lora": they removed its name wherever it stood.
        lambda key: key.replace(".weight", ".lora.weight").replace(".lora", ""),
    ],
    ids=[
        "no prefix",
        "compiled PEFT model",
        "compiled base model",
        "compiled block",
        "FSDP",
        "checkpointing",
        "DDP",
        "adapter name kept",
        "adapter name cut out",
    ],
)
def test_spellings_of_keys(respell: Callable[[str], str], tmp_path: Path) -> None:
    base = tiny.build("bert").double()
    folder = tiny.save_lora(tmp_path / "a", base, ATTENTION)
    reference = Reference(base, [folder])
    rename_keys(folder, respell)

    assert_products(compose(base, folder), reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_and_models_of_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny.build("mlp")
    folders = [tiny.save_lora(tmp_path / str(seed), base, ["lin0"], seed=seed, lora_alpha=3) for seed in range(3)]
    for folder, own in zip(folders, (torch.bfloat16, torch.float64, torch.float8_e4m3fn)):
        edit_tensors(folder, lambda tensors, own=own: tensors.update({key: t.to(own) for key, t in tensors.items()}))
    model = compose(tiny.build("mlp").to(dtype), *folders)

    factors = model.base_model.model.lin0.composition_factors["default"]
    assert factors.A.dtype == factors.B.dtype == dtype
    expected = Reference(base, folders).delta("lin0", torch.tensor(MIX, dtype=torch.float64))
    found = deltas(model)["lin0"].double()
    assert relative_error(found, expected) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("extra", [torch.uint64, torch.int64, torch.int8, torch.uint16])
def test_other_tensors_in_the_file_do_not_shift_the_factors(extra: torch.dtype, tmp_path: Path) -> None:
    """safetensors puts wide types before the factors and narrow ones behind them."""
    base = tiny.build("mlp").double()
    folder = tiny.save_lora(tmp_path / "mine", base, ["lin0", "lin1"])
    content = torch.arange(24, dtype=torch.uint8).view(extra)[:3].clone()
    edit_tensors(folder, lambda tensors: tensors.update({"base_model.model.head.counts": content}))
    with pytest.warns(UserWarning, match=r"head\.counts"):
        model = compose(base, folder)
    edit_tensors(folder, lambda tensors: tensors.pop("base_model.model.head.counts"))
    assert_products(model, Reference(tiny.build("mlp").double(), [folder]))


def test_a_file_by_another_writer(tmp_path: Path) -> None:
    """The format asks neither for an order of the tensors nor for addresses that are multiples of their width."""
    folder = tiny.save_lora(tmp_path / "mine", tiny.build("mlp"), ["lin0", "lin1"])
    base = tiny.build("mlp").double()
    reference = Reference(base, [folder])
    file = folder / "adapter_model.safetensors"
    tensors = dict(reversed(load_file(file).items()))
    header: dict[str, Any] = {"base_model.model.flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    content = b"\x07"
    for key, tensor in tensors.items():
        values = tensor.numpy().tobytes()
        offsets = [len(content), len(content) + len(values)]
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        content += values
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)
    with pytest.warns(UserWarning, match="flag"):
        assert_products(compose(base, folder), reference)


def test_a_subfolder_is_read(tmp_path: Path) -> None:
    base = tiny.build("mlp").double()
    inner = tiny.save_lora(tmp_path / "outer" / "inner", base, ["lin0"])

    model = compose(base, {"path": tmp_path / "outer", "subfolder": "inner", "name": "mine"})

    assert_products(model, Reference(base, [inner]))
    assert model.peft_config["default"].provenance[0]["subfolder"] == "inner"


# Adapters of older PEFT versions. The keys of the configs are those that the versions really wrote.
_OLDEST = {
    "base_model_name_or_path": "",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
}
_SINCE_0_5 = {"auto_mapping": None, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None}
_SINCE_0_7 = {
    "alpha_pattern": {},
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "rank_pattern": {},
}
OLD_CONFIGS: dict[str, dict[str, Any]] = {
    "0.2.0": {**_OLDEST, "enable_lora": None, "merge_weights": False},
    "0.3.0": {**_OLDEST, "init_lora_weights": True},
    "0.5.0": {**_OLDEST, **_SINCE_0_5, "revision": None},
    "0.7.1": {**_OLDEST, **_SINCE_0_5, **_SINCE_0_7, "revision": None},
    "0.10.0": {
        **_OLDEST,
        **_SINCE_0_5,
        **_SINCE_0_7,
        "layer_replication": None,
        "revision": None,
        "use_dora": False,
        "use_rslora": False,
    },
}


@pytest.mark.parametrize(
    ("name", "version"),
    [("bert", "0.2.0"), *((name, v) for name in ("bert", "gpt2", "embedding") for v in OLD_CONFIGS if v != "0.2.0")],
)
def test_adapters_of_older_peft_versions(
    version: str, name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base = tiny.build(name).double()
    targets, fan = tiny.TINY[name].targets, name == "gpt2"
    folder = tiny.save_lora(tmp_path / "a", base, targets, r=4, lora_alpha=8, fan_in_fan_out=fan)
    reference = Reference(base, [folder])
    config = {**OLD_CONFIGS[version], "target_modules": targets, "task_type": None, "fan_in_fan_out": fan}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    if version in ("0.2.0", "0.3.0", "0.5.0"):
        as_pickle(folder)
    recwarn.clear()

    model = compose(base, folder)

    assert_products(model, reference)
    assert not [str(warning.message) for warning in recwarn if "adapter" in str(warning.message)]


def test_settings_of_a_newer_peft_are_named_in_a_warning(tmp_path: Path) -> None:
    base = tiny.build("mlp").double()
    folder = tiny.save_lora(tmp_path / "mine", base, ["lin0"])
    reference = Reference(base, [folder])
    edit_config(folder, warp_factor=9, warp_words="fast", use_nothing=None, no_config={}, eva_config={"rho": 2.0})

    with pytest.warns(UserWarning, match=r"'mine'.* does not know.*: warp_factor, warp_words\.") as caught:
        model = compose(base, folder)
    assert not any("nothing" in str(warning.message) for warning in caught)
    assert_products(model, reference)


# Names that changed in transformers


# As in transformers 4 (read in the source of 4.40), for the modules that people put LoRAs on.
OLD_VIT_NAMES = {
    "vit.layers.": "vit.encoder.layer.",
    ".attention.q_proj": ".attention.attention.query",
    ".attention.k_proj": ".attention.attention.key",
    ".attention.v_proj": ".attention.attention.value",
    ".attention.o_proj": ".attention.output.dense",
    ".mlp.fc1": ".intermediate.dense",
    ".mlp.fc2": ".output.dense",
}


def old_vit_name(key: str) -> str:
    for new, old in OLD_VIT_NAMES.items():
        key = key.replace(new, old)
    return key


def save_vit_loras(tmp_path: Path) -> tuple[list[Path], Reference]:
    """An adapter with ViT's old names and one with today's, and what they should give."""
    base = tiny.build("vit").double()
    folders = [
        tiny.save_lora(tmp_path / "old", base, ["q_proj", "o_proj", "fc1", "fc2"], seed=1, r=2),
        tiny.save_lora(tmp_path / "new", base, ["q_proj", "k_proj", "v_proj"], seed=2, r=3),
    ]
    reference = Reference(base, folders)
    rename_keys(folders[0], old_vit_name)
    edit_config(folders[0], target_modules=["query", "dense"])
    return folders, reference


def test_the_old_vit_names_are_those_that_transformers_still_writes(tmp_path: Path) -> None:
    """Without this the names above could be wrong and the tests below would not notice."""
    base = tiny.build("vit")
    base.save_pretrained(tmp_path)
    written = set(load_file(tmp_path / "model.safetensors"))
    linear = [
        f"{name}.weight" for name, module in base.vit.named_modules(prefix="vit") if isinstance(module, nn.Linear)
    ]
    assert len(linear) == 12
    assert {old_vit_name(name) for name in linear} <= written


def test_an_adapter_with_old_vit_names_composes_with_a_new_one(tmp_path: Path) -> None:
    folders, reference = save_vit_loras(tmp_path)
    model = compose(tiny.build("vit").double(), *folders)
    assert_products(model, reference)
    assert ranks(model)["vit.layers.0.attention.q_proj"] == [2, 3]
    assert ranks(model)["vit.layers.1.mlp.fc2"] == [2, 0]


@pytest.mark.parametrize(
    ("narrowing", "expected"),
    [
        ({"target_modules": ["q_proj"]}, [f"vit.layers.{n}.attention.q_proj" for n in (0, 1)]),
        ({"target_modules": r"vit\.layers\.0\..*fc\d"}, ["vit.layers.0.mlp.fc1", "vit.layers.0.mlp.fc2"]),
        (
            {"target_modules": ["o_proj", "fc1"], "layers_to_transform": 1},
            ["vit.layers.1.attention.o_proj", "vit.layers.1.mlp.fc1"],
        ),
        ({"exclude_modules": ["q_proj", "fc1", "fc2"]}, [f"vit.layers.{n}.attention.o_proj" for n in (0, 1)]),
    ],
    ids=["list", "regex", "layers_to_transform", "exclude_modules"],
)
def test_narrowing_goes_by_the_names_of_the_model_not_of_the_file(
    narrowing: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    folders, _ = save_vit_loras(tmp_path)
    assert list(ranks(compose(tiny.build("vit"), folders[0], **narrowing))) == expected


@pytest.mark.parametrize(
    ("name", "old_names"), [("bert", False), ("vit", False), ("vit", True)], ids=["BERT", "ViT", "ViT, old names"]
)
@pytest.mark.parametrize("trained_with_head", [True, False], ids=["trained with head", "trained without head"])
def test_an_adapter_fits_the_model_with_and_without_its_head(
    name: str, old_names: bool, trained_with_head: bool, tmp_path: Path
) -> None:
    with_head = tiny.build(name).double()
    alone = copy.deepcopy(getattr(with_head, name))
    trained, used = (with_head, alone) if trained_with_head else (alone, with_head)
    folder = tiny.save_lora(tmp_path / "a", trained, tiny.TINY[name].targets[:2])
    expected = Reference(trained, [folder])
    if old_names:
        respell = (
            old_vit_name
            if trained_with_head
            else lambda key: old_vit_name(key.replace("layers.", "vit.layers.")).replace("vit.", "")
        )
        rename_keys(folder, respell)

    found = deltas(compose(used, folder))

    prefix = f"{name}."
    as_used = {m.removeprefix(prefix) if trained_with_head else prefix + m: m for m in expected.modules}
    assert list(found) == list(as_used)
    for module, delta in found.items():
        assert relative_error(delta, expected.delta(as_used[module], torch.tensor(MIX[:1]))) < EXACT


# What is in an adapter beside its factors


def test_heads_are_logged_and_retrained_embeddings_listed_in_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny.build("bert")
    head = tiny.save_lora(tmp_path / "head", base, ["query"], seed=1, task_type="SEQ_CLS")
    embedding = tiny.save_lora(tmp_path / "embedding", base, ["query"], seed=2, modules_to_save=["word_embeddings"])
    plain = tiny.save_lora(tmp_path / "plain", base, ["query"], seed=3)
    for folder in (head, embedding):
        edit_tensors(folder, lambda tensors: [t.fill_(9.0) for key, t in tensors.items() if "lora_" not in key])
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}

    with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO", "peft_composition"):
        warnings.simplefilter("always")
        model = compose(base, head, embedding, plain)

    texts = [str(warning.message) for warning in caught if "not mixed" in str(warning.message)]
    assert texts == [
        "These tensors of the upstream adapters are not LoRA factors and are not mixed: "
        "'embedding': bert.embeddings.word_embeddings.weight. "
        "Without them, these adapters are not exactly what was trained."
    ]
    assert caplog.messages == [
        "The heads of the upstream adapters are not mixed: 'head': classifier.bias, classifier.weight."
    ]
    after = {key.replace(".base_layer", ""): tensor for key, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert list(ranks(model)) == [f"bert.encoder.layer.{n}.attention.self.query" for n in (0, 1)]


def test_trained_tokens_are_listed_as_not_mixed(tmp_path: Path) -> None:
    base = tiny.build("embedding")
    folder = save_peft(
        tmp_path / "tokens", base, LoraConfig(target_modules=["lin"], trainable_token_indices={"emb": [1, 2]})
    )
    with pytest.warns(UserWarning, match="'tokens': emb.token_adapter.trainable_tokens_delta"):
        compose(base, folder)


def test_an_adapter_that_narrowing_leaves_out_is_named_in_a_warning(tmp_path: Path) -> None:
    base = tiny.build("mlp")
    folders = [tiny.save_lora(tmp_path / target, base, [target]) for target in ("lin0", "lin1")]
    with pytest.warns(UserWarning, match="adapter 'lin1' touches none of the composed modules"):
        model = compose(base, *folders, target_modules=["lin0"])
    assert ranks(model) == {"lin0": [8 // 2, 0]}


# Bad input: the message, and the base model as it was


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The block leaves classes, attributes, hooks, trainability and every value of the model as they were."""

    def look() -> dict[str, Any]:
        return {
            "modules": {
                name: (type(module), module.training, sorted(vars(module)), len(module._forward_pre_hooks))
                for name, module in model.named_modules()
            },
            "parameters": {name: (p.requires_grad, p.dtype, id(p)) for name, p in model.named_parameters()},
            "config": model.config.to_dict() if hasattr(model, "config") else None,
        }

    before, values = look(), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    yield
    assert look() == before
    assert not hasattr(model, "peft_config")
    assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())


def refuse(
    base: nn.Module, *adapters: Any, message: str, error: type[Exception] = AdapterError, **fields: Any
) -> None:
    """Composing raises an error with this text, names the adapter, and changes neither the model nor the config."""
    config = CompositionConfig(adapters=list(adapters), **fields)
    asked = config.to_dict()
    with untouched(base), pytest.raises(error, match=re.escape(message)) as caught:
        get_peft_model(base, config)
    if isinstance(caught.value, AdapterError):
        assert str(caught.value).startswith(f"adapter {config.adapter_names[-1]!r}: ")
    assert {**config.to_dict(), "base_model_name_or_path": None} == {**asked, "base_model_name_or_path": None}


def test_a_revision_within_a_hub_id_is_told_how_to_be_written() -> None:
    message = 'and a Hub id has no @; to give a revision, write {"path": "you/lora-b", "revision": "v2"}'
    refuse(tiny.build("mlp"), "you/lora-b@v2", message=message)


def test_a_folder_that_does_not_exist(good: Path, tmp_path: Path) -> None:
    refuse(tiny.build("mlp"), good, tmp_path / "bad", message=f"adapter 'bad': there is no folder {tmp_path}/bad")


def test_a_subfolder_that_does_not_exist(good: Path) -> None:
    missing = {"path": good, "subfolder": "inner", "name": "bad"}
    refuse(tiny.build("mlp"), good, missing, message=f"{good}/inner is not an adapter: it has no adapter_config.json")


def test_a_file_in_place_of_a_folder(good: Path, bad: Path) -> None:
    file = bad / "adapter_model.safetensors"
    message = f"there is no folder {file}: it is a file; give the folder that holds it"
    refuse(tiny.build("mlp"), good, file, message=message)


def test_a_folder_without_weights(good: Path, bad: Path) -> None:
    (bad / "adapter_model.safetensors").unlink()
    message = f"{bad} has neither adapter_model.safetensors nor adapter_model.bin"
    refuse(tiny.build("mlp"), good, bad, message=message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not an adapter: it has no adapter_config.json"),
        (b"", "adapter_config.json is empty: a download or a save was interrupted"),
        (b"\n", "adapter_config.json is not valid JSON: Expecting value"),
        (b"{'peft_type': 'LORA'}", "adapter_config.json is not valid JSON: Expecting property name"),
        (b"\xff\xfe\x00", "adapter_config.json is not valid JSON: 'utf-8' codec can't decode"),
        (b'["LORA"]', "does not describe a PEFT adapter: it has no peft_type"),
        (b'{"model_type": "bert"}', "does not describe a PEFT adapter: it has no peft_type"),
    ],
    ids=["missing", "empty", "blank", "no JSON", "no text", "a list", "another config"],
)
def test_a_config_that_is_none(content: bytes | None, message: str, good: Path, bad: Path) -> None:
    (bad / "adapter_config.json").unlink()
    if content is not None:
        (bad / "adapter_config.json").write_bytes(content)
    refuse(tiny.build("mlp"), good, bad, message=message)


@pytest.mark.parametrize(
    ("name", "config", "method"),
    [
        ("mlp", IA3Config(target_modules=["lin0"], feedforward_modules=[]), "IA3"),
        ("mlp", AdaLoraConfig(target_modules=["lin0"], total_step=10), "ADALORA"),
        ("llama", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isupper() else "",
)
def test_other_peft_methods(name: str, config: PeftConfig, method: str, tmp_path: Path) -> None:
    base = tiny.build(name)
    folder = save_peft(tmp_path / "bad", base, config)
    refuse(base, folder, message=f"its peft_type is {method}; only LORA adapters can be composed")


def test_a_composition_as_an_upstream_adapter(good: Path, tmp_path: Path) -> None:
    compose(tiny.build("mlp"), good).save_pretrained(str(tmp_path / "bad"))
    message = "it is itself a composition. Export it as a plain LoRA, which can be composed: "
    message += f"peft-composition export {tmp_path}/bad --out"
    refuse(tiny.build("mlp"), good, tmp_path / "bad", message=message)


@pytest.mark.parametrize("subfolder", [None, "inner"])
def test_a_composition_with_its_export_as_an_upstream_adapter(
    subfolder: str | None, good: Path, bad: Path, tmp_path: Path
) -> None:
    """What the message says to give composes, to what the composition computes."""
    base = tiny.build("mlp").double()
    saved = tmp_path / "composed" / (subfolder or "")
    composed = compose(tiny.build("mlp").double(), good, bad)
    composed.save_pretrained(str(saved))
    add_to_checkpoint(saved)
    whole = {"path": tmp_path / "composed", "subfolder": subfolder, "name": "bad"}
    with pytest.raises(AdapterError, match=r"Its folder 'lora' holds it as a plain LoRA") as caught:
        compose(base, good, whole)

    advised = json.loads(re.search(r"\{.*\}", str(caught.value))[0])
    assert advised == {"path": f"{tmp_path}/composed", "subfolder": f"{subfolder}/lora" if subfolder else "lora"}
    found, expected = deltas(compose(base, advised)), deltas(composed)
    assert list(found) == list(expected)
    for module, delta in found.items():
        assert relative_error(delta, MIX[0] * expected[module]) < EXACT


@pytest.mark.parametrize("config_tells", [True, False], ids=["config", "tensors alone"])
def test_dora(config_tells: bool, good: Path, tmp_path: Path) -> None:
    base = tiny.build("mlp")
    folder = tiny.save_lora(tmp_path / "bad", base, ["lin0"], use_dora=True)
    edit_config(folder, use_dora=config_tells)
    message = "it is a DoRA adapter" + (
        ", whose update is not the product B A; convert it first with peft.convert_to_lora"
        if config_tells
        else " (base_model.model.lin0.lora_magnitude_vector); convert it first with peft.convert_to_lora"
    )
    refuse(base, good, folder, message=message)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_qalora", True),
        ("alora_invocation_tokens", [3, 4]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("velora_config", {"num_groups": 4}),
        ("monteclora_config", {"samples": 4}),
        ("use_bdlora", {"target_modules_bd_a": ["lin0"]}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"rank": 2}),
        ("enable_lora", [True, False, True]),  # PEFT 0.2, for fused attention
    ],
)
def test_variants_that_are_not_a_plain_product(setting: str, value: Any, good: Path, bad: Path) -> None:
    edit_config(bad, **{setting: value})
    message = f"{setting}={value!r}: this LoRA variant is not a plain product B A"
    refuse(tiny.build("mlp"), good, bad, message=message)


@pytest.mark.parametrize(
    ("setting", "value"), [("use_warp_drive", True), ("use_warp_drive", "fast"), ("warp_config", {"factor": 9})]
)
def test_what_may_be_a_variant_of_a_newer_peft(setting: str, value: Any, good: Path, bad: Path) -> None:
    edit_config(bad, **{setting: value})
    message = "does not know this setting, and it may be a variant that is not a plain product B A; upgrade PEFT"
    refuse(tiny.build("mlp"), good, bad, message=message)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_base_biases(bias: str, good: Path, tmp_path: Path) -> None:
    base = tiny.build("mlp")
    folder = tiny.save_lora(tmp_path / "bad", base, ["lin0"], bias=bias)
    refuse(base, good, folder, message=f"bias={bias!r}: it trained biases of the base model")


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "OLoRA", "pissa_niter_16", "something_new"])
def test_initialisations_that_change_the_base_weights(init: str, good: Path, bad: Path) -> None:
    edit_config(bad, init_lora_weights=init)
    message = f"init_lora_weights={init!r} changes the weights of the base model"
    refuse(tiny.build("mlp"), good, bad, message=message)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", "mica", False])
def test_initialisations_that_leave_the_base_weights_alone(init: str | bool, bad: Path) -> None:
    base = tiny.build("mlp").double()
    edit_config(bad, init_lora_weights=init)
    assert_products(compose(base, bad), Reference(base, [bad]))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rsLoRA"])
def test_a_changed_base_is_refused_as_saved_and_right_as_converted(
    init: str, use_rslora: bool, good: Path, tmp_path: Path
) -> None:
    """The recipe of PEFT's documentation: save the initial adapter, train, save with the path of the initial one."""
    base = tiny.build("mlp")
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["lin0", "lin1"], init_lora_weights=init, use_rslora=use_rslora
    )
    model = get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    model.peft_config["default"].init_lora_weights = init
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "bad"))
    model.save_pretrained(
        str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    trained = model.merge_and_unload()

    refuse(base, good, tmp_path / "bad", message=f"init_lora_weights={init!r} changes the weights of the base model")

    original = copy.deepcopy(base)
    for module, delta in deltas(compose(base, tmp_path / "converted")).items():
        update = trained.get_submodule(module).weight.double() - original.get_submodule(module).weight.double()
        assert relative_error(delta, MIX[0] * update) < 1e-5  # float32, with cancellation


# Does it fit the model?


@pytest.mark.parametrize(
    ("trained_on", "used_on"),
    [
        ("google/bert-tiny", "prajjwal1/bert-tiny"),
        ("bert-base-uncased", "google-bert/bert-base-uncased"),
        ("google/BERT-Tiny", "google/bert-tiny"),
        ("/home/someone/bert-small", "google/bert-tiny"),
        ("./bert-small", "google/bert-tiny"),
        ("~/models/bert-small", "google/bert-tiny"),
        ("runs/7/checkpoint-500", "google/bert-tiny"),
        (r"C:\models\bert-small", "google/bert-tiny"),
        ("google/bert-small", "/data/models/bert-tiny"),
        ("", "google/bert-tiny"),
        (None, "google/bert-tiny"),
    ],
)
def test_base_models_that_may_be_the_same(trained_on: str | None, used_on: str, bad: Path) -> None:
    base = tiny.build("mlp")
    base.name_or_path = used_on
    edit_config(bad, base_model_name_or_path=trained_on)
    assert list(ranks(compose(base, bad))) == ["lin0", "lin1"]


@pytest.mark.parametrize(
    ("trained_on", "used_on"),
    [("google/bert-small", "google/bert-tiny"), ("bert-base-cased", "google-bert/bert-base-uncased")],
)
def test_another_base_model(trained_on: str, used_on: str, good: Path, bad: Path) -> None:
    base = tiny.build("mlp")
    base.name_or_path = used_on
    edit_config(bad, base_model_name_or_path=trained_on)
    message = f"it was trained on {trained_on!r}, but the model is {used_on!r}. If these are the same weights"
    refuse(base, good, bad, message=message)


def test_a_base_folder_that_exists_is_never_compared(
    bad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    base = tiny.build("mlp")
    base.name_or_path = "models/mine"
    edit_config(bad, base_model_name_or_path="google/bert-small")
    assert list(ranks(compose(base, bad))) == ["lin0", "lin1"]


def test_another_hidden_size(tmp_path: Path) -> None:
    wide = BertForSequenceClassification(
        BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )
    base = tiny.build("bert")
    folders = [tiny.save_lora(tmp_path / name, model, ["query"]) for name, model in (("good", base), ("bad", wide))]
    message = (
        "module 'bert.encoder.layer.0.attention.self.query': tensor lora_A.weight has shape (4, 24), but Linear in "
        "the model needs (4, 16). Was it trained on another base model?"
    )
    refuse(base, *folders, message=message)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (
            "lin1.lora_B.weight",
            (16, 3),
            "module 'lin1': tensor lora_B.weight has shape (16, 3), but Linear in the model needs (16, 4)",
        ),
        (
            "lin1.lora_B.weight",
            (16, 4, 1),
            "module 'lin1': tensor lora_B.weight has shape (16, 4, 1), but Linear in the model needs (16, 4)",
        ),
        (
            "lin0.lora_A.weight",
            (3, 10),
            "module 'lin0': its config says rank 4, but lora_A has 3 rows, so that the scale is unknown",
        ),
        # As DeepSpeed ZeRO-3 and FSDP leave them where nobody gathered the values before saving.
        (
            "lin0.lora_A.weight",
            (0,),
            "module 'lin0': lora_A is empty (shape (0,)), like 1 of the 4 tensors. This happens when an adapter",
        ),
        ("lin0.lora_A.weight", (0, 10), "module 'lin0': lora_A is empty (shape (0, 10)), like 1 of the 4 tensors."),
        (
            "lin0.lora_B.weight",
            (40,),
            "module 'lin0': lora_B is not a matrix (shape (40,)). This happens when an adapter",
        ),
        ("lin0.lora_A.weight", (), "module 'lin0': lora_A is not a matrix (shape ())."),
    ],
)
def test_factors_that_do_not_fit(key: str, shape: tuple[int, ...], message: str, good: Path, bad: Path) -> None:
    edit_tensors(bad, lambda tensors: tensors.update({f"base_model.model.{key}": torch.ones(shape)}))
    refuse(tiny.build("mlp"), good, bad, message=message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "module 'lin0': its config says rank 8, but lora_A has 4 rows"),
        ({"rank_pattern": {"lin1": 2}}, "module 'lin1': its config says rank 2, but lora_A has 4 rows"),
        ({"lora_alpha": 1e300}, "module 'lin0': lora_alpha is 1e+300, which float32 cannot hold"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_config_that_contradicts_itself_or_the_tensors(
    changes: dict[str, Any], message: str, good: Path, bad: Path
) -> None:
    edit_config(bad, **changes)
    refuse(tiny.build("mlp"), good, bad, message=message)


def test_a_module_that_does_not_exist(good: Path, bad: Path) -> None:
    rename_keys(bad, lambda key: key.replace("lin1", "lin_1"))
    message = "module 'lin_1' does not exist in the model; the nearest name is 'lin1'. Was it trained on another base"
    refuse(tiny.build("mlp"), good, bad, message=message)


def test_a_module_that_does_not_exist_can_be_left_out(bad: Path) -> None:
    """What the message says to do."""
    rename_keys(bad, lambda key: key.replace("lin1", "other.model.projection"))
    assert list(ranks(compose(tiny.build("mlp"), bad, exclude_modules=["projection"]))) == ["lin0"]


def test_two_spellings_of_one_module(tmp_path: Path) -> None:
    base = tiny.build("vit")
    folder = tiny.save_lora(tmp_path / "bad", base, ["q_proj"])
    edit_tensors(folder, lambda tensors: tensors.update({old_vit_name(key): t.clone() for key, t in tensors.items()}))
    message = "two of its modules are 'vit.layers.0.attention.q_proj' in this model"
    refuse(base, folder, message=message)


@pytest.mark.parametrize("module", ["relu", "head.norm"])
def test_a_layer_that_cannot_hold_a_product(module: str, good: Path, bad: Path) -> None:
    base = tiny.build("mlp")
    base.head = nn.Sequential()
    base.head.norm = nn.LayerNorm(16)
    rename_keys(bad, lambda key: key.replace("lin1", module))
    kind = type(base.get_submodule(module)).__name__
    message = f"module {module!r} ({kind}) cannot be composed: this kind of layer is not supported"
    refuse(base, good, bad, message=message)


def test_a_grouped_convolution(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    folder = save_peft(tmp_path / "bad", base, LoraConfig(target_modules=["0"], r=4))
    refuse(base, folder, message="module '0' (Conv2d) cannot be composed: it has groups=2")


@pytest.mark.parametrize(
    ("trained_on", "used_on", "message"),
    [
        (
            nn.Linear(12, 40),
            nn.Embedding(40, 12),
            "has the factors of a linear or convolutional layer, but is an embedding",
        ),
        (
            nn.Embedding(40, 12),
            nn.Linear(40, 12),
            "has the factors of an embedding, but is a linear or convolutional layer",
        ),
    ],
    ids=["linear on embedding", "embedding on linear"],
)
def test_factors_of_another_kind_of_layer(
    trained_on: nn.Module, used_on: nn.Module, message: str, tmp_path: Path
) -> None:
    folder = save_peft(tmp_path / "bad", nn.Sequential(trained_on), LoraConfig(target_modules=["0"]))
    refuse(nn.Sequential(used_on), folder, message=f"module '0' {message} in the model")


@pytest.mark.parametrize(
    "narrowing",
    [
        {"target_modules": ["head"]},
        {"target_modules": "lin7"},
        {"exclude_modules": ["lin0", "lin1"]},
        {"modules_to_save": ["lin0", "lin1"]},
    ],
    ids=lambda narrowing: next(iter(narrowing)),
)
@pytest.mark.filterwarnings("ignore:adapter .* touches none of the composed modules")
def test_nothing_in_common_after_narrowing(narrowing: dict[str, Any], good: Path, bad: Path) -> None:
    refuse(tiny.build("mlp"), good, bad, message="nothing to compose", error=ValueError, **narrowing)


# Broken tensors


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("lin1.lora_A.weight", "module 'lin1' has lora_B but no lora_A"),
        ("lin0.lora_B.weight", "module 'lin0' has lora_A but no lora_B"),
    ],
)
def test_a_missing_factor(removed: str, message: str, good: Path, bad: Path) -> None:
    edit_tensors(bad, lambda tensors: tensors.pop(f"base_model.model.{removed}"))
    refuse(tiny.build("mlp"), good, bad, message=message)


def test_no_factors_at_all(good: Path, bad: Path) -> None:
    rename_keys(bad, lambda key: key.replace("lora_", ""))
    message = (
        "its weights hold no LoRA factors: none of their 4 keys is one, they are 'base_model.model.lin0.A.weight', '"
    )
    refuse(tiny.build("mlp"), good, bad, message=message)


@pytest.mark.parametrize("save", [lambda folder: folder, as_pickle], ids=["safetensors", "pickle"])
def test_no_tensors_at_all(save: Callable[[Path], Path], good: Path, bad: Path) -> None:
    edit_tensors(bad, lambda tensors: tensors.clear())
    save(bad)
    refuse(
        tiny.build("mlp"), good, bad, message="its weights file holds no tensors. Some old training scripts replaced"
    )


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.lin0.lora_A.other.weight", "module 'lin0' has two tensors A"),
        ("base_model.model.lin0.lora_A.bias", "module 'lin0' has a bias on lora_A"),
        ("base_model.model.lin0.lora_E", "tensor 'base_model.model.lin0.lora_E' is not part of a plain product B A"),
        ("base_model.model.lin2.lora_A.weigth", "lora_A.weigth' is not part of a plain product B A"),
    ],
)
def test_tensors_beside_the_two_factors(key: str, message: str, good: Path, bad: Path) -> None:
    edit_tensors(bad, lambda tensors: tensors.update({key: torch.ones(4)}))
    refuse(tiny.build("mlp"), good, bad, message=message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_values_that_are_not_finite(factor: str, value: float, dtype: torch.dtype, good: Path, bad: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"base_model.model.lin1.{factor}.weight"][1, 2] = value

    edit_tensors(bad, spoil)
    count = 4 * 20 if factor == "lora_A" else 16 * 4
    message = f"module 'lin1': {factor}: 1 of {count} values are NaN or infinite"
    refuse(tiny.build("mlp").to(dtype), good, bad, message=message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("huge_A", [True, False], ids=["A", "B"])
def test_values_are_finite_whose_sum_is_not(huge_A: bool, dtype: torch.dtype, good: Path, bad: Path) -> None:
    huge = 1e38 if dtype != torch.float16 else 6e4
    in_A, in_B = (huge, 2**-10) if huge_A else (2**-10, huge)

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.lin0.lora_A.weight"].fill_(in_A)
        tensors["base_model.model.lin0.lora_B.weight"].fill_(in_B / 4)  # the scale is 16 / 4

    edit_tensors(bad, enlarge)
    model = compose(tiny.build("mlp").to(dtype), good, bad)
    factors = model.base_model.model.lin0.composition_factors["default"]
    large = factors.A if huge_A else factors.B
    assert not large.to(dtype).sum().isfinite()
    expected = torch.tensor([in_A, in_B], dtype=torch.float64).to(dtype)
    assert torch.equal(factors.A[2:], expected[0].expand(4, 10))
    assert torch.equal(factors.B[:, 2:], expected[1].expand(20, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_factors_whose_product_overflows(dtype: torch.dtype, good: Path, bad: Path) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.lin0.lora_A.weight"][0, 0] = 1e30
        tensors["base_model.model.lin0.lora_B.weight"][0, 0] = 1e10

    edit_tensors(bad, enlarge)
    message = r"module 'lin0': values up to 1e+30 in lora_A and 4e+10 in lora_B (scaled) can overflow"
    refuse(tiny.build("mlp").to(dtype), good, bad, message=message)
    for model in (None, tiny.build("mlp")):
        (report,) = inspect_adapters(CompositionConfig(adapters=[bad]).references, model)
        assert "can overflow" in (report.reason or "")


def test_a_bias_that_is_not_finite(good: Path, tmp_path: Path) -> None:
    base = tiny.build("mlp")
    folder = tiny.save_lora(tmp_path / "bad", base, ["lin0"], lora_bias=True)
    edit_tensors(folder, lambda tensors: tensors["base_model.model.lin0.lora_B.bias"].fill_(float("nan")))
    refuse(base, good, folder, message="module 'lin0': lora_B bias: 20 of 20 values are NaN or infinite")


def test_values_that_overflow_in_the_dtype_of_the_model(good: Path, bad: Path) -> None:
    edit_tensors(bad, lambda tensors: tensors["base_model.model.lin0.lora_B.weight"].fill_(20000.0))
    message = "module 'lin0': lora_B: 80 values overflow in torch.float16 once scaled by 4"
    refuse(tiny.build("mlp").half(), good, bad, message=message)
    assert list(ranks(compose(tiny.build("mlp"), good, bad))) == ["lin0", "lin1"]  # fits float32


def test_values_that_are_not_finite_in_a_module_left_out_do_no_harm(bad: Path) -> None:
    edit_tensors(bad, lambda tensors: tensors["base_model.model.lin0.lora_B.weight"].fill_(float("nan")))
    assert list(ranks(compose(tiny.build("mlp"), bad, exclude_modules=["lin0"]))) == ["lin1"]


# Broken and hostile files


@pytest.mark.parametrize(
    "break_it",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: b"",
        lambda content: b"hello world",
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        lambda content: b"<!DOCTYPE html>\n<html><head><title>me/lora</title></head></html>",
        lambda content: bytes(range(256)) * 4,
    ],
    ids=["half", "last byte gone", "20 bytes", "empty", "text", "git-lfs pointer", "web page", "noise"],
)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_damaged_file(file: str, break_it: Callable[[bytes], bytes], good: Path, bad: Path) -> None:
    if file.endswith(".bin"):
        as_pickle(bad)
    (bad / file).write_bytes(break_it((bad / file).read_bytes()))
    message = {
        b"": "is empty: a download or a save was interrupted",
        b"version": "is a Git LFS pointer, not the file itself: the repository was cloned without git-lfs. Run `git",
        b"<!DOCTY": "is a web page, not the file itself.",
    }.get(
        (bad / file).read_bytes()[:7],
        {
            "adapter_model.safetensors": "is not a readable safetensors file",
            "adapter_model.bin": "is a pickle that holds more than tensors or is damaged, and is not loaded",
        }[file],
    )
    refuse(tiny.build("mlp"), good, bad, message=f"{bad / file} {message}")


class _MakesAFolder:
    """What an attacker would put into a pickle: code that runs on loading."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_hostile_pickle_is_not_executed(zipped: bool, good: Path, bad: Path, tmp_path: Path) -> None:
    as_pickle(bad)
    state = torch.load(bad / "adapter_model.bin")
    trap = {**state, "base_model.model.extra": _MakesAFolder(tmp_path / "owned")}
    torch.save(trap, bad / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    message = "adapter_model.bin is a pickle that holds more than tensors or is damaged, and is not loaded"
    refuse(tiny.build("mlp"), good, bad, message=message)
    assert not (tmp_path / "owned").exists()
    torch.load(bad / "adapter_model.bin", weights_only=False)  # the trap does work
    assert (tmp_path / "owned").exists()


def test_a_pickle_of_something_else(good: Path, bad: Path) -> None:
    as_pickle(bad)
    torch.save({"model": {"weight": torch.ones(2)}}, bad / "adapter_model.bin")
    refuse(tiny.build("mlp"), good, bad, message="is not a state dict of tensors")


def test_safetensors_are_preferred_to_a_pickle_beside_them(bad: Path) -> None:
    base = tiny.build("mlp").double()
    (bad / "adapter_model.bin").write_bytes(b"not read")
    assert_products(compose(base, bad), Reference(base, [bad]))


def test_weights_that_changed_after_the_composition_was_saved(good: Path, bad: Path, tmp_path: Path) -> None:
    base = tiny.build("mlp").double()
    saved = compose(base, good, bad, save_adapters=False)
    saved.save_pretrained(str(tmp_path / "saved"))
    recorded = saved.peft_config["default"].provenance[1]["sha256"]

    loaded = PeftModel.from_pretrained(tiny.build("mlp").double(), str(tmp_path / "saved"))
    assert_products(loaded, Reference(tiny.build("mlp").double(), [good, bad]))

    edit_tensors(bad, lambda tensors: tensors["base_model.model.lin0.lora_B.weight"].add_(1e-3))
    fresh = tiny.build("mlp")
    message = f"adapter 'bad': its weights have changed: recorded sha256 {recorded}, but {bad}"
    with untouched(fresh), pytest.raises(AdapterError, match=re.escape(message)):
        PeftModel.from_pretrained(fresh, str(tmp_path / "saved"))


@pytest.mark.parametrize(
    "break_it",
    [lambda content: b"", lambda content: b"hello world", lambda content: content[:-1] + bytes([content[-1] ^ 1])],
    ids=["empty", "text", "one bit"],
)
@pytest.mark.parametrize("save", [lambda folder: folder, as_pickle], ids=["safetensors", "pickle"])
def test_bytes_that_changed_are_not_even_parsed(
    save: Callable[[Path], Path], break_it: Callable[[bytes], bytes], good: Path, bad: Path, tmp_path: Path
) -> None:
    [file] = save(bad).glob("adapter_model.*")
    compose(tiny.build("mlp"), good, bad, save_adapters=False).save_pretrained(str(tmp_path / "saved"))
    file.write_bytes(break_it(file.read_bytes()))
    fresh = tiny.build("mlp")
    with untouched(fresh), pytest.raises(AdapterError, match="adapter 'bad': its weights have changed"):
        PeftModel.from_pretrained(fresh, str(tmp_path / "saved"))


def test_the_recorded_hash_is_that_of_the_whole_file(good: Path, bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file is hashed in several pieces."""
    monkeypatch.setattr(weights, "HASHED_AT_ONCE", 1 << 16)
    edit_tensors(bad, lambda tensors: tensors.update({"base_model.model.head.weight": torch.rand(3, 20_000)}))
    with pytest.warns(UserWarning, match=r"head\.weight"):
        model = compose(tiny.build("mlp"), good, bad)
    files = [folder / "adapter_model.safetensors" for folder in (good, bad)]
    assert files[1].stat().st_size > 3 << 16
    recorded = [entry["sha256"] for entry in model.peft_config["default"].provenance]
    assert recorded == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


# Many adapters


@pytest.mark.parametrize("limit", ["MAPPED_BYTES", "MAPPED_FILES"])
@pytest.mark.parametrize("case", ["ranks and alphas", "disjoint targets", "convolutions", "embedding"])
def test_adapters_that_are_not_mapped_together(
    case: str, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacking, limit, 1)
    name, loras = CASES[case]
    base = tiny.build(name).double()
    folders = [tiny.save_lora(tmp_path / str(seed), base, seed=seed, **lora) for seed, lora in enumerate(loras)]
    model = compose(tiny.build(name).double(), *folders)
    assert_products(model, Reference(base, folders))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_only_a_few_files_are_mapped_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped files count as memory of the process: all at once would double its peak."""
    base = tiny.build("mlp")
    folders = [tiny.save_lora(tmp_path / str(seed), base, ["lin0"], seed=seed) for seed in range(7)]
    stack_batch, counts = stacking._stack_batch, []

    def mapped() -> int:
        return len(set(re.findall(rf"{tmp_path}/.*safetensors", Path("/proc/self/maps").read_text())))

    def counting(*args: Any) -> int:
        rows = stack_batch(*args)
        counts.append(mapped())
        return rows

    monkeypatch.setattr(stacking, "MAPPED_FILES", 3)
    monkeypatch.setattr(stacking, "_stack_batch", counting)
    config = CompositionConfig(adapters=list(folders))
    get_peft_model(base, config)
    assert counts == [3, 3, 1]
    assert mapped() == 0


def test_an_adapter_more_costs_no_more_than_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on the model and the names of its modules alone is done once, whatever the number of adapters."""
    [old, _], _ = save_vit_loras(tmp_path)
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        wrapped = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return wrapped(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(base_model, "layer_shape")
    count(preparation, "check_target_module_exists")
    for name in ("rename_source_key", "get_model_conversion_mapping"):
        count(compat, name)
    count(nn.Module, "named_modules")
    count(weights, "safe_open")

    def cost(number: int) -> Counter[str]:
        base = tiny.build("vit")
        config = CompositionConfig(adapters=[{"path": old, "name": f"n{i}"} for i in range(number)])
        calls.clear()
        get_peft_model(base, config)
        return calls.copy()

    few, many = cost(2), cost(9)
    assert (few.pop("safe_open"), many.pop("safe_open")) == (2, 9)
    assert few == many
    assert few["rename_source_key"] == few["layer_shape"] == 8  # four modules of each of the two layers


# Around the refusal


def test_a_bad_second_composition_leaves_the_first_as_it_was(good: Path, bad: Path) -> None:
    model = compose(tiny.build("mlp"), good)
    before = tiny.output(model, "mlp")
    edit_config(bad, r=8)

    with pytest.raises(AdapterError, match="adapter 'bad': module 'lin0': its config says rank 8"):
        model.add_adapter("second", CompositionConfig(adapters=[bad]))

    assert list(model.peft_config) == ["default"]
    assert torch.equal(tiny.output(model, "mlp"), before)
    edit_config(bad, r=4)
    model.add_adapter("second", CompositionConfig(adapters=[bad]))  # the name is free again
    assert list(model.peft_config) == ["default", "second"]


def test_a_config_that_failed_can_be_used_again(good: Path, bad: Path) -> None:
    base, config = tiny.build("mlp"), CompositionConfig(adapters=[good, bad])
    edit_config(bad, r=8)
    with pytest.raises(AdapterError, match="rank 8"):
        get_peft_model(base, config)
    edit_config(bad, r=4)
    assert ranks(get_peft_model(base, config)) == {"lin0": [2, 4], "lin1": [2, 4]}


def test_the_error_survives_a_process_boundary() -> None:
    """Data loaders and launchers hand exceptions over as pickles."""
    error = pickle.loads(pickle.dumps(AdapterError("mine", "it is broken")))
    assert (str(error), error.adapter_name, error.reason) == ("adapter 'mine': it is broken", "mine", "it is broken")
