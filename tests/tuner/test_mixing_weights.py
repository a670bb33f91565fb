"""`mixing_weights(model)`: the same for every way in, and only of adapters that touch a module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_composition import CompositionConfig, mixing_weights
from peft_composition.checkpoint.saved import saved_mixing_weights

from .. import tiny


WEIGHTS = {"first": 0.25, "second": 0.75}
# The second adapter touches v_proj alone.
EXPECTED = {
    f"model.layers.{layer}.self_attn.{name}": {
        adapter: weight for adapter, weight in WEIGHTS.items() if name == "v_proj" or adapter == "first"
    }
    for layer in (0, 1)
    for name in ("q_proj", "v_proj")
}


@pytest.fixture
def config(tmp_path: Path) -> CompositionConfig:
    return CompositionConfig(adapters=tiny.save_pair(tmp_path, "llama"), mixing="fixed", weights=[*WEIGHTS.values()])


def test_of_a_peft_model_as_of_its_files(config: CompositionConfig, tmp_path: Path) -> None:
    model = get_peft_model(tiny.build("llama"), config)
    model.save_pretrained(tmp_path / "saved")

    assert mixing_weights(model) == EXPECTED
    assert list(mixing_weights(model)) == list(EXPECTED)
    assert model.mixing_weights() == EXPECTED
    assert mixing_weights(model.base_model) == EXPECTED
    assert saved_mixing_weights(tmp_path / "saved") == EXPECTED


def test_of_models_without_a_tuner_around_them(config: CompositionConfig) -> None:
    assert mixing_weights(inject_adapter_in_model(config, tiny.build("llama"))) == EXPECTED


def test_under_a_fresh_lora_and_in_a_compiled_model(config: CompositionConfig) -> None:
    model = get_peft_model(tiny.build("llama"), config)
    assert mixing_weights(torch.compile(model)) == EXPECTED
    both = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), adapter_name="fresh")
    assert mixing_weights(both) == EXPECTED


def test_which_one_is_said_or_asked(config: CompositionConfig) -> None:
    model = get_peft_model(tiny.build("llama"), config)
    model.add_adapter("other", CompositionConfig(adapters=config.adapters[:1], mixing="uniform"))
    assert mixing_weights(model) == EXPECTED
    assert set(map(len, mixing_weights(model, "other").values())) == {1}
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"which composition is meant: \['default', 'other'\] are active"):
        mixing_weights(model)
    with pytest.raises(ValueError, match=r"no composition 'third'; there are \['default', 'other'\]"):
        mixing_weights(model, "third")


def test_where_there_is_none_it_says_why(config: CompositionConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(Linear\) holds no composition: it never did, or .*merged"):
        mixing_weights(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="holds no composition"):
        mixing_weights(get_peft_model(tiny.build("mlp"), LoraConfig(target_modules=["lin0"])))
    model = get_peft_model(tiny.build("llama"), config)
    model.merge_adapter()
    assert mixing_weights(model) == EXPECTED
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    for what in (lambda: mixing_weights(merged), lambda: mixing_weights(model, "default"), model.mixing_weights):
        with pytest.raises(ValueError, match="holds no composition"):
            what()
    for path in (tmp_path, str(tmp_path)):
        with pytest.raises(TypeError, match=r"Load the composition first .* peft-composition weights FOLDER"):
            mixing_weights(path)  # type: ignore[arg-type]


def test_within_a_wrapper_for_several_devices(pair) -> None:
    model = tiny.compose("mlp", pair("mlp"))
    expected = mixing_weights(model)
    assert mixing_weights(nn.DataParallel(model)) == expected
    assert mixing_weights(torch.compile(nn.DataParallel(model), backend="eager")) == expected
