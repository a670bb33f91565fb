"""The names of a head's classes: recorded when they are known, sealed with the weights, and given back on loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from peft_composition import CompositionConfig
from peft_composition.tuner.class_names import stated_names

from .. import tiny


NAMES = ["rain", "calm", "hail"]  # not in the order of the alphabet


def base(names: list[str] | None = None) -> BertForSequenceClassification:
    """A classifier for three classes."""
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    model = BertForSequenceClassification(config)
    if names is not None:
        model.config.id2label = dict(enumerate(names))
    return model


@pytest.fixture
def adapters(tmp_path: Path) -> list[str]:
    return [str(tiny.save_lora(tmp_path / name, base(), ["query"], seed=len(name))) for name in ("a", "bb")]


def composed(model: nn.Module, adapters: list[str], task_type: str | None = "SEQ_CLS") -> PeftModel:
    return get_peft_model(model, CompositionConfig(adapters=adapters, task_type=task_type))


def recorded(folder: Path) -> list[str] | None:
    return json.loads((folder / "adapter_config.json").read_text())["class_names"]


def test_names_that_are_known_at_saving_come_back(tmp_path: Path, adapters: list[str]) -> None:
    model = composed(base(), adapters)
    model.save_pretrained(tmp_path / "unknown")
    assert recorded(tmp_path / "unknown") is None  # LABEL_0 and the like are no names
    model.base_model.model.config.id2label = dict(enumerate(NAMES))  # set after the composition was built
    model.save_pretrained(tmp_path / "known")
    assert recorded(tmp_path / "known") == NAMES

    plain = base()
    again = PeftModel.from_pretrained(plain, tmp_path / "known")
    assert plain.config.id2label == {0: "rain", 1: "calm", 2: "hail"}
    assert plain.config.label2id == {"rain": 0, "calm": 1, "hail": 2}
    again.save_pretrained(tmp_path / "again")
    assert recorded(tmp_path / "again") == NAMES

    # A base that was trained to tell the same classes in another order: the head is the composition's.
    other = base(sorted(NAMES))
    PeftModel.from_pretrained(other, tmp_path / "known")
    assert other.config.id2label == {0: "rain", 1: "calm", 2: "hail"}
    named = base(NAMES)
    PeftModel.from_pretrained(named, tmp_path / "unknown")
    assert stated_names(named) == NAMES


def test_beside_other_adapters_names_stay(tmp_path: Path, adapters: list[str]) -> None:
    composed(base(NAMES), adapters).save_pretrained(tmp_path / "first")
    composed(base(sorted(NAMES)), adapters).save_pretrained(tmp_path / "second")
    own = base()
    model = PeftModel.from_pretrained(own, tmp_path / "first")
    model.load_adapter(tmp_path / "second", "second")
    assert stated_names(own) == NAMES
    model.save_pretrained(tmp_path / "both")
    assert recorded(tmp_path / "both") == NAMES
    assert recorded(tmp_path / "both" / "second") == sorted(NAMES)  # the order of its own head
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "left")
    assert recorded(tmp_path / "left" / "second") == sorted(NAMES)
    own.config.id2label = {0: "x", 1: "y", 2: "z"}  # the user's word
    model.save_pretrained(tmp_path / "left")
    assert recorded(tmp_path / "left" / "second") == ["x", "y", "z"]


def test_names_follow_the_head_that_runs(tmp_path: Path, adapters: list[str]) -> None:
    trained = composed(base(NAMES), adapters)
    with torch.no_grad():
        trained.base_model.model.classifier.modules_to_save["default"].weight.fill_(7)
    trained.save_pretrained(tmp_path / "first")
    composed(base(sorted(NAMES)), adapters).save_pretrained(tmp_path / "second")
    own = base(["x", "y", "z"])
    own.config.label2id = {"x": 0, "y": 1, "z": 2, "Z": 2}  # all of it comes back
    before = dict(own.config.id2label), dict(own.config.label2id)

    def is_as_before() -> bool:
        return (own.config.id2label, own.config.label2id) == before

    model = PeftModel.from_pretrained(own, tmp_path / "first")
    assert stated_names(own) == NAMES
    with model.disable_adapter():
        assert is_as_before()
    assert stated_names(own) == NAMES
    model.load_adapter(tmp_path / "second", "second")
    for active, names in (("second", sorted(NAMES)), ("default", NAMES), ("second", sorted(NAMES))):
        model.set_adapter(active)
        assert stated_names(own) == names
        assert own.config.label2id == {name: place for place, name in enumerate(names)}
    model.save_pretrained(tmp_path / "both")
    assert [recorded(tmp_path / "both" / part) for part in ("", "second")] == [NAMES, sorted(NAMES)]
    model.delete_adapter("second")
    assert stated_names(own) == NAMES  # the other one is active now
    model.delete_adapter("default")
    assert is_as_before()

    unloaded = PeftModel.from_pretrained(base(), tmp_path / "first").unload()
    assert bool((unloaded.classifier.weight == 7).all())  # PEFT leaves the trained head in the model
    assert stated_names(unloaded) == NAMES


def test_names_that_the_user_gives_to_a_loaded_composition_stay(tmp_path: Path, adapters: list[str]) -> None:
    composed(base(NAMES), adapters).save_pretrained(tmp_path / "first")
    own = base()
    model = PeftModel.from_pretrained(own, tmp_path / "first")
    own.config.id2label = {0: "x", 1: "y", 2: "z"}
    with model.disable_adapter():
        assert stated_names(own) == ["x", "y", "z"]
    model.set_adapter("default")
    assert stated_names(own) == ["x", "y", "z"]
    model.save_pretrained(tmp_path / "again")
    assert recorded(tmp_path / "again") == ["x", "y", "z"]
    model.delete_adapter("default")
    assert stated_names(own) == ["x", "y", "z"]


@pytest.mark.parametrize("saved", [None, NAMES])
@pytest.mark.parametrize("here", [None, NAMES])
@pytest.mark.parametrize("are_set_before", [True, False])
def test_a_training_goes_on_whoever_knows_the_names(
    tmp_path: Path, adapters: list[str], saved: list[str] | None, here: list[str] | None, are_set_before: bool
) -> None:
    first = composed(base(saved), adapters)
    first.save_pretrained(tmp_path / "checkpoint")
    own = base(here if are_set_before else None)
    model = composed(own, adapters)
    if here and not are_set_before:
        own.config.id2label = dict(enumerate(here))
    model.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)  # as the Trainer does
    head = {key: value for key, value in first.state_dict().items() if "classifier.modules_to_save" in key}
    assert len(head) == 2
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in head.items())
    model.save_pretrained(tmp_path / "next")
    assert recorded(tmp_path / "next") == here


def test_weights_of_a_head_with_another_order_are_refused(tmp_path: Path, adapters: list[str]) -> None:
    composed(base(NAMES), adapters).save_pretrained(tmp_path / "checkpoint")
    model = composed(base(sorted(NAMES)), adapters)
    with pytest.raises(ValueError, match="do not belong together: 'class_names' is"):
        model.load_adapter(tmp_path / "checkpoint", "default")


def test_auto_peft(tmp_path: Path, adapters: list[str]) -> None:
    base().save_pretrained(tmp_path / "base")
    own = BertForSequenceClassification.from_pretrained(tmp_path / "base", id2label=dict(enumerate(NAMES)))
    composed(own, adapters).save_pretrained(tmp_path / "mix")
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "mix")
    assert stated_names(model.get_base_model()) == NAMES


def test_without_a_head_of_its_own_the_bases_names_stay(tmp_path: Path, adapters: list[str]) -> None:
    model = composed(base(NAMES), adapters, task_type=None)
    model.save_pretrained(tmp_path / "mix")
    assert recorded(tmp_path / "mix") == NAMES
    other = base(sorted(NAMES))
    again = PeftModel.from_pretrained(other, tmp_path / "mix")
    assert stated_names(other) == sorted(NAMES)
    again.save_pretrained(tmp_path / "again")
    assert recorded(tmp_path / "again") == sorted(NAMES)


def test_a_config_for_another_model_does_not_keep_them(adapters: list[str]) -> None:
    config = composed(base(NAMES), adapters).peft_config["default"]
    assert isinstance(config, CompositionConfig)
    assert config.class_names == NAMES
    config.composed_modules = None
    assert get_peft_model(base(), config).peft_config["default"].class_names is None


def test_names_belong_to_the_weights(tmp_path: Path, adapters: list[str]) -> None:
    composed(base(NAMES), adapters).save_pretrained(tmp_path / "mix")
    path = tmp_path / "mix" / "adapter_config.json"
    fields = json.loads(path.read_text())
    for wrong, message in (
        (sorted(NAMES), "do not belong together: 'class_names' is"),
        (None, "do not belong together: 'class_names' is null in the config"),
        (NAMES[:2], "class_names must be 3 different names, as many as num_labels"),
        ([*NAMES[:2], "rain"], "class_names must be 3 different names"),
        ("rain", "class_names must be a list of names, got 'rain'"),
    ):
        path.write_text(json.dumps({**fields, "class_names": wrong}))
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base(), tmp_path / "mix")


def test_checkpoints_of_older_versions_load(tmp_path: Path, adapters: list[str]) -> None:
    composed(base(), adapters).save_pretrained(tmp_path / "mix")
    path = tmp_path / "mix" / "adapter_config.json"
    fields = json.loads(path.read_text())
    del fields["class_names"]
    path.write_text(json.dumps(fields))
    PeftModel.from_pretrained(base(NAMES), tmp_path / "mix").save_pretrained(tmp_path / "new")
    assert recorded(tmp_path / "new") == NAMES


@pytest.mark.parametrize(
    ("id2label", "expected"),
    [
        ({0: "a", 1: "b", 2: "c"}, ["a", "b", "c"]),
        ({2: "c", 0: "a", 1: "b"}, ["a", "b", "c"]),
        ({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, None),
        ({0: "a", 1: "a", 2: "c"}, None),
    ],
)
def test_names_in_a_models_config(id2label: dict[int, str], expected: list[str] | None) -> None:
    model = base()
    model.config.id2label = id2label
    assert stated_names(model) == expected
    assert stated_names(nn.Linear(2, 2)) is None
