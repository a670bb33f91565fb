"""Simulated pools of candidates on cached features: the stated chance that a pick is worse, beside what is true of it.

Candidates are stand-ins (`stand_in.py`): mixes of the task's adapters and the base; the change that an adapter makes,
with its coordinates shuffled, which is as large and of no use; and random changes of low rank. They are selected as
`select_adapters` does. Whether the pick is worse is known from the task's test examples, by the nearest class mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from peft_composition.choosing.ladder import _levels
from peft_composition.choosing.risk import risk_of
from peft_composition.choosing.rounds import in_rounds
from peft_composition.choosing.select import FINALISTS
from peft_composition.choosing.slopes import mean_margin
from peft_composition.choosing.trials import SLOPES, Trial, apartness
from peft_composition.evidence.scores import leave_one_out_distances, margins

from .bench import BASE, UNIFORM, Bench
from .calibration import CHOSE
from .markdown import table
from .records import Record
from .stand_in import Corners


SHOTS, SIZES, KINDS = (2, 5, 20), (5, 20, 100), ("weak", "mixed")
POOLS = 8  # of each kind, K and size
MOST_CLASSES = 10  # at K = 20
RANK = 16
EDGES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 1.0)
Change = Callable[[Corners], Tensor]


def simulate(bench: Bench, seeds: Sequence[int], known: Sequence[Record] = ()) -> Iterator[Record]:
    """A record for each K, number of candidates and kind of pool: "weak" has no mixes of adapters, "mixed" has some.

    Args:
        bench: a task; its seeds' draws of 20 per class are what pools draw from.
        seeds: of these draws.
        known: records that there are; what they have is not done again.

    Yields:
        `"stated"` and `"gain"` have an entry for each pool: the stated chance, and the true gain in accuracy.
    """
    facts = bench.facts
    done = {(r["k"], r["candidates"], r["pool"]) for r in known if {**r, **facts} == r}
    most = max(SHOTS) if bench.classes <= MOST_CLASSES else 5
    rows = sorted({row for seed in seeds for row in bench.support((most, seed))})
    labels = torch.tensor([bench.pool[row] for row in rows])
    names = (*bench.names, UNIFORM, BASE)
    support = Corners.of({name: bench._kept(name, "support", rows) for name in names}, bench.names)
    tests = Corners.of({name: bench.features(name, "test") for name in names}, bench.names)
    for k, size, kind in product(SHOTS, SIZES, KINDS):
        if (k, size, kind) in done or k > most:
            continue
        found = []
        for number in range(POOLS):
            generator = np.random.default_rng([k, size, KINDS.index(kind), number])
            places = np.concatenate(
                [generator.choice(np.flatnonzero(labels == own), k, replace=False) for own in labels.unique()]
            )
            drawn = Corners(support.adapters[:, places], support.uniform[places], support.base[places])
            changes = _candidates(drawn, size, kind, generator)
            pick, stated = _select(drawn, changes, labels[places], number)
            truth = bench.judged_labels["test"]
            gain = _accuracy(changes[pick](drawn), labels[places], changes[pick](tests), truth)
            gain -= _accuracy(drawn.base, labels[places], tests.base, truth)
            found.append((round(stated, 4), round(gain, 4)))
        both = [list(values) for values in zip(*found)]
        yield {**facts, "k": k, "candidates": size, "pool": kind, "stated": both[0], "gain": both[1]}


def _candidates(corners: Corners, count: int, kind: str, generator: np.random.Generator) -> list[Change]:
    share = 0.0 if kind == "weak" else generator.uniform(0.05, 0.5)
    return [_candidate(corners, share, generator) for _ in range(count)]


def _candidate(corners: Corners, share_of_mixes: float, generator: np.random.Generator) -> Change:
    adapters, width = len(corners.adapters), corners.base.shape[1]
    if generator.uniform() < share_of_mixes:
        weights = torch.from_numpy(generator.dirichlet([0.5] * adapters) * generator.uniform(0.1, 1)).float()
        return lambda own: own.mixed(weights)
    if generator.uniform() < 0.5:
        down, up = generator.standard_normal((width, RANK)), generator.standard_normal((RANK, width))
        size = np.exp(generator.uniform(np.log(0.05), np.log(1.5)))
        random = torch.from_numpy(size * down @ up / (width * RANK) ** 0.5).float()
        return lambda own: own.base + own.base @ random
    which, size = int(generator.integers(adapters)), generator.uniform(0.1, 1)
    order, signs = generator.permutation(width), torch.from_numpy(generator.choice([-1.0, 1.0], width)).float()
    return lambda own: own.base + size * (own.adapters[which] - own.base)[:, order] * signs


def _select(corners: Corners, changes: Sequence[Change], labels: Tensor, seed: int) -> tuple[int, float]:
    """The pick of sequential halving and what is stated of it, as `select_adapters` finds them; nobody has a head."""
    levels = torch.tensor(_levels(labels.tolist(), seed))
    sizes = [int((levels <= rung).sum()) for rung in range(int(levels.max()) + 1)]
    features = {0: corners.base, **{number: change(corners) for number, change in enumerate(changes, start=1)}}
    base = corners.base.double().requires_grad_()
    along = torch.autograd.grad(mean_margin(base, labels), base)[0]

    def run(rung: int, numbers: Sequence[int]) -> dict[int, Trial]:
        nothing = torch.empty(0)
        if rung == SLOPES:
            return {
                own: Trial(nothing, nothing.bool(), _slope(features[own] - corners.base, along)) for own in numbers
            }
        rows, found = levels <= rung, {}
        if rung == 0:
            return {own: Trial(nothing, nothing.bool(), apart=apartness(features[own][rows])) for own in numbers}
        for own in (0, *numbers):
            values = margins(leave_one_out_distances(features[own][rows], labels[rows]))
            found[own] = Trial(values, values > 0)
        return found

    found = in_rounds(run, sizes, 1, len(changes), FINALISTS, True)
    return found.order[0] - 1, risk_of(found.first, found.last, found.order[0], are_left_out=True)


def _slope(change: Tensor, along: Tensor) -> float:
    """Of a change of features, as of one of weights: it is about 0.8 for a random one."""
    size = float(change.double().norm() * along.square().mean().sqrt())
    return abs(float((change * along).sum())) / size if size else 0.0


def _accuracy(features: Tensor, labels: Tensor, tests: Tensor, truth: Tensor) -> float:
    means = torch.stack([features[labels == own].mean(0) for own in labels.unique()])
    return float((torch.cdist(tests, means).argmin(1) == truth).double().mean())


def tables(records: Sequence[Record]) -> dict[str, str]:
    """What is stated beside how often it is true: in bins, on tasks that chose the formula and on others; by K, N."""
    halves: dict[str, list[Record]] = {"chose": [], "others": []}
    for record in records:
        halves["chose" if (record["scenario"], record["target"]) in CHOSE else "others"].append(record)
    found = {}
    for name, some in halves.items():
        rows = [_row(f"{100 * low:.0f} to {100 * high:.0f}%", some, low, high) for low, high in pairwise(EDGES)]
        found[f"risk-{name}"] = table(["stated", "pools", "stated, mean", "true"], [*rows, _row("all", some)])
    parts = []
    for key, values in (("k", SHOTS), ("candidates", SIZES), ("pool", KINDS)):
        for value in values:
            some = [record for record in halves["others"] if record[key] == value]
            title = {"k": f"K = {value}", "candidates": f"{value} candidates", "pool": f"{value} pools"}[key]
            parts.append([*_row(title, some), *_row("", some, 0.0, 0.1)[1:]])
    heads = ["other tasks", "pools", "stated, mean", "true", "stated below 10%", "stated, mean", "true"]
    return {**found, "risk-by": table(heads, parts)}


def _row(name: str, records: Sequence[Record], low: float = 0.0, high: float = 1.0) -> list[str]:
    """How many pools have a stated chance in a range, its mean, and the share whose pick is worse (half if equal)."""
    pairs = [pair for record in records for pair in zip(record["stated"], record["gain"])]
    own = [(stated, gain) for stated, gain in pairs if low <= stated < high + (high == 1.0)]
    if not own:
        return [name, "0", "-", "-"]
    worse = np.mean([0.5 if gain == 0 else float(gain < 0) for _, gain in own])
    return [name, str(len(own)), f"{100 * np.mean([stated for stated, _ in own]):.0f}%", f"{100 * worse:.0f}%"]
