"""Config and weights of a saved composition that do not belong together, and records that are damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from peft_composition import CompositionConfig
from peft_composition.checkpoint.card import write_model_card
from peft_composition.checkpoint.export import lora_from_checkpoint
from peft_composition.checkpoint.push import add_to_checkpoint
from peft_composition.checkpoint.saved import saved_mixing_weights

from .. import tiny


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHERS = "do not belong together"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny.build("bert").save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def other_pair(tmp_path: Path) -> Callable[[str], list[str]]:
    """LoRAs with the names, ranks and targets of `pair`, but other values."""

    def make(name: str) -> list[str]:
        base, targets = tiny.build(name), tiny.TINY[name].targets
        first = tiny.save_lora(tmp_path / "others" / "first", base, targets, seed=3, r=2)
        second = tiny.save_lora(tmp_path / "others" / "second", base, targets[-1:], seed=4, r=3)
        return [str(first), str(second)]

    return make


def saved(folder: Path, name: str, adapters: list[str], base: nn.Module | None = None, **fields: Any) -> Path:
    tiny.compose(name, adapters, base, **fields).save_pretrained(str(folder))
    return folder


def with_config_of(folder: Path, other: Path) -> Path:
    """What a kill between the two files leaves: the new weights beside the old config."""
    shutil.copyfile(other / CONFIG, folder / CONFIG)
    return folder


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    edit(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def without_fingerprint(tensors: dict[str, Tensor]) -> None:
    """As version 0.1 saved."""
    for key in [key for key in tensors if "composition_fingerprint" in key]:
        del tensors[key]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


class Untouched:
    """A base model, and that nothing has happened to it."""

    def __init__(self, name: str) -> None:
        self.model = tiny.build(name)
        self.state = snapshot(self.model)
        self.modules = [type(module) for module in self.model.modules()]

    def check(self) -> None:
        assert [type(module) for module in self.model.modules()] == self.modules
        assert all(torch.equal(tensor, self.state[key]) for key, tensor in self.model.state_dict().items())
        assert not hasattr(self.model, "peft_config")


@pytest.fixture
def untouched() -> Iterator[Callable[[str], nn.Module]]:
    bases: list[Untouched] = []

    def build(name: str) -> nn.Module:
        bases.append(Untouched(name))
        return bases[-1].model

    yield build
    for base in bases:
        base.check()


def _loaded_by_hand(folder: str, base: str) -> None:
    model = tiny.build("bert")
    inject_adapter_in_model(PeftConfig.from_pretrained(folder), model, "mix")
    weights = Path(folder, WEIGHTS)
    tensors = load_file(weights) if weights.is_file() else torch.load(Path(folder, "adapter_model.bin"))
    set_peft_model_state_dict(model, tensors, adapter_name="mix")


def _loaded_beside(folder: str, base: str) -> None:
    model = PeftModel.from_pretrained(tiny.build("bert"), str(Path(folder).parent / "config"), adapter_name="one")
    model.load_adapter(folder, "two")


def _loaded_into(folder: str, base: str) -> None:
    """As the Trainer loads best models and checkpoints: the config in the folder is not read."""
    model = PeftModel.from_pretrained(tiny.build("bert"), str(Path(folder).parent / "config"), is_trainable=True)
    model.load_adapter(folder, "default", is_trainable=True)


WAYS_IN: dict[str, Callable[[str, str], object]] = {
    "from_pretrained": lambda folder, base: PeftModel.from_pretrained(tiny.build("bert"), folder),
    "low_cpu_mem_usage": lambda folder, base: PeftModel.from_pretrained(
        tiny.build("bert"), folder, low_cpu_mem_usage=True
    ),
    "config read before": lambda folder, base: PeftModel.from_pretrained(
        tiny.build("bert"), folder, config=PeftConfig.from_pretrained(folder)
    ),
    "load_adapter": _loaded_beside,
    "load_adapter into the same": _loaded_into,
    "AutoPeftModel": lambda folder, base: AutoPeftModelForSequenceClassification.from_pretrained(folder),
    "load_adapter of transformers": lambda folder, base: tiny.build("bert").load_adapter(folder),
    "from_pretrained of transformers": lambda folder, base: AutoModelForSequenceClassification.from_pretrained(folder),
    "set_peft_model_state_dict": _loaded_by_hand,
    "lora_from_checkpoint": lambda folder, base: lora_from_checkpoint(folder),
    "add_to_checkpoint": lambda folder, base: add_to_checkpoint(folder),
    "write_model_card": lambda folder, base: write_model_card(folder),
    "saved_mixing_weights": lambda folder, base: saved_mixing_weights(folder),
}
# transformers looks for safetensors alone in a local folder.
NOT_PICKLED = [way for way in WAYS_IN if not way.endswith("of transformers")]


class TestNewWeightsBesideAnOldConfig:
    @pytest.mark.parametrize(
        ("way", "safe_serialization"), [*((way, True) for way in WAYS_IN), *((way, False) for way in NOT_PICKLED)]
    )
    def test_are_refused_on_every_way_in(self, way, safe_serialization, pair, base_folder, tmp_path) -> None:
        """Compositions of the same shapes, so that nothing else could refuse them."""
        # PEFT finds a head by hand only where its keys were renamed.
        no_head = {"modules_to_save": None, "task_type": None} if way == "set_peft_model_state_dict" else {}
        base = AutoModelForSequenceClassification.from_pretrained(base_folder)
        saved(tmp_path / "config", "bert", pair("bert"), base, gain=20, **no_head)
        base = AutoModelForSequenceClassification.from_pretrained(base_folder)
        model = tiny.compose("bert", pair("bert"), base, gain=30, **no_head)
        model.save_pretrained(str(tmp_path / "mixed"), safe_serialization=safe_serialization)
        if way != "load_adapter into the same":
            WAYS_IN[way](str(tmp_path / "mixed"), base_folder)
        with_config_of(tmp_path / "mixed", tmp_path / "config")
        with pytest.raises(ValueError, match=rf"{OTHERS}: 'gain' is 20\.0 in the config, 30\.0 beside the weights"):
            WAYS_IN[way](str(tmp_path / "mixed"), base_folder)

    @pytest.mark.parametrize(
        ("fields", "difference"),
        [
            ({"gain": 7.5}, r"'gain' is 40\.0 in the config, 7\.5"),
            ({"weights": [0.25, 0.75]}, r"'weights' is null in the config, \[0\.25, 0\.75\]"),
            ({"normalization": "none", "gain": 40}, "'normalization' is 'softmax' in the config, 'none'"),
            ({"weight_sharing": "block"}, "'weight_sharing' is 'module' in the config, 'block'"),
            ({"weight_sharing": "model"}, "'weight_sharing' is 'module' in the config, 'model'"),
            ({"mixing": "uniform"}, "'mixing' is 'learned' in the config, 'uniform'"),
            ({"target_modules": ["lin1"]}, r"module 'lin0' is composed with ranks \[2, 0\] in the config, not comp"),
        ],
        ids=str,
    )
    def test_every_difference_is_named_and_the_model_stays(
        self, fields, difference, pair, untouched, tmp_path
    ) -> None:
        old = saved(tmp_path / "old", "mlp", pair("mlp"))
        new = saved(tmp_path / "new", "mlp", pair("mlp"), **fields)
        with pytest.raises(ValueError, match=f"{OTHERS}: {difference}"):
            PeftModel.from_pretrained(untouched("mlp"), str(with_config_of(new, old)))

    def test_other_adapters_of_the_same_shapes(self, pair, other_pair, untouched, tmp_path) -> None:
        old = saved(tmp_path / "old", "mlp", pair("mlp"))
        new = saved(tmp_path / "new", "mlp", other_pair("mlp"))
        with pytest.raises(ValueError, match=rf"{OTHERS}: adapter 'first' has the sha256 '\w{{64}}' in the config"):
            PeftModel.from_pretrained(untouched("mlp"), str(with_config_of(new, old)))

    def test_the_same_adapters_in_another_order(self, pair, untouched, tmp_path) -> None:
        old = saved(tmp_path / "old", "mlp", pair("mlp"))
        new = saved(tmp_path / "new", "mlp", pair("mlp")[::-1])
        order = r'the adapters are \["first", "second"\] in the config, \["second", "first"\] beside the weights'
        with pytest.raises(ValueError, match=f"{OTHERS}: {order}"):
            PeftModel.from_pretrained(untouched("mlp"), str(with_config_of(new, old)))

    @pytest.mark.parametrize("save_adapters", [True, False])
    def test_without_the_factors_too(self, save_adapters, pair, untouched, tmp_path) -> None:
        old = saved(tmp_path / "old", "mlp", pair("mlp"), save_adapters=save_adapters)
        new = saved(tmp_path / "new", "mlp", pair("mlp"), save_adapters=save_adapters, gain=7)
        with pytest.raises(ValueError, match=f"{OTHERS}: 'gain'"):
            PeftModel.from_pretrained(untouched("mlp"), str(with_config_of(new, old)))

    @pytest.mark.parametrize("way", ["from_pretrained", "from_pretrained of transformers", "AutoPeftModel"])
    def test_of_a_uniform_mixing_without_factors(self, way, pair, other_pair, base_folder, tmp_path) -> None:
        """The weights file holds the head and the fingerprint alone."""
        folders = []
        for number, adapters in enumerate((pair("bert"), other_pair("bert"))):
            base = AutoModelForSequenceClassification.from_pretrained(base_folder)
            fields = {"mixing": "uniform", "save_adapters": False}
            folders.append(saved(tmp_path / str(number), "bert", adapters, base, **fields))
        WAYS_IN[way](str(folders[1]), base_folder)
        with pytest.raises(ValueError, match=f"{OTHERS}: adapter 'first'"):
            WAYS_IN[way](str(with_config_of(*folders[::-1])), base_folder)

    def test_trained_weights_are_no_other_composition(self, pair, tmp_path) -> None:
        """Theta and head are in one file: beside either config a checkpoint is whole."""
        first = saved(tmp_path / "first", "mlp", pair("mlp"))
        model = tiny.compose("mlp", pair("mlp"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * parameter.requires_grad
        model.save_pretrained(str(tmp_path / "second"))
        loaded = PeftModel.from_pretrained(tiny.build("mlp"), str(with_config_of(tmp_path / "second", first)))
        torch.testing.assert_close(tiny.output(loaded, "mlp"), tiny.output(model.eval(), "mlp"), rtol=0, atol=0)

    @pytest.mark.parametrize(
        "weights", [[1 / 3, 1 / 3, 1 / 3], [0.1, 0.2, 0.7], [0.333, 0.333, 0.333], [3e-9, 0.5, 0.5]]
    )
    def test_weights_are_the_same_after_any_number_of_loads(self, weights, pair, tmp_path) -> None:
        folder = saved(tmp_path / "0", "mlp", [*pair("mlp"), str(_copied(pair("mlp")[0], tmp_path))], weights=weights)
        kept = json.loads((folder / CONFIG).read_text())["weights"]
        assert math.fsum(kept) == pytest.approx(1, abs=1e-15)
        for number in range(1, 4):
            model = PeftModel.from_pretrained(tiny.build("mlp"), str(folder))
            folder = tmp_path / str(number)
            model.save_pretrained(str(folder))
            assert json.loads((folder / CONFIG).read_text())["weights"] == kept

    def test_of_an_older_version_load_with_a_warning(self, pair, tmp_path) -> None:
        model = tiny.compose("mlp", pair("mlp"))
        model.save_pretrained(str(tmp_path))
        edit_weights(tmp_path, without_fingerprint)
        edit_config(tmp_path, lambda config: config.pop("layer_sizes"))
        with pytest.warns(UserWarning, match="has no fingerprint.*save it again"):
            loaded = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path))
        torch.testing.assert_close(tiny.output(loaded, "mlp"), tiny.output(model.eval(), "mlp"), rtol=0, atol=0)
        loaded.save_pretrained(str(tmp_path / "again"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path / "again"))

    def test_transformers_loads_them_and_reports_what_is_missing(self, pair, tmp_path) -> None:
        model = tiny.compose("bert", pair("bert"))
        model.save_pretrained(str(tmp_path))
        edit_weights(tmp_path, without_fingerprint)
        plain = tiny.build("bert")
        report = plain.load_adapter(str(tmp_path))
        key = "bert.encoder.layer.0.attention.self.key.composition_fingerprint.default._extra_state"
        assert report.missing_keys == {key}  # what it logs
        torch.testing.assert_close(tiny.output(plain, "bert"), tiny.output(model.eval(), "bert"), rtol=0, atol=0)


def _copied(adapter: str, folder: Path) -> Path:
    return Path(shutil.copytree(adapter, folder / "third"))


NAN = torch.tensor([float("nan"), 0.0])


class TestADamagedRecord:
    """Without a fingerprint, as in checkpoints of version 0.1, so that the record has to show it by itself."""

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("composed_modules", {"lin0": [2, 0], "lin1": [6]}, r"2 ranks for module 'lin1', got \[6\]"),
            (
                "composed_modules",
                {"lin0": [2, 0], "lin1": [2, -3]},
                "rank of adapter 'second' in module 'lin1'.*got -3",
            ),
            ("composed_modules", {"lin0": [2, 0], "lin1": [2, 3.0]}, r"'second' in module 'lin1'.*got 3\.0"),
            ("composed_modules", {"lin0": [True, 0], "lin1": [2, 3]}, "'first' in module 'lin0'.*got True"),
            (
                "composed_modules",
                {"lin0": [0, 0], "lin1": [2, 3]},
                r"must have a rank above 0 for module 'lin0'.*\[0, 0\]",
            ),
            ("composed_modules", {"lin0": "20", "lin1": [2, 3]}, "2 ranks for module 'lin0', got '20'"),
            ("composed_modules", {}, "composed_modules must be a dict"),
            ("composed_modules", [2, 3], "composed_modules must be a dict"),
            (
                "composed_modules",
                {"lin0": [2, 0], "lin1": [3, 3]},
                r"'lin1': the config has ranks \[3, 3\], but A .*\(5,",
            ),
            (
                "composed_modules",
                {"lin1": [2, 3]},
                "weights for module 'lin0', which is not in its adapter_config.json",
            ),
            ("biased_modules", ["lin2"], "biased_modules names a module .* 'lin2'"),
            ("biased_modules", 5, "biased_modules must name modules, got 5"),
            ("layer_sizes", {"lin1": [17, 20]}, r"'lin1' has the sizes \[16, 20\] .* in the model and \[17, 20\]"),
            ("layer_sizes", {"lin2": [16, 20]}, "layer_sizes names a module .* 'lin2'"),
            ("provenance", None, "provenance must have an entry for each of the 2 adapters, got None"),
            ("provenance", [], r"provenance must have an entry for each of the 2 adapters, got \[\]"),
            (
                "provenance",
                [5, 6],
                "provenance must have the entry for adapter 'first' at the adapter's position, got 5",
            ),
        ],
    )
    def test_is_refused_before_the_model_is_changed(self, field, value, message, pair, untouched, tmp_path) -> None:
        saved(tmp_path, "mlp", pair("mlp"))
        edit_weights(tmp_path, without_fingerprint)
        edit_config(tmp_path, lambda config: config.pop("layer_sizes"))
        edit_config(tmp_path, lambda config: config.update({field: value}))
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(untouched("mlp"), str(tmp_path))

    def test_a_rank_without_measure_is_refused_before_memory_is_taken(self, pair, untouched, tmp_path) -> None:
        saved(tmp_path, "mlp", pair("mlp"))
        config = PeftConfig.from_pretrained(str(tmp_path))
        config.composed_modules["lin1"][1] = 10**9
        rank = r"'second' has rank 1000000000 in module 'lin1'. Its sizes are \[16, 20\] .* above 1864135:"
        with pytest.raises(ValueError, match=rank):
            PeftModel.from_pretrained(untouched("mlp"), str(tmp_path), config=config)

    def test_swapped_ranks_are_shown_by_the_fingerprint(self, pair, untouched, tmp_path) -> None:
        saved(tmp_path, "mlp", pair("mlp"))
        edit_config(tmp_path, lambda config: config["composed_modules"].update(lin1=[3, 2]))
        swapped = r"'lin1' is composed with ranks \[3, 2\] in the config, composed with ranks \[2, 3\] beside"
        with pytest.raises(ValueError, match=f"{OTHERS}: module {swapped}"):
            PeftModel.from_pretrained(untouched("mlp"), str(tmp_path))

    @pytest.mark.parametrize("damage", [None, [], "entry", "hash"], ids=str)
    def test_the_hashes_are_not_done_without(self, damage, tmp_path, untouched) -> None:
        """Adapters that are fetched again are compared with their hashes, whatever the record lacks."""
        adapters = tiny.save_pair(tmp_path / "upstream", "mlp")
        folder = saved(tmp_path / "saved", "mlp", adapters, save_adapters=False)
        tensors = load_file(Path(adapters[1], WEIGHTS))
        save_file({key: tensor * 2 for key, tensor in tensors.items()}, Path(adapters[1], WEIGHTS))

        def edit(config: dict[str, Any]) -> None:
            if damage == "entry":
                config["provenance"][1] = None
            elif damage == "hash":
                config["provenance"][1]["sha256"] = None
            else:
                config["provenance"] = damage

        edit_config(folder, edit)
        with pytest.raises(ValueError, match="The record of the saved composition is damaged: provenance must have"):
            PeftModel.from_pretrained(untouched("mlp"), str(folder))

    @pytest.mark.parametrize("name", ["mlp", "conv", "embedding", "attention", "mixtral", "gpt_oss"])
    def test_sizes_fit_the_modules_they_came_from(self, name, pair, tmp_path) -> None:
        folder = saved(tmp_path, name, pair(name))
        recorded = json.loads((folder / CONFIG).read_text())["layer_sizes"]
        weights = {n.removesuffix(".weight"): p for n, p in tiny.build(name).named_parameters()}
        for module, sizes in recorded.items():
            assert math.prod(sizes) == weights[module].numel()

    def test_a_base_of_other_sizes_is_refused_untouched(self, pair, tmp_path) -> None:
        folder = saved(tmp_path, "mlp", pair("mlp"), modules_to_save=None)
        base = Untouched("mlp")
        base.model.lin1 = nn.Linear(20, 17)
        base.state = snapshot(base.model)
        with pytest.raises(ValueError, match=r"'lin1' has the sizes \[17, 20\] .* and \[16, 20\] in the saved comp"):
            PeftModel.from_pretrained(base.model, str(folder))
        base.check()

    def test_clearing_it_composes_anew(self, pair, tmp_path) -> None:
        config = PeftConfig.from_pretrained(str(saved(tmp_path, "mlp", pair("mlp"))))
        config = dataclasses.replace(config, composed_modules=None, provenance=None)
        assert isinstance(config, CompositionConfig)
        assert not config.is_restored


class TestDamagedWeights:
    @pytest.mark.parametrize("key", ["composition_factors.A", "composition_factors.B", "composition_mixing.weight"])
    def test_whole_numbers_are_no_factors(self, key, pair, untouched, tmp_path) -> None:
        saved(tmp_path, "mlp", pair("mlp"))
        key = f"base_model.model.lin1.{key}"
        edit_weights(tmp_path, lambda tensors: tensors.update({key: tensors[key].int()}))
        with pytest.raises(ValueError, match=r"module 'lin1': '\w+\.\w+' .* dtype (I32|torch\.int32)"):
            PeftModel.from_pretrained(untouched("mlp"), str(tmp_path))

    @pytest.mark.parametrize("way", ["from_pretrained", "load_adapter of transformers", "lora_from_checkpoint"])
    def test_weights_that_are_not_finite_are_refused(self, way, pair, tmp_path) -> None:
        saved(tmp_path, "bert", pair("bert"))
        key = "base_model.model.bert.encoder.layer.1.attention.self.query.composition_mixing.weight"
        edit_weights(tmp_path, lambda tensors: tensors.update({key: NAN}))
        query = r"module 'bert\.encoder\.layer\.1\.attention\.self\.query': .* not finite: \[nan, 0\.0\]"
        with pytest.raises(ValueError, match=query):
            WAYS_IN[way](str(tmp_path), "")

    def test_weights_of_another_number_of_adapters_are_refused(self, pair, untouched, tmp_path) -> None:
        saved(tmp_path, "mlp", pair("mlp"))
        key = "base_model.model.lin0.composition_mixing.weight"
        edit_weights(tmp_path, lambda tensors: tensors.update({key: torch.zeros(3)}))
        with pytest.raises(ValueError, match=r"module 'lin0': .* shape \(3,\), but the config has 2 adapters"):
            PeftModel.from_pretrained(untouched("mlp"), str(tmp_path))

    @pytest.mark.parametrize("damage", [torch.zeros(40, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)])
    def test_a_damaged_fingerprint_is_refused(self, damage, pair, untouched, tmp_path) -> None:
        saved(tmp_path, "mlp", pair("mlp"))
        key = "base_model.model.lin0.composition_fingerprint._extra_state"
        edit_weights(tmp_path, lambda tensors: tensors.update({key: damage}))
        with pytest.raises(ValueError, match=r"fingerprint in the weights file .* is damaged"):
            PeftModel.from_pretrained(untouched("mlp"), str(tmp_path))
