"""Timings and memory on a device: training steps, forward passes and single tokens beside the peers, an 8B model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel, StaticCache, ViTConfig

from ..measure import race
from ..memory import give_back, peak_during, resident_bytes
from ..models import ARCHITECTURES, Architecture, Workbench, _llama, _vit
from ..peers import BASE, COMPOSITION, FROZEN, LOOP, LORA, MERGED, PEFT, Peer, UnavailableError
from ..train import Step


Row = dict[str, Any]
FEW_TOKENS = 64
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def architectures(smoke: bool) -> dict[str, Architecture]:
    """ViT-B/32 and a 1B Llama, with adapters on q, k and v or on all linear layers; in a smoke run tiny ones."""
    if smoke:
        vit, llama = ARCHITECTURES["tiny-vit"], ARCHITECTURES["tiny-llama"]
    else:
        vit = _vit(ViTConfig(patch_size=32), "ViT-B/32", 32)
        llama = _llama(llama_config(2048, 8192, 16, 32), "Llama-3.2-1B's shape", 4, 512)
    return {"vit": vit, "llama": llama, "llama-all": dataclasses.replace(llama, targets=ALL_LINEAR)}


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


def short(bench: Workbench) -> Workbench:
    """The same with one sequence of few tokens, whose kernels take longer to launch than to run."""
    few = copy.copy(bench)
    inputs, labels = bench.architecture.inputs, bench.architecture.labels
    few.architecture = dataclasses.replace(
        bench.architecture,
        batch_size=1,
        inputs=lambda count: {name: tensor[:, :FEW_TOKENS] for name, tensor in inputs(count).items()},
        labels=lambda count: {name: tensor[:, :FEW_TOKENS] for name, tensor in labels(count).items()},
    )
    return few


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


def graphed(bench: Workbench, count: int, peers: Sequence[Peer], rounds: int) -> Iterator[Row]:
    """The same token with a static cache, recorded once as a CUDA graph: what the device itself takes."""
    prompt = bench.batch(1)["input_ids"][:, :32]
    last = prompt[:, -1:].clone()

    def token_of(model: nn.Module) -> Callable[[], object]:
        base = bench.base
        assert isinstance(base, PreTrainedModel)
        cache = StaticCache(config=base.config, max_cache_len=128)
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
        lengths: list[Tensor] = [getattr(layer, "cumulative_length") for layer in cache.layers]  # noqa: B009

        def token() -> object:
            result = model(input_ids=last, past_key_values=cache, use_cache=True)
            for length in lengths:
                length.fill_(prompt.shape[1])
            return result

        if bench.device.type != "cuda":
            return token
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                token()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            token()
        return graph.replay

    yield from _without_gradient("token, CUDA graph", bench, count, peers, rounds, token_of)


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
            "what": "training step, checkpointed",
            "N": 8,
            "peer": peer.title,
            "peak_mb": (peak + resident_bytes(step.model, step.optimizer)) / 1e6,
        }
        steps[peer.title] = step
    yield from _with_times(rows, race(steps, LORA.title, rounds, device, "8B"))


TRAINED = (COMPOSITION, FROZEN)
SLOW = (PEFT, LOOP)
READ = (COMPOSITION, MERGED, LORA)
