"""Weights chosen by evidence, over many draws: what they gain on the uniform mix of the same adapters.

Bodies stay frozen. Features of the uniform mix, of each adapter alone and of the bare model are computed once for all
draws; a mix that evidence chose is run anew, module by module. On all of them the same fresh head is fitted.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from peft_composition import CompositionConfig
from peft_composition.evidence.fit import put_weights
from peft_composition.evidence.passes import Composition, candidates, composition_in
from peft_composition.evidence.scores import (
    LeftOut,
    bayesian_bootstrap,
    leave_one_out_distances,
    log_likelihoods,
    margins,
)
from peft_composition.evidence.weights import spread_uniform, stack, vote

from .data import Tasks, few_shot, labels_of
from .downstream import judged
from .models import Classifier
from .records import Record
from .scenario import Scenario, Setting
from .training import Body, fit_features
from .upstream import Adapter, foundation, peft_options, train_adapter


BATCH = 64
BOOTSTRAPS = 500
METHODS = ("likelihood-vote", "vote", "stacking")
NOT_MIXED = "validation pick"


@dataclass
class Bench:
    """A downstream task with a composition whose weights can be set, and the features of its parts.

    Attributes:
        composition: fixed, at first uniform.
        rows: encoded rows by split: "support" (all that any draw needs), "validation" and "test".
        labels: of the rows.
        places: of an example of the training pool among the rows of "support".
        features: by candidate and split.
    """

    setting: Setting
    composition: Composition
    model: Classifier
    rows: dict[str, Dataset]
    labels: dict[str, Tensor]
    places: dict[int, int]
    features: dict[tuple[str, str], Tensor]


def compare(
    scenario: Scenario,
    folder: Path,
    target: str | None,
    shots: Sequence[int],
    seeds: int,
    methods: Sequence[str],
    progress: bool = True,
) -> Iterator[Record]:
    """Measure a scenario's downstream tasks, draw by draw.

    Args:
        scenario: of classification.
        folder: where adapters are kept.
        target: the downstream task; None: all.
        shots: K.
        seeds: draws for each K.
        methods: of choosing weights, among `METHODS`.
        progress: whether to show a progress bar.

    Yields:
        A record for each draw and contender: K = 1 has none for the methods, which choose the uniform mix there.
    """
    tasks = Tasks(scenario)
    model = foundation(scenario, folder / "foundation", progress)
    assert isinstance(model, Classifier)
    for setting in scenario.settings():
        if target not in (None, setting.target):
            continue
        adapters = [
            train_adapter(scenario, name, setting.rank, tasks, model, folder / "upstream", progress)
            for name in setting.upstream
        ]
        task = tasks[setting.target]
        pool = labels_of(task.train)
        draws = {(k, seed): few_shot(pool, k, seed) for k in shots for seed in range(seeds)}
        chosen = sorted({index for support in draws.values() for index in support})
        data = {"support": task.train.select(chosen), **judged(scenario, task, model)}
        bench = Bench(
            setting,
            composition_in(_fixed(model.build(len(task.classes), 0), adapters, scenario), None),
            model,
            {split: model.encode(rows) for split, rows in data.items()},
            {split: torch.tensor(labels_of(rows)) for split, rows in data.items()},
            {index: place for place, index in enumerate(chosen)},
            {},
        )
        _cache_features(bench)
        description = f"{scenario.name} {setting.target}"
        with tqdm(total=len(draws), desc=description, unit="draw", disable=not progress) as bar:
            for (k, seed), support in draws.items():
                facts = {"scenario": scenario.name, "target": setting.target, "k": k, "seed": seed}
                for record in _draw(bench, scenario, [bench.places[index] for index in support], k, seed, methods):
                    yield {**facts, **record}
                bar.update()


def _fixed(base: nn.Module, upstream: Sequence[Adapter], scenario: Scenario) -> PeftModel:
    """A composition with weights that can be set, at first the same for all."""
    adapters: list[Any] = [{"path": adapter.folder, "name": adapter.name} for adapter in upstream]
    even = [1 / len(adapters)] * len(adapters)
    config = CompositionConfig(adapters=adapters, mixing="fixed", weights=even, **peft_options(scenario))
    with warnings.catch_warnings():
        # That the upstream heads are not used is what we want here: the new task gets a head of its own.
        warnings.filterwarnings("ignore", message="These entries of the upstream adapters")
        return get_peft_model(base, config)


def _draw(
    bench: Bench, scenario: Scenario, support: list[int], k: int, seed: int, methods: Sequence[str]
) -> Iterator[Record]:
    """What every contender makes of one support set."""
    labels = bench.labels["support"][support]
    names = bench.composition.config.adapter_names

    def outcome(train: Tensor, features: Mapping[str, Tensor]) -> dict[str, float]:
        head = fit_features(train, labels, len(bench.labels["test"].unique()), scenario.downstream, seed)
        return {split: _accuracy(head, own, bench.labels[split]) for split, own in features.items()}

    judged_on = ("validation", "test")
    found = {}
    for candidate in (*names, "uniform", "base"):
        of_splits = {split: bench.features[candidate, split] for split in judged_on}
        found[candidate] = outcome(bench.features[candidate, "support"][support], of_splits)
        kind = "single" if candidate in names else candidate
        yield {"method": kind, "adapter": candidate if kind == "single" else None, **_named(found[candidate])}
    picked = max(names, key=lambda name: found[name]["validation"])  # the first one, where several are best
    yield {"method": NOT_MIXED, "adapter": picked, **_named(found[picked])}
    if k == 1:
        return
    left = [leave_one_out_distances(bench.features[name, "support"][support], labels) for name in (*names, "uniform")]
    for method in methods:
        started = time.perf_counter()
        weights = weights_by(method, left, seed).tolist()
        put_weights(bench.composition, weights)
        train = _features(bench, bench.rows["support"].select(support))
        accuracy = outcome(train, {"test": _features(bench, bench.rows["test"])})
        rounded = {name: round(weight, 4) for name, weight in zip(names, weights)}
        seconds = round(time.perf_counter() - started, 3)
        yield {"method": method, "adapter": None, **_named(accuracy), "weights": rounded, "seconds": seconds}


def weights_by(method: str, left: Sequence[LeftOut], seed: int) -> Tensor:
    """Mixing weights from distances of each adapter alone and, last, of their uniform mix."""
    if method == "stacking":
        return spread_uniform(stack(torch.stack([log_likelihoods(own) for own in left], dim=1)))
    measure = margins if method == "vote" else log_likelihoods
    values = torch.stack([measure(own) for own in left], dim=1)
    return spread_uniform(vote(values, bayesian_bootstrap(len(values), BOOTSTRAPS, seed)))


def _cache_features(bench: Bench) -> None:
    for candidate in candidates(bench.composition, ("adapter", "uniform", "base")):
        with candidate.switch():
            for split, rows in bench.rows.items():
                bench.features[candidate.name, split] = _features(bench, rows)


@torch.no_grad()
def _features(bench: Bench, rows: Dataset) -> Tensor:
    """What the head would be given, (n, width), computed with similar lengths side by side."""
    body = Body(bench.composition.model.eval())
    order = np.argsort([len(ids) for ids in rows["input_ids"][:]], kind="stable")
    found: list[Tensor] = []
    for start in range(0, len(order), BATCH):
        batch = bench.model.collate([rows[int(index)] for index in order[start : start + BATCH]])
        found.append(body(**batch)["logits"])
    return torch.cat(found)[torch.from_numpy(np.argsort(order, kind="stable"))]


def _accuracy(head: nn.Module, features: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return round(100 * float((head(features).argmax(-1) == labels).double().mean()), 4)


def _named(accuracy: Mapping[str, float]) -> dict[str, Any]:
    return {"accuracy": accuracy["test"], "validation": accuracy.get("validation")}


# The table


def gains(records: Sequence[Record], methods: Sequence[str] = METHODS) -> str:
    """Points of accuracy against the uniform mix, paired by draw, with 95% intervals, as Markdown."""
    tasks = dict.fromkeys((record["scenario"], record["target"]) for record in records)
    shots = sorted({record["k"] for record in records})
    rows = ["best single (by test)", NOT_MIXED, "base", *methods]
    lines = []
    for task in tasks:
        own = [record for record in records if (record["scenario"], record["target"]) == task]
        uniform = {(r["k"], r["seed"]): r["accuracy"] for r in own if r["method"] == "uniform"}
        lines += [
            "",
            f"| `{task[0]}`, {task[1]} | " + " | ".join(f"K = {k}" for k in shots) + " |",
            "| --- |" + " ---: |" * len(shots),
            "| uniform, % | " + " | ".join(f"{_mean(uniform, k):.1f}" for k in shots) + " |",
        ]
        for row in rows:
            values = _values(own, row)
            cells = [_difference(values, uniform, k) for k in shots]
            if any(cell != "-" for cell in cells):
                lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def _values(records: Sequence[Record], row: str) -> dict[tuple[int, int], float]:
    if row != "best single (by test)":
        return {(r["k"], r["seed"]): r["accuracy"] for r in records if r["method"] == row}
    singles = [record for record in records if record["method"] == "single"]
    best = {}
    for k in {record["k"] for record in singles}:  # the adapter that is best on average over the draws
        of_adapter: dict[str, list[float]] = {}
        for record in singles:
            if record["k"] == k:
                of_adapter.setdefault(record["adapter"], []).append(record["accuracy"])
        best[k] = max(of_adapter, key=lambda name: float(np.mean(of_adapter[name])))
    return {(r["k"], r["seed"]): r["accuracy"] for r in singles if r["adapter"] == best[r["k"]]}


def _mean(values: Mapping[tuple[int, int], float], k: int) -> float:
    return float(np.mean([value for (own, _), value in values.items() if own == k]))


def _difference(values: Mapping[tuple[int, int], float], uniform: Mapping[tuple[int, int], float], k: int) -> str:
    pairs = [value - uniform[key] for key, value in values.items() if key[0] == k]
    if len(pairs) < 2:
        return "-"
    mean, error = float(np.mean(pairs)), float(stats.sem(pairs))
    if error == 0:
        return f"{mean:+.1f}"
    low, high = stats.t.interval(0.95, len(pairs) - 1, mean, error)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def append(records: Iterator[Record], path: Path) -> None:
    """Write records to a file of JSON lines as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, sort_keys=True) + "\n")
            file.flush()


def read(path: Path) -> list[Record]:
    """Read them."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
