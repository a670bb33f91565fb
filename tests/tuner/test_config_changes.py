"""Fields that are set after the config was made: they take effect, or are refused; never ignored in silence."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from peft_composition import CompositionConfig

from .. import tiny
from ..reference import TOLERANCE, Reference, mixing_weights, relative_error


Folders = Callable[[str], list[str]]


def output(model: nn.Module) -> Tensor:
    return tiny.output(model, "mlp")


def composed_of(config: CompositionConfig) -> PeftModel:
    return get_peft_model(tiny.build("mlp"), config).eval()


CHANGES: list[dict[str, Any]] = [
    {"target_modules": ["lin0"]},
    {"target_modules": ".*lin1"},
    {"exclude_modules": ["lin0"]},
    {"mixing": "fixed", "weights": [0.25, 0.75]},
    {"weights": [0.25, 0.75]},
    {"normalization": "none", "mixing": "fixed", "weights": [2.0, -1.0]},
    {"weight_sharing": "model"},
    {"gain": 3.0},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(map(str, changes)))
def test_what_is_set_before_a_model_is_built_is_what_is_built(changes: dict[str, Any], pair: Folders) -> None:
    folders = pair("mlp")
    config = CompositionConfig(adapters=folders)
    for name, value in changes.items():
        setattr(config, name, value)
    model = composed_of(config)

    modules = {"lin0", "lin1"}
    if "target_modules" in changes:
        modules = {"lin0"} if changes["target_modules"] == ["lin0"] else {"lin1"}
    elif "exclude_modules" in changes:
        modules = {"lin1"}
    assert set(model.mixing_weights()) == modules
    reference = Reference(tiny.build("mlp"), folders)
    theta = torch.zeros(2, dtype=torch.float64)
    learned = [parameter for name, parameter in model.named_parameters() if "composition_mixing" in name]
    assert len({id(parameter) for parameter in learned}) == {"fixed": 0}.get(
        changes.get("mixing", ""), 1 if "weight_sharing" in changes else len(modules)
    )
    if "gain" in changes:
        theta = torch.tensor([0.1, -0.2], dtype=torch.float64)
        for parameter in learned:
            parameter.data.copy_(theta)
    start = changes.get("weights", [0.5, 0.5])
    w = mixing_weights(start, theta, changes.get("gain", 40.0), changes.get("normalization", "softmax"))
    reference.modules = [name for name in reference.modules if name in modules]
    expected = reference(dict.fromkeys(reference.modules, w), tiny.TINY["mlp"].inputs()["x"].double())
    assert relative_error(output(model), expected) < TOLERANCE[torch.float32]


def test_adapters_that_are_set_later_are_composed(pair: Folders, tmp_path: Path) -> None:
    folders = pair("mlp")
    config = CompositionConfig(adapters=["./nowhere"])
    config.adapters = folders
    assert config.adapter_names == ["first", "second"]
    model = composed_of(config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path)).eval()

    assert list(model.mixing_weights()["lin1"]) == ["first", "second"]  # the second touches lin1 alone
    assert torch.equal(output(again), output(model))


def test_the_default_gain_follows_the_normalization_a_given_one_stays() -> None:
    config = CompositionConfig(adapters=["a"])
    config.normalization = "none"
    given = CompositionConfig(adapters=["a"], gain=41.0)
    given.normalization = "none"
    for each in (config, given):
        with each.building():
            pass
    assert config.gain == CompositionConfig(adapters=["a"], normalization="none").gain
    assert given.gain == 41.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixing": "average"}, "mixing must be one of"),
        ({"mixing": "fixed", "weights": [1.0]}, "weights has 1 entry for 2 adapters"),
        ({"mixing": "fixed", "weights": [0.9, 0.9]}, "weights sum to 1.8"),
        ({"gain": -1.0}, "gain must be"),
        ({"adapters": []}, "adapters must name at least one"),
        ({"layers_to_transform": [0], "target_modules": ".*"}, "layers_to_transform needs target_modules"),
    ],
    ids=str,
)
def test_what_a_config_refuses_it_refuses_later_too(changes: dict[str, Any], message: str, pair: Folders) -> None:
    config = CompositionConfig(adapters=pair("mlp"))
    for name, value in changes.items():
        setattr(config, name, value)
    base = tiny.build("mlp")

    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)

    assert type(base.lin0) is nn.Linear


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adapters", ["other"]),
        ("mixing", "uniform"),
        ("weights", [0.25, 0.75]),
        ("normalization", "none"),
        ("gain", 3.0),
        ("weight_sharing", "model"),
        ("target_modules", ["lin1"]),
        ("exclude_modules", ["lin1"]),
        ("layers_to_transform", [0]),
        ("layers_pattern", "h"),
    ],
)
@pytest.mark.parametrize("is_loaded", [False, True], ids=["built", "loaded"])
def test_the_config_of_a_model_stays_what_the_model_computes(
    name: str, value: object, is_loaded: bool, pair: Folders, tmp_path: Path
) -> None:
    model = composed_of(CompositionConfig(adapters=pair("mlp"), target_modules=["lin0", "lin1"]))
    if is_loaded:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path))
    config = model.peft_config["default"]
    before = config.to_dict()

    with pytest.raises(ValueError, match=rf"^{name} cannot become .*: a model was built with .*dataclasses\.replace"):
        setattr(config, name, value)

    setattr(config, name, before[name])  # what it is already
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("name", "value"), [("target_modules", ["lin1"]), ("gain", 3.0), ("weights", [0.25, 0.75]), ("mixing", "uniform")]
)
def test_the_config_of_a_checkpoint_cannot_be_changed_before_loading(
    name: str, value: object, pair: Folders, tmp_path: Path
) -> None:
    composed_of(CompositionConfig(adapters=pair("mlp"))).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(str(tmp_path))
    setattr(config, name, value)

    with pytest.raises(ValueError, match=f"^{name} is .*, but the saved composition .*composed_modules=None"):
        PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path), config=config)


def test_a_config_serves_again_also_after_a_failure(pair: Folders) -> None:
    folders = pair("mlp")
    config = CompositionConfig(adapters=folders, target_modules=["lin1"])
    with pytest.raises(ValueError, match="does not exist in the model"):
        get_peft_model(nn.ModuleDict({"other": nn.Linear(2, 2)}), config)
    assert config.target_modules == ["lin1"]
    first = composed_of(config)
    for again in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert torch.equal(output(composed_of(again)), output(first))
    other = dataclasses.replace(config, composed_modules=None, target_modules=["lin0"])
    assert set(composed_of(other).mixing_weights()) == {"lin0"}


@pytest.mark.parametrize("way", ["get_peft_model", "inject_adapter_in_model"])
def test_a_config_for_two_models_stays_as_written_and_each_records_its_own(way: str, pair: Folders) -> None:
    config = CompositionConfig(adapters=pair("bert"))
    written = copy.deepcopy(vars(config))
    bases = [tiny.build("bert"), tiny.build("bert")]
    other = copy.deepcopy(bases[1].config)
    other.num_labels = 7
    bases[1] = type(bases[1])(other)
    models = [
        get_peft_model(base, config) if way == "get_peft_model" else inject_adapter_in_model(config, base)
        for base in bases
    ]
    records = [model.peft_config["default"] for model in models]
    assert {**vars(config), "base_model_name_or_path": None} == written  # which PEFT fills in
    assert [record.num_labels for record in records] == [base.config.num_labels for base in bases]
    assert all(record.composed_modules for record in records)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.weights.append(0.5),
        lambda config: config.weights.reverse(),
        lambda config: config.adapters[0].update(path="elsewhere"),
        lambda config: config.adapters.reverse(),
        lambda config: config.target_modules.append("lin1"),
        lambda config: config.exclude_modules.append("lin1"),
        lambda config: config.composed_modules.pop("lin1"),
        lambda config: config.composed_modules["lin1"].reverse(),
        lambda config: config.provenance[0].update(sha256="0" * 64),
        lambda config: setattr(config, "composed_modules", None),
    ],
)
def test_a_checkpoint_says_what_its_model_was_built_with(
    edit: Callable[[Any], Any], pair: Folders, tmp_path: Path
) -> None:
    model = composed_of(
        CompositionConfig(adapters=pair("mlp"), mixing="fixed", weights=[0.25, 0.75], exclude_modules=["relu"])
    )
    model.save_pretrained(tmp_path / "before")
    edit(model.peft_config["default"])
    model.save_pretrained(tmp_path / "after")

    before, after = ((tmp_path / name / CONFIG_NAME).read_text() for name in ("before", "after"))
    assert after == before
    again = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path / "after")).eval()
    assert torch.equal(output(again), output(model))
