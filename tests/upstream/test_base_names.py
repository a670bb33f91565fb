"""Names of base models: copies of the same weights are let in with a warning, others only where users say so."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from typer.testing import CliRunner

from peft_composition import CompositionConfig
from peft_composition.analysis.inspection import inspect_adapters
from peft_composition.upstream.base_names import original
from peft_composition_cli import app

from .. import tiny
from ..reference import Reference
from .test_adapters import assert_products, compose, edit_config, ranks, refuse


LLAMA = "meta-llama/Meta-Llama-3.1-8B-Instruct"
# Repositories of the Hub.
COPIES = {
    LLAMA: [
        "meta-llama/Llama-3.1-8B-Instruct",
        "unsloth/Meta-Llama-3.1-8B-Instruct",
        "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit",
        "unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit",
        "unsloth/Llama-3.1-8B-Instruct-GGUF",
        "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4",
        "hugging-quants/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4",
        "hugging-quants/Meta-Llama-3.1-8B-Instruct-BNB-NF4",
        "neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8-dynamic",
        "neuralmagic/Meta-Llama-3.1-8B-Instruct-quantized.w8a8",
        "neuralmagic/Meta-Llama-3.1-8B-Instruct-quantized.w4a16",
        "amd/Llama-3.1-8B-Instruct-FP8-KV",
        "nvidia/Llama-3.1-8B-Instruct-NVFP4",
        "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
        "mlx-community/Meta-Llama-3.1-8B-Instruct-bf16",
        "turboderp/Llama-3.1-8B-Instruct-exl2",
        "someone/Meta-Llama-3.1-8B-Instruct-4.0bpw-h6-exl2",
    ],
    "Qwen/Qwen2.5-7B-Instruct": [
        "Qwen/Qwen2.5-7B-Instruct-AWQ",
        "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4",
        "Qwen/Qwen2.5-7B-Instruct-GGUF",
        "mlx-community/Qwen2.5-7B-Instruct-4bit-DWQ",
    ],
    "Qwen/Qwen3-8B": ["Qwen/Qwen3-8B-FP8", "Qwen/Qwen3-8B-MLX-4bit", "unsloth/Qwen3-8B-unsloth-bnb-4bit"],
    "meta-llama/Llama-2-7b-chat-hf": ["TheBloke/Llama-2-7B-Chat-GPTQ", "TheBloke/Llama-2-7B-Chat-AWQ"],
    "meta-llama/Llama-2-7b-hf": ["meta-llama/Llama-2-7b", "ISTA-DASLab/Llama-2-7b-AQLM-2Bit-1x16-hf"],
    "openai/gpt-oss-20b": ["unsloth/gpt-oss-20b-BF16", "mlx-community/gpt-oss-20b-MXFP4-Q8"],
    "tiiuae/falcon-7b": ["ybelkada/falcon-7b-sharded-bf16"],
}
OTHERS = {
    LLAMA: [
        "meta-llama/Meta-Llama-3.1-8B",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "meta-llama/Meta-Llama-3.1-70B-Instruct-bnb-4bit",
        "mlabonne/Meta-Llama-3.1-8B-Instruct-abliterated",
    ],
    "google/gemma-3-4b-it": ["google/gemma-3-4b-pt", "google/gemma-3-4b-it-qat-q4_0-unquantized"],
    "mistralai/Mistral-7B-v0.1": ["mistralai/Mistral-7B-v0.2", "mistralai/Mistral-7B-Instruct-v0.1"],
    "google/vit-base-patch16-224": ["google/vit-base-patch16-384", "google/vit-base-patch32-224"],
    "microsoft/phi-2": ["microsoft/phi-4"],
}


def pairs(names: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(name, other) for name, others in names.items() for other in others]


@pytest.mark.parametrize(("name", "copy"), pairs(COPIES), ids=lambda value: value.rpartition("/")[2])
def test_copies_of_a_model(name: str, copy: str) -> None:
    assert original(name) == original(copy)


@pytest.mark.parametrize(("name", "other"), pairs(OTHERS), ids=lambda value: value.rpartition("/")[2])
def test_other_models(name: str, other: str) -> None:
    assert original(name) != original(other)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("4bit", "4bit"), ("-4bit", "-4bit"), ("org/-bnb-4bit", "-bnb"), ("hf", "hf"), ("", ""), ("-" * 96, "-" * 96)],
)
def test_something_is_left_of_every_name(name: str, expected: str) -> None:
    assert original(name) == expected


def test_names_that_no_hub_takes_cost_nothing() -> None:
    name = "a" * 10_000_000 + "-4bit" * 100_000
    assert original(name) == name


@pytest.fixture
def trio(tmp_path: Path) -> list[Path]:
    """LoRAs trained on three copies of a model."""
    names = [LLAMA, "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit"]
    folders = [tiny.save_lora(tmp_path / f"{n}", tiny.build("mlp"), ["lin0", "lin1"], seed=n) for n in range(3)]
    return [edit_config(folder, base_model_name_or_path=name) for folder, name in zip(folders, names)]


@pytest.mark.parametrize(
    "used_on", [LLAMA, "unsloth/Llama-3.1-8B-Instruct-unsloth-bnb-4bit"], ids=["on the original", "on a copy"]
)
def test_copies_compose_with_one_warning_that_names_both(used_on: str, trio: list[Path]) -> None:
    base = tiny.build("mlp").double()
    base.name_or_path = used_on
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = compose(base, *trio)
    [text] = [str(warning.message) for warning in caught if "copies" in str(warning.message)]
    assert f"these models are copies of the base model {used_on!r}" in text
    assert "'unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit' ('1')" in text
    assert "'mlx-community/Meta-Llama-3.1-8B-Instruct-4bit' ('2')" in text
    assert (f"{LLAMA!r} ('0')" in text) == (used_on != LLAMA)
    assert_products(model, Reference(tiny.build("mlp").double(), trio))


def test_the_same_name_is_no_warning(trio: list[Path], recwarn: pytest.WarningsRecorder) -> None:
    base = tiny.build("mlp")
    base.name_or_path = "someone/meta-llama-3.1-8B-Instruct"
    recwarn.clear()
    compose(base, trio[0])
    assert not [warning for warning in recwarn if "copies" in str(warning.message)]


def test_what_the_error_advises_lets_another_name_in(trio: list[Path], tmp_path: Path) -> None:
    edit_config(trio[1], base_model_name_or_path="someone/my-llama")
    base = tiny.build("mlp").double()
    base.name_or_path = LLAMA
    advice = "pass CompositionConfig(check_base_model=False). Modules"
    refuse(base, *trio[:2], message=f"it was trained on 'someone/my-llama', but the model is {LLAMA!r}.")
    refuse(base, *trio[:2], message=advice)

    model = compose(base, *trio, check_base_model=False, save_adapters=False)
    assert_products(model, Reference(tiny.build("mlp").double(), trio))

    # The checkpoint fetches its adapters again, under the same names.
    model.save_pretrained(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["check_base_model"] is False
    assert PeftConfig.from_pretrained(str(tmp_path / "saved")).check_base_model is False
    again = tiny.build("mlp").double()
    again.name_or_path = LLAMA
    assert_products(
        PeftModel.from_pretrained(again, str(tmp_path / "saved")), Reference(tiny.build("mlp").double(), trio)
    )


def test_shapes_are_compared_whatever_the_names(trio: list[Path]) -> None:
    other = torch.nn.ModuleDict({"lin0": torch.nn.Linear(12, 20), "lin1": torch.nn.Linear(20, 16)})
    message = "module 'lin0': tensor lora_A.weight has shape (4, 10), but Linear in the model needs (4, 12)"
    refuse(other, trio[0], message=message, check_base_model=False)


def test_a_checkpoint_of_before_has_the_check(trio: list[Path], tmp_path: Path) -> None:
    compose(tiny.build("mlp"), trio[0]).save_pretrained(str(tmp_path / "saved"))
    file = tmp_path / "saved" / "adapter_config.json"
    fields = json.loads(file.read_text())
    assert fields.pop("check_base_model") is True
    file.write_text(json.dumps(fields))
    loaded = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path / "saved"))
    assert loaded.peft_config["default"].check_base_model is True
    assert list(ranks(loaded)) == ["lin0", "lin1"]


@pytest.mark.parametrize("field", ["check_base_model", "save_adapters"])
@pytest.mark.parametrize("value", ["no", 0, None])
def test_a_switch_that_is_none(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be True or False, got {value!r}"):
        CompositionConfig(adapters=["a"], **{field: value})


@pytest.mark.parametrize("name", [None, "./models/mine"], ids=["no name", "a folder"])
def test_a_base_without_a_name_and_adapters_of_two_models(name: str | None, trio: list[Path], tmp_path: Path) -> None:
    other = tiny.save_lora(tmp_path / "other", tiny.build("mlp"), ["lin0"])
    edit_config(other, base_model_name_or_path="someone/my-llama")
    base = tiny.build("mlp")
    base.name_or_path = name
    message = r"different base models: 'llama-3.1-8b' \('0', '1'\); 'my-llama' \('other'\)"
    with pytest.warns(UserWarning, match=message.replace("llama-3.1-8b", original(LLAMA))):
        get_peft_model(base, CompositionConfig(adapters=[*trio[:2], other]))
    for fields in ({"adapters": trio}, {"adapters": [trio[0], other], "check_base_model": False}):
        base = tiny.build("mlp")
        base.name_or_path = name
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*different base models")
            get_peft_model(base, CompositionConfig(**fields))


# Inspecting


def test_inspection_notes_copies_and_refuses_others(trio: list[Path], tmp_path: Path) -> None:
    """Without a model, the name that most adapters share counts."""
    other = tiny.save_lora(tmp_path / "other", tiny.build("mlp"), ["lin0"])
    edit_config(other, base_model_name_or_path="someone/my-llama")
    references = CompositionConfig(adapters=[*trio, other]).references
    reports = inspect_adapters(references)
    assert [report.is_composable for report in reports] == [True, True, True, False]
    assert [len(report.notes) for report in reports] == [0, 1, 1, 0]
    assert "these models are copies of the base model" in reports[1].notes[0]
    assert "--no-check-base" in str(reports[3].reason)
    assert all(report.is_composable for report in inspect_adapters(references, check_base_model=False))

    base = tiny.build("mlp")
    base.name_or_path = LLAMA
    reports = inspect_adapters(references, base)
    assert [report.is_composable for report in reports] == [True, True, True, False]
    assert [len(report.notes) for report in reports] == [0, 1, 1, 0]
    assert all(report.is_composable for report in inspect_adapters(references, base, check_base_model=False))


def test_the_command_line_leaves_names_aside_where_asked(tmp_path: Path) -> None:
    base = tiny.build("bert")
    base.save_pretrained(tmp_path / "org" / "base")
    folder = tiny.save_lora(tmp_path / "mine", base, ["query"], task_type="SEQ_CLS")
    for name in ("one", "two"):
        other = tmp_path / name
        other.mkdir()
        for file in folder.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
    edit_config(folder, base_model_name_or_path="someone/my-bert")
    edit_config(tmp_path / "one", base_model_name_or_path="org/bert")
    edit_config(tmp_path / "two", base_model_name_or_path="org/bert")
    adapters = [str(tmp_path / name) for name in ("one", "two", "mine")]
    run = CliRunner().invoke
    assert run(app, ["inspect", "--json", *adapters]).exit_code == 1
    assert run(app, ["inspect", "--json", "--no-check-base", *adapters]).exit_code == 0

    out = tmp_path / "out"
    command = ["compose", "--base", str(tmp_path / "org" / "base"), "--adapters", *adapters, "--out", str(out)]
    result = run(app, [*command, "--no-lora", "--no-check-base"])
    assert result.exit_code == 0, result.output
    assert json.loads((out / "adapter_config.json").read_text())["check_base_model"] is False
