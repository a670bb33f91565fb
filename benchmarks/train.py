"""The table `train`: one training step (forward with labels, backward, AdamW, zero_grad), relative to LoRA's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from . import arithmetic
from .cells import build_peers, in_order, target_calls
from .measure import elapsed, race
from .memory import SavedBytes, expected_growth, free_bytes, give_back, peak_during, resident_bytes
from .models import RANK, Workbench
from .peers import COMPOSITION, FROZEN, LOOP, LORA, PEFT, PEFT_TRAINED, UNIFORM, XLORA
from .results import Cell, Measurement
from .settings import LIMIT, Settings, Table


SHARE_OF_FREE_MEMORY = 0.7


class Step:
    """A training step of one peer, to be called again and again.

    Args:
        model: of the peer.
        bench: gives the batch.
        batch_size: of the step. Default: the architecture's.
    """

    def __init__(self, model: nn.Module, bench: Workbench, batch_size: int | None = None) -> None:
        self.model = model.train()
        self.bench = bench
        self.batch = bench.batch(batch_size, labels=True)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5) if parameters else None
        self.saved = SavedBytes(model)

    def __call__(self) -> None:
        self._finish(self.model(**self.batch).loss)

    def first(self) -> None:
        """The same, counting what is saved for backward."""
        with self.saved.counting():
            loss = self.model(**self.batch).loss
        self._finish(loss)

    def loss(self, batch_size: int) -> Tensor:
        """The loss with its graph, of a batch of another size."""
        return self.model(**self.bench.batch(batch_size, labels=True)).loss

    def _finish(self, loss: Tensor) -> None:
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def run(settings: Settings) -> Iterator[Cell]:
    """Measure every model and N."""
    for key in settings.models:
        for count in settings.adapters:
            yield _cell(settings, key, count)


def _cell(settings: Settings, key: str, count: int) -> Cell:
    give_back()  # the cell before
    bench = settings.workbench(key)
    limit = SHARE_OF_FREE_MEMORY * free_bytes(settings.device)
    if settings.memory_limit is not None:
        limit = settings.memory_limit
    models, measured = build_peers(settings.peers, bench, count)
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    warm_up: dict[str, float] = {}
    for peer, model in models.items():
        step = Step(model, bench)
        needed = expected_growth(step.loss, bench.architecture.batch_size, settings.device)
        if peer is not settings.peers[0] and needed > limit:
            measured[peer.title] = Measurement(skipped=f"needs about {needed / 1e9:.0f} GB for a step")
            continue
        steps[peer.title] = step
        peaks[peer.title], warm_up[peer.title] = _first_step(step, settings.device)
        give_back()
    reference = settings.peers[0].title
    label = f"train {key} N={count}"
    timed = race(steps, reference, settings.rounds[key], settings.device, label, settings.rare, warm_up=warm_up)
    for title, measurement in timed.items():
        step = steps[title]
        measurement.saved_bytes = step.saved.total
        measurement.peak_bytes = peaks[title] + resident_bytes(step.model, step.optimizer)
    measured.update(timed)
    if FROZEN.title in timed:
        measured[LIMIT] = _limit(bench, steps[FROZEN.title].model, timed[FROZEN.title], count)
    return Cell(key, count, reference, in_order(settings.peers, measured))


def _first_step(step: Step, device: torch.device) -> tuple[int, float]:
    """The transient peak of a first step, and its seconds."""
    seconds: list[float] = []
    peak = peak_during(lambda: seconds.append(elapsed(step.first, device)), device)
    return peak, seconds[0]


def _limit(bench: Workbench, frozen: nn.Module, floor: Measurement, count: int) -> Measurement:
    step: Callable[[], None] = Step(frozen, bench, 1)
    total = arithmetic.count(step) * bench.architecture.batch_size
    longer = arithmetic.factor(target_calls(bench), RANK * count, arithmetic.least_extra_training, total)
    return floor.lengthened(longer)


TABLE = Table(
    peers=(LORA, COMPOSITION, UNIFORM, PEFT, PEFT_TRAINED, LOOP, XLORA, FROZEN),
    models=("vit", "t5", "llama"),
    adapters=(1, 2, 5, 20, 64),
    rounds={"vit": 7, "t5": 4, "llama": 4, "tiny-vit": 4, "tiny-llama": 4},
    describe=lambda model: f"{model.name}, {model.size}",
    run=run,
)
