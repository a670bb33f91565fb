"""A plain Hugging Face `Trainer` on a composition: evaluation, best model, checkpoints, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_composition import CompositionConfig

from . import tiny


class Sentences(Dataset):
    """Token sequences whose label tells whether a certain token comes often: learnable by a tiny BERT."""

    def __init__(self, count: int, seed: int, flipped: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, 60, (count, 12), generator=generator)
        self.labels = ((self.tokens < 20).float().mean(dim=1).gt(1 / 3) ^ flipped).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


class StopAt(TrainerCallback):
    """Ends training after a step, as a cut-off session would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            control.should_training_stop = True


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    base = tiny.build("bert")
    return [tiny.save_lora(tmp_path / f"upstream{n}", base, ["query", "value"], seed=n, r=n + 1) for n in range(3)]


def compose(adapters: list[Path], **fields: Any) -> nn.Module:
    return get_peft_model(
        tiny.build("bert"), CompositionConfig(adapters=list(adapters), task_type="SEQ_CLS", **fields)
    )


def trainer(model: nn.Module, folder: Path, callbacks: list[TrainerCallback] | None = None, **more: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "learning_rate": 5e-4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "logging_steps": 1,
        "load_best_model_at_end": True,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **more}),
        train_dataset=Sentences(64, seed=0),
        eval_dataset=Sentences(32, seed=1),
        callbacks=callbacks,
    )


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("sharing", ["module", "block", "model"])
def test_resumed_training_ends_where_an_uninterrupted_one_does(
    adapters: list[Path], tmp_path: Path, sharing: str
) -> None:
    whole = compose(adapters, weight_sharing=sharing)
    trainer(whole, tmp_path / "whole", load_best_model_at_end=False).train()

    trainer(
        compose(adapters, weight_sharing=sharing), tmp_path / "cut", [StopAt(6)], load_best_model_at_end=False
    ).train()
    assert (tmp_path / "cut" / "checkpoint-4").is_dir()
    resumed = compose(adapters, weight_sharing=sharing)
    checkpoint = str(tmp_path / "cut" / "checkpoint-4")
    trainer(resumed, tmp_path / "cut", load_best_model_at_end=False).train(resume_from_checkpoint=checkpoint)

    expected = trained_state(whole)
    assert any("composition_mixing" in name and weight.abs().max() > 0 for name, weight in expected.items())
    actual = trained_state(resumed)
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


def test_best_checkpoint_is_loaded_at_the_end(adapters: list[Path], tmp_path: Path) -> None:
    """Judged by flipped labels every step makes it worse: an early checkpoint must come back, bit for bit."""
    model = compose(adapters)
    run = trainer(model, tmp_path / "run", learning_rate=0.02, max_steps=24)
    run.eval_dataset = Sentences(64, seed=0, flipped=True)
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert best < max(losses)
    assert run.state.best_model_checkpoint == str(tmp_path / "run" / f"checkpoint-{best}")
    reloaded = PeftModel.from_pretrained(tiny.build("bert"), run.state.best_model_checkpoint)
    assert torch.equal(tiny.output(model.eval(), "bert"), tiny.output(reloaded.eval(), "bert"))
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_only_the_mixing_weights_and_the_head_train(adapters: list[Path], tmp_path: Path) -> None:
    model = compose(adapters)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(model, tmp_path / "run", load_best_model_at_end=False)
    run.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".composition_mixing." in name or ".modules_to_save." in name for name in changed), changed
    assert sum(".composition_mixing." in name for name in changed) == 4  # query and value in two layers


def test_saved_model_of_the_trainer_stands_alone(adapters: list[Path], tmp_path: Path) -> None:
    model = compose(adapters)
    run = trainer(model, tmp_path / "run", load_best_model_at_end=False)
    run.train()
    run.save_model(str(tmp_path / "final"))
    for folder in adapters:
        folder.rename(folder.with_name(f"gone-{folder.name}"))
    reloaded = PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path / "final"))
    assert torch.equal(tiny.output(model.eval(), "bert"), tiny.output(reloaded.eval(), "bert"))
