"""What the commands are given, read: references to adapters, the task and the class of the base model, dtypes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig

from ..checkpoint.base_models import AUTO_CLASSES, Loader, choose, loaders, stated_class
from ..config import CompositionConfig
from ..references import AdapterReference, read_reference
from ..selection import HEADS
from ..text import one_line
from ..tuner.preparation import require_composable
from ..upstream.adapter import read_adapters, read_config
from ..upstream.files import locate_one


def references_of(adapters: Sequence[str]) -> list[AdapterReference]:
    """The adapters as dicts with names."""
    return CompositionConfig(adapters=[*map(read_reference, adapters)]).references


def task_and_loader(
    references: Sequence[AdapterReference],
    task: str | None,
    base_config: PretrainedConfig,
    check_base: bool,
    is_strict: bool,
) -> tuple[str | None, Loader]:
    """The task type and the class that loads the base model, from the configs of the base model and the adapters.

    Args:
        references: the adapters.
        task: the requested task type. None: the one that the adapters state.
        base_config: the config of the base model.
        check_base: whether to reject adapters that name another base model.
        is_strict: whether to refuse adapters that cannot be read or that differ. Otherwise the majority decides.
    """
    configs = []
    for reference in references:
        try:
            configs.append(read_config(locate_one(reference, with_card=False)))
        except Exception:  # the report shows any error
            if is_strict:
                raise
    stated = None
    if task is None:
        told = [str(config["task_type"]) for config in configs if config.get("task_type")]
        tasks = Counter(task for task in told if is_strict or task in AUTO_CLASSES)
        if is_strict and len(tasks) > 1:
            names = ", ".join(map(one_line, sorted(tasks)))
            raise ValueError(f"the adapters were trained for different tasks ({names}); give --task")
        task = next((name for name, _ in tasks.most_common(1)), None)
        classes = Counter(filter(None, map(stated_class, configs)))
        stated = next((name for name, _ in classes.most_common(1)), None)
    fits = partial(_fits_one_of, references, task, check_base)
    return task, choose(loaders(task, base_config, stated), base_config, fits)


def _fits_one_of(references: Sequence[AdapterReference], task: str | None, check_base: bool, model: nn.Module) -> bool:
    """Whether the first readable adapter fits a model."""
    for reference in references:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # composing reads it again, with its warnings
            try:
                (adapter,) = read_adapters([locate_one(reference, with_card=False)], [None])
            except Exception:
                continue
            try:
                config = CompositionConfig(
                    adapters=[reference], modules_to_save=HEADS.get(task or ""), check_base_model=check_base
                )
                require_composable(config, model, [adapter])
            except ValueError:
                return False
            return True
    return False


def recorded_loader(config: CompositionConfig, task: str | None, base_config: PretrainedConfig) -> Loader:
    """The class to load the base model of a saved composition with."""
    stated = None if task else stated_class({"auto_mapping": config.auto_mapping})
    composed = (config.composed_modules or {}).keys()

    def fits(model: nn.Module) -> bool:
        return composed <= {*dict(model.named_modules()), *dict(model.named_parameters())}

    return choose(loaders(task or config.task_type, base_config, stated), base_config, fits)


def new_modules(new: Sequence[str], task: str | None) -> list[str] | None:
    """The new modules that PEFT does not recognise as heads of the task."""
    heads = HEADS.get(task or "", [])
    return [module for module in new if not any(part in heads for part in module.split("."))] or None


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype with this name."""
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {name!r} is unknown; give float32, bfloat16 or float16")
    return dtype
