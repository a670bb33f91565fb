"""`peft-composition merge`: the base model with a saved composition merged into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import AutoProcessor
from transformers.utils.hub import has_file

from ..checkpoint.base_models import base_config
from ..checkpoint.saved import SavedComposition
from ..terminal import print_json, say
from ..text import one_line
from .inputs import dtype_of, recorded_loader


# A repository with a tokenizer, an image processor, a feature extractor or a combined processor has one of these.
PROCESSOR_FILES = ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")


def run(folder: Path, out: Path, base: str | None, task: str | None, dtype: str | None, as_json: bool) -> None:
    """Save the base model with the composition merged into it, and its tokenizer or processor."""
    composition = SavedComposition.opened(folder)
    config = composition.config
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{folder} does not name its base model; give --base")
    revision = config.revision if base == config.base_model_name_or_path else None
    loader = recorded_loader(config, task, base_config(base, revision))
    base_model, new = loader.from_pretrained(
        base,
        revision=revision,
        dtype=dtype_of(dtype),
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
