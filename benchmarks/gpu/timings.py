"""Timings and memory on a device: training steps, forward passes and single tokens beside the peers, an 8B model, syncs."""

from __future__ import annotations

import dataclasses
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, ViTConfig

from ..measure import race
from ..memory import give_back, peak_during, resident_bytes
from ..models import Architecture, Workbench, _llama, _vit
from ..peers import BASE, COMPOSITION, FROZEN, LOOP, LORA, MERGED, PEFT, Peer, UnavailableError
from ..train import Step


Row = dict[str, Any]
LIBRARY = "/peft_composition/"


def architectures(smoke: bool) -> dict[str, Architecture]:
    """ViT-B/32 and a 1B Llama; in a smoke run tiny ones of the same kinds."""
    if smoke:
        vit = ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        )
        llama = LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        return {"vit": _vit(vit, "tiny ViT", 4), "llama": _llama(llama, "tiny Llama", 2, 16)}
    return {
        "vit": _vit(ViTConfig(patch_size=32), "ViT-B/32", 32),
        "llama": _llama(llama_config(2048, 8192, 16, 32), "Llama-3.2-1B's shape", 4, 512),
    }


def llama_config(width: int, inner: int, layers: int, heads: int, vocabulary: int = 128256) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=width <= 2048,
        max_position_embeddings=8192,
    )


def workbench(architecture: Architecture, folder: Path, device: torch.device, dtype: torch.dtype) -> Workbench:
    """As `Workbench`, with the random weights made on the device, and targets by the names this transformers has."""

    def build() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return architecture.build()
        finally:
            torch.set_default_dtype(before)

    with torch.device("meta"):
        names = {name.rpartition(".")[2] for name, _ in architecture.build().named_modules()}
    targets = architecture.targets if names.issuperset(architecture.targets) else ("query", "key", "value")
    folder.mkdir(parents=True)
    return Workbench(dataclasses.replace(architecture, build=build, targets=targets), folder, device, dtype)


def train(bench: Workbench, count: int, peers: Sequence[Peer], rounds: int) -> Iterator[Row]:
    """A training step of every peer: seconds and ratio to LoRA, saved bytes, peak of tensors in all."""
    steps: dict[str, Step] = {}
    rows: dict[str, Row] = {}
    for peer in (LORA, *peers):
        rows[peer.title] = row = {"what": "training step", "N": count, "peer": peer.title}
        try:
            assert peer.build is not None
            step = Step(peer.build(bench, count), bench)
            give_back()
            peak = peak_during(step.first, bench.device)
            row["saved_mb"] = step.saved.total / 1e6
            row["peak_mb"] = (peak + resident_bytes(step.model, step.optimizer)) / 1e6
            steps[peer.title] = step
        except (UnavailableError, torch.OutOfMemoryError) as error:
            row["skipped"] = str(error).partition("\n")[0]
    timed = race(steps, LORA.title, rounds, bench.device, f"train N={count}")
    yield from _with_times(rows, timed)


def forward(bench: Workbench, count: int, peers: Sequence[Peer], rounds: int) -> Iterator[Row]:
    """A forward pass without gradient; ratios to the base model."""
    batch = bench.batch()
    yield from _without_gradient("forward pass", bench, count, peers, rounds, lambda model: lambda: model(**batch))


def decode(bench: Workbench, count: int, peers: Sequence[Peer], rounds: int) -> Iterator[Row]:
    """One more token behind 32 others with a KV cache; ratios to the base model."""
    prompt = bench.batch(1)["input_ids"][:, :32]

    def token_of(model: nn.Module) -> Callable[[], object]:
        cache = model(input_ids=prompt, use_cache=True).past_key_values

        def token() -> object:
            result = model(input_ids=prompt[:, -1:], past_key_values=cache, use_cache=True)
            cache.crop(-1)
            return result

        return token

    yield from _without_gradient("token with KV cache", bench, count, peers, rounds, token_of)


def _without_gradient(
    what: str,
    bench: Workbench,
    count: int,
    peers: Sequence[Peer],
    rounds: int,
    call_of: Callable[[nn.Module], Callable[[], object]],
) -> Iterator[Row]:
    calls: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    with torch.no_grad():
        for peer in (BASE, *peers):
            rows[peer.title] = row = {"what": what, "N": count, "peer": peer.title}
            try:
                assert peer.build is not None
                calls[peer.title] = call_of(peer.build(bench, count).eval())
            except (UnavailableError, torch.OutOfMemoryError) as error:
                row["skipped"] = str(error).partition("\n")[0]
        timed = race(calls, BASE.title, rounds, bench.device, f"{what} N={count}")
    yield from _with_times(rows, timed)


def _with_times(rows: dict[str, Row], timed: dict[str, Any]) -> Iterator[Row]:
    for title, row in rows.items():
        if title in timed:
            row["ms"] = timed[title].seconds.median * 1000
            row["ratio"] = timed[title].ratio.median
        yield row


def eight_billion(device: torch.device, dtype: torch.dtype, folder: Path, smoke: bool, rounds: int) -> Iterator[Row]:
    """Eight adapters on one 8B Llama: a training step with gradient checkpointing, memory and time beside LoRA's."""
    config = llama_config(64, 128, 2, 8, 128) if smoke else llama_config(4096, 14336, 32, 32)
    bench = workbench(_llama(config, "Llama-3-8B's shape", 1, 32 if smoke else 1024), folder, device, dtype)
    steps, rows = {}, {}
    for peer in (LORA, COMPOSITION):
        assert peer.build is not None
        model = peer.build(bench, 8)
        base = model.get_base_model()  # type: ignore[operator]
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        step = Step(model, bench)
        give_back()
        peak = peak_during(step, device)
        rows[peer.title] = {
            "what": "training step, checkpointing",
            "N": 8,
            "peer": peer.title,
            "peak_mb": (peak + resident_bytes(step.model, step.optimizer)) / 1e6,
        }
        steps[peer.title] = step
    yield from _with_times(rows, race(steps, LORA.title, rounds, device, "8B"))


def synchronisations(bench: Workbench, count: int) -> Iterator[Row]:
    """How often a training step waits for the device, by whose code asked, and how many kernels it launches."""
    for peer in (LORA, COMPOSITION):
        assert peer.build is not None
        step = Step(peer.build(bench, count), bench)
        for _ in range(3):
            step()
        row: Row = {"what": "host waits and kernels a step", "N": count, "peer": peer.title}
        if bench.device.type == "cuda":
            row["waits_of_ours"], row["waits_of_others"] = _waits(step)
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        else:
            activities = [ProfilerActivity.CPU]
        with profile(activities=activities) as profiler:
            step()
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
        kernels = [event for event in profiler.events() if event.device_type.name == "CUDA"]
        row["kernels" if kernels else "operators"] = len(kernels or profiler.events())
        top = Counter(event.name.partition("<")[0][-60:] for event in kernels)
        row["most"] = top.most_common(8)
        yield row


def _waits(step: Callable[[], object]) -> tuple[int, int]:
    ours, others = 0, 0

    def note(*arguments: Any, **_: Any) -> None:
        nonlocal ours, others
        files = [frame.filename for frame in traceback.extract_stack()]
        if any(LIBRARY in file for file in files):
            ours += 1
        else:
            others += 1

    torch.cuda.set_sync_debug_mode("warn")
    before = warnings.showwarning
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            step()
    finally:
        warnings.showwarning = before
        torch.cuda.set_sync_debug_mode("default")
    return ours, others


TRAINED = (COMPOSITION, FROZEN)
SLOW = (PEFT, LOOP)
READ = (COMPOSITION, MERGED, LORA)
