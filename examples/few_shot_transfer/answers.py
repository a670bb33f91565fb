"""Mixing weights of a language model by evidence, over many draws: what they gain on the uniform mix.

A model without a head answers alike at every draw. So each adapter alone is run once over a pool of examples that
support sets are drawn from, and each distinct mix once over the test examples; weights are rounded to quarters
before they are run, but not those that were trained. All but these is kept on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from peft_composition import mixing_weights
from peft_composition.evidence.choices import choices
from peft_composition.evidence.fit import put_weights
from peft_composition.evidence.passes import Composition, composition_in
from peft_composition.evidence.posterior import posterior
from peft_composition.evidence.weights import floored
from peft_composition.tuner.single import mixed_by, one_adapter

from .bench import BASE, UNIFORM, Draw, compose
from .data import Task, Tasks, balanced, few_shot, labels_of
from .language_model import LanguageModel
from .options import option_scores
from .plan import Plan
from .records import Record, identity
from .scenario import Scenario, Setting
from .training import fit
from .upstream import Adapter, foundation, train_adapter


POOL = 80  # examples that support sets are drawn from
PARTS = 4  # weights are run in this many parts
TRAINED = {"learned": False, "posterior, then learned": True}  # whether the posterior is the start


@dataclass(frozen=True)
class Seen:
    """What each adapter alone and their uniform mix make of n examples with C options: negative log-likelihoods.

    Attributes:
        options: of the adapters, shape (n, adapters, C).
        tokens: of the options, shape (n, C).
        labels: the right options, shape (n,).
        mixed: of the uniform mix, shape (n, C).
    """

    options: Tensor
    tokens: Tensor
    labels: Tensor
    mixed: Tensor

    @property
    def nll(self) -> Tensor:
        """Of the right answers under the adapters, (n, adapters)."""
        return self.options[torch.arange(len(self.labels)), :, self.labels]

    @property
    def uniform(self) -> Tensor:
        """Of the right answers under the uniform mix, (n,)."""
        return self.mixed[torch.arange(len(self.labels)), self.labels]

    @property
    def length(self) -> Tensor:
        """Of the right answers, in tokens, (n,)."""
        return self.tokens[torch.arange(len(self.labels)), self.labels]


def _nll_among_options(seen: Seen) -> Tensor:
    return -(-seen.options).log_softmax(-1)[torch.arange(len(seen.labels)), :, seen.labels]


def _over_options(seen: Seen, seed: int) -> Tensor:
    own = _nll_among_options(seen)
    return posterior(own, torch.ones(len(own)))


def _best_among_options(seen: Seen, seed: int) -> Tensor:
    mean = _nll_among_options(seen).mean(0)
    return torch.eye(len(mean), dtype=torch.float64)[int(mean.argmin())]


def _most_right(seen: Seen, seed: int) -> Tensor:
    right = (seen.options.argmin(-1) == seen.labels[:, None]).double().mean(0)
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))  # a tie is broken by chance
    best = int(order[right[order].argmax()])
    return torch.eye(len(right), dtype=torch.float64)[best]


def _with_uniform(seen: Seen, odds: int) -> Tensor:
    """The uniform mix is a candidate, before so many times as probable as an adapter; all get its share evenly."""
    count = seen.nll.shape[1]
    found = posterior(torch.cat([seen.nll, seen.uniform[:, None].expand(-1, odds)], 1), seen.length, floor=0.0)
    return floored(found[:count] + found[count:].sum() / count)


WAYS: dict[str, Callable[[Seen, int], Tensor]] = {
    "posterior": lambda seen, _: posterior(seen.nll, seen.length),
    "choices": lambda seen, _: choices(seen.nll, seen.length, _nll_among_options(seen))[0],
    "posterior, uniform mix as one more": lambda seen, _: _with_uniform(seen, 1),
    "posterior, uniform mix at one half": lambda seen, _: _with_uniform(seen, seen.nll.shape[1]),
    "posterior, every token counts": lambda seen, _: posterior(seen.nll, seen.length, temper=1.0),
    "posterior, an answer counts as one token": lambda seen, _: posterior(
        seen.nll / seen.length[:, None], torch.ones(len(seen.labels))
    ),
    "posterior over the options": _over_options,
    "best among the options": _best_among_options,
    "most right answers": _most_right,
}


class Bench(Protocol):
    """What `compare_answers` asks of a task and its adapters.

    Attributes:
        parts: weights are run in so many parts.
    """

    parts: int

    @property
    def facts(self) -> Mapping[str, str]:
        """`scenario` and `target`."""

    @property
    def names(self) -> Sequence[str]:
        """Of the adapters."""

    def seen(self, draw: Draw) -> Seen:
        """What each adapter alone and their uniform mix make of the support set."""

    def judged(self, weights: Sequence[float] | int) -> dict[str, float]:
        """How a mix answers the test questions; a number is an adapter alone."""

    def pool_accuracy(self, weights: Sequence[float] | int) -> float:
        """How many of the examples that support sets are drawn from a mix answers rightly, in percent."""

    def learned(self, draw: Draw, start: Sequence[float], scratch: Path) -> tuple[dict[str, float], Any]:
        """Weights trained on the support set: what they answer, and their means over modules."""


class AnswerBench:
    """A new task for a language model, and the adapters that meet it.

    Args:
        scenario: of a language model.
        setting: the task and its adapters.
        task: the data: `input`, `answer`, `options` and `label`, the right option.
        adapters: trained.
        model: the foundation model.
        folder: where likelihoods are kept.
    """

    parts = PARTS

    def __init__(
        self,
        scenario: Scenario,
        setting: Setting,
        task: Task,
        adapters: Sequence[Adapter],
        model: LanguageModel,
        folder: Path,
    ) -> None:
        self.scenario, self.setting, self.model, self.folder = scenario, setting, model, folder
        self.adapters = adapters
        self.facts = {"scenario": scenario.name, "target": setting.target}
        self.rows = {
            "pool": task.train.select(balanced(labels_of(task.train), POOL)),
            "test": task.test.select(balanced(labels_of(task.test), scenario.downstream.test_size)),
        }

    @property
    def names(self) -> list[str]:
        """Of the adapters."""
        return [adapter.name for adapter in self.adapters]

    def support(self, draw: Draw) -> list[int]:
        """The examples of a draw, as places in the pool."""
        return few_shot(labels_of(self.rows["pool"]), *draw)

    def seen(self, draw: Draw) -> Seen:
        """What each adapter alone and their uniform mix make of the support set."""
        chosen = self.support(draw)
        count = len(self.adapters)
        found = [self._scores(number, "pool") for number in range(count)]
        mixed, *_ = self._scores([1 / count] * count, "pool")
        labels = torch.tensor(self.rows["pool"].select(chosen)["label"][:])
        return Seen(torch.stack([own[0][chosen] for own in found], 1), found[0][1][chosen], labels, mixed[chosen])

    def judged(self, weights: Sequence[float] | int) -> dict[str, float]:
        """How a mix answers the test questions; a number is an adapter alone.

        Returns:
            `accuracy` in percent, the likeliest option being the answer; `exact`, how often greedy generation would
            give the right answer, in percent; `nll` of the right one among the options; and `nll_token`, of a token of
            the right answer over the whole vocabulary.
        """
        return self._judge(*self._scores(weights, "test"))

    def pool_accuracy(self, weights: Sequence[float] | int) -> float:
        """How many of the examples that support sets are drawn from a mix answers rightly, in percent."""
        nll, *_ = self._scores(weights, "pool")
        return round(100 * float((nll.argmin(1) == torch.tensor(labels_of(self.rows["pool"]))).double().mean()), 4)

    def _judge(self, nll: Tensor, tokens: Tensor, said: Tensor) -> dict[str, float]:
        labels = torch.tensor(labels_of(self.rows["test"]))
        place = torch.arange(len(labels)), labels
        return {
            "accuracy": round(100 * float((nll.argmin(1) == labels).double().mean()), 4),
            "exact": round(100 * float(said[place].mean()), 4),
            "nll": round(-float((-nll).log_softmax(1)[place].mean()), 5),
            "nll_token": round(float((nll[place] / tokens[place]).mean()), 5),
        }

    def learned(self, draw: Draw, start: Sequence[float], scratch: Path) -> tuple[dict[str, float], Any]:
        """Weights of every module trained on the support set: what the model answers, and their means over modules."""
        model = compose(self.model.build(0, 0), self.adapters, self.scenario, mixing="learned")
        put_weights(composition_in(model, None), start)
        rows = self.model.encode(self.rows["pool"].select(self.support(draw)))
        how = self.scenario.downstream
        rate = how.grid["mixing"][0]
        plan = Plan(rate, how.epochs, how.batch_size, None, how.max_steps, draw[1])
        fit(model, rows, plan, scratch, self.model.collate)
        of_modules = mixing_weights(model).values()
        found = [fmean(float(own[name]) for own in of_modules) for name in self.names]
        return self._judge(*option_scores(model, self.model, self.rows["test"])), found

    @cached_property
    def _composition(self) -> Composition:
        even = [1 / len(self.adapters)] * len(self.adapters)
        return composition_in(
            compose(self.model.build(0, 0), self.adapters, self.scenario, mixing="fixed", weights=even), None
        )

    def _switched(self, weights: Sequence[float] | int) -> AbstractContextManager[None]:
        layers, name = list(self._composition.layers.values()), self._composition.name
        if isinstance(weights, int):
            return one_adapter(layers, name, weights)
        return mixed_by(layers, name, list(weights))

    def _scores(self, weights: Sequence[float] | int, split: str) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(weights, int) and max(weights) == 1:
            weights = list(weights).index(1)
        path = self.folder / f"{self._key(weights, split)}.pt"
        if not path.is_file():
            with self._switched(weights):
                found = option_scores(self._composition.model, self.model, self.rows[split])
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, path.with_suffix(".draft"))
            path.with_suffix(".draft").replace(path)
        nll, tokens, said = torch.load(path)
        return nll, tokens, said

    def _key(self, weights: Sequence[float] | int, split: str) -> str:
        folders = [adapter.folder.name for adapter in self.adapters]
        mix = (
            [folders[weights]]
            if isinstance(weights, int)
            else [[folder, round(weight, 4)] for folder, weight in zip(folders, weights) if weight]
        )
        spec = self.scenario.tasks[self.setting.target]
        return identity(
            {
                "model": [self.model.name, asdict(self.scenario.model)],
                "mix": mix,
                "data": [asdict(self.scenario.data[spec.data]), spec.classes, asdict(self.scenario.splits)],
                "rows": [split, len(self.rows[split])],
            }
        )


def open_answer_benches(
    scenario: Scenario, folder: Path, target: str | None, progress: bool = True
) -> Iterator[AnswerBench]:
    """The downstream tasks of a scenario with their adapters, trained where they are not there yet."""
    tasks = Tasks(scenario)
    model = foundation(scenario, folder / "foundation", progress)
    assert isinstance(model, LanguageModel)
    for setting in scenario.settings():
        if target in (None, setting.target):
            adapters = [
                train_adapter(scenario, name, setting.rank, tasks, model, folder / "upstream", progress)
                for name in setting.upstream
            ]
            yield AnswerBench(scenario, setting, tasks[setting.target], adapters, model, folder / "answers")


def compare_answers(
    bench: Bench,
    draws: Sequence[Draw],
    trained: int = 0,
    known: Sequence[Record] = (),
    progress: bool = True,
) -> Iterator[Record]:
    """Measure a task: once each adapter alone, the uniform mix and the bare model; then draw by draw.

    Args:
        bench: the task.
        draws: K and seeds.
        trained: how many draws of each K also train the weights, from uniform ones and from the posterior.
        known: records that there are; what they have is not done again.
        progress: whether to show a progress bar.

    Yields:
        A record for each mix without a draw (K and seed are None), and for each draw and way.
    """
    facts = bench.facts
    done = {
        (r["target"], r["k"], r["seed"], r["method"], r["adapter"])
        for r in known
        if r["scenario"] == facts["scenario"]
    }
    count = len(bench.names)
    still: list[tuple[str, str | None, Sequence[float] | int]] = [
        *(("single", name, number) for number, name in enumerate(bench.names)),
        (UNIFORM, None, [1 / count] * count),
        (BASE, None, [0.0] * count),
    ]
    for method, adapter, weights in still:
        if (facts["target"], None, None, method, adapter) not in done:
            one = {**facts, "k": None, "seed": None, "method": method, "adapter": adapter}
            yield {**one, **bench.judged(weights), "pool": bench.pool_accuracy(weights), "weights": None}
    for k, seed in tqdm(draws, desc=" ".join(facts.values()), unit="draw", disable=not progress):
        seen = bench.seen((k, seed))
        own: Record = {**facts, "k": k, "seed": seed, "adapter": None}
        for method, way in WAYS.items():
            if (facts["target"], k, seed, method, None) not in done:
                found = way(seen, seed).tolist()
                yield {
                    **own,
                    "method": method,
                    **bench.judged(in_parts(found, bench.parts)),
                    "weights": _named(bench, found),
                }
        for method, is_evidence in TRAINED.items() if seed < trained else ():
            if (facts["target"], k, seed, method, None) not in done:
                start = WAYS["posterior"](seen, seed).tolist() if is_evidence else [1 / count] * count
                with tempfile.TemporaryDirectory() as scratch:
                    judged, found = bench.learned((k, seed), start, Path(scratch))
                yield {**own, "method": method, **judged, "weights": _named(bench, found)}


def in_parts(weights: Sequence[float], parts: int = PARTS) -> list[float]:
    """Weights that sum to 1 rounded to whole parts that sum to 1, those with the largest rest upwards."""
    wanted = [weight * parts for weight in weights]
    counts = [int(value + 1e-9) for value in wanted]
    by_rest = sorted(range(len(wanted)), key=lambda place: counts[place] - wanted[place])
    for place in by_rest[: parts - sum(counts)]:
        counts[place] += 1
    return [count / parts for count in counts]


def _named(bench: Bench, weights: Sequence[float]) -> Mapping[str, float]:
    return {name: round(weight, 4) for name, weight in zip(bench.names, weights)}
