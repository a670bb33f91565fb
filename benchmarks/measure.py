"""Timing peers side by side: warmed up, then in rounds, each round every peer once in an order of its own."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from tqdm import tqdm

from .memory import give_back, heap_is_swollen
from .results import Measurement, Summary


# Peers that no claim rests on are timed in every third round, unless a call takes less than this.
ROUNDS_APART = 3
SHORT_SECONDS = 0.3


def race(
    calls: Mapping[str, Callable[[], object]],
    reference: str,
    rounds: int,
    device: torch.device,
    label: str,
    rare: Collection[str] = (),
    units: int = 1,
    warm_up: Mapping[str, float] | None = None,
) -> dict[str, Measurement]:
    """Time the calls in interleaved rounds, so that a slow spell of the machine falls on all of them.

    Args:
        calls: what is timed, by name.
        reference: the name that ratios refer to.
        rounds: how many rounds are timed.
        device: where the calls run.
        label: for the progress bar.
        rare: names for which every third round is enough.
        units: how many units of work a call does.
        warm_up: seconds of a call of each that was made already. Default: one is made before the rounds.

    Returns:
        For each name the seconds of a unit, and the ratio to the reference in the same round.
    """
    order = list(calls)
    shuffle = random.Random(0).shuffle
    times: dict[str, dict[int, float]] = {name: {} for name in calls}
    with _no_collection(), tqdm(total=rounds * len(calls), desc=label, leave=False, unit="call") as progress:

        def timed(name: str) -> float:
            seconds = elapsed(calls[name], device)
            if heap_is_swollen():
                give_back()
                calls[reference]()  # the next must not be the one to fetch the memory again
            return seconds

        if warm_up is None:
            warm_up = {name: timed(name) for name in order}
        else:
            calls[reference]()  # fetches the memory that was given back since
        for number in range(rounds):
            shuffle(order)
            for name in order:
                if number % ROUNDS_APART == 0 or name not in rare or warm_up[name] < SHORT_SECONDS:
                    times[name][number] = timed(name)
                progress.update()
            gc.collect()
    return {
        name: Measurement(
            seconds=Summary.of([seconds / units for seconds in own.values()]),
            ratio=Summary.of([seconds / times[reference][number] for number, seconds in own.items()]),
        )
        for name, own in times.items()
    }


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes: wall time on the CPU, CUDA events on a GPU."""
    # Results are kept until the clock has stopped: to free a model takes time of its own.
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1000
    else:
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
    del result
    return seconds


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector runs between the rounds alone."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
