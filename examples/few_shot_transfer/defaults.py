"""What users get who change nothing: the text script with its defaults, and the README's lines, run on real tasks.

Each method is the program itself, `few_shot_text_classification.py`, run as from the command line, with another
`--method`; the README's block is run as it is printed, with the names of a task's base, adapters and data in it.
"""

from __future__ import annotations

import gc
import io
import json
import runpy
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, set_seed

from .bench import Bench
from .data import labels_of
from .evidence import open_benches
from .models import resolve
from .records import Record
from .scenario import load


EXAMPLES = Path(__file__).parents[1]
SCRIPT = EXAMPLES / "few_shot_text_classification.py"
README = EXAMPLES.parent / "README.md"
TASKS = (
    "distractors:movies",
    "vader-domains:amazon",
    "newsgroups-entangled:new-16-20",
    "text-tasks:newsgroups",
)
METHODS: dict[str, tuple[str, ...]] = {  # arguments of the script
    "uniform": ("--method", "uniform"),
    "script's default": (),
    "weights trained, too": ("--method", "learned"),
    "fresh LoRA": ("--method", "lora"),
    "head only": ("--method", "base"),
}
PRINTED = "README's lines"
EQUAL = "README's lines, equal weights"
TOKENS = 40


@dataclass(frozen=True)
class Inputs:
    """A task as a user has it.

    Attributes:
        base: folder of the base model.
        adapters: their folders.
        data: folder of the data set, with columns text and label.
        classes: how many there are.
    """

    base: Path
    adapters: Sequence[Path]
    data: Path
    classes: int

    @classmethod
    def of(cls, bench: Bench, folder: Path) -> Inputs:
        """Writes a task's data.

        Args:
            bench: a task of sentences.
            folder: for the data.
        """
        names = bench.task.classes

        def rows(data: Dataset) -> Dataset:
            labels = [names[label] for label in labels_of(data)]
            return Dataset.from_dict({"text": data["input"][:], "label": labels})

        DatasetDict({"train": rows(bench.task.train), "test": rows(bench.judged["test"])}).save_to_disk(str(folder))
        base = Path(resolve(str(bench.scenario.model.path))[0])
        return cls(base, [adapter.folder for adapter in bench.adapters], folder, len(names))


def measure(
    tasks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    k: int | None,
    folder: Path,
    known: Sequence[Record],
) -> Iterator[Record]:
    """Run every method on every task and draw.

    Args:
        tasks: as scenario:task.
        methods: among `METHODS`, `PRINTED` and `EQUAL`.
        seeds: of the draws.
        k: examples of each class; None: the script's default.
        folder: where models and adapters are kept.
        known: records that there are; what they have is not done again.
    """
    done = {(r["scenario"], r["target"], r["k"], r["seed"], r["method"]) for r in known}
    for task in tasks:
        scenario, _, target = task.partition(":")
        (bench,) = open_benches(load(scenario), folder, target, progress=False)
        with tempfile.TemporaryDirectory() as scratch:
            inputs = Inputs.of(bench, Path(scratch, "data"))
            for seed in seeds:
                for method in methods:
                    shots = default_k() if k is None else k
                    facts = {"scenario": scenario, "target": target, "k": shots, "seed": seed, "method": method}
                    if tuple(facts.values()) in done:
                        continue
                    started = time.process_time()
                    found = _run(method, inputs, shots, seed, Path(scratch, "output"))
                    yield {**facts, "adapter": None, **found, "cpu_seconds": round(time.process_time() - started, 1)}
                    gc.collect()


def default_k() -> int:
    """The script's."""
    from few_shot import FewShotArguments

    return FewShotArguments.k


def _run(method: str, inputs: Inputs, k: int, seed: int, output: Path) -> Record:
    if method == PRINTED:
        return run_printed(readme_lines(), inputs, k, seed, output)
    if method == EQUAL:
        return run_printed(without_evidence(readme_lines()), inputs, k, seed, output)
    return run_script(inputs, output, "--k", k, "--seed", seed, *METHODS[method])


def run_script(inputs: Inputs, output: Path, *arguments: object) -> Record:
    """Run the script as the main program of this process; its accuracy in percent, and its mixing weights."""
    command = [str(SCRIPT), "--model_name_or_path", str(inputs.base), "--dataset_name", str(inputs.data)]
    command += ["--adapters", *map(str, inputs.adapters), "--max_length", str(TOKENS), "--output_dir", str(output)]
    command += ["--report_to", "none", "--disable_tqdm", "true", *map(str, arguments)]
    AcceleratorState._reset_state(reset_partial_state=True)  # of the run before
    with patch.object(sys, "argv", command), _without_talk():
        runpy.run_path(str(SCRIPT), run_name="__main__")
    AcceleratorState._reset_state(reset_partial_state=True)
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    weights = {Path(name).name: round(value, 4) for name, value in results["mixing_weights"].items()}
    return {"accuracy": round(100 * results["metrics"]["accuracy"], 4), "weights": weights}


def readme_lines() -> str:
    """The README's first block of Python."""
    _, _, rest = README.read_text(encoding="utf-8").partition("```python\n")
    return rest.partition("```")[0]


def without_evidence(lines: str) -> str:
    """The README's lines without the one that chooses weights, so that they stay equal: the control for it.

    Raises:
        ValueError: there is no such line, or more than one.
    """
    kept = [line for line in lines.splitlines(keepends=True) if "fit_mixing_weights(" not in line]
    if len(kept) != len(lines.splitlines()) - 1:
        raise ValueError("not exactly one of the README's lines calls fit_mixing_weights")
    return "".join(kept)


def adapted(lines: str, inputs: Inputs) -> str:
    """The README's lines with the names of a task in place of those that are printed.

    Raises:
        ValueError: one of the printed names is not there.
    """
    replaced = {
        '"org/base-model"': repr(str(inputs.base)),
        "num_labels=2": f"num_labels={inputs.classes}",
        '["me/lora-a", "you/lora-b", "./lora-c"]': repr([str(folder) for folder in inputs.adapters]),
    }
    for printed, own in replaced.items():
        if printed not in lines:
            raise ValueError(f"the README's lines have no {printed}")
        lines = lines.replace(printed, own)
    return lines


def run_printed(lines: str, inputs: Inputs, k: int, seed: int, output: Path) -> Record:
    """Run the README's lines on a draw of the script's; the accuracy of their `model` in percent, and its weights."""
    from few_shot import draw, encode_classes
    from few_shot_text_classification import TextArguments

    arguments = TextArguments(
        str(inputs.base), str(inputs.data), adapters=list(map(str, inputs.adapters)), k=k, max_length=TOKENS
    )
    support, test, _ = encode_classes(*draw(arguments, seed, ["text"], "label"), "label")
    tokenizer = AutoTokenizer.from_pretrained(inputs.base)
    train, judged = (
        data.map(
            lambda row: dict(tokenizer(row["text"], truncation=True, max_length=TOKENS, padding="max_length")),
            remove_columns="text",
        )
        for data in (support, test)
    )
    output.mkdir(exist_ok=True)
    names: dict[str, Any] = {"train_dataset": train}
    AcceleratorState._reset_state(reset_partial_state=True)
    set_seed(seed)
    with chdir(output), _without_talk():
        exec(compile(adapted(lines, inputs), str(README), "exec"), names)
    model = names["merged"].eval()
    hits = []
    with torch.no_grad():
        for batch in judged.with_format("torch").iter(32):
            labels = batch.pop("labels")
            hits += (model(**batch).logits.argmax(-1) == labels).tolist()
    return {"accuracy": round(100 * float(np.mean(hits)), 4), "weights": _means(names["config"], output / "composed")}


def _means(config: Any, folder: Path) -> Mapping[str, float]:
    from peft_composition.analysis.report import weights_table
    from peft_composition.checkpoint.saved import saved_mixing_weights

    return {row.adapter: round(row.mean, 4) for row in weights_table(saved_mixing_weights(folder))}


@contextmanager
def _without_talk() -> Iterator[None]:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # that upstream heads are not used is what is wanted here
        yield
