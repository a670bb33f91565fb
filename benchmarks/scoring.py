"""What it costs to score adapters on K examples, relative to as many passes of PEFT with one LoRA.

python -m benchmarks.scoring
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from peft_composition.evidence.passes import candidates, composition_in, passes, read_examples
from peft_composition.tuner.single import mixed_by

from . import machine, text
from .measure import race
from .models import Architecture, Workbench
from .peers import compose


CLASSES, TOKENS = 2, 40
SCORED, LORA, STACKED = "score_adapters", "PEFT, one LoRA", "one-hot weights"
NOTES = {
    LORA: "N + 1 forward passes of PEFT with one LoRA",
    SCORED: "N adapters alone and their uniform mix, leave-one-out distances included",
    STACKED: "the same mixes as weights 1 and 0 of the whole composition",
}
MOST_STACKED = 20


def architecture(shots: int, is_tiny: bool) -> Architecture:
    """A BERT of MiniLM's shape (6 layers x 384), with all examples in one batch."""
    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    if is_tiny:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    count = shots * CLASSES
    return Architecture(
        name="MiniLM's shape, 6 layers x 384" if not is_tiny else "a tiny BERT",
        size=f"{count} examples of {TOKENS} tokens",
        build=lambda: BertForSequenceClassification(BertConfig(**sizes)),
        targets=("query", "key", "value"),
        head=("classifier",),
        task_type=None,
        batch_size=count,
        inputs=lambda size: {"input_ids": torch.randint(3, 30522, (size, TOKENS))},
        labels=lambda size: {"labels": torch.arange(size) % CLASSES},
    )


def measure(bench: Workbench, count: int, rounds: int) -> dict[str, Any]:
    """Time one N; the memory of the process beyond what the model takes comes with it."""
    model = compose(bench, bench.shared_base(), count).eval()
    composition = composition_in(model, None)
    mixes = candidates(composition, ("adapter", "uniform"))
    batch = bench.batch(labels=True)
    examples = read_examples(model, [batch], None, None, len(batch["labels"]))
    layers = list(composition.layers.values())
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def scored() -> object:
        return passes(model, mixes, examples)

    @torch.no_grad()
    def stacked() -> list[Tensor]:
        found = []
        for number in range(count):
            with mixed_by(layers, composition.name, [float(other == number) for other in range(count)]):
                found.append(model(**inputs).logits)
        with mixed_by(layers, composition.name, [1 / count] * count):
            return [*found, model(**inputs).logits]

    calls: dict[str, Callable[[], object]] = {LORA: _passes_of(bench.peft_model(1).eval(), inputs, count + 1)}
    calls[SCORED] = scored
    if count <= MOST_STACKED:
        calls[STACKED] = stacked
    timed = race(calls, LORA, rounds, bench.device, f"N={count}")
    facts = {
        name: {"seconds": own.seconds.median, "ratio": own.ratio.median, "low": own.ratio.low, "high": own.ratio.high}
        for name, own in timed.items()
        if own.seconds is not None and own.ratio is not None
    }
    return {"adapters": count, "rounds": rounds, "peers": facts}


def _passes_of(model: nn.Module, inputs: dict[str, Tensor], count: int) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> list[Tensor]:
        return [model(**inputs).logits for _ in range(count)]

    return run


def main(words: Sequence[str] | None = None) -> None:
    """Called from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[4, 20, 64, 256])
    parser.add_argument("--shots", type=int, default=5, help="examples of each of two classes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="to try the program")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scoring-cpu.json")
    options = parser.parse_args(words)
    transformers.logging.set_verbosity_error()
    own = architecture(options.shots, options.tiny)
    device = torch.device("cpu")
    described = machine.describe(device)
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(own, Path(folder), device, torch.float32)
        cells = [measure(bench, count, options.rounds) for count in options.adapters]
    results = {"model": own.name, "size": own.size, "machine": described, "notes": NOTES, "cells": cells}
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    grid = Table("N", "what", "seconds", "/ N + 1 passes of one LoRA")
    for cell in cells:
        for name, entry in cell["peers"].items():
            grid.add_row(str(cell["adapters"]), name, text.seconds(entry["seconds"]), f"{entry['ratio']:.2f}")
    Console().print(grid)


if __name__ == "__main__":
    main()
