"""How well, and at what cost, selectors find the related adapters among 256: evidence, halving, accuracy, chance.

    python -m benchmarks.selecting --folder build/selecting

The pool has adapters that the study trained on sentiment (related to movie reviews) and on topics (unrelated), each
whole and at half its size, random ones of the same norms, and broken ones. Features are computed once and kept in the
folder; draws of K examples of a class use them. `--cost` measures `select_adapters` itself, in a process for each N.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from peft_composition.choosing.ladder import _levels
from peft_composition.choosing.risk import chance_of_harm
from peft_composition.choosing.select import FINALISTS, _kept, _plan, select_adapters
from peft_composition.evidence.scores import LeftOut, leave_one_out_distances, log_likelihoods, margins
from peft_composition.evidence.streamed import read_in_turn

from . import machine


sys.path.append(str(Path(__file__).parents[1] / "examples"))  # the study

from few_shot_transfer import scenario as scenarios
from few_shot_transfer.bench import features_of
from few_shot_transfer.data import Tasks, balanced, few_shot, labels_of
from few_shot_transfer.models import Classifier
from few_shot_transfer.upstream import foundation, train_adapter
from random_lora import with_random_factors

from . import planted


RELATED = {"vader-domains": ("amazon", "nyt", "tweets")}
UNRELATED = {"distractors": ("reuters", "g1-10", "g11-20"), "newsgroups-labels": ("g1-5", "g6-10", "g11-15", "g16-20")}
BROKEN = 8
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HERE = Path(__file__).parent
SELECTORS = ("margins", "margins, halving", "likelihood", "likelihood, halving", "accuracy", "chance")


def pool(folder: Path, trained: Path, count: int) -> list[Path]:
    """The candidates, made where they are not there yet; those that are related begin with "related"."""
    made = folder / f"pool-{count}"
    if not (made / "done").is_file():
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        sources = []
        for kind, group in (("related", RELATED), ("unrelated", UNRELATED)):
            for name, tasks in group.items():
                scenario = scenarios.load(name)
                data, model = Tasks(scenario), foundation(scenario, trained / "foundation")
                for task in tasks:
                    rank = scenario.upstream.ranks[0]
                    source = train_adapter(scenario, task, rank, data, model, trained / "upstream").folder
                    sources.append(source)
                    _copy(source, made / f"{kind}-{task}", 1.0)
                    _copy(source, made / f"{kind}-{task}-half", 0.5)
        number = 0
        while len([*made.iterdir()]) < count:
            source = sources[number % len(sources)]
            is_broken = number < BROKEN
            own = made / (f"broken-{number}" if is_broken else f"random-{number:03}")
            _copy(source, own, 1.0)
            tensors = with_random_factors(load_file(source / WEIGHTS), number)
            save_file(tensors, own / WEIGHTS)
            if is_broken:
                (own / WEIGHTS).write_bytes((own / WEIGHTS).read_bytes()[: 1000 * (number + 1)])
            number += 1
        (made / "done").touch()
    return sorted(path for path in made.iterdir() if path.is_dir())


def _copy(source: Path, target: Path, scale: float) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.md", "study.json"))
    config = json.loads((target / CONFIG).read_text())
    config["lora_alpha"] *= scale
    (target / CONFIG).write_text(json.dumps(config))


def features(model: Classifier, candidates: Sequence[Path], rows: Any, folder: Path) -> dict[str, Tensor]:
    """Of each candidate that can be read, and of the base, on some rows."""
    base = model.build(2, 0)
    found: dict[str, Tensor] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for path in tqdm([Path("base"), *candidates], desc="Features"):
        kept = folder / f"{path.name}-{len(rows)}.pt"
        if not kept.is_file():
            try:
                mix = read_in_turn(base, [str(path)] if path.name != "base" else [str(candidates[-1])])
                with (mix[0] if path.name != "base" else mix[-1]).switch():
                    torch.save(features_of(base, model, rows), kept)
            except ValueError:
                continue
        found[path.name] = torch.load(kept)
    return found


def draws(
    found: dict[str, Tensor], labels: Tensor, tests: Tensor, shots: Sequence[int], seeds: int
) -> Iterator[dict[str, Any]]:
    """What each selector picks in each draw: the accuracy of its pick, of the best one, and of the base."""
    names = sorted(own for own in found if own != "base")
    related = {name for name in names if name.startswith("related")}
    everything = torch.stack([found[name] for name in [*names, "base"]])
    support, test = everything[:, : len(labels)], everything[:, len(labels) :]
    for k in shots:
        for seed in range(seeds):
            rows = few_shot(labels.tolist(), k, seed)
            own = labels[rows]
            means = torch.stack([support[:, rows][:, own == label].mean(1) for label in (0, 1)], dim=1)
            accuracy = (torch.cdist(test, means).argmin(2) == tests).double().mean(1)
            whole = [leave_one_out_distances(part[rows], own) for part in support]
            values = torch.stack([margins(left) for left in whole])
            likelihoods = torch.stack([log_likelihoods(left) for left in whole])
            likely = likelihoods[:-1].mean(1)
            generator = np.random.default_rng(seed)
            shuffled = torch.from_numpy(generator.permutation(len(names)))
            right = (values[:-1] > 0).double().mean(1)
            order, cost, screened = _halved(support[:, rows], own, seed, margins)
            likely_order, _, likely_screened = _halved(support[:, rows], own, seed, log_likelihoods)
            orders = {
                "margins": values[:-1].mean(1).argsort(descending=True),
                "margins, halving": order,
                "likelihood, halving": likely_order,
                "likelihood": likely.argsort(descending=True),
                "accuracy": shuffled[right[shuffled].argsort(descending=True, stable=True)],
                "chance": shuffled,
            }
            whole_cost = len(names) * len(rows)
            costs = {"margins, halving": cost, "likelihood, halving": cost, "chance": 0}
            for name, found_order in orders.items():
                top = [names[int(place)] for place in found_order[: len(related)]]
                pick = int(found_order[0])
                own_values = likelihoods if name.startswith("likelihood") else values
                gains = own_values[pick] - own_values[-1]
                yield {
                    "k": k,
                    "seed": seed,
                    "selector": name,
                    "pick": float(accuracy[pick]),
                    "best": float(accuracy[:-1].max()),
                    "base": float(accuracy[-1]),
                    "precision": len(related.intersection(top)) / len(related),
                    "cost": costs.get(name, whole_cost) / whole_cost,
                    "risk": chance_of_harm(gains, likely_screened if name.startswith("likelihood") else screened, True)
                    if "halving" in name
                    else None,
                }


def _halved(
    support: Tensor, labels: Tensor, seed: int, measure: Callable[[LeftOut], Tensor]
) -> tuple[Tensor, int, Tensor]:
    """What `select_adapters` does, on features: the order, the examples passed, and the gains of the first round."""
    levels = torch.tensor(_levels(labels.tolist(), seed))
    count = len(support) - 1
    alive, cost, screened = torch.arange(count), 0, torch.empty(0)
    behind: list[Tensor] = []
    plan = _plan(count, int(levels.max()) + 1, FINALISTS, True)
    for place, (rung, _) in enumerate(plan):
        rows = levels <= rung
        own = torch.stack(
            [measure(leave_one_out_distances(support[number][rows], labels[rows])) for number in [*alive, count]]
        )
        cost += len(alive) * int(rows.sum())
        if place == 0:
            screened = own[:-1] - own[-1]
        order = own[:-1].mean(1).argsort(descending=True)
        alive = alive[order]
        if place + 1 < len(plan):
            kept = _kept(len(alive), FINALISTS)
            behind.insert(0, alive[kept:])
            alive = alive[:kept]
    return torch.cat([alive, *behind]), cost, screened


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each selector and K, with 95% intervals over draws."""
    text = [
        "| K | selector | regret, points | related among its first | cost | worse than the base |",
        "| --- " * 6 + "|",
    ]
    for k in sorted({line["k"] for line in lines}):
        for name in SELECTORS:
            own = [line for line in lines if (line["k"], line["selector"]) == (k, name)]
            regret = np.array([100 * (line["best"] - line["pick"]) for line in own])
            half = 1.96 * regret.std(ddof=1) / len(own) ** 0.5
            harmed = np.mean([line["pick"] < line["base"] for line in own])
            stated = [line["risk"] for line in own if line["risk"] is not None]
            said = f" (stated {100 * np.mean(stated):.0f} %)" if stated else ""
            text.append(
                f"| {k} | {name} | {regret.mean():.1f} ± {half:.1f} | "
                f"{100 * np.mean([line['precision'] for line in own]):.0f} % | "
                f"{100 * np.mean([line['cost'] for line in own]):.0f} % | {100 * harmed:.0f} %{said} |"
            )
    return "\n".join(text)


def cost_of(model: Classifier, candidates: Sequence[Path], rows: Any) -> dict[str, Any]:
    """Seconds and peak memory of `select_adapters` in this process."""
    encoded = model.encode(rows)
    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = select_adapters(
        model.build(2, 0), candidates, [encoded[n] for n in range(len(encoded))], collate=model.collate, progress=False
    )
    return {
        "candidates": len(candidates),
        "examples": len(encoded),
        "passed": found.passed,
        "seconds": time.perf_counter() - started,
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "before MB": before / 1024,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Called from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/selecting"), help="for pools and features")
    parser.add_argument("--trained", type=Path, help="where the study keeps its adapters; default: the folder")
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--support", type=int, default=40, help="examples of a class that draws are taken from")
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--cost", type=int, nargs="*", help="instead: measure select_adapters with so many candidates")
    parser.add_argument("--small", action="store_true", help="instead: a tiny network with planted adapters")
    parser.add_argument("--alone", action="store_true", help="with --cost N: in this process")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args(words)
    if options.small:
        with tempfile.TemporaryDirectory() as folder:
            candidates = planted.make_pool(Path(folder), options.candidates, BROKEN)
            (x, labels), (more, tests) = planted.points(200, 1), planted.points(2000, 2)
            found = planted.features(candidates, torch.cat([x, more]))
        lines = list(draws(found, labels, tests, options.shots, options.draws))
        _write(options.out / "selecting-small.json", candidates, found, lines)
        return
    trained = options.trained or options.folder
    scenario = scenarios.load("vader-domains")
    model = foundation(scenario, trained / "foundation")
    assert isinstance(model, Classifier)
    task = Tasks(scenario)["movies"]
    drawn = few_shot(labels_of(task.train), options.support, 0)
    if options.alone:
        rows = task.train.select(few_shot(labels_of(task.train), 5, 0))
        print(json.dumps(cost_of(model, pool(options.folder, trained, options.cost[0]), rows)))
        return
    if options.cost is not None:
        lines = []
        for count in options.cost or [64, 128, 256, 512]:
            pool(options.folder, trained, count)
            command = [sys.executable, "-m", "benchmarks.selecting", "--folder", str(options.folder), "--trained",
                       str(trained), "--alone", "--cost", str(count)]  # fmt: skip
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            lines.append(json.loads(done.stdout.splitlines()[-1]))
            print(lines[-1])
        described = {"machine": machine.describe(torch.device("cpu")), "cells": lines}
        (options.out / "selecting-cost-cpu.json").write_text(json.dumps(described, indent=2) + "\n")
        return
    candidates = pool(options.folder, trained, options.candidates)
    test_rows = balanced(labels_of(task.test), options.test)
    rows = concatenate_datasets([task.train.select(drawn), task.test.select(test_rows)])
    found = features(model, candidates, rows, options.folder / "features")
    labels = torch.tensor([labels_of(task.train)[row] for row in drawn])
    tests = torch.tensor([labels_of(task.test)[row] for row in test_rows])
    lines = list(draws(found, labels, tests, options.shots, options.draws))
    _write(options.out / "selecting-cpu.json", candidates, found, lines)


def _write(path: Path, candidates: Sequence[Path], found: Mapping[str, Tensor], lines: list[dict[str, Any]]) -> None:
    facts = {
        "candidates": len(candidates),
        "readable": len(found) - 1,
        "related": sum(name.startswith("related") for name in found),
        "lines": lines,
    }
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(table(lines))


if __name__ == "__main__":
    main()
