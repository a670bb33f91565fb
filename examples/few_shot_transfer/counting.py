"""Counts what a scenario will run, from its file and the documented sizes of its data alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from .plan import HELD_OUT, Plan, recipe_plan
from .scenario import ADDED, ALL, BASELINES, FACTORS, FROZEN, DataSpec, Scenario, Setting, SplitSpec


FILE = Path(__file__).parent / "sizes.yaml"
NAMING = ("path", "corpus", "domain", "variant")  # the option that names a data set, by source
SPLITS = ("train", "validation", "test")
ABOUT = ("classes", "question", "answer")


@dataclass(frozen=True)
class Sizes:
    """How large a task is.

    Attributes:
        classes: with examples, all equally many.
        train, validation, test: examples.
        question, answer: tokens, where there are any.
    """

    classes: int
    train: int
    validation: int
    test: int
    question: int = 0
    answer: int = 0

    def support(self, k: int | str) -> int:
        """Examples of a support set."""
        return self.train if k == ALL else self.classes * min(int(k), self.train // self.classes)


@dataclass(frozen=True)
class Body:
    """What computes: the model as it is, all of it in training, with a LoRA, or with a learned composition."""

    kind: Literal["bare", "full", "lora", "mixing"]
    rank: int = 0
    adapters: int = 0


@dataclass(frozen=True)
class Work:
    """Passes through one model.

    Attributes:
        body: the model.
        task: its examples.
        steps: optimizer steps.
        trained: examples that these steps see.
        seen: examples of which the logits or features are computed.
        answered: examples that are answered in words.
        head_steps: steps of a head alone, on features.
    """

    body: Body
    task: Sizes
    steps: int = 0
    trained: int = 0
    seen: int = 0
    answered: int = 0
    head_steps: int = 0


@dataclass(frozen=True)
class Planned:
    """One line of the results file, as the study will ask for it.

    Attributes:
        rate: the learning rate, or the label of the round whose grid search chooses it.
    """

    setting: Setting
    method: str
    adapters: tuple[str, ...]
    k: int | str
    seed: int
    rate: float | str | None
    judged_on: str
    factor: str | None = None

    @property
    def outcome(self) -> tuple[Any, ...]:
        """What runs have in common that give the same result."""
        rank = self.setting.rank if self.adapters or self.method in ("lora", "lambda-lora") else None
        run = self.k, self.seed, self.rate, self.judged_on
        return (self.setting.target, self.method, self.adapters, self.factor, rank, *run)


@dataclass(frozen=True)
class Tally:
    """What a scenario will run.

    Attributes:
        upstream: phases 1 and 2 by what is trained, which scenarios share.
        runs: lines of results, as the progress bar counts them.
        computed: runs but for those whose outcome another one has.
        downstream: phase 3.
    """

    upstream: Mapping[str, Work]
    runs: int
    computed: int
    downstream: tuple[Work, ...]


@dataclass
class _Known:
    """What a setting has computed before and keeps."""

    looked: set[tuple[tuple[str, ...], str]] = field(default_factory=set)
    warmed: set[tuple[tuple[str, ...], int | str, int]] = field(default_factory=set)
    loras: set[tuple[int | str, int, float | str | None]] = field(default_factory=set)


def tally(scenario: Scenario) -> Tally:
    """Counts the runs of a scenario and what they compute.

    Raises:
        ValueError: if the sizes of a data set are not known; the message says where they belong.
    """
    runs = list(planned(scenario))
    known: dict[Setting, _Known] = {}
    outcomes = set()
    works: list[Work] = []
    for run in runs:
        if run.outcome in outcomes:
            continue
        outcomes.add(run.outcome)
        kept = known.setdefault(run.setting, _Known())
        sizes = sizes_of(scenario, run.setting.target)
        counted = _answering if scenario.is_language else _by_recipe if run.method in ADDED else _classifying
        works += counted(scenario, run, sizes, kept)
    works += _comparing(scenario)
    return Tally(_upstream(scenario), len(runs), len(outcomes), tuple(works))


def planned(scenario: Scenario) -> Iterator[Planned]:
    """The runs of phase 3: first those of the grid search, then the final ones."""
    how = scenario.downstream
    for setting in scenario.judges().values() if how.selection else ():
        assert how.selection is not None
        for method, adapters, factor in _contenders(scenario, setting):
            rates = scenario.grid(method)
            for rate in rates if len(rates) > 1 else ():
                for k in how.selection.shots:
                    for seed in range(how.selection.seeds):
                        yield Planned(setting, method, adapters, k, seed, rate, "validation", factor)
    for setting in scenario.settings():
        for method, adapters, factor in _contenders(scenario, setting):
            rates = scenario.grid(method)
            chosen = rates[0] if len(rates) == 1 else setting.label
            for k in how.shots:
                for seed in range(how.seeds):
                    yield Planned(setting, method, adapters, k, seed, chosen, "test", factor)


def sizes_of(scenario: Scenario, task: str) -> Sizes:
    """The sizes of a task, with the splits that the study makes where a data set has none."""
    spec = scenario.tasks[task]
    return _task_sizes(scenario.data[spec.data], spec.classes, scenario.splits)


def _task_sizes(data: DataSpec, classes: tuple[int | str, ...] | None, splits: SplitSpec) -> Sizes:
    known = _documented(data)
    every = known["classes"]
    chosen = every if classes is None else sum(_width(entry) for entry in classes)
    parts = {split: known[split] for split in SPLITS if split in known}
    for split, fraction in (("test", splits.test), ("validation", splits.validation)):
        if split not in parts:
            parts[split] = every * round(fraction * (parts["train"] // every))
            parts["train"] -= parts[split]
    counts = {split: size * chosen // every for split, size in parts.items()}
    return Sizes(chosen, **counts, question=known.get("question", 0), answer=known.get("answer", 0))


def _documented(data: DataSpec) -> dict[str, int]:
    """The entry of a data set, its splits named and joined as the study reads them."""
    options = data.options
    name = next((str(options[key]) for key in NAMING if key in options), data.source)
    name = " ".join([name, *map(str, options.get("where", {}).values())])
    entries = _all_documented().get(data.source, {})
    if name not in entries:
        raise ValueError(f"the size of {name!r} of source {data.source!r} is not known: add it to {FILE.name}")
    known = dict(entries[name])
    if data.source == "hub":
        named = {"train": ["train"], **options}
        sums = {split: sum(known[part] for part in named[split]) for split in SPLITS if split in named}
        known = {key: size for key, size in known.items() if key in ABOUT} | sums
    limit = options.get("limit")
    if limit is not None:
        known.update({split: min(known[split], limit) for split in SPLITS if split in known})
    return known


@cache
def _all_documented() -> dict[str, dict[str, dict[str, int]]]:
    content: dict[str, dict[str, dict[str, int]]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return content


def _width(entry: int | str) -> int:
    match = re.fullmatch(r"(\d+)-(\d+)", str(entry))
    return int(match[2]) - int(match[1]) + 1 if match else 1


def _contenders(scenario: Scenario, setting: Setting) -> Iterator[tuple[str, tuple[str, ...], str | None]]:
    for method in scenario.methods:
        if method == "single":
            yield from ((method, (name,), None) for name in setting.upstream)
        elif method == "lambda-lora":
            yield from ((method, (), factor) for factor in FACTORS)
        elif method in BASELINES:
            yield method, (), None
        else:
            prefix = "random " if method.startswith("random") else ""
            yield method, tuple(prefix + name for name in setting.upstream), None


def _upstream(scenario: Scenario) -> dict[str, Work]:
    """Phases 1 and 2; the keys name everything that decides a training, as the study's folders do."""
    trained: dict[str, Work] = {}
    test_size = scenario.downstream.test_size
    shape = scenario.model.pretraining
    if shape is not None:
        sizes = _task_sizes(scenario.data[shape.data], shape.classes, scenario.splits)
        plan = Plan(shape.learning_rate, float(shape.steps), shape.batch_size, max_steps=shape.steps)
        judged = min(HELD_OUT, test_size or HELD_OUT, sizes.test)
        trained[f"{scenario.name} {shape}"] = _training(Body("full"), sizes, plan, sizes.train, seen=judged)
    how = replace(scenario.upstream, ranks=(), checkpoint_steps=0)
    for name, rank in scenario.wanted():
        sizes, spec = sizes_of(scenario, name), scenario.tasks[name]
        examples = min(how.limit or sizes.train, sizes.train)
        epochs = how.epochs if how.max_steps < 0 else float(how.max_steps)
        plan = Plan(how.learning_rate, epochs, how.batch_size, max_steps=how.max_steps)
        judged = min(HELD_OUT, test_size or HELD_OUT, sizes.test)
        looks = {"answered" if scenario.is_language else "seen": judged}
        key = repr((name, rank, scenario.model, scenario.data[spec.data], spec.classes, scenario.splits, how))
        trained[key] = _training(Body("lora", rank), sizes, plan, examples, **looks)
    return trained


def _classifying(scenario: Scenario, run: Planned, sizes: Sizes, known: _Known) -> Iterator[Work]:
    """One run of `downstream.Downstream`."""
    how, rank = scenario.downstream, run.setting.rank
    support = sizes.support(run.k)
    start = Body("mixing", rank, len(run.adapters)) if run.adapters else Body("bare")
    warm_up = Plan(how.warmup_learning_rate, how.warmup_epochs, how.batch_size).steps(support)
    plan = Plan(0.0, how.epochs, how.batch_size, max_steps=how.max_steps)
    judged = _judged(scenario, sizes)
    if run.method == "lorahub":
        seen = (how.lorahub_budget + 1) * support + judged[run.judged_on]
        yield Work(Body("lora", rank), sizes, seen=seen, head_steps=warm_up + plan.steps(support))
        return
    is_frozen = run.method in FROZEN
    # Every support set of the setting at once; two of them may share examples, which counts twice here.
    pool = min(sizes.train, how.seeds * max(sizes.support(k) for k in how.shots))
    looks = {"support": pool}
    if is_frozen:
        looks[run.judged_on] = judged[run.judged_on]
        if run.judged_on == "test":
            looks["validation"] = judged["validation"]
    head_steps = plan.steps(support) if is_frozen else 0
    if (run.adapters, run.k, run.seed) not in known.warmed:
        known.warmed.add((run.adapters, run.k, run.seed))
        head_steps += warm_up
    yield Work(start, sizes, seen=_new(known, run.adapters, looks), head_steps=head_steps)
    if not is_frozen:
        yield _training(_trained(run, rank), sizes, plan, support, seen=judged[run.judged_on])


def _by_recipe(scenario: Scenario, run: Planned, sizes: Sizes, known: _Known) -> Iterator[Work]:
    """One run of `recipes.Recipes`. A LoRA that the grid search has trained for a final run counts twice."""
    how, rank, support = scenario.downstream, run.setting.rank, sizes.support(run.k)
    judged = _judged(scenario, sizes)
    if run.method in ("evidence", "evidence-learned"):  # each adapter alone, the uniform mix and the bare model
        yield Work(Body("lora", rank), sizes, seen=(len(run.adapters) + 2) * support)
    if run.method in ("lambda-lora", "fresh-member") and (run.k, run.seed, run.rate) not in known.loras:
        known.loras.add((run.k, run.seed, run.rate))
        trained = list(_classifying(scenario, replace(run, method="lora", adapters=()), sizes, known))
        yield from (replace(work, seen=0) if work.steps else work for work in trained)
    if run.method == "lambda-lora":
        splits = {run.judged_on, "validation"}
        yield Work(Body("lora", rank), sizes, seen=sum(judged[split] for split in splits))
    elif run.method == "evidence":
        warm_up = Plan(how.warmup_learning_rate, how.warmup_epochs, how.batch_size)
        steps = (warm_up.steps(support), Plan(0.0, how.epochs, how.batch_size, max_steps=how.max_steps).steps(support))
        body = Body("mixing", rank, len(run.adapters))
        yield Work(body, sizes, seen=support + judged[run.judged_on], head_steps=sum(steps))
    else:
        body = Body("mixing", rank, len(run.adapters) + (run.method == "fresh-member"))
        yield _training(
            body, sizes, recipe_plan(how.recipe_steps, how.batch_size), support, seen=judged[run.judged_on]
        )


def _answering(scenario: Scenario, run: Planned, sizes: Sizes, known: _Known) -> Iterator[Work]:
    """One run of `language.LanguageDownstream`."""
    how, rank = scenario.downstream, run.setting.rank
    support, judged = sizes.support(run.k), _judged(scenario, sizes)
    if run.method in FROZEN:
        start = Body("mixing", rank, len(run.adapters)) if run.adapters else Body("bare")
        looks = {split: judged[split] for split in (run.judged_on, "validation")}
        yield Work(start, sizes, answered=_new(known, run.adapters, looks))
    elif run.method == "lorahub":
        yield Work(Body("lora", rank), sizes, seen=how.lorahub_budget * support, answered=judged[run.judged_on])
    else:
        plan = Plan(0.0, how.epochs, how.batch_size, max_steps=how.max_steps)
        yield _training(_trained(run, rank), sizes, plan, support, answered=judged[run.judged_on])


def _comparing(scenario: Scenario) -> Iterator[Work]:
    """CKA: the new task's examples pass through every upstream adapter and through the task's own."""
    if scenario.similarity is None:
        return
    for setting in scenario.settings():
        if len(setting.upstream) > 1:
            sizes = sizes_of(scenario, setting.target)
            examples = min(scenario.similarity.examples, sizes.test)
            yield Work(Body("lora", setting.rank), sizes, seen=(len(setting.upstream) + 1) * examples)


def _training(body: Body, sizes: Sizes, plan: Plan, examples: int, seen: int = 0, answered: int = 0) -> Work:
    steps = plan.steps(examples)
    epochs, rest = divmod(steps, math.ceil(examples / plan.batch_size))
    trained = epochs * examples + min(rest * plan.batch_size, examples)
    return Work(body, sizes, steps, trained, seen, answered)


def _trained(run: Planned, rank: int) -> Body:
    if run.method == "full":
        return Body("full")
    return Body("lora", rank) if run.method == "lora" else Body("mixing", rank, len(run.adapters))


def _judged(scenario: Scenario, sizes: Sizes) -> dict[str, int]:
    how = scenario.downstream
    return {
        "validation": min(how.validation_size or sizes.validation, sizes.validation),
        "test": min(how.test_size or sizes.test, sizes.test),
    }


def _new(known: _Known, adapters: tuple[str, ...], looks: Mapping[str, int]) -> int:
    """Examples of the splits that were not looked at before, which are so from now on."""
    new = {split: size for split, size in looks.items() if (adapters, split) not in known.looked}
    known.looked.update((adapters, split) for split in new)
    return sum(new.values())
