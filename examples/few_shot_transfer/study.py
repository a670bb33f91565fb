"""Runs a scenario: all three phases, every run once, each finished run one line of the results file."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm import tqdm

from benchmarks import machine

from .data import Task, Tasks
from .downstream import Downstream, Run, describe
from .language import LanguageDownstream
from .language_model import LanguageModel
from .methods import Contender, contenders
from .models import Classifier
from .plan import RECIPE_RATE
from .recipes import Recipes
from .records import Record, Results, identity
from .scenario import FACTORS, RECIPES, Key, Scenario, Setting
from .similarity import upstream_cka
from .upstream import Adapter, foundation, random_adapter, train_adapter


SOURCES = ("peft_composition", "examples")
NO_COST = {"seconds": 0.0, "cpu_seconds": 0.0}
FORMAT = 1  # raised when the same settings would no longer give the same result


@dataclass
class Stage:
    """A setting that is ready: adapters trained, data read."""

    setting: Setting
    downstream: Downstream | LanguageDownstream
    contenders: list[Contender]


class Study:
    """A scenario under way.

    Args:
        scenario: what to run.
        folder: for models, adapters and results.
        progress: whether to show progress bars.
        command: what was asked for; the results file names it.
    """

    def __init__(
        self, scenario: Scenario, folder: Path, progress: bool = True, command: str = "called from Python"
    ) -> None:
        self.scenario, self.folder, self.command = scenario, folder, command
        # The Trainer heeds this variable; PartialState alone would make each of several processes on CPUs the first.
        self.state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        torch.set_float32_matmul_precision("high")  # TF32 on the GPUs that have it; nothing changes on a CPU
        self.progress = progress and self.state.is_main_process
        with self.state.main_process_first():  # which cuts a torn line before the others read
            self.results = Results(folder / "results" / f"{scenario.name}.jsonl", self.state.is_main_process)
        self.tasks = Tasks(scenario)
        self._model: Classifier | LanguageModel | None = None
        self._adapters: dict[tuple[str, int], tuple[Adapter, Adapter]] = {}
        self._stages: dict[Setting, Stage] = {}
        self._session: str | None = None

    def run(self) -> None:
        """Does what has not been done."""
        settings = list(self.scenario.settings())
        self._upstream()
        # The Trainer collects garbage before and after every training. What is there by now stays to the end: looking
        # through it each time would take longer than many a run.
        gc.freeze()
        with tqdm(total=self._count(settings), desc=self.scenario.name, unit="run", disable=not self.progress) as bar:
            rates = self._select(bar)
            for setting in settings:
                for contender in self._stage(setting).contenders:
                    for k in self.scenario.downstream.shots:
                        for seed in range(self.scenario.downstream.seeds):
                            rate = rates[setting.target, setting.label][contender.method]
                            self._once(setting, Run(contender, k, seed, rate, "test"), bar)
                self._compare(setting)
                self._stages.pop(setting)  # with the features it kept
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def model(self) -> Classifier | LanguageModel:
        """The foundation model."""
        if self._model is None:
            self._model = foundation(self.scenario, self.folder / "foundation", self.progress)
        return self._model

    @property
    def _scratch(self) -> Path:
        return self.folder / "scratch" / self.scenario.name

    def _upstream(self) -> None:
        """Phases 1 and 2."""
        wanted = self.scenario.wanted()
        for name, rank in tqdm(wanted, desc="upstream adapters", unit="adapter", disable=not self.progress):
            adapter = train_adapter(
                self.scenario, name, rank, self.tasks, self.model, self.folder / "upstream", self.progress
            )
            self._adapters[name, rank] = adapter, random_adapter(adapter, self.folder / "random")
            run = identity({"format": FORMAT, "phase": "upstream", "adapter": adapter.folder.name})
            if run not in self.results:
                facts = {key: adapter.facts[key] for key in ("examples", "steps", "accuracy", "seconds")}
                self._append({"id": run, "phase": "upstream", "task": name, "rank": rank, **facts})

    def _compare(self, setting: Setting) -> None:
        """CKA of the setting's adapters with the target's own."""
        if self.scenario.similarity is None or len(setting.upstream) < 2:
            return
        own = {name: self._adapters[name, setting.rank][0] for name in self.scenario.trained_for(setting)}
        folders = {name: adapter.folder.name for name, adapter in own.items()}
        settings = {"phase": "similarity", **asdict(setting), "upstream": list(setting.upstream)}
        settings |= {**asdict(self.scenario.similarity), "part": "output"}
        name = identity({"format": FORMAT, **settings, "adapters": folders})
        if name in self.results:
            return
        started = time.perf_counter()
        upstream = [own[task] for task in setting.upstream]
        task = self.tasks[setting.target]
        cka = upstream_cka(self.scenario, setting, task, self.model, upstream, own[setting.target])
        seconds = round(time.perf_counter() - started, 3)
        self._append({"id": name, **settings, "cka": cka, "seconds": seconds})

    def _select(self, bar: tqdm) -> dict[Key, dict[str, float]]:
        """The grid search: for every target and method the learning rate that validates best."""
        rates: dict[Key, dict[str, float]] = {}
        for key, setting in self.scenario.judges().items():
            rates[key] = {}
            for method in dict.fromkeys(contender.method for contender in self._stage(setting).contenders):
                grid = self.scenario.grid(method)
                means = (
                    [self._mean_validation(setting, method, rate, bar) for rate in grid] if len(grid) > 1 else [0.0]
                )
                rates[key][method] = grid[means.index(max(means))]
        return rates

    def _mean_validation(self, setting: Setting, method: str, rate: float, bar: tqdm) -> float:
        selection = self.scenario.downstream.selection
        assert selection is not None
        accuracies = []
        for contender in self._stage(setting).contenders:
            if contender.method == method:
                for k in selection.shots:
                    for seed in range(selection.seeds):
                        run = Run(contender, k, seed, rate, "validation")
                        accuracies.append(self._once(setting, run, bar)["validation"])
        return fmean(accuracies)

    def _once(self, setting: Setting, run: Run, bar: tqdm) -> Record:
        """Runs it, unless it has finished before; what is the same in several settings is run in one of them."""
        settings = self._settings(setting, run)
        outcome_id = identity(self._recipe(setting, run))
        name = identity({**settings, "outcome": outcome_id})
        bar.set_postfix_str(f"{setting.target} K={run.k} seed {run.seed}: {run.contender.method}")
        if name not in self.results:
            known = self.results.by_outcome.get(outcome_id)
            if known is None:
                downstream = self._stage(setting).downstream
                before = time.process_time()
                done = describe(downstream.run(run))
                done["cpu_seconds"] = round(time.process_time() - before, 3)
            else:
                done = {**{key: known[key] for key in known if key not in ("id", *settings)}, **NO_COST}
            self._append({"id": name, "outcome": outcome_id, **settings, **done})
        bar.update()
        return self.results[name]

    def _append(self, record: Record) -> None:
        """Adds a finished run; before the first one of this session, what it runs on."""
        if self._session is None:
            facts = machine.describe(self.state.device, SOURCES)
            facts = {**facts, "processes": self.state.num_processes, "command": self.command}
            self._session = identity({**facts, "lines before": len(self.results)})
            self.results.append({"id": self._session, "phase": "session", **facts})
        made = {"date": time.strftime("%Y-%m-%d"), "session": self._session}
        self.results.append({**record, **{key: record.get(key, value) for key, value in made.items()}})

    def _settings(self, setting: Setting, run: Run) -> Record:
        return {
            "phase": "selection" if run.judged_on == "validation" else "final",
            **asdict(setting),
            "upstream": list(setting.upstream),
            "method": run.contender.method,
            "adapter": run.contender.adapter,
            "k": run.k,
            "seed": run.seed,
            "learning_rate": run.learning_rate,
        }

    def _recipe(self, setting: Setting, run: Run) -> dict[str, Any]:
        """Everything that decides what comes out of a run."""
        scenario, contender = self.scenario, run.contender
        tasks = {name: scenario.tasks[name] for name in (setting.target, *(own.name for own in contender.adapters))}
        ignored = ("shots", "seeds", "grid", "selection", "checkpoint_steps", "recipe_steps")
        return {
            "format": FORMAT,
            "method": contender.method,
            "adapters": [adapter.folder.name for adapter in contender.adapters],
            "rank": setting.rank if contender.adapters or contender.method in ("lora", "lambda-lora") else None,
            "run": [run.k, run.seed, run.learning_rate, run.judged_on],
            "model": asdict(scenario.model),
            "splits": asdict(scenario.splits),
            "tasks": {name: [asdict(task), asdict(scenario.data[task.data])] for name, task in tasks.items()},
            "alpha_per_rank": scenario.upstream.alpha_per_rank,
            "downstream": {k: v for k, v in asdict(scenario.downstream).items() if k not in ignored},
            **({"factor": contender.adapter} if contender.method == "lambda-lora" else {}),
            **(
                {"recipe": [RECIPE_RATE, scenario.downstream.recipe_steps]}
                if contender.method in (*RECIPES, "fresh-member")
                else {}
            ),
        }

    def _stage(self, setting: Setting) -> Stage:
        if setting not in self._stages:
            pairs = [self._adapters[name, setting.rank] for name in setting.upstream]
            own, random = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            task = self.tasks[setting.target]
            downstream = self._downstream(setting, task)
            self._stages[setting] = Stage(setting, downstream, contenders(self.scenario.methods, own, random))
        return self._stages[setting]

    def _downstream(self, setting: Setting, task: Task) -> Downstream | LanguageDownstream:
        if isinstance(self.model, LanguageModel):
            return LanguageDownstream(self.scenario, setting, task, self.model, self._scratch)
        return Recipes(self.scenario, setting, task, self.model, self._scratch)

    def _count(self, settings: list[Setting]) -> int:
        """How many runs there are in all, finished or not."""
        how = self.scenario.downstream
        total = 0
        for setting in settings:
            total += len(list(self._methods_of(setting))) * len(how.shots) * how.seeds
        for setting in self.scenario.judges().values():
            for method in self._methods_of(setting):
                if how.selection is not None and len(self.scenario.grid(method)) > 1:
                    total += len(self.scenario.grid(method)) * len(how.selection.shots) * how.selection.seeds
        return total

    def _methods_of(self, setting: Setting) -> Iterator[str]:
        for method in self.scenario.methods:
            yield from [method] * {"single": len(setting.upstream), "lambda-lora": len(FACTORS)}.get(method, 1)


def limited(
    scenario: Scenario,
    seeds: int | None,
    methods: tuple[str, ...] | None,
    shots: tuple[int | str, ...] | None = None,
    target: str | None = None,
) -> Scenario:
    """The scenario with fewer or more seeds, with some methods, other K, or one downstream task alone.

    Raises:
        ValueError: for a method or K that there is not, or a task that is not a downstream task of the scenario.
    """
    if seeds is not None:
        scenario = replace(scenario, downstream=replace(scenario.downstream, seeds=seeds))
    if shots is not None:
        scenario = replace(scenario, downstream=replace(scenario.downstream, shots=shots))
    if target is not None:
        rounds = tuple(replace(own, target=(target,)) for own in scenario.rounds if target in own.target)
        if not rounds:
            known = dict.fromkeys(name for own in scenario.rounds for name in own.target)
            raise ValueError(f"{target!r} is no downstream task of {scenario.name}: there are {', '.join(known)}")
        scenario = replace(scenario, rounds=rounds)
    return scenario if methods is None else replace(scenario, methods=methods)
