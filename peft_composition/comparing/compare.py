"""`compare_methods`: is it worth to reuse these adapters on these examples, and how sure is that?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from ..evidence.batches import Collate
from ..evidence.passes import Precision
from ..text import plural
from ..tuner.locating import composition_layers
from .differences import Differences, left_out, over_draws
from .heads import Budget
from .methods import EVIDENCE, FRESH, METHODS, REUSING, Outcome, run
from .rows import Rows
from .splits import cross_fit, draw_per_class
from .table import Comparison, MethodScore
from .tasks import Classes, Split, Task, Tokens, loss_of
from .verdict import LEVEL, ROPE, judge, require_good_limits


LEAST_TESTS = 10


def compare_methods(
    base: nn.Module,
    adapters: Sequence[Any],
    data: Any,
    *,
    test: Any = None,
    k: int | None = None,
    seeds: int = 1,
    folds: int = 5,
    repeats: int = 1,
    methods: Sequence[str] = METHODS,
    judged: str = EVIDENCE,
    scales: Sequence[float] = (0.5, 1.0),
    steps: int = 100,
    learning_rate: float = 1e-2,
    lora_learning_rate: float = 1e-3,
    lora_rank: int = 8,
    batch_size: int = 16,
    rope: float = ROPE,
    level: float = LEVEL,
    head: str | nn.Module | None = None,
    collate: Collate | None = None,
    mixed_precision: Precision = "no",
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Compare reusing adapters with what needs none, on the same examples and with the same budget.

    - `"base"`: only a new head is trained ("head only"); a model that answers in tokens stays as it is ("zero-shot");
    - `"fresh LoRA"`: a new LoRA on the modules that the adapters target, and the same with its product scaled;
    - `"best single"`: the adapter that the training examples of a split speak for most;
    - `"uniform"`: all adapters with equal weights;
    - `"evidence"`: weights by `fit_mixing_weights`;
    - `"evidence, learned"`: trained from there;
    - `"random LoRAs"`: as uniform, with random values of the same size; a control that knows nothing.

    With `data` alone they are all that there is: every example is left out once in each repeat, and predicted by what
    all methods made of the others, choices and weights included. With `test` or `k` the methods are trained on
    `seeds` draws of `k` examples per class and judged by the test examples; without `test` by those that no draw has.

    A frozen body's features are computed once and heads are trained on them: the same result as in the model.
    Everything is trained without dropout. The base model is as before afterwards.

    Args:
        base: a model without adapters. A classifier must have a head for the number of classes, trained or new.
        adapters: Hub ids, folders or dicts, as `CompositionConfig` takes them. One that cannot be composed or scored
            is left out, with the reason in the result. Of a single one `"uniform"` is not run: it is `"best single"`.
        data: labelled examples: a data set or list of rows as the model takes them, with `labels`, or a `DataLoader`
            over one. Labels are one class for each example, or the tokens of its answer with -100 elsewhere.
        test: more of them to judge by. Default: none.
        k: examples of each class in a draw; of all, where labels are tokens. Default: all.
        seeds: number of draws.
        folds: of cross-fitting.
        repeats: of cross-fitting.
        methods: which ones; adapters are judged against `"base"` and `"fresh LoRA"`, or the one of them that is there.
        judged: the method that the verdict is about. It is chosen before the results are seen: the best of several
            would look better than it is.
        scales: of the fresh LoRA's product.
        steps: of every training.
        learning_rate: of heads and mixing weights; it falls to zero along a line.
        lora_learning_rate: of the fresh LoRA's factors, likewise.
        lora_rank: of the fresh LoRA; its alpha is twice that.
        batch_size: of every step.
        rope: a difference of up to this share of examples is none in practice.
        level: probability that "equivalent", and "helps" against several alternatives, need; "helps" against a single
            one needs 1 - (1 - level) / 2, and "harms" 1 - (1 - level) / 10, counting how many alternatives there are.
        head: as for `score_adapters`.
        collate: as for `score_adapters`.
        mixed_precision: as for `score_adapters`.
        seed: of the splits and of all that is random in the methods.
        progress: whether to show a progress bar; the command line writes a line every 30 seconds into a log file.

    Returns:
        The table with the verdict; `print` shows it, `as_json` is for programs. The seconds of a method are what it
        takes by itself: each pass, choice and training that it needs, once. Methods share passes, so that the whole
        takes less than the sum.

    Raises:
        ValueError: an argument is wrong, there are too few examples, labels do not fit the model, or a training
            diverges, or none of the adapters can be composed. The message says what to do, and the model is as before.
        ImportError: scipy is not installed.

    Example:
        >>> result = compare_methods(base, ["me/lora-a", "me/lora-b"], support_set)
        >>> print(result)
        >>> result.verdict.word
        'cannot tell'
    """
    started = time.perf_counter()
    require_good_limits(rope, level)
    _check(base, methods, judged, scales, seeds, repeats, k)
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}; leave it out to take all examples")
    budget = Budget(steps, batch_size, learning_rate, lora_learning_rate)
    rows = Rows(data, collate)
    tests = None if test is None else Rows(test, collate)
    is_crossed = test is not None or k is not None
    if is_crossed:
        splits, rows = _draws(rows, tests, k, seeds, seed)
        setting = f"{plural(len(splits), 'draw')} of {plural(len(splits[0].train), 'example')}, judged by "
        setting += plural(len(splits[0].test), "other")
    else:
        splits = _left_out(rows, folds, repeats, seed)
        count = len(splits) // repeats
        setting = f"{plural(len(rows), 'example')}, each left out {plural(repeats, 'time')} ({count} folds)"
    task: Task
    if rows.labels is None:
        task = Tokens(base, rows, budget, mixed_precision)
    else:
        task = Classes(base, rows, head, budget, mixed_precision)
    outcomes, broken = run(task, base, adapters, splits, methods, scales, lora_rank, seed, progress, judged)
    right = {own.name: _table(own, splits, len(rows), repeats, is_crossed) for own in outcomes}
    shared = len(splits) // repeats

    def known(values: np.ndarray) -> Differences:
        return over_draws(values) if is_crossed else left_out(values, shared)

    scores = [_row(own, known(right[own.name])) for own in outcomes]
    others = [own.name for own in outcomes if own.kind == "alternative"]
    differences = known(np.stack([right[judged] - right[name] for name in others], axis=-1))
    of_others = [row.score for row in scores if row.kind == "alternative"]
    verdict = judge(judged, others, of_others, differences, rope, level)
    return Comparison(
        rows=tuple(scores),
        verdict=verdict,
        measure="accuracy" if rows.labels is not None else "exact match",
        setting=setting,
        broken=tuple(broken),
        seconds=time.perf_counter() - started,
    )


def _check(
    base: nn.Module,
    methods: Sequence[str],
    judged: str,
    scales: Sequence[float],
    seeds: int,
    repeats: int,
    k: int | None,
) -> None:
    if isinstance(base, PeftModel) or any(True for _ in composition_layers(base)):
        raise ValueError(f"This model ({type(base).__name__}) already has adapters. Pass the base model.")
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}; there are {', '.join(map(repr, METHODS))}")
    if judged not in REUSING or judged not in methods:
        raise ValueError(
            f"judged must be one of {', '.join(map(repr, REUSING))}, and among the methods; got {judged!r}"
        )
    if not {"base", FRESH} & {*methods}:
        raise ValueError(f"there is nothing to judge adapters against: add 'base' or {FRESH!r} to methods")
    if seeds > 1 and k is None:
        raise ValueError(
            f"seeds={seeds} draws of all examples would be the same: give k=..., the examples of each class"
        )
    if seeds < 1 or repeats < 1 or not scales or min(scales) <= 0:
        raise ValueError(
            f"seeds and repeats must be 1 or more and scales more than 0, got seeds={seeds}, repeats={repeats}, "
            f"scales={list(scales)}"
        )


def _left_out(rows: Rows, folds: int, repeats: int, seed: int) -> list[Split]:
    every = torch.arange(len(rows))
    labels = torch.zeros(len(rows), dtype=torch.int64) if rows.labels is None else rows.labels
    if rows.labels is not None and len(labels.unique()) < 2:
        raise ValueError(f"all {len(rows)} examples are of {rows.called(int(labels[0]))}: nothing can be told apart")
    found = []
    for of_example in cross_fit(labels, folds, repeats, seed, rows.called):
        for fold in range(int(of_example.max()) + 1):
            found.append(Split(every[of_example != fold], every[of_example == fold]))
    return found


def _draws(rows: Rows, tests: Rows | None, k: int | None, seeds: int, seed: int) -> tuple[list[Split], Rows]:
    """Draws with the rows that they need, numbered anew."""
    labels = torch.zeros(len(rows), dtype=torch.int64) if rows.labels is None else rows.labels
    every = torch.arange(len(rows))
    drawn = [every if k is None else draw_per_class(labels, k, seed + number, rows.called) for number in range(seeds)]
    used = torch.cat(drawn).unique()
    if tests is None:
        judged_by = every[~torch.isin(every, used)]
        if len(judged_by) < LEAST_TESTS:
            raise ValueError(
                f"{plural(seeds, 'draw')} of k={k} would leave {len(judged_by)} of {plural(len(rows), 'example')} to "
                "judge by, too few: lower k=... or seeds=..., give test=..., or leave out k=... to leave each example "
                "out in turn"
            )
        kept = rows.subset(torch.cat([used, judged_by]))
    else:
        kept = rows.subset(used).joined(tests)
    test = torch.arange(len(used), len(kept))
    return [Split(torch.searchsorted(used, own), test) for own in drawn], kept


def _table(own: Outcome, splits: Sequence[Split], count: int, repeats: int, is_crossed: bool) -> np.ndarray:
    """Whether each example is right: (draws, tests), or (repeats, examples)."""
    if is_crossed:
        return torch.stack([judged.right for judged in own.judged]).numpy()
    found = torch.full((repeats, count), torch.nan, dtype=torch.float64)
    for number, (judged, split) in enumerate(zip(own.judged, splits)):
        found[number // (len(splits) // repeats), split.test] = judged.right
    return found.numpy()


def _row(own: Outcome, known: Differences) -> MethodScore:
    low, high = known.interval()
    loss = float(np.mean([loss_of(judged) for judged in own.judged]))
    return MethodScore(
        name=own.name,
        kind=own.kind,
        score=float(known.mean[0]),
        low=max(0.0, float(low[0])),
        high=min(1.0, float(high[0])),
        loss=loss,
        trainable=own.trainable,
        seconds=own.seconds,
    )
