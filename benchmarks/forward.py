"""The table `forward`: one forward pass without gradient, relative to the base model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from . import arithmetic
from .cells import build_peers, in_order, require_same, target_calls
from .measure import race
from .models import RANK, Workbench
from .peers import BASE, COMPOSITION, LOOP, LORA, MERGED, PEFT, XLORA
from .results import Cell, Measurement
from .settings import LIMIT, Settings, Table


# These compute the same function before they are trained: N scales of 1/N.
SAME = (COMPOSITION, MERGED, PEFT, LOOP)


def run(settings: Settings) -> Iterator[Cell]:
    """Measure every model and N."""
    for key in settings.models:
        for count in settings.adapters:
            yield _cell(settings, key, count)


def _cell(settings: Settings, key: str, count: int) -> Cell:
    bench = settings.workbench(key)
    models, measured = build_peers(settings.peers, bench, count)
    passes = {peer.title: _forward(model, bench) for peer, model in models.items()}
    if bench.dtype == torch.float32:
        require_same({peer.title: passes[peer.title]() for peer in SAME if peer in models})
    reference = settings.peers[0].title
    timed = race(passes, reference, settings.rounds[key], settings.device, f"forward {key} N={count}", settings.rare)
    measured.update(timed)
    measured[LIMIT] = _limit(bench, timed[reference], count)
    return Cell(key, count, reference, in_order(settings.peers, measured))


def _forward(model: nn.Module, bench: Workbench) -> Callable[[], Tensor]:
    model.eval()
    batch = bench.batch()

    @torch.no_grad()
    def forward() -> Tensor:
        return model(**batch).logits

    return forward


def _limit(bench: Workbench, base: Measurement, count: int) -> Measurement:
    total = arithmetic.count(_forward_once(bench)) * bench.architecture.batch_size
    longer = arithmetic.factor(target_calls(bench), RANK * count, arithmetic.least_extra_forward, total)
    return base.lengthened(longer)


def _forward_once(bench: Workbench) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            bench.base(**bench.batch(1))

    return forward


TABLE = Table(
    peers=(BASE, COMPOSITION, MERGED, LORA, PEFT, LOOP, XLORA),
    models=("vit", "t5", "llama"),
    adapters=(1, 2, 5, 20, 64),
    rounds={"vit": 7, "t5": 5, "llama": 5, "tiny-vit": 4, "tiny-llama": 4},
    describe=lambda model: f"{model.name}, {model.size}",
    run=run,
)
