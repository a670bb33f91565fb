"""`select_adapters`: which of many adapters help on a few labelled examples, and how sure that is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn

from ..config import CompositionConfig
from ..evidence.batches import Collate, collate_of, processes, rank
from ..evidence.passes import Precision
from ..evidence.scores import bayesian_bootstrap, interval
from ..evidence.table import DRAWS
from ..evidence.together import together
from ..progress import progress_bar
from ..references import AdapterReference, is_local, place_of
from ..text import plural
from .downloads import Downloads
from .greedy import choose_together, weigh
from .identity import key_of
from .journal import Journal
from .ladder import ladder
from .risk import risk_of
from .rounds import expected, in_rounds
from .selection import RankedAdapter, Selection
from .slopes import Slopes
from .trials import Trial, Trials, values_on


FINALISTS = 8  # so many at least are scored on all examples


def select_adapters(
    base: nn.Module,
    candidates: Sequence[Any],
    data: Any,
    *,
    most: int = 4,
    halving: bool = True,
    log: str | os.PathLike[str] | None = None,
    cache_budget: float = 20.0,
    task_type: str | None = None,
    head: str | nn.Module | None = None,
    collate: Collate | None = None,
    batch_size: int = 16,
    mixed_precision: Precision = "no",
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """Choose from many adapters those that help on a few labelled examples, without training or a validation set.

    Candidates are read one after the other, so that memory does not grow with their number. Of a classifier, one
    backward pass over all examples tells by how much a small share of each would change the score: the first 70% pass
    one example of each class. Those that put these far apart, and whose own heads do, are scored on all examples, or
    where there are 12 of each class and more, on six or nine first, and the best of them on all. At least 8 get to see
    all. Without a backward pass, as for answers, all are scored on the same few examples first (two or three of each
    class, or four answers), the best quarter on three times as many, and so on.

    From those that have seen all the chosen ones are taken one by one, as long as each improves the mix, and weighed
    by evidence. Scores are those of `score_adapters`; of a classifier the order is by these and by what the adapters'
    own heads tell of the classes. The base model is as before afterwards.

    Several processes (`torchrun`, `accelerate launch`) share the candidates; each of them calls this.

    Args:
        base: the base model, without adapters. Of a classifier the head may be new.
        candidates: Hub ids, folders or dicts, as `CompositionConfig` takes them. One that cannot be composed becomes a
            row of the ranking with the reason.
        data: the examples, as for `score_adapters`, two of each class at least; or `EncodedRows`.
        most: how many to choose at most.
        halving: whether to drop candidates that are behind on fewer examples. False: all are scored on all examples,
            which passes three to four times as many; the guide has what halving costs.
        log: a file for what was scored, as JSON lines. If it exists, the selection goes on from there; adapters whose
            files have changed are scored again.
        cache_budget: GB that downloads may take; repositories that were in the cache before are not counted and stay.
        task_type: of the resulting config.
        head: as for `score_adapters`.
        collate: as for `score_adapters`.
        batch_size: for rows.
        mixed_precision: as for `score_adapters`.
        seed: of the order of the examples and of the bootstraps. The same seed gives the same selection.
        progress: whether to show a progress bar; the command line writes a line every 30 seconds into a log file.

    Returns:
        The selection; `print` shows it.

    Raises:
        ValueError: there is no candidate, none can be scored, `log` is of another selection, or as `score_adapters`.

    Example:
        >>> support, _ = read_data("reviews.csv").draw(10)
        >>> rows = EncodedRows(support, load_processor("org/model", "text"))
        >>> selection = select_adapters(base, adapters_in("loras"), rows, task_type="SEQ_CLS")
        >>> model = get_peft_model(base, selection.config)
    """
    started = time.perf_counter()
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    references = _references(candidates)
    steps = ladder(base, data, head, collate_of(data, collate), batch_size, seed)
    own_rank = rank()
    key = "" if log is None else together(lambda: key_of(base, references, steps, mixed_precision, seed))[0]
    journal = together(lambda: Journal(log, key, own_rank, values_on(steps)))[own_rank]
    count, finalists = len(references), max(FINALISTS, 2 * most)
    everything = steps.rungs[-1]
    total = sum(
        len(range(own_rank, among + 1, processes()))
        for among in expected(steps.sizes, steps.first_scored, count, finalists, halving)
    )
    with progress_bar(total, "Scoring candidates", "pass", progress and own_rank == 0) as bar:
        downloads = Downloads(cache_budget * 1e9 / processes())
        slopes = Slopes(base, everything, mixed_precision)
        trials = Trials(base, references, journal, downloads, mixed_precision, slopes, bar)
        found = in_rounds(
            lambda rung, numbers: trials.run(rung, numbers, steps.rungs[rung]),  # all for slopes, whose rung is -1
            steps.sizes,
            steps.first_scored,
            count,
            finalists,
            halving,
        )
    if not found.order:
        raise ValueError(_none(references, trials.reasons))
    _meet()  # what one process downloaded must not be dropped while another reads it
    front = [references[own - 1] for own in found.order[:finalists]]
    places, tried = choose_together(
        base, front, [found.last[own] for own in found.order[:finalists]], everything, most, mixed_precision
    )
    chosen = [front[place] for place in places]
    weights = weigh(base, chosen, everything, mixed_precision, seed)
    config = CompositionConfig(adapters=[*chosen], weights=weights if sum(weights) > 0 else None, task_type=task_type)
    scored = {own for own, trial in found.trials.items() if own and len(trial.values)}
    behind = [*found.behind, *sorted(scored - {*found.order, *found.behind})]  # scored once, and then no more

    broken = sorted({*trials.reasons} - scored)

    def row(number: int) -> RankedAdapter:
        own, trial = _named(references[number - 1]), found.trials.get(number)
        if number not in found.dropped:
            return replace(_scored(own, found.trials[number], seed), is_dropped=number not in found.last)
        told = trial.information if trial else None
        passed = steps.sizes[0] if trial else 0
        return replace(own, examples=passed, reason=found.dropped[number], information=told, is_dropped=True)

    return Selection(
        chosen={own["name"]: weight for own, weight in zip(chosen, weights)},
        ranking=(
            *map(row, [*found.order, *behind]),
            *(replace(_named(references[own - 1]), reason=trials.reasons[own]) for own in broken),
        ),
        base=_scored(_named(AdapterReference(name="(base)", path="(base)")), found.last[0], seed),
        config=config,
        candidates=count,
        examples=len(everything),
        risk_worse_than_base=risk_of(
            found.first, found.last, found.order[0], are_left_out=everything.labels is not None
        ),
        measure="log-likelihood" if everything.labels is None else "margin",
        passed=trials.passed + tried * len(everything),
        seconds=time.perf_counter() - started,
    )


def _references(candidates: Sequence[Any]) -> list[AdapterReference]:
    """The candidates with names; one that is given twice counts once."""
    if isinstance(candidates, (str, os.PathLike, Mapping)):
        candidates = [candidates]
    found: dict[str, Any] = {}
    for entry in candidates:
        found.setdefault(_place(entry), entry)
    if not found:
        raise ValueError("there are no candidates to select from")
    return CompositionConfig(adapters=[*found.values()], mixing="uniform").references


def _place(entry: Any) -> str:
    """Where a candidate is, the same for each way to write it. A link is a place of its own."""
    own = entry if isinstance(entry, Mapping) else {"path": entry}
    path, subfolder = own.get("path"), own.get("subfolder")
    if isinstance(path, (str, os.PathLike)) and is_local(os.fspath(path)):
        return os.path.abspath(os.path.join(path, subfolder or ""))
    place = {key: value for key, value in own.items() if key not in ("name", "local_files_only") and value}
    return json.dumps(place, sort_keys=True, default=str)


def _meet() -> None:
    if processes() > 1:
        dist.barrier()


def _none(references: Sequence[AdapterReference], reasons: dict[int, str]) -> str:
    number = min(reasons)
    return (
        f"none of {plural(len(references), 'candidate')} could be scored; of the first, "
        f"{references[number - 1]['name']!r}: {reasons[number]}"
    )


def _named(reference: AdapterReference) -> RankedAdapter:
    return RankedAdapter(reference["name"], place_of(reference), None, None, None, None, 0)


def _scored(row: RankedAdapter, trial: Trial, seed: int) -> RankedAdapter:
    low, high = interval(trial.values, bayesian_bootstrap(len(trial.values), DRAWS, seed))
    accuracy = float(trial.is_right.double().mean())
    return replace(
        row,
        score=trial.score,
        low=low,
        high=high,
        accuracy=accuracy,
        examples=len(trial.values),
        information=trial.information,
    )
