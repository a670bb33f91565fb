"""A composition on disk: whatever opens it says the same of a folder that holds none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from peft_composition import CompositionConfig
from peft_composition.checkpoint import add_to_checkpoint, lora_from_checkpoint, saved_mixing_weights, write_model_card
from peft_composition.checkpoint.saved import SavedComposition
from peft_composition_cli import app

from .. import tiny


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _message_of(call: Callable[[Path], Any], folder: Path, expected: str) -> str:
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$") as caught:
        call(folder)
    return str(caught.value)


def _message_of_command(name: str, folder: Path) -> str:
    out = [] if name == "weights" else ["--out", str(folder.parent / "out")]
    result = CliRunner().invoke(app, [name, str(folder), *out])
    assert result.exit_code == 1, result.output
    return result.stderr.strip().removeprefix("Error: ")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("empty", f"it has no {CONFIG} of an adapter"),
        ("lora", "it is a plain LoRA"),
        ("config", f"it has no {CONFIG} of an adapter"),
        ("weights", f"its weights are missing, it has neither {WEIGHTS} nor adapter_model.bin"),
        ("json", f"it has no {CONFIG} of an adapter"),
    ],
)
def test_one_text_whoever_opens_it(fault: str, reason: str, pair: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mix"
    folder.mkdir()
    if fault == "lora":
        tiny.save_lora(folder, tiny.build("mlp"), ["lin0"])
    elif fault != "empty":
        tiny.compose("mlp", pair("mlp")).save_pretrained(str(folder))
    if fault in ("config", "weights"):
        (folder / {"config": CONFIG, "weights": WEIGHTS}[fault]).unlink()
    if fault == "json":
        (folder / CONFIG).write_text((folder / CONFIG).read_text()[:-5])
    expected = f"{folder} is not a saved composition: {reason}."
    calls = (SavedComposition.opened, saved_mixing_weights, lora_from_checkpoint, add_to_checkpoint, write_model_card)
    assert {call.__name__: _message_of(call, folder, expected) for call in calls} == {
        call.__name__: expected for call in calls
    }
    assert {_message_of_command(name, folder) for name in ("weights", "export", "merge")} == {expected}


def test_a_card_is_written_from_a_config_that_is_parsed_once(pair: Any, tmp_path: Path) -> None:
    model = tiny.compose("mlp", pair("mlp"))
    parsed: list[Path] = []
    CompositionConfig.when_loaded += (lambda folder, config: parsed.append(folder),)
    try:
        model.save_pretrained(str(tmp_path))
    finally:
        CompositionConfig.when_loaded = CompositionConfig.when_loaded[:-1]
    assert parsed == [tmp_path]


def test_it_reads_what_was_saved(pair: Any, tmp_path: Path) -> None:
    tiny.compose("mlp", pair("mlp")).save_pretrained(str(tmp_path / "named"))
    saved = SavedComposition.opened(tmp_path, "named")
    assert saved.folder == tmp_path / "named"
    fields = json.loads((saved.folder / CONFIG).read_text())
    assert saved.ranks == fields["composed_modules"]
    assert saved.mixing_weights() == {module: [0.5, 0.5] for module in fields["composed_modules"]}
    for module, ranks in saved.ranks.items():
        assert saved.read(module, "factors.A").shape[0] == sum(ranks)
    with pytest.raises(ValueError, match=r"'base_model\.model\.lin0\.composition_factors\.C' is missing"):
        saved.read("lin0", "factors.C")
