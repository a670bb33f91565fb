"""What a training step asks of the device: waits of the host, by whose code, and the kernels that it launches."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..models import Workbench
from ..peers import COMPOSITION, FROZEN, LORA
from ..train import Step
from .timings import Row


LIBRARY = "peft_composition"
MESSAGE = "synchronizing CUDA operation"


def launches(bench: Workbench, count: int) -> Iterator[Row]:
    """Waits, kernels and the time that the device is busy, of one training step of LoRA, ours and the frozen base."""
    for peer in (LORA, COMPOSITION, FROZEN):
        assert peer.build is not None
        step = Step(peer.build(bench, count), bench)
        for _ in range(3):
            step()
        row: Row = {"what": "launches", "N": count, "peer": peer.title}
        if bench.device.type == "cuda":
            places = waits(step)
            row["waits"] = dict(places)
            row["waits_of_ours"] = sum(number for place, number in places.items() if is_ours(place))
            row["waits_of_others"] = sum(places.values()) - row["waits_of_ours"]
        yield {**row, **_profiled(step, bench.device)}


def _profiled(step: Callable[[], object], device: torch.device) -> Row:
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.events() or []
    if not on_gpu:
        return {"operators": sum(event.name.startswith("aten::") for event in events)}
    # Marks that the host puts on the device's line ("Optimizer.step#AdamW.step") are no work.
    kernels = [event for event in events if event.device_type.name == "CUDA" and "#" not in event.name]
    names = Counter(event.name.partition("<")[0].removeprefix("void ")[:60] for event in kernels)
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1000
    return {"kernels": len(kernels), "busy_ms": busy, "most_frequent": dict(names.most_common(12))}


def waits(step: Callable[[], object]) -> Counter[str]:
    """The places from which a call made the host wait for the device; those within autograd have none in Python."""
    places: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if MESSAGE in str(message):
            places[_place()] += 1

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():  # puts showwarning back, too
            warnings.simplefilter("always")
            warnings.showwarning = note
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return places


def _place() -> str:
    """The innermost line outside of PyTorch and of this file that leads here."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module not in (__name__, "warnings") and module.partition(".")[0] != "torch":
            return f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def is_ours(place: str) -> bool:
    """Whether a place lies in this library."""
    return place.partition(":")[0].partition(".")[0] == LIBRARY
