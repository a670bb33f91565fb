"""How well, and at what cost, selectors find the adapters of a task among 256, and what `select_adapters` takes.

  pools    a task on a small ViT of the study: trained adapters, what is made of them, broken ones
  small    a tiny network, in a minute
  cost     seconds and peak memory of `select_adapters` itself, in a fresh process for each number of candidates
  report   results -> the block of docs/how-to/choose-adapters.md
  all      all of these

Features and what is trained are kept in the folder; results are benchmarks/results/selecting-*.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from torch import Tensor

from .. import machine
from . import planted, pool
from .cost import measure, so_many
from .features import features
from .judged import judge
from .report import write_block
from .targets import RECIPES, Target, few_shot, labels_of


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "choose-adapters.md"
RESULTS = Path(__file__).parents[1] / "results"
SUPPORT = 40  # of each class; what draws are taken from
TESTS = 150
CANDIDATES = 256
OF_COST = "clothes"
COSTS = ((64, 5, True), (256, 5, True), (512, 5, True), (256, 5, False), (256, 20, True), (256, 20, False))


def main(words: Sequence[str] | None = None) -> None:
    """Called from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selecting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("pools", "small", "cost", "report", "all"))
    parser.add_argument("--folder", type=Path, default=Path("build/selecting"), help="for pools and features")
    parser.add_argument("--trained", type=Path, help="where the study keeps its adapters; default: the folder")
    parser.add_argument("--targets", nargs="+", choices=RECIPES, default=["clothes"])
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--first-seed", type=int, default=100, help="of the draws; what was tuned saw those below 100")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--alone", type=int, nargs=3, help=argparse.SUPPRESS)  # one line of the costs
    options = parser.parse_args(words)
    options.trained = options.trained or options.folder
    if options.alone:
        print(json.dumps(_cost(options, *options.alone)))
        return
    steps: dict[str, Callable[[argparse.Namespace], None]] = {
        "small": _small,
        "pools": _pools,
        "cost": _costs,
        "report": lambda own: write_block(own.out, own.page),
    }
    for name, step in steps.items():
        if options.what in (name, "all"):
            step(options)


def _small(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        candidates = planted.make_pool(Path(folder), CANDIDATES)
        (x, labels), (more, tests) = planted.points(200, 1), planted.points(2000, 2)
        read = planted.reading(torch.cat([x, more]))
        found = features(planted.network(), candidates, read(range(2200)), Path(folder, "features"))
        lines = []
        for k in options.shots:
            supports = [few_shot(labels.tolist(), k, seed) for seed in _seeds(options)]
            own = judge(
                found, labels, tests, supports, Path(folder), planted.network(), planted.reading(x), options.first_seed
            )
            lines += [{"k": k, **line} for line in own]
    _write(options.out / "selecting-small.json", candidates, found, lines)


def _seeds(options: argparse.Namespace) -> range:
    return range(options.first_seed, options.first_seed + options.draws)


def _pools(options: argparse.Namespace) -> None:
    for name in options.targets:
        target = Target(name, SUPPORT, TESTS, options.trained)
        folder = options.folder / "pools" / name
        candidates = pool_of(target, folder, CANDIDATES)
        base = target.model.build(target.classes, 0).eval()
        rows = concatenate_datasets([target.support, target.test])
        found = features(base, candidates, target.reading(rows, range(len(rows))), options.folder / f"features-{name}")
        labels, tests = (torch.tensor(labels_of(own)) for own in (target.support, target.test))
        lines = []
        for k in options.shots:
            supports = [few_shot(labels.tolist(), k, seed) for seed in _seeds(options)]
            own = judge(
                found,
                labels,
                tests,
                supports,
                folder,
                base,
                partial(target.reading, target.support),
                options.first_seed,
            )
            lines += [{"k": k, **line} for line in own]
        _write(options.out / f"selecting-{name}.json", candidates, found, lines)


def pool_of(target: Target, folder: Path, size: int) -> list[Path]:
    """The candidates, made where they are not there yet."""
    done = folder / "planted"
    if not done.is_file():
        target.plant(folder)
        done.touch()
    if len(pool.candidates_in(folder)) < size:
        related, unrelated = (list(target.of_the_study(own).values()) for own in (True, False))
        pool.fill(folder, related, unrelated, size)
    return pool.candidates_in(folder)


def _costs(options: argparse.Namespace) -> None:
    cells = []
    for count, k, halving in COSTS:  # each in a process of its own, which has no peak of another
        command = [
            *(sys.executable, "-m", "benchmarks.selecting", "cost", "--folder", str(options.folder)),
            *("--trained", str(options.trained), "--alone", str(count), str(k), str(int(halving))),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        cells.append(json.loads(done.stdout.splitlines()[-1]))
        print(cells[-1])
    described = {"machine": machine.describe(torch.device("cpu")), "cells": cells}
    (options.out / "selecting-cost-cpu.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _cost(options: argparse.Namespace, count: int, k: int, halving: int) -> dict[str, Any]:
    """Of one selection in this process."""
    target = Target(OF_COST, SUPPORT, TESTS, options.trained)
    candidates = pool_of(target, options.folder / "pools" / OF_COST, CANDIDATES)
    encoded = target.model.encode(target.support.select(few_shot(labels_of(target.support), k, 0)))
    rows = [encoded[place] for place in range(len(encoded))]
    with tempfile.TemporaryDirectory() as folder:
        some = so_many(candidates, count, Path(folder))
        base = target.model.build(target.classes, 0)
        return {"k": k, **measure(base, some, rows, collate=target.model.collate, halving=bool(halving))}


def _write(path: Path, candidates: Sequence[Path], found: dict[str, Tensor], lines: list[dict[str, Any]]) -> None:
    kinds = [own.name.partition("-")[0] for own in candidates]
    facts = {
        "candidates": len(candidates),
        "readable": len(found) - 1,
        **{kind: kinds.count(kind) for kind in pool.KINDS},
        "lines": lines,
    }
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
