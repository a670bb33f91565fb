"""What the commands of `peft-composition` do and print; their arguments are declared in `peft_composition_cli.py`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoProcessor, PretrainedConfig
from transformers.utils.hub import has_file

from . import upstream
from .config import AdapterReference, CompositionConfig
from .export import LoraExport, lora_from_checkpoint, to_lora
from .hub import AUTO_CLASSES, LORA_SUBFOLDER, push_to_hub, saved_mixing_weights, write_model_card
from .inspection import AdapterReport, inspect_adapters
from .report import Part, WeightRow, plot_weights, weights_table


MOST_COLUMNS = 8  # of adapters in a table by parts
# One of these is there where a tokenizer, an image processor, a feature extractor or a processor of several is.
PROCESSOR_FILES = ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")


# The commands


def inspect(
    adapters: Sequence[str], base: str | None, task: str | None, as_json: bool, check_base: bool = True
) -> bool:
    """Print a row for every adapter; True if all can be composed."""
    references = _references(adapters)
    model = None
    if base is not None:
        task = task or _task_type(references, is_strict=False)
        model = _empty_model(base, task)
    reports = inspect_adapters(references, model, task, check_base)
    if as_json:
        rows = [{**asdict(report), "composable": report.is_composable} for report in reports]
        _print_json({"base": base, "task_type": task, "adapters": rows})
    else:
        _print_reports(reports, base)
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
    save_adapters: bool,
    with_lora: bool,
    push: str | None,
    as_json: bool,
    check_base: bool = True,
) -> None:
    """Build a composition, save it, and push it where that is asked for."""
    references = _references(adapters)
    task = task or _task_type(references, is_strict=True)
    config = CompositionConfig(
        adapters=[*references],
        mixing=mixing,  # type: ignore[arg-type]  # the config refuses others
        weights=weights,
        normalization=normalization,  # type: ignore[arg-type]
        task_type=task,
        save_adapters=save_adapters,
        check_base_model=check_base,
    )
    model = get_peft_model(_base_model(base, task), config)
    lora = to_lora(model) if with_lora else None
    model.save_pretrained(str(out))
    if lora is not None:
        lora.save_pretrained(out / LORA_SUBFOLDER)
        write_model_card(out)  # once more: it tells of the export
    commit = push_to_hub(model, push, lora=with_lora) if push else None
    mixed = model.mixing_weights()
    means = {row.adapter: row.mean for row in weights_table(mixed)}
    if as_json:
        _print_json(
            {
                "out": str(out),
                "task_type": task,
                "modules": len(mixed),
                "weights": means,
                "lora": str(out / LORA_SUBFOLDER) if lora is not None else None,
                "commit": commit.commit_url if commit else None,
            }
        )
        return
    shares = ", ".join(f"{name} {weight:.3g}" for name, weight in means.items())
    _say(f"Composed {len(means)} adapters in {len(mixed)} modules ({shares}): {out}")
    if lora is not None:
        _say(f"{lora}: {out / LORA_SUBFOLDER}")
    if commit:
        _say(f"Pushed: {commit.commit_url}")


def export(folder: Path, out: Path, head: str, dtype: str | None, as_json: bool, **options: Any) -> None:
    """Save a composition as a plain LoRA, and print what the truncation cost."""
    include_head = {"with": True, "without": False}.get(head, head)
    lora = lora_from_checkpoint(folder, include_head=include_head, dtype=_dtype(dtype), **options)  # type: ignore[arg-type]
    lora.save_pretrained(out)
    if as_json:
        found = {"ranks": lora.ranks, "errors": lora.errors, "total_error": lora.total_error}
        _print_json({"out": str(out), **found})
        return
    if any(lora.errors.values()):
        _print_errors(lora)
    _say(f"{lora}: {out}")


def weights(folder: Path, png: Path, by: Part, as_json: bool) -> None:
    """Print the mixing weights of a saved composition and draw them."""
    mixed = saved_mixing_weights(folder)
    names = _saved_config(folder).adapter_names
    png.parent.mkdir(parents=True, exist_ok=True)
    plot_weights(mixed, by, f"Mixing weights of {folder.resolve().name}", names).savefig(png, dpi=150)
    whole, parts = weights_table(mixed, adapters=names), weights_table(mixed, by, names)
    if as_json:
        rows = [asdict(row) for row in (*whole, *parts)]
        _print_json({"mixing_weights": mixed, "table": rows, "png": str(png)})
        return
    _print_means(whole)
    if by != "model":
        _print_parts(parts, whole, by)
    _say(f"Heatmap: {png}")


def merge(folder: Path, out: Path, base: str | None, dtype: str | None, as_json: bool) -> None:
    """Save the base model with the composition merged into it, and its tokenizer or processor."""
    config = _saved_config(folder)
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{folder} does not say what its base model is; give --base")
    model = PeftModel.from_pretrained(_base_model_of(config, base, dtype), str(folder))
    merged = model.merge_and_unload()
    merged.save_pretrained(str(out))
    has_processor = any(has_file(base, name, revision=config.revision) for name in PROCESSOR_FILES)
    if has_processor:
        AutoProcessor.from_pretrained(base, revision=config.revision).save_pretrained(str(out))
    kind = type(merged).__name__
    stored = str(merged.dtype).removeprefix("torch.")
    if as_json:
        _print_json({"out": str(out), "model": kind, "dtype": stored, "processor": has_processor})
        return
    beside = "with" if has_processor else "the base has no"
    _say(f"Merged into a {kind} ({stored}, {beside} tokenizer or processor): {out}")


# What goes in


def _saved_config(folder: Path) -> CompositionConfig:
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, CompositionConfig):
        raise ValueError(f"{folder} is no saved composition: its peft_type is {config.peft_type}")
    return config


def _references(adapters: Sequence[str]) -> list[AdapterReference]:
    """The adapters as dicts with names; `id@revision` is a revision of a repository on the Hub."""
    entries: list[str | Path | AdapterReference] = []
    for adapter in adapters:
        path, at, revision = adapter.rpartition("@")
        is_revision = at and not os.path.isdir(adapter) and upstream.is_hub_id(path)
        entries.append(AdapterReference(path=path, revision=revision) if is_revision else adapter)
    return CompositionConfig(adapters=entries).references


def _task_type(references: Sequence[AdapterReference], is_strict: bool) -> str | None:
    """The task type that the adapters state; None where they state none.

    Args:
        references: the adapters.
        is_strict: refuse adapters that cannot be read or differ. Otherwise the most frequent one is taken.
    """
    stated: Counter[str] = Counter()
    for reference in references:
        try:
            task = upstream.read_config(upstream.locate_one(reference, with_card=False)).get("task_type")
        except Exception:
            if is_strict:
                raise
            continue
        stated.update([task] if task else [])
    if is_strict and len(stated) > 1:
        raise ValueError(f"the adapters were trained for different tasks ({', '.join(sorted(stated))}); give --task")
    return stated.most_common(1)[0][0] if stated else None


def _auto_class(task: str | None, base_config: PretrainedConfig) -> Any:
    """The class to load a base model with: by the task or, without one, what the model itself says."""
    if task is not None:
        if task not in AUTO_CLASSES:
            raise ValueError(f"task type {task!r} is not known; there are {', '.join(AUTO_CLASSES)}")
        return getattr(transformers, AUTO_CLASSES[task])
    for name in base_config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def _empty_model(base: str, task: str | None) -> nn.Module:
    """The base model without values: its modules and shapes, from its config alone."""
    config = AutoConfig.from_pretrained(base)
    kind = _auto_class(task, config)
    with torch.device("meta"):
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def _base_model(base: str, task: str | None, dtype: str | None = None, **kwargs: Any) -> nn.Module:
    revision = kwargs.get("revision")
    kind = _auto_class(task, AutoConfig.from_pretrained(base, revision=revision))
    return kind.from_pretrained(base, dtype=_dtype(dtype) or "auto", **kwargs)


def _base_model_of(config: CompositionConfig, base: str, dtype: str | None) -> nn.Module:
    """The model that a saved composition was made on, with a head of the same size."""
    kwargs: dict[str, Any] = {}
    if config.num_labels is not None:
        kwargs["num_labels"] = config.num_labels
    if config.revision and base == config.base_model_name_or_path:
        kwargs["revision"] = config.revision
    return _base_model(base, config.task_type, dtype, **kwargs)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {name!r} is not known; give float32, bfloat16 or float16")
    return dtype


# What comes out


def _say(text: str) -> None:
    Console(soft_wrap=True, highlight=False, markup=False).print(text)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_reports(reports: Sequence[AdapterReport], base: str | None) -> None:
    table = Table(title=f"{len(reports)} adapters" + (f" for {base}" if base else ""), show_lines=True)
    for heading in ("adapter", "base", "rank", "targets", "modules", "size", "licence, commit", "composable"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("modules", "size") else "left")
    for report in reports:
        verdict = "yes" if report.is_composable else f"no: {report.reason}"
        source = [report.license, report.commit[:12] if report.commit else None]
        table.add_row(
            _plain(report.name),
            _plain(report.base),
            _span(report.ranks),
            _plain(", ".join(report.targets)),
            "-" if report.modules is None else str(report.modules),
            "-" if report.bytes is None else _size(report.bytes),
            _plain("\n".join(filter(None, source))),
            "\n".join(
                [f"[{'green' if report.is_composable else 'red'}]{_plain(verdict)}[/]", *map(_plain, report.notes)]
            ),
        )
    console = Console()
    console.print(table)
    good = sum(report.is_composable for report in reports)
    console.print(f"{good} of {len(reports)} can be composed.", highlight=False)


def _print_errors(lora: LoraExport) -> None:
    table = Table(title="Relative error of the truncation")
    table.add_column("module", overflow="fold")
    table.add_column("rank", justify="right")
    table.add_column("error", justify="right")
    for module, error in lora.errors.items():
        table.add_row(_plain(module), str(lora.ranks[module]), f"{error:.3g}")
    Console().print(table)


def _print_means(rows: Sequence[WeightRow]) -> None:
    table = Table(title="Mixing weights")
    table.add_column("adapter", overflow="fold")
    for heading in ("modules", "mean", "min", "max"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(_plain(row.adapter), str(row.modules), f"{row.mean:.3f}", f"{row.min:.3f}", f"{row.max:.3f}")
    Console().print(table)


def _print_parts(rows: Sequence[WeightRow], whole: Sequence[WeightRow], by: Part) -> None:
    """Parts down and adapters across; of many adapters those with the largest weights."""
    largest = sorted(whole, key=lambda row: -abs(row.mean))[:MOST_COLUMNS]
    shown = [row.adapter for row in whole if row in largest]
    few = f"the {len(shown)} of {len(whole)} adapters with the largest weights; all with --json"
    table = Table(title=f"Mean weight by {by}", caption=few if len(shown) < len(whole) else None)
    table.add_column(by, overflow="fold")
    for adapter in shown:
        table.add_column(_plain(adapter), justify="right", overflow="fold")
    means = {(row.part, row.adapter): f"{row.mean:.3f}" for row in rows}
    for part in dict.fromkeys(row.part for row in rows):
        table.add_row(_plain(part), *(means.get((part, adapter), "-") for adapter in shown))
    Console().print(table)


def _plain(text: str | None) -> str:
    """Text for a cell; rich reads square brackets as markup."""
    return escape(text) if text else "-"


def _span(ranks: tuple[int, int] | None) -> str:
    if ranks is None:
        return "-"
    low, high = ranks
    return str(low) if low == high else f"{low}-{high}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
