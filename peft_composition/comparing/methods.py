"""The methods of a comparison, run on all splits: what each may use, what it trains, and what that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..config import CompositionConfig
from ..evidence.fit import put_weights
from ..evidence.passes import ALL_KINDS, Composition, advice, candidates
from ..evidence.scores import NotFiniteError
from ..progress import progress_bar
from ..text import quoted
from ..tuner.single import evaluating
from .bodies import fresh_lora, mixing_parameters, random_factors
from .broken import BrokenAdapter, NotFiniteAdapterError, composed_of_good
from .tasks import Judged, Split, Task
from .training import as_before, fit


HEAD_ONLY, ZERO_SHOT, FRESH = "head only", "zero-shot", "fresh LoRA"
SINGLE, UNIFORM, EVIDENCE, LEARNED = "best single", "uniform", "evidence", "evidence, learned"
RANDOM = "random LoRAs"
BASE = "base"  # "head only" or "zero-shot", as the model has it
ALTERNATIVES = (BASE, FRESH)
REUSING = (SINGLE, UNIFORM, EVIDENCE, LEARNED)
METHODS = (*ALTERNATIVES, *REUSING, RANDOM)
Kind = Literal["alternative", "adapters", "control"]
SAME = 1e-6


@dataclass
class Outcome:
    """A method on all splits.

    Attributes:
        name: of the method.
        kind: "alternative" needs no adapters, "adapters" uses them, "control" uses random ones.
        judged: what it gave for the rows that each split is judged by.
        trainable: number of parameters that it trains.
        seconds: that it takes by itself, over all splits: each pass, choice and training that it needs, once.
    """

    name: str
    kind: Kind
    judged: list[Judged]
    trainable: int
    seconds: float


@dataclass
class Clock:
    """A progress bar, and the seconds of what was timed."""

    bar: Any
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str, steps: int = 1) -> Iterator[None]:
        """Count the time within for a method, or for what methods share; it is that many steps of the bar."""
        self.bar.set_postfix_str(name, refresh=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.bar.update(steps)


def run(
    task: Task,
    base: nn.Module,
    adapters: Sequence[Any],
    splits: Sequence[Split],
    methods: Sequence[str],
    scales: Sequence[float],
    rank: int,
    seed: int,
    progress: bool,
    judged: str = EVIDENCE,
) -> tuple[list[Outcome], list[BrokenAdapter]]:
    """Run methods on all splits; the base model is as before afterwards.

    Adapters that cannot be composed or scored are left out. Of one adapter alone "uniform" is the same as
    "best single", so only one of them is run.

    Args:
        task: the kind of model, with the examples and the budget.
        base: a model without adapters.
        adapters: as in `CompositionConfig`.
        splits: of the examples.
        methods: among `METHODS`.
        scales: of the fresh LoRA; 1 is the LoRA itself.
        rank: of the fresh LoRA.
        seed: of heads, LoRAs, bootstraps and the order of examples.
        progress: whether to show progress.
        judged: the method that the verdict is about, which is run in any case.

    Returns:
        What the methods gave, and the adapters that are left out.

    Raises:
        ValueError: no adapter is left.
    """
    trained = sum(name in methods for name in (EVIDENCE, LEARNED, FRESH))
    total = len(adapters) + 2 + (RANDOM in methods) + trained * len(splits)
    references = CompositionConfig(adapters=cast(Any, adapters), mixing="uniform").references
    broken: list[BrokenAdapter] = []
    found: list[Outcome] | None = None
    with progress_bar(total, "Comparing", "run", progress) as bar, as_before(base, task.head_parameters):
        while found is None:
            clock = Clock(bar)
            try:
                with composed_of_good(base, references, broken) as composition:
                    reusing = _Reusing(task, composition, splits, seed, clock)
                    found = reusing.outcomes(_different(methods, judged, len(reusing.names)))
                    modules = [name for name in composition.layers if name in _modules(base)]
            except NotFiniteAdapterError as error:
                broken.append(error.adapter)
                bar.reset()
        if FRESH in methods:
            found += _fresh(task, base, modules, splits, scales, rank, seed, clock)
    order = {name: number for number, name in enumerate((HEAD_ONLY, ZERO_SHOT, *METHODS))}
    return sorted(found, key=lambda own: order.get(own.name, order[FRESH])), broken


def _different(methods: Sequence[str], judged: str, count: int) -> list[str]:
    """The methods without one of two that are the same where there is one adapter."""
    same = {SINGLE if judged == UNIFORM else UNIFORM} if count == 1 and {SINGLE, UNIFORM} <= {*methods} else set()
    return [name for name in methods if name not in same]


class _Reusing:
    """Methods that stand on the composition, and on the base inside of it."""

    def __init__(self, task: Task, composition: Composition, splits: Sequence[Split], seed: int, clock: Clock) -> None:
        self.task, self.composition, self.splits, self.seed, self.clock = task, composition, splits, seed, clock
        self.every = torch.arange(len(task.rows))
        self.names = composition.config.adapter_names
        self.keys = [_key(name) for name in self.names]
        self.reads: dict[str, Any] = {}
        for candidate in candidates(composition, ALL_KINDS):
            is_adapter = candidate.kind == "adapter"
            key = _key(candidate.name) if is_adapter else f"({candidate.kind})"
            self.reads[key] = self._read(key, candidate.switch, candidate.name if is_adapter else None)
        self.passes = sum(clock.seconds.values())
        alone = [self.reads[key] for key in self.keys]
        with clock.timed("(choice)", steps=0):
            heads = task.own_heads(composition)
            self.choices = [
                task.evidence(alone, self.reads["(uniform)"], self.reads["(base)"], split.train, seed, heads)
                for split in splits
            ]
        self.chosen = self.passes + clock.seconds["(choice)"]

    def outcomes(self, methods: Sequence[str]) -> list[Outcome]:
        head = self.task.head_parameters
        shared = {name: self.clock.seconds[name] for name in ("(base)", "(uniform)")}
        alone = sum(self.clock.seconds[name] for name in (*self.keys, "(choice)"))
        found = []
        if BASE in methods:
            name = HEAD_ONLY if head else ZERO_SHOT
            found.append(self._frozen(name, "alternative", self._always("(base)"), shared["(base)"]))
        if SINGLE in methods:
            best = [self.reads[self.keys[pick]] for pick, _ in self.choices]
            found.append(self._frozen(SINGLE, "adapters", best, alone))
        if UNIFORM in methods:
            found.append(self._frozen(UNIFORM, "adapters", self._always("(uniform)"), shared["(uniform)"]))
        if EVIDENCE in methods:
            mixed = [self._mixed(weights) for _, weights in self.choices]
            found.append(self._frozen(EVIDENCE, "adapters", mixed, self.chosen + self.clock.seconds[EVIDENCE]))
        if RANDOM in methods:
            uniform = next(own for own in candidates(self.composition, ("uniform",)))
            with random_factors(self.composition, self.seed):
                read = self._read(RANDOM, uniform.switch)
            seconds = self.clock.seconds[RANDOM]
            found.append(self._frozen(RANDOM, "control", [read] * len(self.splits), seconds))
        if LEARNED in methods:
            found.append(self._learned())
        return found

    def _always(self, key: str) -> list[Any]:
        return [self.reads[key]] * len(self.splits)

    def _frozen(self, name: str, kind: Kind, of_splits: Sequence[Any], seconds: float) -> Outcome:
        started = time.perf_counter()
        judged = self.task.frozen(of_splits, self.splits, self.seed)
        return Outcome(name, kind, judged, _size(self.task.head_parameters), seconds + time.perf_counter() - started)

    def _read(self, key: str, switch: Callable[[], AbstractContextManager[None]], adapter: str | None = None) -> Any:
        model = self.composition.model
        with self.clock.timed(key), evaluating([model]), switch():
            try:
                return self.task.read(model, self.every)
            except NotFiniteError as error:
                if adapter is not None:
                    raise NotFiniteAdapterError(BrokenAdapter(adapter, f"{error}. {advice(True)}")) from error
                raise NotFiniteError(f"Scoring {quoted(key)}: {error}. {advice(False)}") from error

    def _mixed(self, weights: Tensor) -> Any:
        """What is read under weights by evidence; where they are uniform it was read before."""
        if bool((weights - 1 / len(weights)).abs().max() < SAME):
            with self.clock.timed(EVIDENCE):
                return self.reads["(uniform)"]
        put_weights(self.composition, weights.tolist())
        return self._read(EVIDENCE, nullcontext)

    def _learned(self) -> Outcome:
        model, task = self.composition.model, self.task
        judged = []
        weights = mixing_parameters(self.composition)
        head = task.head_parameters
        with as_before(model, head):
            for split, (_, start) in zip(self.splits, self.choices):
                with self.clock.timed(LEARNED):
                    put_weights(self.composition, start.tolist())
                    task.renew(self.seed)
                    rate = task.budget.learning_rate
                    fit(task, model, split, [(weights, rate), (head, rate)], task.budget, self.seed, LEARNED)
                    with evaluating([model]):
                        judged.append(task.judge(model, split.test))
        trainable = _size(head) + _size(weights)
        return Outcome(LEARNED, "adapters", judged, trainable, self.chosen + self.clock.seconds[LEARNED])


def _fresh(
    task: Task,
    base: nn.Module,
    modules: Sequence[str],
    splits: Sequence[Split],
    scales: Sequence[float],
    rank: int,
    seed: int,
    clock: Clock,
) -> list[Outcome]:
    if not modules:
        raise ValueError("the adapters target parameters alone, for which a fresh LoRA is not built; leave it out")
    judged: dict[float, list[Judged]] = {scale: [] for scale in scales}
    head = task.head_parameters
    with fresh_lora(base, modules, rank) as lora, as_before(base, head):
        rates = task.budget.lora_learning_rate, task.budget.learning_rate
        trainable = _size(lora.factors) + _size(head)
        for split in splits:
            with clock.timed(FRESH):
                lora.renew(seed)
                task.renew(seed)
                fit(task, lora.model, split, [(lora.factors, rates[0]), (head, rates[1])], task.budget, seed, FRESH)
            for scale, own in judged.items():
                with clock.timed(_scaled(scale), steps=0), evaluating([lora.model]), lora.times(scale):
                    own.append(task.judge(lora.model, split.test))
    seconds = dict(clock.seconds)
    trained = seconds.pop(FRESH)
    return [
        Outcome(name, "alternative", own, trainable, trained + seconds[judging])
        for name, judging, own in ((_name(scale), _scaled(scale), own) for scale, own in judged.items())
    ]


def _key(adapter: str) -> str:
    """What an adapter's pass goes by. An adapter may have any name, that of a method, too."""
    return f"adapter {adapter}"


def _name(scale: float) -> str:
    return FRESH if scale == 1 else f"{FRESH} x {scale:g}"


def _scaled(scale: float) -> str:
    return f"{FRESH} times {scale:g}"


def _size(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _modules(base: nn.Module) -> set[str]:
    return {name for name, _ in base.named_modules()}
