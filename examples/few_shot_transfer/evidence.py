"""Weights chosen by evidence, and recipes of training from them, over many draws: what they gain on the uniform mix.

Features of the uniform mix, of each adapter alone and of the bare model are computed once for all draws. A mix that
evidence chose is run anew, module by module; training runs on stand-ins for features. All get the same fresh head.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from peft_composition.evidence.fit import weights_by
from peft_composition.evidence.scores import leave_one_out_distances
from peft_composition.evidence.weights import informed

from .bench import BASE, UNIFORM, Bench, Draw
from .data import Tasks
from .gains import NOT_MIXED
from .models import Classifier
from .records import Record, cut_torn_line, write_line
from .scenario import Scenario, Setting
from .stand_in import Corners, Recipe, train
from .training import fit_features
from .upstream import foundation, train_adapter
from .views import VIEWS


METHODS = ("likelihood-vote", "vote", "stacking")
OF_VIEWS = "two-views"  # at K = 1: the margin vote, with two views of each example as its examples
WITH_HEADS = "heads-and-vote"  # the likelihood vote times what the adapters' own heads tell; at K = 1 these alone
FIXED = "evidence, stand-in"
TRAINED = {  # where the weights start, and how head and weights are trained
    "cold": ("uniform", Recipe()),
    "evidence-learned": ("evidence", Recipe()),
    "evidence-learned, gain 4": ("evidence", Recipe(gain=4.0)),
    "as it was: warm-up, then rate 1e-2": ("uniform", Recipe(steps=150, warmup=50)),
}


def open_benches(scenario: Scenario, folder: Path, target: str | None, progress: bool = True) -> Iterator[Bench]:
    """The downstream tasks of a scenario, each with most of its adapters of each rank, trained where they are missing.

    Args:
        scenario: of classification.
        folder: where models, adapters and features are kept.
        target: the downstream task; None: all.
        progress: whether to show progress bars.
    """
    tasks = Tasks(scenario)
    model = foundation(scenario, folder / "foundation", progress)
    assert isinstance(model, Classifier)
    largest: dict[tuple[str, int], Setting] = {}
    for setting in scenario.settings():
        key = setting.target, setting.rank
        if target in (None, setting.target) and len(setting.upstream) > len(
            largest.get(key, replace(setting, upstream=())).upstream
        ):
            largest[key] = setting
    for setting in largest.values():
        adapters = [
            train_adapter(scenario, name, setting.rank, tasks, model, folder / "upstream", progress)
            for name in setting.upstream
        ]
        yield Bench(scenario, setting, tasks[setting.target], adapters, model, folder / "features")


def compare(
    bench: Bench,
    draws: Sequence[Draw],
    methods: Sequence[str],
    trained: Sequence[str] = (),
    known: Sequence[Record] = (),
    progress: bool = True,
) -> Iterator[Record]:
    """Measure a downstream task, draw by draw.

    Args:
        bench: the task.
        draws: K and seeds.
        methods: of choosing weights, among `METHODS`, `WITH_HEADS` and `OF_VIEWS`; each draw's mix is run module by
            module.
        trained: recipes on stand-ins, among `TRAINED`; `FIXED` beside them.
        known: records that there are; what they have is not done again.
        progress: whether to show a progress bar.

    Yields:
        A record for each draw and contender: K = 1 has none for `METHODS`, which choose the uniform mix there, and
        `OF_VIEWS` has none elsewhere.
    """
    facts = bench.facts
    done = {(r["scenario"], r["target"], r["k"], r["seed"], r["method"]) for r in known}
    bench.prepare(draws)
    with tqdm(total=len(draws), desc=" ".join(facts.values()), unit="draw", disable=not progress) as bar:
        for k, seed in draws:
            own = {**facts, "k": k, "seed": seed}
            is_new = {name for name in ("single", *methods, FIXED, *trained) if (*own.values(), name) not in done}
            if "single" in is_new:
                yield from ({**own, **record} for record in _parts(bench, (k, seed)))
            for method in (name for name in methods if name in is_new):
                if method == WITH_HEADS or (method == OF_VIEWS) == (k == 1):
                    yield {**own, **_mixed(bench, (k, seed), method)}
            wanted = [name for name in (FIXED, *trained) if name in is_new] if trained else []
            if wanted:
                yield from ({**own, **record} for record in _stand_ins(bench, (k, seed), wanted))
            bar.update()


def _parts(bench: Bench, draw: Draw) -> Iterator[Record]:
    """Each adapter alone, the uniform mix, the bare model, and the adapter that validation examples pick."""
    found = {}
    for candidate in (*bench.names, UNIFORM, BASE):
        head = head_on(bench, draw, bench.features(candidate, draw))
        found[candidate] = {
            split: _accuracy(head(bench.features(candidate, split)), bench.judged_labels[split])
            for split in ("validation", "test")
        }
        kind = "single" if candidate in bench.names else candidate
        yield {"method": kind, "adapter": candidate if kind == "single" else None, **_named(found[candidate])}
    picked = max(bench.names, key=lambda name: found[name]["validation"])  # the first one, where several are best
    yield {"method": NOT_MIXED, "adapter": picked, **_named(found[picked])}


def _mixed(bench: Bench, draw: Draw, method: str) -> Record:
    """The mix that a method chooses, run module by module."""
    started = time.perf_counter()
    weights = chosen_weights(bench, draw, method).tolist()
    head = head_on(bench, draw, bench.mixed(weights, draw))
    accuracy = _accuracy(head(bench.mixed(weights, "test")), bench.judged_labels["test"])
    seconds = round(time.perf_counter() - started, 3)
    return {
        "method": method,
        "adapter": None,
        **_named({"test": accuracy}),
        "weights": _by_name(bench, weights),
        "seconds": seconds,
    }


def _stand_ins(bench: Bench, draw: Draw, names: Sequence[str]) -> Iterator[Record]:
    """Head and weights trained on stand-ins for features, from uniform weights or from those by evidence."""
    candidates = (*bench.names, UNIFORM, BASE)
    support = Corners.of({name: bench.features(name, draw) for name in candidates}, bench.names)
    test = Corners.of({name: bench.features(name, "test") for name in candidates}, bench.names)
    even = torch.full((len(bench.names),), 1 / len(bench.names), dtype=torch.float64)
    starts = {"uniform": even, "evidence": even if draw[0] == 1 else chosen_weights(bench, draw, METHODS[0])}
    how = bench.scenario.downstream
    for name in names:
        head: nn.Module
        if name == FIXED:
            weights = starts["evidence"].float()
            head = head_on(bench, draw, support.mixed(weights))
        else:
            start, recipe = TRAINED[name]
            labels = bench.labels(draw)
            head, weights = train(support, labels, starts[start], bench.classes, recipe, how.batch_size, draw[1])
        with torch.no_grad():
            accuracy = _accuracy(head(test.mixed(weights)), bench.judged_labels["test"])
        yield {
            "method": name,
            "adapter": None,
            **_named({"test": accuracy}),
            "weights": _by_name(bench, weights.tolist()),
        }


def chosen_weights(bench: Bench, draw: Draw, method: str) -> Tensor:
    """The mixing weights that a method chooses for a draw, shape (N,); their sum may be less than 1."""
    labels = bench.labels(draw)
    candidates = (*bench.names, UNIFORM, BASE)
    if method == OF_VIEWS:
        seen = [torch.cat([bench.view_features(name, view, draw) for view in VIEWS]) for name in candidates]
        left = [leave_one_out_distances(features, labels.repeat(len(VIEWS))) for features in seen]
        return weights_by("vote", left, draw[1])
    if method == WITH_HEADS:
        count = len(bench.names)
        even = torch.full((count,), 1 / count, dtype=torch.float64)
        weights = even if draw[0] == 1 else chosen_weights(bench, draw, METHODS[0])
        return informed(weights, bench.told(draw), labels)
    left = [leave_one_out_distances(bench.features(name, draw), labels) for name in candidates]
    return weights_by(method, left, draw[1])


def head_on(bench: Bench, draw: Draw, features: Tensor) -> nn.Linear:
    """A head fitted to the examples of a draw, given their features."""
    return fit_features(features, bench.labels(draw), bench.classes, bench.scenario.downstream, draw[1])


def _by_name(bench: Bench, weights: Sequence[float]) -> dict[str, float]:
    return {name: round(weight, 4) for name, weight in zip(bench.names, weights)}


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return round(100 * float((logits.argmax(-1) == labels).double().mean()), 4)


def _named(accuracy: Mapping[str, float]) -> dict[str, Any]:
    return {"accuracy": accuracy["test"], "validation": accuracy.get("validation")}


def append(records: Iterator[Record], path: Path) -> None:
    """Write records to a file of JSON lines as they come; a torn last line is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_torn_line(path)
    for record in records:
        write_line(path, json.dumps(record, sort_keys=True))
