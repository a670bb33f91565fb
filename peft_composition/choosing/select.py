"""`select_adapters`: which of many adapters help on a few labelled examples, and how sure that is."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
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
from .ladder import KEPT, KEPT_BESIDE_STEEP, STEEP, ladder
from .risk import Gains, chance_of_harm
from .selection import RankedAdapter, Selection
from .slopes import Slopes
from .trials import Trial, Trials, ranked


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

    Candidates are read one after the other, so that memory does not grow with their number. All are scored on the same
    few examples first (two or three of each class), those that are ahead on three times as many, and so on; at least 8
    get to see all. Of a classifier, one backward pass over all examples tells by how much a small share of each would
    change the score: the best sixth goes on, and by that an eighth. Without it, as for answers, the best quarter does.
    From these the chosen ones are taken one by one, as long as each improves the mix, and weighed by evidence. Scores
    are those of `score_adapters`; of a classifier the order is by these and by what the adapters' own heads tell of
    the classes. The base model is as before afterwards.

    Several processes (`torchrun`, `accelerate launch`) share the candidates; each of them calls this.

    Args:
        base: the base model, without adapters. Of a classifier the head may be new.
        candidates: Hub ids, folders or dicts, as `CompositionConfig` takes them. One that cannot be composed becomes a
            row of the ranking with the reason.
        data: the examples, as for `score_adapters`, two of each class at least; or `EncodedRows`.
        most: how many to choose at most.
        halving: whether to drop candidates that are behind on fewer examples. False: all are scored on all examples,
            which passes two to four times as many; the guide has what halving costs.
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
    journal = together(lambda: Journal(log, key, own_rank, steps.sizes))[own_rank]
    finalists = max(FINALISTS, 2 * most)
    everything = steps.rungs[-1]
    has_slopes = everything.labels is not None
    plan = _plan(len(references), len(steps.rungs), finalists, halving, STEEP if has_slopes else None)
    total = sum(len(range(own_rank, count + 1, processes())) for _, count in plan)
    with progress_bar(total, "Scoring candidates", "pass", progress and own_rank == 0) as bar:
        downloads = Downloads(cache_budget * 1e9 / processes())
        slopes = Slopes(base, everything, mixed_precision)
        trials = Trials(base, references, journal, downloads, mixed_precision, slopes, bar)
        last: dict[int, Trial] = {}
        alive = list(range(1, len(references) + 1))
        first: dict[int, Trial] = {}
        behind: list[int] = []
        for place, (rung, _) in enumerate(plan):
            found = trials.run(rung, alive, steps.rungs[rung], has_slopes and place == 0 and len(plan) > 1)
            last.update(found)
            alive = ranked({number: trial for number, trial in found.items() if number})
            if not alive:
                raise ValueError(_none(references, trials.reasons))
            first = first or found
            if place + 1 < len(plan):
                going = _those_who_go_on(alive, {own: first[own].slope for own in alive}, finalists)
                behind = [*(own for own in alive if own not in going), *behind]
                alive = going
    _meet()  # what one process downloaded must not be dropped while another reads it
    front = [references[own - 1] for own in alive[:finalists]]
    places, tried = choose_together(
        base, front, [last[own] for own in alive[:finalists]], everything, most, mixed_precision
    )
    chosen = [front[place] for place in places]
    weights = weigh(base, chosen, everything, mixed_precision, seed)
    config = CompositionConfig(adapters=[*chosen], weights=weights if sum(weights) > 0 else None, task_type=task_type)
    seen = {own: trial for own, trial in last.items() if own}
    behind += sorted({*seen} - {*alive, *behind})  # scored once, and then no more
    return Selection(
        chosen={own["name"]: weight for own, weight in zip(chosen, weights)},
        ranking=(
            *(_row(references[own - 1], seen[own], seed) for own in [*alive, *behind]),
            *(_broken(references[own - 1], trials.reasons[own]) for own in sorted(trials.reasons) if own not in seen),
        ),
        base=_row(AdapterReference(name="(base)", path="(base)"), last[0], seed),
        config=config,
        candidates=len(references),
        examples=len(everything),
        risk_worse_than_base=_risk(first, found, alive[0], are_left_out=everything.labels is not None),
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


def _plan(
    candidates: int, rungs: int, finalists: int, halving: bool, steep: int | None = None
) -> list[tuple[int, int]]:
    """The rungs that are run, with the most candidates in each; `steep`: one of so many goes on by its slope."""
    if not halving or candidates <= finalists:
        return [(rungs - 1, candidates)]
    plan: list[tuple[int, int]] = []
    count = best = candidates
    for rung in range(rungs):
        if best <= finalists and rung < rungs - 1 and plan:
            continue  # those that are left are scored on all
        plan.append((rung, count))
        best = _kept(count, finalists, bool(steep))
        count = min(count, best + (math.ceil(count / steep) if steep else 0))
    return plan


def _kept(candidates: int, finalists: int, has_slopes: bool) -> int:
    """How many go on to the next rung by their scores."""
    return max(finalists, math.ceil(candidates / (KEPT_BESIDE_STEEP if has_slopes else KEPT)))


def _those_who_go_on(order: Sequence[int], slopes: Mapping[int, float | None], finalists: int) -> list[int]:
    """The first ones, and the steepest ones of all; in their order.

    The few examples of a rung may mislead. Slopes are of all examples, but tell what a small share of an adapter does:
    each finds what the other one overlooks.
    """
    steepest = sorted(
        (own for own in order if slopes[own] is not None), key=lambda own: (-cast(float, slopes[own]), own)
    )
    going = {*order[: _kept(len(order), finalists, bool(steepest))], *steepest[: math.ceil(len(order) / STEEP)]}
    return [own for own in order if own in going]


def _risk(first: dict[int, Trial], last: dict[int, Trial], pick: int, are_left_out: bool) -> float:
    """The chance of harm of a pick, from all trials of the first round and of the last; number 0 is the base."""
    all_of_them, finalists = sorted({*first} - {0}), sorted({*last} - {0})
    places = torch.tensor([all_of_them.index(own) for own in finalists])
    by_measure = []
    for measure in ("values", "is_right"):
        begun, ended = (
            torch.stack(
                [getattr(trials[own], measure).double() - getattr(trials[0], measure).double() for own in some]
            )
            for trials, some in ((first, all_of_them), (last, finalists))
        )
        by_measure.append(Gains(begun, ended, places, finalists.index(pick)))
    return chance_of_harm(by_measure[0], by_measure[1], are_left_out)


def _meet() -> None:
    if processes() > 1:
        dist.barrier()


def _none(references: Sequence[AdapterReference], reasons: dict[int, str]) -> str:
    number = min(reasons)
    return (
        f"none of {plural(len(references), 'candidate')} could be scored; of the first, "
        f"{references[number - 1]['name']!r}: {reasons[number]}"
    )


def _row(reference: AdapterReference, trial: Trial, seed: int) -> RankedAdapter:
    low, high = interval(trial.values, bayesian_bootstrap(len(trial.values), DRAWS, seed))
    accuracy = float(trial.is_right.double().mean())
    return RankedAdapter(
        reference["name"],
        place_of(reference),
        trial.score,
        low,
        high,
        accuracy,
        len(trial.values),
        information=trial.information,
    )


def _broken(reference: AdapterReference, reason: str) -> RankedAdapter:
    return RankedAdapter(reference["name"], place_of(reference), None, None, None, None, 0, reason)
