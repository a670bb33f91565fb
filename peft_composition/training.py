"""Small optional helpers for transformers' `Trainer`.

Separate learning rates for mixing weights and head, a warm-up of the head, logs of the mixing weights, and the last
complete checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from .config import CompositionConfig
from .tuner.locating import composition_layers


if TYPE_CHECKING:  # importing the Trainer is slow, and not everybody trains
    from torch.optim import Optimizer
    from transformers import Trainer, TrainingArguments


def parameter_groups(
    model: nn.Module, *, mixing_lr: float | None = None, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Group the trainable parameters for an optimizer: first the mixing weights, then the head and everything else.

    Weight decay is never applied to mixing weights. Of the rest, it applies to the parameters that the Trainer would
    decay, which excludes biases and norms. The schedulers of torch and transformers scale the learning rates of all
    groups alike; the Trainer logs the `learning_rate` of the first group.

    Args:
        model: a model with a composition; may be wrapped by DDP, FSDP or `torch.compile`.
        mixing_lr: learning rate of the mixing weights. Default: the optimizer's.
        head_lr: learning rate of the rest. Default: the optimizer's.
        weight_decay: weight decay of the rest. Default: 0.

    Returns:
        The groups that are not empty, with `params`, `weight_decay` and, if given, `lr`.

    Raises:
        ValueError: no parameter is trainable.

    Example:
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, mixing_lr=1e-2, head_lr=1e-3))
        >>> Trainer(model, args, optimizers=(optimizer, None), ...)
    """
    from transformers import Trainer

    decaying = set(Trainer.get_decay_parameter_names(cast("Trainer", None), model))
    mixing = [parameter for _, parameter in _trainable(model, mixing=True)]
    rest = list(_trainable(model, mixing=False))
    groups = [
        _group(mixing, mixing_lr, 0.0),
        _group([parameter for name, parameter in rest if name in decaying], head_lr, weight_decay),
        _group([parameter for name, parameter in rest if name not in decaying], head_lr, 0.0),
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("The model has no trainable parameter: none has requires_grad=True.")
    return groups


def _group(parameters: list[nn.Parameter], lr: float | None, weight_decay: float) -> dict[str, Any]:
    group = {"params": parameters, "weight_decay": weight_decay}
    return group if lr is None else {**group, "lr": lr}


def _trainable(model: nn.Module, mixing: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """The trainable mixing weights of a model, or all its other trainable parameters.

    They are recognised by a part of their name: wrappers add other parts, and FSDP may use a flat parameter instead.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("composition_mixing" in name.split(".")) is mixing:
            yield name, parameter


def composition_optimizer(
    args: TrainingArguments, *, mixing_lr: float | None = None, head_lr: float | None = None
) -> tuple[type[Any], dict[str, Any]]:
    """The optimizer that `args` selects, with the groups of `parameter_groups`, for the Trainer to build.

    The Trainer builds it when the trainable parameters exist. It therefore works under FSDP, where the Trainer refuses
    `optimizers=`, and is built again for every trial of a hyperparameter search.

    Args:
        args: the Trainer's arguments, which give `optim`, its settings, `weight_decay` and the default learning rate.
        mixing_lr: learning rate of the mixing weights. Default: `args.learning_rate`.
        head_lr: learning rate of the rest. Default: `args.learning_rate`.

    Returns:
        A value for the Trainer's argument `optimizer_cls_and_kwargs`.

    Raises:
        ValueError: when the Trainer builds it: no parameter is trainable, or `optim` groups the parameters itself.

    Example:
        >>> Trainer(model, args, optimizer_cls_and_kwargs=composition_optimizer(args, mixing_lr=1e-2), ...)
    """
    return _OptimizerFactory, {"args": args, "mixing_lr": mixing_lr, "head_lr": head_lr}


class _OptimizerFactory:
    """Instantiated and called by the Trainer, because it is not an optimizer class."""

    def __call__(
        self, model: nn.Module, args: TrainingArguments, mixing_lr: float | None, head_lr: float | None
    ) -> Optimizer:
        from transformers import Trainer

        optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, cast(Any, model))
        takes_groups = isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)
        if not takes_groups or {"params", "model", "optimizer_dict"} & kwargs.keys():
            raise ValueError(
                f"optim={str(args.optim)!r} groups the parameters itself and ignores mixing_lr and head_lr. Choose "
                "another optimizer, or leave out composition_optimizer."
            )
        groups = parameter_groups(model, mixing_lr=mixing_lr, head_lr=head_lr, weight_decay=args.weight_decay)
        return optimizer_cls(groups, **kwargs)


class HeadWarmupCallback(TrainerCallback):
    """Trains only the head at first; during this warm-up the mixing weights stay unchanged, bit for bit.

    In the paper the classifier trains for 50 epochs before the mixing weights move (arXiv 2402.15414). After the
    warm-up the optimizer starts with fresh states for the mixing weights; the learning rate schedule continues
    throughout.

    The mixing weights require gradients all the time, because DDP and FSDP check that only when they wrap a model.
    They are restored after every optimizer step. The optimizer keeps the same states in both phases, as FSDP needs
    them for resuming; at the end of the warm-up the states of the mixing weights are dropped. The gradient norm that
    is clipped and logged is therefore always that of head and mixing weights together. The end of the warm-up is
    computed from the Trainer's step count, so that a resumed training continues correctly.

    Args:
        epochs: length of the warm-up in epochs, rounded to the nearest step.
        steps: length of the warm-up in optimizer steps. Give either `epochs` or `steps`.

    Raises:
        ValueError: both or none of the arguments are given, or the value is not positive. When training begins: no
            mixing weights or nothing else is trainable; or the warm-up is as long as the whole training, so that the
            mixing weights would never move; or `epochs` is given and the data set has no length; or DeepSpeed is used,
            whose optimizers update copies of the parameters.
    """

    def __init__(self, *, epochs: float | None = None, steps: int | None = None) -> None:
        if (epochs is None) == (steps is None):
            raise ValueError(f"Give either epochs or steps of the warm-up, got epochs={epochs} and steps={steps}.")
        if not cast(float, epochs if steps is None else steps) > 0:
            raise ValueError(f"The warm-up must be longer than 0, got epochs={epochs} and steps={steps}.")
        self.epochs = epochs
        self.steps = steps
        self._end = 0  # in optimizer steps
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the warm-up is possible, and compute its last step."""
        model = kwargs["model"]
        if args.deepspeed_plugin is not None:
            raise ValueError("HeadWarmupCallback does not work with DeepSpeed, whose optimizers update copies.")
        if not any(_trainable(model, mixing=True)):
            raise ValueError("HeadWarmupCallback: the model has no trainable mixing weights.")
        if not any(_trainable(model, mixing=False)):
            raise ValueError("HeadWarmupCallback: only mixing weights are trainable; is modules_to_save missing?")
        self._end = self._last_step(args, kwargs["train_dataloader"])
        if self._end >= state.max_steps > 0:
            length = f"{self.epochs:g} epochs, {self._end} steps" if self.steps is None else f"{self._end} steps"
            raise ValueError(
                f"HeadWarmupCallback: the warm-up of the head ({length}) takes the whole training of "
                f"{state.max_steps} steps, so the mixing weights would never move. Make the warm-up shorter or the "
                f"training longer (num_train_epochs={args.num_train_epochs:g}, max_steps={args.max_steps})."
            )

    def _last_step(self, args: TrainingArguments, dataloader: Any) -> int:
        if self.steps is not None:
            return self.steps
        if not has_length(dataloader):
            raise ValueError("HeadWarmupCallback: the data set has no length; give steps instead of epochs.")
        return max(1, round(cast(float, self.epochs) * math.ceil(len(dataloader) / args.gradient_accumulation_steps)))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """During the warm-up remember the mixing weights; after it drop their optimizer states."""
        if state.global_step < self._end:
            self._kept = [(theta, theta.detach().clone()) for _, theta in _trainable(kwargs["model"], mixing=True)]
        elif state.global_step == self._end:
            for _, theta in _trainable(kwargs["model"], mixing=True):
                kwargs["optimizer"].state.pop(theta, None)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the mixing weights."""
        with torch.no_grad():
            for theta, value in self._kept:
                theta.copy_(value)
        self._kept = []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if training ended during the warm-up."""
        if state.global_step <= self._end and state.is_world_process_zero:
            warnings.warn(
                f"Training ended at step {state.global_step}, during the warm-up of the head ({self._end} steps): the "
                "mixing weights were not trained.",
                stacklevel=2,
            )


class MixingWeightsCallback(TrainerCallback):
    """Adds the mixing weights to the Trainer's logs, so that they reach `log_history` and all reporting integrations.

    With every training loss it logs for the active compositions:

    - `mixing_weight/<adapter>`: its weight, mean over the composed modules;
    - `mixing_entropy`: entropy of the weights, as parts of their sum, divided by ln N, mean over the modules: 1 is
      uniform, 0 is one adapter alone. Not where N is 1, nor for free weights (`normalization="none"`);
    - `mixing_max_change`: largest change of any weight since the last log, or since training began or was resumed.

    With several active compositions, their names are included: `mixing_weight/<composition>/<adapter>`. In names, all
    characters except letters, digits, `.`, `_` and `-` are replaced by `_`.

    Args:
        trainer: the Trainer that the callback is added to. It moves before the reporting callbacks.

    Raises:
        ValueError: when training begins, if it was added to another Trainer.

    Example:
        >>> trainer.add_callback(MixingWeightsCallback(trainer))
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._last: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move before the reporting callbacks, so that they also report these values."""
        handler = self._trainer.callback_handler
        if self not in handler.callbacks:
            raise ValueError("MixingWeightsCallback(trainer) was added to another Trainer than its argument.")
        # A new list: the Trainer is iterating over the old one.
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        self._last = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the weights before the first step."""
        if not self._last:  # not when training begins: FSDP can only return weights after a forward pass
            self._last = _weights_by_composition(kwargs["model"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to a log of the training loss."""
        if logs is None or "loss" not in logs:
            return
        # In every process, because reading sharded weights needs all of them.
        weights = _weights_by_composition(kwargs["model"])
        values = _summary(weights, self._last, _configs(kwargs["model"]))
        self._last = weights
        logs.update(values)
        state.log_history[-1].update(values)


@torch.no_grad()
def _weights_by_composition(model: nn.Module) -> dict[str, Tensor]:
    """The mixing weights of the active compositions, each of shape (modules, N), on the CPU."""
    rows: dict[str, list[Tensor]] = {}
    for _, layer in composition_layers(model):
        for name in layer.active_adapters:
            if name in layer.composition_factors:
                rows.setdefault(name, []).append(layer.mixing_weights(name))
    return {name: torch.stack([row.cpu() for row in entries]) for name, entries in rows.items()}


def _configs(model: nn.Module) -> Mapping[str, CompositionConfig]:
    """The configs of a model's adapters, however it is wrapped."""
    return next(configs for module in model.modules() if (configs := getattr(module, "peft_config", None)))


def _summary(
    weights: dict[str, Tensor], before: dict[str, Tensor], configs: Mapping[str, CompositionConfig]
) -> dict[str, float]:
    values: dict[str, float] = {}
    composition_tags = _tags(list(weights))
    for composition, table in weights.items():
        config = configs[composition]
        infix = f"/{composition_tags[composition]}" if len(weights) > 1 else ""
        for tag, weight in zip(_tags(config.adapter_names).values(), table.mean(0).tolist()):
            values[f"mixing_weight{infix}/{tag}"] = weight
        count = len(config.adapter_names)
        if config.normalization == "softmax" and count > 1:
            shares = table / table.sum(1, keepdim=True).clamp_min(torch.finfo(table.dtype).tiny)
            entropy = torch.special.entr(shares).sum(1).mean().item()
            values[f"mixing_entropy{infix}"] = entropy / math.log(count)
        if composition in before:  # it may have just become active
            values[f"mixing_max_change{infix}"] = (table - before[composition]).abs().max().item()
    return values


def _tags(names: list[str]) -> dict[str, str]:
    """Names that all reporters accept; if two become equal, with their number."""
    tags = {name: re.sub(r"[^\w.-]", "_", name) for name in names}
    seen = Counter(tags.values())
    return {name: tag if seen[tag] == 1 else f"{tag}-{n}" for n, (name, tag) in enumerate(tags.items())}


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The last complete checkpoint of a Trainer.

    A training that is killed while it writes a checkpoint leaves an incomplete one, with which
    `train(resume_from_checkpoint=True)` fails. The Trainer writes `trainer_state.json` last: folders without it, or
    with an incomplete one, are skipped.

    Args:
        output_dir: the Trainer's output folder; it need not exist.

    Returns:
        The folder, for `trainer.train(resume_from_checkpoint=...)`. None if there is none, which starts a new
        training.
    """
    found = {
        int(number): folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := folder.name.rpartition("-")[2]).isdecimal() and _is_complete(folder)
    }
    return str(found[max(found)]) if found else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return True
