"""Gains on the uniform mix judged once more, on examples that no test split had, with the error of the examples, too.

An interval over draws of the support set tells nothing of the few test examples that all draws share: with 200 of them
a paired difference is uncertain by a point or two for that reason alone. Here every draw is judged on all it can be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from scipy import stats
from tqdm import tqdm

from .bench import UNIFORM, Bench, Draw
from .data import balanced, labels_of
from .downstream import correct_answers, packed
from .evidence import WITH_HEADS, chosen_weights, head_on
from .markdown import table
from .records import Record, by_task


SIZE = 600


class Others(NamedTuple):
    """Labelled examples that the study's test sample does not have, or, of the whole, these after that sample.

    Attributes:
        rows: the test sample, of the whole; then those sampled from the rest of the test split and the training pool.
        places: of each in the training pool; -1 for those of the test split.
    """

    rows: Dataset
    places: np.ndarray


class Both(NamedTuple):
    """A mean difference in points, with 95% intervals: over draws alone, and over draws and examples."""

    mean: float
    over_draws: tuple[float, float]
    over_both: tuple[float, float]


def others(bench: Bench, size: int = SIZE, is_whole: bool = False) -> Others:
    """The examples of a task that are neither in its test sample nor among its validation examples.

    Args:
        bench: the task.
        size: at most so many, by chance.
        is_whole: whether the test sample stands before them.
    """
    task, test = bench.task, bench.judged["test"]
    judged = set(balanced(labels_of(task.test), bench.scenario.downstream.test_size))
    left = [index for index in range(len(task.test)) if index not in judged]
    places = np.concatenate([np.full(len(left), -1), np.arange(len(task.train))])
    unseen = concatenate_datasets([task.test.select(left), task.train])
    sample = np.sort(np.random.default_rng(0).permutation(len(unseen))[:size])
    rows, places = unseen.select(sample), places[sample]
    if is_whole:
        rows, places = concatenate_datasets([test, rows]), np.concatenate([np.full(len(test), -1), places])
    return Others(rows, places)


def judge_elsewhere(
    bench: Bench,
    draws: Sequence[Draw],
    size: int = SIZE,
    known: Sequence[Record] = (),
    progress: bool = True,
    is_whole: bool = False,
) -> Iterator[Record]:
    """What the uniform mix and that by evidence and heads get right of the other examples, draw by draw.

    Args:
        bench: the task.
        draws: K and seeds; the examples of a draw are left out of what it is judged on.
        size: at most so many that the test sample does not have.
        known: records that there are; what they have is not done again.
        progress: whether to show a progress bar.
        is_whole: whether the test sample of the study is judged on, too.

    Yields:
        Two records for each draw, as `evidence` writes them, with `correct` in place of a validation accuracy.
    """
    facts = {**bench.facts, "most": size, "whole": is_whole}
    done = {(r["k"], r["seed"]) for r in known if facts.items() <= r.items() and r["method"] == WITH_HEADS}
    wanted = [draw for draw in draws if draw not in done]
    if not wanted:
        return
    bench.prepare(wanted)
    sample = others(bench, size, is_whole)
    labels = torch.tensor(labels_of(sample.rows))
    even = [1 / len(bench.names)] * len(bench.names)
    of_uniform = bench.mixed(even, sample.rows)
    for draw in tqdm(wanted, desc=" ".join(bench.facts.values()), unit="draw", disable=not progress):
        weights = chosen_weights(bench, draw, WITH_HEADS).tolist()
        is_new = ~np.isin(sample.places, bench.support(draw))
        found = {
            UNIFORM: (bench.features(UNIFORM, draw), of_uniform, even),
            WITH_HEADS: (bench.mixed(weights, draw), bench.mixed(weights, sample.rows), weights),
        }
        for method, (support, features, mix) in found.items():
            head = head_on(bench, draw, support)
            with torch.no_grad():
                is_right = (head(features).argmax(1) == labels).numpy()
            yield {
                **facts,
                "k": draw[0],
                "seed": draw[1],
                "method": method,
                "adapter": None,
                "accuracy": round(100 * float(is_right[is_new].mean()), 4),
                **packed(is_right.tolist()),
                "drawn": np.flatnonzero(~is_new).tolist(),
                "weights": dict(zip(bench.names, (round(weight, 4) for weight in mix))),
            }


def gain_of(records: Sequence[Record], method: str, k: int) -> Both | None:
    """What a method gains on the uniform mix in one task, paired by draw and example; None with fewer than two draws.

    The interval over both counts draws and examples as crossed clusters (Cameron, Gelbach and Miller 2011).

    Args:
        records: of `judge_elsewhere`, of one task, judged on the same sample.
        method: in `records`.
        k: examples of each class.
    """
    of_draw = {(r["seed"], r["method"]): r for r in records if r["k"] == k}
    seeds = sorted(seed for seed, own in of_draw if own == method and (seed, UNIFORM) in of_draw)
    if len(seeds) < 2:
        return None
    return crossed(np.stack([_differences(of_draw[seed, method], of_draw[seed, UNIFORM]) for seed in seeds]))


def crossed(differences: np.ndarray) -> Both:
    """The mean of a table of differences and its intervals.

    Args:
        differences: of each draw (row) on each example (column), in points; NaN where a draw has the example. Rows
            count alike.
    """
    draws = len(differences)
    of_rows = np.nanmean(differences, axis=1)
    mean = float(of_rows.mean())
    # What each cell adds to the mean: rows weigh 1 / draws, cells of a row 1 / their number.
    parts = (differences - mean) / (draws * (~np.isnan(differences)).sum(1, keepdims=True))
    parts = np.nan_to_num(parts)
    rows, columns, cells = (float((parts.sum(axis) ** 2).sum()) for axis in (1, 0, ()))
    few = draws / (draws - 1)
    quantile = float(stats.t.ppf(0.975, draws - 1))
    only, both = quantile * (few * rows) ** 0.5, quantile * (few * rows + max(columns - cells, 0.0)) ** 0.5
    return Both(mean, (mean - only, mean + only), (mean - both, mean + both))


def elsewhere_table(records: Sequence[Record], method: str = WITH_HEADS) -> str:
    """Gains on the uniform mix by task and K, over draws and over draws and examples, as Markdown."""
    rows = []
    for (scenario, target), of_task in by_task(records).items():
        for k, is_whole, most in sorted({(record["k"], *_sample(record)) for record in of_task}):
            own = [record for record in of_task if (record["k"], *_sample(record)) == (k, is_whole, most)]
            found = gain_of(own, method, k)
            if found is not None:
                some = [record for record in own if record["method"] == method]
                judged = [record["examples"] - len(record["drawn"]) for record in some]
                over = [f"[{low:+.1f}, {high:+.1f}]" for low, high in (found.over_draws, found.over_both)]
                of_what = f"{np.mean(judged):.0f}{' of all' if is_whole else ''}"
                facts = [str(k), str(len(some)), of_what, f"{found.mean:+.1f}"]
                rows.append([f"`{scenario}`: {target}", *facts, *over])
    header = ["task", "K", "draws", "examples", "points", "over draws", "over draws and examples"]
    return table(header, rows)


def _sample(record: Record) -> tuple[bool, int]:
    return record.get("whole", False), record.get("most", SIZE)


def _differences(own: Record, uniform: Record) -> np.ndarray:
    found = 100.0 * (correct_answers(own).astype(float) - correct_answers(uniform))
    found[own["drawn"]] = np.nan
    return found
