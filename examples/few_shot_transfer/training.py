"""Fitting and predicting with the Hugging Face Trainer, which all three phases share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

from peft_composition.training import last_complete_checkpoint

from .models import HEAD, Collate
from .plan import Plan
from .scenario import DownstreamSpec


EVALUATION_BATCH = 64
LOADERS, MANY_IMAGES = 8, 1000  # processes that decode images for a GPU, where there are enough to start them for


class GroupedTrainer(Trainer):
    """A Trainer whose head has a learning rate of its own."""

    def __init__(self, *args: Any, head_learning_rate: float | None = None, **kwargs: Any) -> None:
        self.head_learning_rate = head_learning_rate
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Called by the Trainer."""
        if self.head_learning_rate is None:
            return super().create_optimizer(model)
        trained = self.model if model is None else model
        assert trained is not None
        head = {id(parameter) for parameter in active_head(trained).parameters()}
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "lr": self.head_learning_rate}]
        for parameter in trained.parameters():
            if parameter.requires_grad:
                groups[id(parameter) in head]["params"].append(parameter)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer


class HeadOnFeatures(nn.Module):
    """A head alone, for features that were computed before."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits (batch, classes) from features (batch, width)."""
        logits = self.head(features)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Body(nn.Module):
    """A model up to its head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """What the head would be given, (batch, width)."""
        seen: list[Tensor] = []
        head = wrapped_head(self.model)
        assert head is not None
        hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            self.model(**{name: value for name, value in inputs.items() if name != "labels"})
        finally:
            hook.remove()
        return {"logits": seen[0]}


class Rows(torch.utils.data.Dataset):
    """Features and labels as the Trainer takes them."""

    def __init__(self, features: np.ndarray, labels: Sequence[int]) -> None:
        self.features, self.labels = torch.from_numpy(features), list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"features": self.features[index], "labels": self.labels[index]}


def wrapped_head(model: nn.Module) -> nn.Module | None:
    """The classifier's place in the model, also where PEFT keeps a copy of it for its adapter; None without one."""
    return next((module for name, module in model.named_modules() if name.split(".")[-1] == HEAD), None)


def active_head(model: nn.Module) -> nn.Module:
    """The linear layer that classifies."""
    head = wrapped_head(model)
    assert head is not None
    return head.modules_to_save[head.active_adapters[0]] if isinstance(head, ModulesToSaveWrapper) else head


def trainable_outside_head(model: nn.Module) -> int:
    """The number of trainable parameters besides the head's, as the paper counts them."""
    has_head = wrapped_head(model) is not None
    head = {id(parameter) for parameter in active_head(model).parameters()} if has_head else set()
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in head)


def fit(
    model: nn.Module, data: Any, plan: Plan, folder: Path, collate: Collate | None = None, progress: bool = False
) -> None:
    """Trains; where the folder holds a checkpoint of the same training, goes on from there.

    Args:
        model: trained in place.
        data: encoded rows.
        plan: how long and how fast.
        folder: for checkpoints.
        collate: makes batches; default: the Trainer's.
        progress: whether to show the Trainer's progress bar.

    Raises:
        ValueError: if the batch size is not a multiple of the number of processes.
    """
    processes = PartialState().num_processes
    if plan.batch_size % processes:
        raise ValueError(f"batch size {plan.batch_size} cannot be shared by {processes} processes")
    saving: dict[str, Any] = {"save_strategy": "no"}
    if plan.checkpoint_steps is not None:
        saving = {"save_strategy": "steps", "save_steps": plan.checkpoint_steps, "save_total_limit": 2}
    trainer = _trainer(
        model,
        folder,
        collate,
        loaders(data, torch.cuda.is_available()),
        train_dataset=data,
        head_learning_rate=plan.head_learning_rate,
        per_device_train_batch_size=plan.batch_size // processes,
        max_steps=plan.steps(len(data)),
        learning_rate=plan.learning_rate,
        weight_decay=0.0,
        seed=plan.seed,
        disable_tqdm=not progress,
        **saving,
    )
    trainer.train(resume_from_checkpoint=None if plan.checkpoint_steps is None else last_complete_checkpoint(folder))


def fit_head(head: nn.Module, features: np.ndarray, labels: Sequence[int], plan: Plan, folder: Path) -> None:
    """Trains a head on features that were computed before: the same as in the model, where the body is frozen."""
    fit(HeadOnFeatures(head), Rows(features, labels), plan, folder)


def fit_features(features: Tensor, labels: Tensor, classes: int, how: DownstreamSpec, seed: int) -> nn.Linear:
    """A fresh head, warmed up on features as `fit_head` does it by the scenario's plan, but in less time.

    Args:
        features: shape (n, width).
        labels: shape (n,).
        classes: how many there are.
        how: gives `warmup_epochs`, `warmup_learning_rate` and `batch_size`.
        seed: of the head, and of the order of the examples.
    """
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(features.shape[1], classes)
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    steps = Plan(how.warmup_learning_rate, how.warmup_epochs, how.batch_size).steps(len(labels))
    optimizer = torch.optim.AdamW(head.parameters(), lr=how.warmup_learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(how.warmup_epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(how.batch_size):
            loss = nn.functional.cross_entropy(head(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)  # as the Trainer does by default
            optimizer.step()
            schedule.step()
    return head


def predict(model: nn.Module, data: Any, folder: Path, collate: Collate | None = None) -> np.ndarray:
    """The model's logits, (n, classes); for a `Body`, the features."""
    batch: Collate = collate or default_data_collator

    def without_labels(rows: list[Any]) -> dict[str, Any]:
        return batch([{name: value for name, value in row.items() if name != "labels"} for row in rows])

    workers = loaders(data, torch.cuda.is_available())
    trainer = _trainer(model, folder, without_labels, workers, per_device_eval_batch_size=EVALUATION_BATCH)
    return np.asarray(trainer.predict(data).predictions)


def loaders(data: Any, has_gpu: bool) -> int:
    """How many processes read the examples: one core that decodes images would be what a GPU waits for."""
    are_images = isinstance(data, Dataset) and data.format["type"] == "custom"  # decoded when they are asked for
    return LOADERS if has_gpu and are_images and len(data) >= MANY_IMAGES else 0


def _trainer(
    model: nn.Module,
    folder: Path,
    collate: Collate | None,
    workers: int,
    train_dataset: Any = None,
    head_learning_rate: float | None = None,
    **arguments: Any,
) -> GroupedTrainer:
    arguments.setdefault("save_strategy", "no")
    arguments.setdefault("disable_tqdm", True)
    settings = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        logging_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        **arguments,
    )
    trainer = GroupedTrainer(
        model=model,
        args=settings,
        train_dataset=train_dataset,
        data_collator=collate,
        head_learning_rate=head_learning_rate,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
