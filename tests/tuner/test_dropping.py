"""Adapters dropped from a composition in a model: what is computed, saved and loaded then, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_composition import mixing_weights
from peft_composition.checkpoint.saved import saved_mixing_weights
from peft_composition.evidence.passes import composition_in
from peft_composition.tuner.dropping import drop_adapters

from .. import tiny
from ..reference import read_lora


def three(folder: Path, name: str) -> list[str]:
    """The two of `save_pair`, and a third that touches the first target alone."""
    pair = tiny.save_pair(folder, name)
    return [*pair, str(tiny.save_lora(folder / "third", tiny.build(name), tiny.TINY[name].targets[:1], seed=3, r=1))]


def drop(model: Any, *numbers: int) -> None:
    found = composition_in(model, None)
    drop_adapters(model, found.name, found.config, found.layers, numbers)


def trained(model: Any) -> Any:
    """The model with mixing weights as a training could have left them."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".composition_mixing." in name:
            parameter.data = 0.03 * torch.randn(parameter.shape, generator=generator)
    return model


def weights_by_module(model: Any, folders: list[str]) -> dict[str, list[float]]:
    """All N weights of every composed module, also of adapters that do not touch it."""
    found = composition_in(model, None)
    return {name: layer.mixing_weights(found.name).double().tolist() for name, layer in found.layers.items()}


@pytest.mark.parametrize("name", tiny.TINY)
def test_what_is_left_computes_the_mix_without_them(name: str, tmp_path: Path) -> None:
    folders = three(tmp_path, name)
    model = trained(tiny.compose(name, folders))
    before = weights_by_module(model, folders)
    drop(model, 0)
    expected = {module: [0.0, *(weight / (row[1] + row[2]) for weight in row[1:])] for module, row in before.items()}
    by_hand = tiny.output(tiny.composed_by_hand(tiny.build(name), folders, expected), name)
    torch.testing.assert_close(tiny.output(model, name), by_hand, atol=2e-5, rtol=1e-4)

    model.save_pretrained(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(tiny.build(name), str(tmp_path / "saved")).eval()
    torch.testing.assert_close(tiny.output(again, name), tiny.output(model, name), atol=0, rtol=0)
    assert mixing_weights(again) == mixing_weights(model) == saved_mixing_weights(tmp_path / "saved")
    assert {adapter for row in mixing_weights(again).values() for adapter in row} == {"second", "third"}
    assert sorted(mixing_weights(again)) == tiny.touched_modules(folders[1:])  # the others are no longer composed
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert [entry["name"] for entry in config["adapters"]] == ["second", "third"]
    assert [entry["name"] for entry in config["provenance"]] == ["second", "third"]
    factors = [t for key, t in load_file(tmp_path / "saved/adapter_model.safetensors").items() if "_factors." in key]
    alone = [lora for folder in folders[1:] for lora in read_lora(folder).values()]
    assert sum(t.numel() for t in factors) == sum(lora.A.numel() + lora.B.numel() for lora in alone)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mixing": "uniform"}, [0.5, 0, 0.5]),
        ({"mixing": "fixed", "weights": [0.5, 0.25, 0.25]}, [2 / 3, 0, 1 / 3]),
        ({"mixing": "fixed", "weights": [0.1, 0.5, 0.1]}, [0.35, 0, 0.35]),  # the base model's share stays
        ({"mixing": "fixed", "weights": [0.4, -2.0, 0.3], "normalization": "none"}, [0.4, 0, 0.3]),
        ({"mixing": "learned"}, [0.5, 0, 0.5]),
        ({"mixing": "learned", "normalization": "none"}, [1 / 3, 0, 1 / 3]),
        ({"mixing": "learned", "weights": [0.1, 0.5, 0.1]}, [0.35, 0, 0.35]),
        ({"mixing": "learned", "weight_sharing": "model"}, [0.5, 0, 0.5]),
    ],
)
def test_weights_of_every_kind(fields: dict[str, Any], expected: list[float], tmp_path: Path) -> None:
    folders = three(tmp_path, "mlp")
    model = tiny.compose("mlp", folders, **fields)
    drop(model, 1)
    by_hand = tiny.output(tiny.composed_by_hand(tiny.build("mlp"), folders, expected), "mlp")
    torch.testing.assert_close(tiny.output(model, "mlp"), by_hand, atol=2e-6, rtol=1e-5)
    model.save_pretrained(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path / "saved"), is_trainable=True).eval()
    torch.testing.assert_close(tiny.output(again, "mlp"), tiny.output(model, "mlp"), atol=0, rtol=0)
    drop(again, 1)  # once more, in a loaded one
    assert set(mixing_weights(again)["lin0"]) == {"first"}
    again.save_pretrained(str(tmp_path / "smaller"))
    last = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path / "smaller")).eval()
    torch.testing.assert_close(tiny.output(last, "mlp"), tiny.output(again, "mlp"), atol=0, rtol=0)


def test_trained_weights_go_on_training_from_where_they_were(tmp_path: Path) -> None:
    folders = three(tmp_path, "mlp")
    model = trained(tiny.compose("mlp", folders, weights=[0.2, 0.3, 0.1]))
    row = weights_by_module(model, folders)["lin1"]
    drop(model, 2)
    left = weights_by_module(model, folders)["lin1"]
    assert sum(row) < 0.99  # the rest is the base model's, and stays so
    assert left == pytest.approx([weight * sum(row) / sum(row[:2]) for weight in row[:2]], abs=1e-6)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("composition_mixing" in name for name in trains)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**tiny.TINY["mlp"].inputs()).square().sum().backward()
    optimizer.step()
    assert weights_by_module(model, folders)["lin1"] != left
    with pytest.raises(ValueError, match="adapters cannot become"):
        model.peft_config["default"].adapters = ["other"]


def test_a_config_that_built_a_model_can_build_another(tmp_path: Path) -> None:
    folders = three(tmp_path, "mlp")
    model = tiny.compose("mlp", folders, mixing="uniform")
    drop(model, 0)
    other = tiny.compose("mlp", [folders[1], folders[2]], mixing="uniform")
    config = model.peft_config["default"]
    assert (config.adapter_names, config.is_restored) == (["second", "third"], False)
    assert config.composed_modules == other.peft_config["default"].composed_modules
    assert config.lora_layout == other.peft_config["default"].lora_layout


def test_a_checkpoint_without_factors_names_what_is_left(tmp_path: Path) -> None:
    folders = three(tmp_path, "mlp")
    model = trained(tiny.compose("mlp", folders, save_adapters=False))
    drop(model, 0)
    model.save_pretrained(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path / "saved")).eval()
    torch.testing.assert_close(tiny.output(again, "mlp"), tiny.output(model, "mlp"), atol=0, rtol=0)


def test_merged_and_unloaded_afterwards(tmp_path: Path) -> None:
    folders = three(tmp_path, "mlp")
    model = trained(tiny.compose("mlp", folders))
    drop(model, 0, 1)
    expected = tiny.output(model, "mlp")
    merged = model.merge_and_unload()
    torch.testing.assert_close(tiny.output(merged, "mlp"), expected)
    assert type(merged.lin1) is torch.nn.Linear  # which only dropped adapters touched


def test_another_composition_beside_it_stays(tmp_path: Path) -> None:
    folders = three(tmp_path, "mlp")
    model = trained(tiny.compose("mlp", folders))
    model.add_adapter("other", tiny.compose("mlp", folders[:1]).peft_config["default"].copy())
    model.set_adapter("other")
    expected = tiny.output(model, "mlp")
    model.set_adapter("default")
    drop(model, 0)
    model.set_adapter("other")
    torch.testing.assert_close(tiny.output(model, "mlp"), expected)


@pytest.mark.parametrize("fields", [{}, {"weights": [0.5, 0.5, 0.0]}])
def test_something_must_be_left(fields: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.compose("mlp", three(tmp_path, "mlp"), **fields)
    before = tiny.output(model, "mlp")
    with pytest.raises(ValueError, match="Nothing would be left to mix"):
        drop(model, 0, 1, *(() if fields else (2,)))
    torch.testing.assert_close(tiny.output(model, "mlp"), before, atol=0, rtol=0)
