"""A saved composition, loaded with its base model, and labelled examples encoded for it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..checkpoint.base_models import base_config
from ..checkpoint.saved import SavedComposition
from ..choosing import EncodedRows, LabelledData, load_processor, read_data
from ..config import CompositionConfig
from ..text import one_line
from ..tuner.class_names import stated_names
from .inputs import recorded_loader
from .labelled import load_base, require_examples


@dataclass(frozen=True)
class Loaded:
    """What a command works on.

    Attributes:
        model: the composition on its base model, in eval mode.
        rows: the examples, encoded.
        test: further examples; None where none were asked for.
    """

    model: PeftModel
    rows: EncodedRows
    test: EncodedRows | None


def load(
    folder: Path,
    data: str,
    columns: Mapping[str, Any],
    *,
    k: int | None,
    seed: int,
    base: str | None,
    task: str | None,
    test: str | None = None,
) -> Loaded:
    """Load a saved composition and read examples for it.

    Args:
        folder: of the composition.
        data: where the examples are, as for `read_data`.
        columns: its further arguments.
        k: how many of each class to draw; None: all.
        seed: of the draw.
        base: the base model. None: the recorded one.
        task: its task type. None: the recorded one.
        test: further examples.
    """
    composition = SavedComposition.opened(folder)
    config = composition.config
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{folder} does not name its base model; give --base")
    examples = read_data(data, **columns)
    if k is not None:  # before classes of the head that have no examples here are added
        examples, _ = examples.draw(k, seed)
    revision = config.revision if base == config.base_model_name_or_path else None
    of_base = base_config(base, revision)
    loader = recorded_loader(config, task, of_base)
    require_examples(base, loader, examples, of_base)
    processor = load_processor(base, examples.kind, revision)
    model, new = load_base(
        loader,
        base,
        processor,
        revision=revision,
        num_labels=config.num_labels if loader.is_classifier else None,
        is_reported=False,
    )
    saved = tuple(config.modules_to_save or ())
    is_untrained = composition.has_untrained_head or any(
        module not in saved and not any(part in saved for part in module.split(".")) for module in new
    )
    if test is not None and is_untrained:
        raise ValueError(f"the head of {one_line(folder)} is untrained and cannot predict test data; leave out --test")
    if examples.classes:
        named = _names_of_head(config, model, is_recorded=base == config.base_model_name_or_path)
        numbers = [str(number) for number in range(config.num_labels or 0)]
        known = next((names for names in (named, numbers) if names and {*examples.classes} <= {*names}), None)
        if known is not None:
            examples = _numbered_as(examples, known)
        elif test is not None:
            _warn_of_the_order(examples.classes, named)
    tests = None if test is None else read_data(test, **{**columns, "classes": examples.classes or None})
    is_seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    composed = PeftModel.from_pretrained(model, str(folder)).eval()
    rows = EncodedRows(examples, processor, is_seq2seq)
    return Loaded(composed, rows, None if tests is None else rows.encoded_alike(tests))


def _names_of_head(config: CompositionConfig, model: nn.Module, is_recorded: bool) -> list[str] | None:
    """The names of the classes of the head that predicts: the composition's own, or else that of the base as loaded.

    Args:
        config: of the composition.
        model: its base model.
        is_recorded: whether that is the one that the composition was saved with.
    """
    if config.modules_to_save:
        return config.class_names or stated_names(model)
    return stated_names(model) or (config.class_names if is_recorded else None)


def _numbered_as(examples: LabelledData, names: Sequence[str]) -> LabelledData:
    """The examples with their classes numbered in this order, in which some may be without examples."""
    place = {name: number for number, name in enumerate(names)}
    labels = tuple(place[examples.classes[label]] for label in examples.labels)
    return replace(examples, labels=labels, classes=tuple(names))


def _warn_of_the_order(classes: Sequence[str], named: Sequence[str] | None) -> None:
    said = "Neither the composition nor its base model has names for the head's classes"
    if named:
        said = f"The head's classes are called {_numbered(named)}, and not as those of the examples"
    warnings.warn(
        f"{said}, so those of the examples are numbered in order: {_numbered(classes)}. If the head was trained in "
        "another order, its accuracy is wrong: give numbers as labels, or set id2label in the model's config before "
        "the composition is saved.",
        stacklevel=3,
    )


def _numbered(names: Sequence[str]) -> str:
    shown = ", ".join(f"{number} {one_line(name)}" for number, name in enumerate(names[:20]))
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown


def typed(command: str, folder: Path, options: Mapping[str, Any]) -> list[str]:
    """The words of a command for a report; of absolute paths the last part alone: the rest would tell of a machine."""
    words = ["peft-composition", command, _shown(folder)]
    for name, value in options.items():
        for each in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            if each is not None:
                words += [f"--{name.replace('_', '-')}", _shown(each)]
    return words


def _shown(value: object) -> str:
    text = str(value)
    return Path(text).name if text.startswith("~") or Path(text).is_absolute() else text
