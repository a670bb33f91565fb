"""What the commands of `peft-composition` do and print; their arguments are declared in `peft_composition_cli.py`."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import AutoProcessor, PretrainedConfig
from transformers.utils.hub import has_file

from .analysis.inspection import inspect_adapters
from .analysis.report import Part, plot_weights, weights_table
from .checkpoint.base_models import AUTO_CLASSES, Loader, base_config, choose, loaders, stated_class
from .checkpoint.card import write_model_card
from .checkpoint.export import lora_from_checkpoint, to_lora
from .checkpoint.push import push_to_hub
from .checkpoint.saved import SavedComposition, head_hash, saved_mixing_weights
from .config import CompositionConfig
from .names import LORA_SUBFOLDER
from .references import AdapterReference, is_hub_id
from .terminal import print_errors, print_json, print_means, print_parts, print_reports, say
from .text import LONG, in_python, one_line
from .tuner.preparation import require_composable
from .upstream.adapter import read_adapters, read_config
from .upstream.files import locate_one
from .upstream.keys import HEADS


# A repository with a tokenizer, an image processor, a feature extractor or a combined processor has one of these.
PROCESSOR_FILES = ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")


# The commands


def inspect(
    adapters: Sequence[str], base: str | None, task: str | None, as_json: bool, check_base: bool = True
) -> bool:
    """Print a row for every adapter; True if all can be composed."""
    references = _references([*dict.fromkeys(adapters)])  # a row says all, however often an adapter is named
    model = None
    if base is not None:
        config = base_config(base)
        task, loader = _task_and_loader(references, task, config, check_base, is_strict=False)
        model = loader.empty(config)
    reports = inspect_adapters(references, model, task, check_base)
    if as_json:
        rows = [{**asdict(report), "composable": report.is_composable} for report in reports]
        print_json({"base": base, "task_type": task, "adapters": rows})
    else:
        print_reports(reports, base)
    return all(report.is_composable for report in reports)


def compose(
    base: str,
    adapters: Sequence[str],
    mixing: str,
    weights: list[float] | None,
    normalization: str,
    out: Path,
    *,
    task: str | None,
    num_labels: int | None,
    save_adapters: bool,
    with_lora: bool,
    push: str | None,
    as_json: bool,
    check_base: bool = True,
) -> None:
    """Build a composition, save it, and push it if a repository is given."""
    references = _references(adapters)
    task, loader = _task_and_loader(references, task, base_config(base), check_base, is_strict=True)
    if num_labels is not None and not loader.is_classifier:
        raise ValueError(f"--num-labels is for classifiers, but the model is a {loader.builds.__name__}; leave it out")
    base_model, new = loader.from_pretrained(
        base,
        num_labels=num_labels,
        is_reported=not loader.is_classifier,  # for classifiers it is reported below
    )
    has_new_head = loader.is_classifier and any(new)
    is_headless = has_new_head and num_labels is None
    config = CompositionConfig(
        adapters=[*references],
        mixing=mixing,  # type: ignore[arg-type]  # the config refuses others
        weights=weights,
        normalization=normalization,  # type: ignore[arg-type]
        task_type=None if is_headless else task,  # with a task type, PEFT would save the head as a trained one
        modules_to_save=_new_modules(new, task) if has_new_head and not is_headless else None,
        save_adapters=save_adapters,
        check_base_model=check_base,
    )
    model = get_peft_model(base_model, config)
    config = cast(CompositionConfig, model.peft_config["default"])
    if is_headless:
        config.num_labels = None
    elif has_new_head:
        config.untrained_head = head_hash(get_peft_model_state_dict(model))
    lora = to_lora(model) if with_lora else None
    model.save_pretrained(str(out))
    if lora is not None:
        lora.save_beside(out, LORA_SUBFOLDER)
        write_model_card(out)  # again: the card mentions the export
    commit = _push(model, push, with_lora, out) if push else None
    mixed = model.mixing_weights()
    means = {row.adapter: row.mean for row in weights_table(mixed)}
    if as_json:
        print_json(
            {
                "out": str(out),
                "task_type": task,
                "num_labels": config.num_labels,
                "head": None if is_headless or not config.modules_to_save else "new" if has_new_head else "base",
                "modules": len(mixed),
                "weights": means,
                "lora": str(out / LORA_SUBFOLDER) if lora is not None else None,
                "commit": commit.commit_url if commit else None,
            }
        )
        return
    shares = ", ".join(f"{one_line(name)} {weight:.3g}" for name, weight in means.items())
    say(f"Composed {len(means)} adapters in {len(mixed)} modules ({shares}): {out}")
    if is_headless:
        say(f"It has no head: {base} has no trained one ({', '.join(new)}). To add a new one, use --num-labels.")
    elif has_new_head:
        say(f"Its head for {num_labels} labels is new and untrained ({', '.join(new)}): train it before use.")
    if lora is not None:
        say(f"{lora}: {out / LORA_SUBFOLDER}")
    if commit:
        say(f"Pushed: {commit.commit_url}")


def export(folder: Path, out: Path, head: str, dtype: str | None, as_json: bool, **options: Any) -> None:
    """Save a composition as a plain LoRA, and print what the truncation cost."""
    include_head = {"with": True, "without": False}.get(head, head)
    lora = lora_from_checkpoint(folder, include_head=include_head, dtype=_dtype(dtype), **options)  # type: ignore[arg-type]
    lora.save_pretrained(out)
    if as_json:
        found = {"ranks": lora.ranks, "errors": lora.errors, "total_error": lora.total_error}
        print_json({"out": str(out), **found})
        return
    if any(lora.errors.values()):
        print_errors(lora)
    say(f"{lora}: {out}")


def weights(folder: Path, png: Path | None, by: Part, as_json: bool) -> None:
    """Print the mixing weights of a saved composition and, if a file is given, plot them."""
    mixed = saved_mixing_weights(folder)
    names = SavedComposition.opened(folder).config.adapter_names
    whole, parts = weights_table(mixed, adapters=names), weights_table(mixed, by, names)
    if as_json:
        rows = [asdict(row) for row in (*whole, *parts)]
        print_json({"mixing_weights": mixed, "table": rows, "png": str(png) if png else None})
    else:
        print_means(whole)
        if by != "model":
            print_parts(parts, whole, by)
    if png is None:
        return
    figure = plot_weights(mixed, by, f"Mixing weights of {folder.resolve().name}", names)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)
    if not as_json:
        say(f"Heatmap: {png}")


def merge(folder: Path, out: Path, base: str | None, task: str | None, dtype: str | None, as_json: bool) -> None:
    """Save the base model with the composition merged into it, and its tokenizer or processor."""
    composition = SavedComposition.opened(folder)
    config = composition.config
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{folder} does not name its base model; give --base")
    revision = config.revision if base == config.base_model_name_or_path else None
    loader = _recorded_loader(config, task, base_config(base, revision))
    base_model, new = loader.from_pretrained(
        base,
        revision=revision,
        dtype=_dtype(dtype),
        num_labels=config.num_labels if loader.is_classifier else None,
        is_reported=False,
    )
    head, is_untrained = composition.head_modules, composition.has_untrained_head
    dropped = _without_place(head, base_model)
    if dropped and not is_untrained:
        raise ValueError(
            f"a {type(base_model).__name__} has no module for the trained {', '.join(map(one_line, dropped))} of "
            f"{one_line(folder)}, which would be lost; "
            + (f"leave out --task {task}, or use export" if task else "give the --task that it was trained for")
        )
    untrained = [module for module in head if module not in dropped] if is_untrained else []
    saved = tuple(config.modules_to_save or ())
    new = [module for module in new if not any(part in saved for part in module.split(".")) and module not in saved]
    model = PeftModel.from_pretrained(base_model, str(folder))
    merged = model.merge_and_unload()
    merged.save_pretrained(str(out))
    has_processor = any(has_file(base, name, revision=revision) for name in PROCESSOR_FILES)
    if has_processor:
        AutoProcessor.from_pretrained(base, revision=revision).save_pretrained(str(out))
    kind = type(merged).__name__
    stored = str(merged.dtype).removeprefix("torch.")
    if as_json:
        found = {"model": kind, "dtype": stored, "processor": has_processor, "untrained": sorted({*new, *untrained})}
        print_json({"out": str(out), **found})
        return
    beside = "with" if has_processor else "the base has no"
    say(f"Merged into a {kind} ({stored}, {beside} tokenizer or processor): {out}")
    if new:
        say(f"Neither {base} nor the composition has weights for {', '.join(new)}: these are new and untrained.")
    if untrained:
        say(f"Its head ({', '.join(untrained)}) was saved as new and untrained: train it before use.")
    if dropped:
        say(f"Left out, because it is untrained and a {kind} has no such module: {', '.join(dropped)}.")


def _push(model: PeftModel, repo_id: str, with_lora: bool, out: Path) -> CommitInfo:
    """Push a saved composition; an error says that it was saved."""
    try:
        return push_to_hub(model, repo_id, lora=with_lora)
    except Exception as error:  # errors of the Hub, its HTTP client or the network
        lora = "" if with_lora else ", lora=False"
        raise RuntimeError(
            f"{out} was saved completely, but pushing it to {one_line(repo_id)} failed: "
            f"{one_line(error, LONG // 2) or type(error).__name__} To push it later, load it as its README.md shows "
            f"and call peft_composition.push_to_hub(model, {in_python(repo_id)}{lora})"
        ) from error


# Inputs of the commands


def _references(adapters: Sequence[str]) -> list[AdapterReference]:
    """The adapters as dicts with names; `id@revision` means a revision of a Hub repository."""
    entries: list[str | Path | AdapterReference] = []
    for adapter in adapters:
        path, at, revision = adapter.rpartition("@")
        is_revision = at and not os.path.isdir(adapter) and is_hub_id(path)
        entries.append(AdapterReference(path=path, revision=revision) if is_revision else adapter)
    return CompositionConfig(adapters=entries).references


def _task_and_loader(
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


def _recorded_loader(config: CompositionConfig, task: str | None, base_config: PretrainedConfig) -> Loader:
    """The class to load the base model of a saved composition with."""
    stated = None if task else stated_class({"auto_mapping": config.auto_mapping})
    composed = (config.composed_modules or {}).keys()

    def fits(model: nn.Module) -> bool:
        return composed <= {*dict(model.named_modules()), *dict(model.named_parameters())}

    return choose(loaders(task or config.task_type, base_config, stated), base_config, fits)


def _without_place(modules: Sequence[str], model: nn.Module) -> list[str]:
    """The modules that a model does not have, whatever prefixes either side has."""
    names = {name for name, _ in model.named_modules()} - {""}
    suffixes = {name[start:] for name in names for start in _starts(name)}
    return [
        module
        for module in filter(None, modules)
        if module not in suffixes and not any(module.endswith(f".{n}") for n in names)
    ]


def _starts(name: str) -> list[int]:
    return [0, *(at + 1 for at, character in enumerate(name) if character == ".")]


def _new_modules(new: Sequence[str], task: str | None) -> list[str] | None:
    """The new modules that PEFT does not recognise as heads of the task."""
    heads = HEADS.get(task or "", [])
    return [module for module in new if not any(part in heads for part in module.split("."))] or None


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {name!r} is unknown; give float32, bfloat16 or float16")
    return dtype
