"""What a saved or pushed composition tells of the machine it was made on: names and hashes, no folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification

from peft_composition.checkpoint.export import to_lora
from peft_composition.public import publish, without_local_paths

from .. import tiny


CONFIG = "adapter_config.json"


def written(folder: Path) -> str:
    """All text and all bytes that lie in a folder."""
    return "".join(path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["mlp", "bert", "mixtral"])
def test_no_file_of_a_checkpoint_names_a_folder_of_this_machine(name, tmp_path) -> None:
    adapters = tiny.save_pair(tmp_path / "upstream", name)
    model = tiny.compose(name, adapters)
    model.save_pretrained(str(tmp_path / "saved"))
    assert str(tmp_path) not in written(tmp_path / "saved")
    fields = json.loads((tmp_path / "saved" / CONFIG).read_text())
    assert [entry["path"] for entry in fields["adapters"]] == ["./first", "./second"]
    assert [entry["name"] for entry in fields["adapters"]] == ["first", "second"]
    assert [entry["path"] for entry in fields["provenance"]] == ["./first", "./second"]

    loaded = PeftModel.from_pretrained(tiny.build(name), str(tmp_path / "saved"))
    assert tiny.output(loaded, name).equal(tiny.output(model.eval(), name))
    assert loaded.base_model.mixing_weights() == model.base_model.mixing_weights()
    assert model.peft_config["default"].references[0]["path"] == adapters[0]  # the model itself still knows


def test_what_was_loaded_is_saved_again_as_it_was(pair, tmp_path) -> None:
    tiny.compose("mlp", pair("mlp")).save_pretrained(str(tmp_path / "first"))
    PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path / "first")).save_pretrained(str(tmp_path / "second"))
    first, second = (json.loads((tmp_path / folder / CONFIG).read_text()) for folder in ("first", "second"))
    for fields in (first, second):
        fields["modules_to_save"] = sorted(set(fields["modules_to_save"]))  # PEFT appends on every load
    assert first == second


def test_without_the_factors_it_still_finds_its_adapters(pair, tmp_path) -> None:
    tiny.compose("mlp", pair("mlp"), save_adapters=False).save_pretrained(str(tmp_path))
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert [entry["path"] for entry in fields["adapters"]] == pair("mlp")
    PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path))


@pytest.mark.parametrize(
    ("path", "saved"),
    [
        ("/home/someone/loras/first", "./first"),
        ("/home/someone/loras/first/", "./first"),
        ("~/loras/first", "./first"),
        ("C:\\Users\\someone\\loras\\first", "./first"),
        ("\\\\server\\share\\loras\\first", "./first"),
        ("loras/first", "loras/first"),
        ("./first", "./first"),
        ("../loras/first", "../loras/first"),
        ("me/first", "me/first"),
        (None, None),
    ],
)
def test_every_kind_of_path(path, saved) -> None:
    entry = {"name": "one", "path": path or "me/first", "base_model_name_or_path": path}
    fields = {
        "adapters": [{"path": path or "me/first", "name": "one"}],
        "provenance": [entry],
        "composed_modules": {"lin": [1]},
        "save_adapters": True,
    }
    public = without_local_paths(fields)
    assert public["adapters"] == [{"path": saved or "me/first", "name": "one"}]
    assert public["provenance"] == [{"name": "one", "path": saved or "me/first", "base_model_name_or_path": saved}]
    assert fields["provenance"] == [entry]
    assert without_local_paths({**fields, "composed_modules": None})["adapters"] == fields["adapters"]


class TestPublish:
    @pytest.mark.parametrize("stated", ["org/base", None, "/mnt/base"])
    def test_a_base_in_a_folder_is_not_named(self, stated, tmp_path) -> None:
        tiny.build("bert").save_pretrained(str(tmp_path / "base"))
        adapters = tiny.save_pair(tmp_path / "upstream", "bert")
        for adapter in adapters:
            fields = json.loads(Path(adapter, CONFIG).read_text())
            Path(adapter, CONFIG).write_text(json.dumps({**fields, "base_model_name_or_path": stated}))
        base = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "base"))
        model = tiny.compose("bert", adapters, base)
        model.save_pretrained(str(tmp_path / "saved"))
        assert PeftConfig.from_pretrained(str(tmp_path / "saved")).base_model_name_or_path == str(tmp_path / "base")
        to_lora(model).save_pretrained(tmp_path / "saved" / "lora")
        publish(tmp_path / "saved")
        for folder in ("saved", "saved/lora"):
            assert PeftConfig.from_pretrained(str(tmp_path / folder)).base_model_name_or_path is None
            text = (tmp_path / folder / CONFIG).read_text()
            assert str(tmp_path) not in text
            assert "/mnt" not in text
            loaded = PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path / folder))
            assert tiny.output(loaded, "bert").sub(tiny.output(model.eval(), "bert")).abs().max() < 1e-5

    def test_a_base_on_the_hub_stays(self, pair, tmp_path) -> None:
        tiny.compose("mlp", pair("mlp")).save_pretrained(str(tmp_path))
        fields = json.loads((tmp_path / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps({**fields, "base_model_name_or_path": "org/base"}))
        before = (tmp_path / CONFIG).read_bytes()
        publish(tmp_path)
        assert (tmp_path / CONFIG).read_bytes() == before
