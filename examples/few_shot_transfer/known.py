"""Verdicts on tasks whose answer is known: a user has K examples per class and some test examples, and many more tell.

Methods are run in the models themselves, a fresh LoRA on all blocks included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from peft_composition.comparing.differences import over_draws
from peft_composition.comparing.heads import Budget
from peft_composition.comparing.methods import BASE, EVIDENCE, FRESH, UNIFORM, run
from peft_composition.comparing.rows import Rows
from peft_composition.comparing.tasks import Classes, Split
from peft_composition.comparing.verdict import ROPE, judge

from .bench import Bench
from .markdown import table
from .records import Record


SEEN = 200  # test examples that the user has
METHODS = (BASE, FRESH, UNIFORM, EVIDENCE)


def outcomes(bench: Bench, k: int, seeds: Sequence[int], progress: bool = True) -> Iterator[Record]:
    """Whether each method is right on each test example, for every draw.

    Args:
        bench: a task of sentences; its test examples judge.
        k: examples of each class.
        seeds: of the draws.
        progress: whether to show a progress bar.
    """
    drawn = [bench.support((k, seed)) for seed in seeds]
    used = sorted({index for own in drawn for index in own})
    tests = bench.judged["test"]
    support = Rows(bench.model.encode(bench.task.train.select(used)), bench.model.collate)
    rows = support.joined(Rows(bench.model.encode(tests), bench.model.collate))
    place = {index: number for number, index in enumerate(used)}
    judged_by = torch.arange(len(used), len(rows))
    splits = [Split(torch.tensor([place[index] for index in own]), judged_by) for own in drawn]
    base = bench.model.build(bench.classes, 0)
    adapters: list[Any] = [{"path": str(own.folder), "name": own.name} for own in bench.adapters]
    task = Classes(base, rows, None, Budget(), "no")
    found, _ = run(task, base, adapters, splits, METHODS, (0.5, 1.0), 8, 0, progress)
    for number, seed in enumerate(seeds):
        correct = {own.name: [int(value) for value in own.judged[number].right] for own in found}
        yield {
            **bench.facts,
            "k": k,
            "seed": seed,
            "methods": {name: "".join(map(str, values)) for name, values in correct.items()},
        }


def verdicts(records: Sequence[Record]) -> str:
    """What the user's test examples say, beside what the others say, for every draw, as Markdown."""
    rows = []
    for record in records:
        right = {name: np.array([float(bit) for bit in bits]) for name, bits in record["methods"].items()}
        order = np.random.default_rng(record["seed"]).permutation(len(right[EVIDENCE]))
        seen, rest = order[:SEEN], order[SEEN:]
        others = [name for name in right if name not in (UNIFORM, EVIDENCE)]
        for judged in (EVIDENCE, UNIFORM):
            differences = np.stack([right[judged] - right[name] for name in others], axis=-1)
            scores = [float(right[name][seen].mean()) for name in others]
            verdict = judge(judged, others, scores, over_draws(differences[None, seen]), ROPE)
            words = {"helps": verdict.helps, "equivalent": verdict.equivalent, "harms": verdict.harms}
            sure = words.get(verdict.word)
            truth = float(right[judged][rest].mean()) - max(float(right[name][rest].mean()) for name in others)
            rows.append(
                [
                    f"`{record['scenario']}`, {record['target']}",
                    str(record["seed"]),
                    judged,
                    verdict.word if sure is None else f"{verdict.word} ({100 * sure:.0f}%)",
                    f"{100 * verdict.difference:+.1f} against {verdict.against}",
                    f"{100 * truth:+.1f} on {len(rest):,}",
                ]
            )
    return table(["task", "draw", "judged", f"verdict from {SEEN} test examples", "points", "truth"], rows)
