"""`CompositionConfig`: what it accepts, what it refuses, and that it survives being saved."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig

from peft_composition import CompositionConfig


def test_defaults_are_the_papers() -> None:
    config = CompositionConfig(adapters=["me/lora-a"])
    assert (config.mixing, config.normalization, config.weight_sharing) == ("learned", "softmax", "module")
    assert config.weights is None
    assert config.target_modules is None
    assert config.save_adapters is True


def test_adapters_are_ids_paths_or_dicts() -> None:
    config = CompositionConfig(
        adapters=[
            "me/lora-a",
            Path("some/lora-b"),
            {"path": "me/many", "subfolder": "c", "revision": "v1"},
            {"path": Path("x/y"), "name": "mine"},
        ]
    )
    assert config.adapters == [
        {"path": "me/lora-a", "revision": None, "subfolder": None, "name": "lora-a"},
        {"path": "some/lora-b", "revision": None, "subfolder": None, "name": "lora-b"},
        {"path": "me/many", "revision": "v1", "subfolder": "c", "name": "c@v1"},
        {"path": "x/y", "revision": None, "subfolder": None, "name": "mine"},
    ]


@pytest.mark.parametrize(
    ("adapters", "names"),
    [
        (["a/lora", "b/lora", "c/other"], ["a/lora", "b/lora", "other"]),
        (["runs/a/lora", "runs/b/lora"], ["a/lora", "b/lora"]),
        ([{"path": "me/x", "name": "lora"}, "b/lora"], ["lora", "b/lora"]),
        ([{"path": "me/x", "revision": "v1"}, {"path": "me/x", "revision": "v2"}], ["x@v1", "x@v2"]),
    ],
)
def test_unnamed_adapters_get_the_shortest_name_that_tells_them_apart(adapters: list[Any], names: list[str]) -> None:
    assert CompositionConfig(adapters=adapters).adapter_names == names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapters": None}, "at least one trained LoRA adapter"),
        ({"adapters": []}, "at least one trained LoRA adapter"),
        ({"adapters": "me/lora"}, "adapters must be a list, got a single adapter: 'me/lora'"),
        ({"adapters": {"path": "me/lora"}}, "adapters must be a list, got a single adapter"),
        ({"adapters": [3]}, "a Hub id, a local folder or a dict with 'path', got 3"),
        ({"adapters": [{"name": "x"}]}, "needs a 'path'"),
        ({"adapters": [{"path": "x", "branch": "y"}]}, "unknown keys ['branch']"),
        ({"adapters": ["me/a", "me/a"]}, "two adapters are named 'me/a': me/a and me/a"),
        (
            {"adapters": [{"path": "me/a", "name": "x"}, {"path": "me/b", "name": "x"}]},
            "two adapters are named 'x': me/a and me/b",
        ),
        ({"mixing": "average"}, "mixing must be one of 'learned', 'uniform', 'fixed', got 'average'"),
        ({"normalization": "sum"}, "normalization must be one of 'softmax', 'none', got 'sum'"),
        ({"weight_sharing": "layer"}, "weight_sharing must be one of 'module', 'block', 'model', got 'layer'"),
        ({"mixing": "uniform", "weights": [0.5, 0.5]}, 'mixing="uniform" ignores them'),
        ({"weights": [1.0]}, "weights has 1 entry for 2 adapters (a, b)"),
        ({"weights": [0.5, float("nan")]}, "the weight of adapter 'b' must be a finite number, got nan"),
        ({"weights": [float("inf"), 0.5]}, "the weight of adapter 'a' must be a finite number, got inf"),
        ({"weights": [0.5, "0.5"]}, "the weight of adapter 'b' must be a finite number, got '0.5'"),
        ({"weights": "ab"}, "weights must be a list of numbers, got 'ab'"),
        ({"weights": [1.5, -0.5]}, "the weight of adapter 'b' is -0.5"),
        ({"weights": [0.5, 0.6]}, "weights sum to 1.1"),
        ({"weights": [0.5, 0.6], "mixing": "fixed"}, "weights sum to 1.1"),
        ({"weights": [0.0, 0.0]}, "all weights are zero"),
        (
            {"weights": [1e39, 0.5], "normalization": "none"},
            "weights: the weight of adapter 'a' is 1e+39; weights are stored in float32",
        ),
        (
            {"weights": [0.5, -1e39], "normalization": "none"},
            "weights: the weight of adapter 'b' is -1e+39; weights are stored in float32",
        ),
        ({"weights": [10**5000, 1]}, "weights: the weight of adapter 'a' must be a finite number, got an integer of"),
        ({"weights": [0.5, True]}, "the weight of adapter 'b' must be a finite number, got True"),
        ({"weights": torch.tensor(0.5)}, "weights must be a list of numbers, got tensor(0.5000)"),
        ({"weights": torch.eye(2)}, "the weight of adapter 'a' must be a finite number, got [1.0, 0.0]"),
        ({"gain": 0}, "gain must be a positive number in the range of float32 (1.2e-38 to 3.4e+38), got 0"),
        ({"gain": -1.0}, "gain must be a positive number in the range of float32 (1.2e-38 to 3.4e+38), got -1.0"),
        ({"gain": float("inf")}, "in the range of float32 (1.2e-38 to 3.4e+38), got inf"),
        ({"gain": float("nan")}, "in the range of float32 (1.2e-38 to 3.4e+38), got nan"),
        ({"gain": 1e39}, "in the range of float32 (1.2e-38 to 3.4e+38), got 1e+39"),
        ({"gain": 1e-50}, "in the range of float32 (1.2e-38 to 3.4e+38), got 1e-50"),
        ({"gain": 10**400}, "in the range of float32 (1.2e-38 to 3.4e+38), got an integer of about 401 digits"),
        ({"gain": True}, "in the range of float32 (1.2e-38 to 3.4e+38), got True"),
        ({"gain": "40"}, "in the range of float32 (1.2e-38 to 3.4e+38), got '40'"),
        ({"layers_to_transform": [0], "target_modules": ".*query"}, "layers_to_transform needs target_modules"),
        ({"layers_pattern": "layers"}, "layers_pattern has no effect without layers_to_transform"),
        ({"target_modules": "("}, "target_modules: '(' is not a regular expression: missing )"),
        ({"target_modules": 5}, "target_modules must be a list of module names or a regular expression, got 5"),
        (
            {"target_modules": ["a", 5]},
            "target_modules must be a list of module names or a regular expression, got ['a'",
        ),
        ({"exclude_modules": "*"}, "exclude_modules: '*' is not a regular expression: nothing to repeat"),
        (
            {"exclude_modules": {"a": 1}},
            "exclude_modules must be a list of module names or a regular expression, got {",
        ),
        (
            {"layers_to_transform": "("},
            "layers_to_transform must be the index of a layer, or a list of indices from 0 on",
        ),
        ({"layers_to_transform": [0, "1"]}, "layers_to_transform must be the index of a layer, or a list of indices"),
        (
            {"layers_to_transform": -1},
            "layers_to_transform must be the index of a layer, or a list of indices from 0 on",
        ),
        ({"layers_to_transform": True}, "layers_to_transform must be the index of a layer, or a list of indices"),
        (
            {"layers_to_transform": 0, "layers_pattern": "("},
            "layers_pattern must be the name of a module list, such",
        ),
        ({"layers_to_transform": 0, "layers_pattern": 5}, "layers_pattern must be one or more names of module lists"),
        (
            {"layers_to_transform": 0, "layers_pattern": ["(.*)*!"]},
            "layers_pattern must be the name of a module list",
        ),
        ({"modules_to_save": 5}, "modules_to_save must be a list of module names, got 5"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of module names, got 'head'; write ['head']"),
        ({"modules_to_save": ["head", None]}, "modules_to_save must be a list of module names, got ['head', None]"),
        ({"modules_to_save": ["("]}, "modules_to_save: '(' is not a regular expression: missing )"),
        ({"adapters": [{"path": 5}]}, "the 'path' in an adapter's dict must be text, got 5"),
        ({"adapters": [b"me/a"]}, "a Hub id, a local folder or a dict with 'path', got b'me/a'"),
        ({"adapters": [{"path": "me/a", "revision": 5}]}, "the 'revision' in an adapter's dict must be text, got 5"),
        ({"adapters": [{"path": "me/a", "name": ["x"]}]}, "the 'name' in an adapter's dict must be text, got ['x']"),
        ({"adapters": [{"path": "me/a", "subfolder": 7}]}, "the 'subfolder' in an adapter's dict must be text, got 7"),
        ({"task_type": "NONSENSE"}, "Invalid task type: 'NONSENSE'"),
    ],
)
def test_bad_fields_are_refused_with_the_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CompositionConfig(**{"adapters": ["me/a", "me/b"], **fields})


def test_fields_that_select_modules_take_what_peft_takes() -> None:
    config = CompositionConfig(
        adapters=["a"],
        target_modules={"query", "key"},
        exclude_modules=("a.b",),
        layers_to_transform=range(2),
        layers_pattern=("h", "layer"),
        modules_to_save=("classifier",),
    )
    assert config.requested_target_modules == {"query", "key"}
    assert config.exclude_modules == ["a.b"]
    assert config.layers_to_transform == [0, 1]
    assert config.layers_pattern == ["h", "layer"]
    assert config.modules_to_save == ["classifier"]
    one_layer = CompositionConfig(adapters=["a"], layers_to_transform=np.int64(3), target_modules=["query"])
    assert json.loads(json.dumps(one_layer.to_dict()))["layers_to_transform"] == 3


@pytest.mark.parametrize("path", [".", "./", "x/..", "../work"])
def test_a_folder_is_named_by_what_it_is(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert CompositionConfig(adapters=[path]).adapter_names == ["work"]


def test_the_root_has_a_name_and_subfolders_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CompositionConfig(adapters=["/"]).adapter_names == ["/"]
    assert CompositionConfig(adapters=[{"path": ".", "subfolder": "inner"}]).adapter_names == ["inner"]
    assert CompositionConfig(adapters=[{"path": "x", "subfolder": ".."}]).adapter_names == [tmp_path.name]


@pytest.mark.parametrize("count", [1, 3, 49])
def test_fixed_weights_are_equal_until_others_are_chosen(count: int) -> None:
    config = CompositionConfig(adapters=[f"me/{number}" for number in range(count)], mixing="fixed")
    assert config.weights == pytest.approx([1 / count] * count, abs=1e-15)
    config.follow([1.0] + [0.0] * (count - 1))  # as `fit_mixing_weights` does
    assert config.weights == [1.0] + [0.0] * (count - 1)


def test_free_weights_may_be_negative_and_need_no_sum() -> None:
    config = CompositionConfig(adapters=["a", "b"], weights=[2, -1], normalization="none", mixing="fixed")
    assert config.weights == [2.0, -1.0]


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    for weights in (np.array([0.25, 0.75]), torch.tensor([0.25, 0.75]), [np.float32(0.25), torch.tensor(0.75)]):
        config = CompositionConfig(adapters=["a", "b"], weights=weights, gain=np.float32(8))
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (saved["weights"], saved["gain"]) == ([0.25, 0.75], 8.0)


def test_rounded_softmax_weights_are_brought_to_sum_one() -> None:
    config = CompositionConfig(adapters=["a", "b", "c"], weights=[0.333, 0.333, 0.333])
    assert config.weights == pytest.approx([1 / 3] * 3, rel=1e-12)


def test_default_gain_is_written_down() -> None:
    """A checkpoint's theta means something only together with the gain it was trained with."""
    for normalization in ("softmax", "none"):
        config = CompositionConfig(adapters=["a"], normalization=normalization)
        assert isinstance(config.gain, float)
        assert asdict(config)["gain"] == config.gain


def test_config_survives_being_saved(tmp_path: Path) -> None:
    config = CompositionConfig(
        adapters=[Path("x/a"), {"path": "me/b", "revision": "main", "name": "bee"}],
        weights=[0.25, 0.75],
        weight_sharing="block",
        target_modules=["query"],
        exclude_modules=["classifier"],
        layers_to_transform=[0, 2],
        layers_pattern="layer",
        modules_to_save=["head"],
        save_adapters=False,
        task_type="SEQ_CLS",
    )
    config.save_pretrained(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["adapter_config.json"]
    for loaded in (
        PeftConfig.from_pretrained(tmp_path / "saved"),
        CompositionConfig.from_pretrained(tmp_path / "saved"),
    ):
        assert isinstance(loaded, CompositionConfig)
        assert asdict(loaded) == asdict(config)
    assert asdict(CompositionConfig(**json.loads(json.dumps(asdict(config))))) == asdict(config)


def test_failed_save_leaves_the_earlier_file(tmp_path: Path) -> None:
    config = CompositionConfig(adapters=["me/a"])
    config.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_text()
    config.auto_mapping = {"unserialisable": object()}
    with pytest.raises(TypeError):
        config.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == before
    assert len(list(tmp_path.iterdir())) == 1
