"""How much memory a step takes: what is saved for backward, and the peak."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


FEW_SAMPLES = 4


class SavedBytes:
    """Counts the storages that autograd keeps for backward, each once; parameters and buffers do not count.

    Args:
        model: whose parameters and buffers are there anyway.
    """

    def __init__(self, model: nn.Module) -> None:
        own = (*model.parameters(), *model.buffers())
        self._own = {self._identity(tensor.untyped_storage()) for tensor in own}
        self._kept: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self._kept.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what forward passes inside the block save."""
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        identity = self._identity(storage)
        if identity not in self._own:
            self._kept[identity] = storage.nbytes()
        return tensor

    def _identity(self, storage: torch.UntypedStorage) -> int:
        """What tells two storages apart."""
        return storage.data_ptr()


def expected_growth(forward: Callable[[int], object], batch_size: int, device: torch.device) -> int:
    """How much memory a forward pass with its graph will take, from what a few samples take.

    On the CPU this is memory of the process and not of tensors: glibc's heap can grow to several times what is in use,
    where small tensors that stay lie between large ones that go.

    Args:
        forward: batch size -> anything that keeps the graph.
        batch_size: the size asked for.
        device: where it runs.
    """
    give_back()
    before = _held_bytes(device)
    graph = forward(FEW_SAMPLES)
    grown = _held_bytes(device) - before
    del graph
    give_back()
    return grown * batch_size // FEW_SAMPLES


def _held_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of the parameters and buffers of a model and of the state of its optimizer, each storage once."""
    state = [] if optimizer is None else [t for entry in optimizer.state.values() for t in entry.values()]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers(), *state)
        if isinstance(tensor, Tensor)
    }
    return sum(storages.values())


def peak_during(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors take at one time during a call, above what they took before it.

    On a GPU from the caching allocator, on the CPU from the profiler's record of every allocation: unlike the peak of
    the process this does not depend on what ran before.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak


def give_back() -> None:
    """Collect garbage, and return what is free to the system.

    glibc keeps freed memory in a heap full of holes: peer after peer, each with tensors of other sizes, would fill the
    machine.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries do not have it
        if trim is not None:
            trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def heap_is_swollen() -> bool:
    """Whether this process holds more than a third of the machine's memory."""
    return _held_bytes(torch.device("cpu")) > psutil.virtual_memory().total / 3


def free_bytes(device: torch.device) -> int:
    """Memory that a step could take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
