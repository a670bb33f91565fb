"""The code of the README runs as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer

from . import tiny
from .test_trainer import Sentences


README = Path(__file__).parents[1] / "README.md"


def block_under(heading: str) -> str:
    """The first block of Python below a heading."""
    text = README.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    found = re.search(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert found is not None, heading
    return found[1]


@pytest.mark.filterwarnings("error:Training ended")
def test_the_helpers_for_the_trainer(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the data set filled in, and fewer epochs of the same proportion."""
    monkeypatch.chdir(tmp_path)
    code = block_under("### Train with the Trainer")
    for printed, filled_in in (
        ("train_dataset=...", "train_dataset=train_dataset"),
        ("num_train_epochs=100", "num_train_epochs=4, use_cpu=True, disable_tqdm=True"),
        ("epochs=50)", "epochs=2)"),
    ):
        assert code.count(printed) == 1
        code = code.replace(printed, filled_in)
    model = tiny.compose("bert", pair("bert"))
    names: dict[str, Any] = {
        "model": model,
        "Trainer": Trainer,  # imported by the block before
        "TrainingArguments": transformers.TrainingArguments,
        "train_dataset": Sentences(32, seed=0),
    }
    exec(code, names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 16
    logs = [entry for entry in trainer.state.log_history if "mixing_max_change" in entry]
    assert logs
    moved = [parameter for name, parameter in model.named_parameters() if ".composition_mixing." in name]
    assert all(torch.any(parameter != 0) for parameter in moved)
