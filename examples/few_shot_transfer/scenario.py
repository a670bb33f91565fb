"""Scenarios: what a YAML file in `scenarios/` may say, its defaults (the paper's where it has any), and its checks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from .plan import RECIPE_RATE


FOLDER = Path(__file__).parent / "scenarios"
ALL = "all"
OTHERS = "others"
METHODS = (
    "zero-shot",
    "classifier",
    "full",
    "lora",
    "uniform",
    "learned",
    "learned-free",
    "single",
    "random-uniform",
    "random-learned",
    "lorahub",
    "evidence",
    "cold",
    "cold-block",
    "cold-model",
    "evidence-learned",
    "fresh-member",
    "lambda-lora",
)
# Neither the paper's nor its controls: run where they are named, for classifiers.
ADDED = METHODS[METHODS.index("evidence") :]
FACTORS = ("0.25", "0.5", "0.75", "1")  # of "lambda-lora"
CAUSAL = ("causal", "completion")
LANGUAGE = ("text-to-text", *CAUSAL)
BASELINES = ("zero-shot", "classifier", "full", "lora", "lambda-lora")  # methods without upstream adapters
FROZEN = ("zero-shot", "classifier", "uniform", "random-uniform", "single")  # nothing but a head is trained
SHARING = {"cold-block": "block", "cold-model": "model"}  # of weights that train; otherwise each module has its own
RECIPES = ("cold", *SHARING, "evidence-learned")  # head and weights train together, at a rate that is not searched
Key = tuple[str, str | None]  # a target and the label of its round
# Which learning rates a method's grid is about; what trains besides a head.
GRID_OF = {
    "classifier": "head",
    "uniform": "head",
    "single": "head",
    "random-uniform": "head",
    "lorahub": "head",
    "evidence": "head",
    "full": "full",
    "lora": "lora",
    "fresh-member": "lora",
    "lambda-lora": "lora",
    "learned": "mixing",
    "random-learned": "mixing",
    "learned-free": "mixing",
}


Entry = TypeVar("Entry")
# In YAML a list, or one value alone.
Several = Annotated[
    tuple[Entry, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else (value,))
]


class Settings:
    """Base of what is read from YAML: pydantic takes no unknown fields and no other types than those of the fields."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Pretraining(Settings):
    """Phase 1 where no foundation model is given: a small ViT trained on some classes of a data set.

    Args:
        data: name of the data set, from the scenario's `data`.
        classes: the classes it may see; leave out those of the downstream tasks.
        hidden_size, layers, heads, patch_size: the ViT.
        steps, batch_size, learning_rate: its training.
    """

    data: str
    classes: Several[int | str] | None = None
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    patch_size: int = 4
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class ModelSpec(Settings):
    """The foundation model.

    Args:
        kind: "sentence" (an encoder, mean-pooled, with a linear head), "image" (ViT with a linear head),
            "text-to-text" (as Flan-T5), "causal" (as SmolLM2, in its chat template) or "completion" (the same, which
            continues a text as it is).
        path: a Hub id, a folder, or the name of a packaged model (`models.PACKAGED`). Default: pretrained here.
        pretraining: how it is pretrained here.
        target_modules: where the LoRAs go; the query, key and value projections.
        max_length: tokens that are read of a text.
        max_new_tokens: tokens that an answer may have, for language models.
    """

    kind: Literal["sentence", "image", "text-to-text", "causal", "completion"]
    target_modules: Several[str]
    path: str | None = None
    pretraining: Pretraining | None = None
    max_length: int = 128
    max_new_tokens: int = 8

    def __post_init__(self) -> None:
        if (self.path is None) == (self.pretraining is None):
            raise ValueError("a model has either a path or pretraining")


@dataclass(frozen=True)
class DataSpec(Settings):
    """A data set: the module of `sources/` that reads it, and the options of its `load`."""

    source: str
    options: Mapping[str, Any] = field(default_factory=dict)


def _with_options(value: Any) -> Any:
    """In YAML the options of a data set stand beside its source."""
    if not isinstance(value, dict) or "source" not in value:
        return value
    options = {name: option for name, option in value.items() if name != "source"}
    return {"source": value["source"], "options": options}


@dataclass(frozen=True)
class TaskSpec(Settings):
    """A classification problem on some classes of a data set, or a question answering set.

    Args:
        data: name of the data set.
        classes: indices, names, or ranges such as "0-24" (both ends included); default all.
        parts: makes it a family: that many tasks on disjoint, equal shares of the classes.
    """

    data: str
    classes: Several[int | str] | None = None
    parts: int | None = None


@dataclass(frozen=True)
class RoundSpec(Settings):
    """Downstream tasks, each met in turn with the adapters of the upstream tasks.

    Args:
        target: the downstream tasks.
        upstream: names of upstream tasks or families; or "others": every task but the target.
        subsets: meet it with every non-empty subset of the upstream tasks, too (figure 5).
        label: what distinguishes this round in tables, where the number of adapters does not.
    """

    target: Several[str]
    upstream: Several[str] = (OTHERS,)
    subsets: bool = False
    label: str | None = None


@dataclass(frozen=True)
class UpstreamSpec(Settings):
    """Phase 2: how the LoRAs are trained. `epochs` counts if `max_steps` is -1, as for the Trainer."""

    ranks: Several[int] = (16,)
    alpha_per_rank: float = 2.0
    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 32
    learning_rate: float = 1e-3
    limit: int | None = None
    checkpoint_steps: int = 100


@dataclass(frozen=True)
class Selection(Settings):
    """The runs on which the grid search judges, by validation accuracy: these K and this many seeds."""

    shots: Several[int | str]
    seeds: int = 1


@dataclass(frozen=True)
class DownstreamSpec(Settings):
    """Phase 3: the budget that all methods share, and the grid that is searched for each.

    Args:
        shots: K, examples per class; "all" for the whole training split.
        seeds: how many; a seed decides the support set, the fresh head and the order of the examples.
        warmup_epochs, warmup_learning_rate: of the head alone, before all else (the paper: 50 epochs).
        epochs, max_steps, batch_size: of what follows; `max_steps` caps the steps, -1 does not.
        head_learning_rate: of the head beside a method's own parameters.
        grid: learning rates to choose from, by what trains: "head", "lora", "full", "mixing".
        selection: where the grid search judges; needed if a grid has more than one value.
        validation_size, test_size: examples, equally many of each class; None: all there are.
        lorahub_budget: combinations that LoraHub tries (its own default).
        recipe_steps: of a fresh head and weights that train together ("cold" and what starts elsewhere).
    """

    shots: Several[int | str]
    seeds: int = 3
    warmup_epochs: int = 50
    warmup_learning_rate: float = 1e-2
    epochs: int = 20
    max_steps: int = -1
    batch_size: int = 64
    head_learning_rate: float = 1e-3
    grid: Mapping[str, Several[float]] = field(
        default_factory=lambda: {"head": (1e-2,), "lora": (1e-3,), "full": (5e-5,), "mixing": (1e-3,)}
    )
    selection: Selection | None = None
    validation_size: int | None = None
    test_size: int | None = None
    lorahub_budget: int = 40
    recipe_steps: int = 100
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        for k in self.shots:
            if k != ALL and not (isinstance(k, int) and k > 0):
                raise ValueError(f'shots are positive numbers or "all", got {k!r}')
        unknown = set(self.grid) - set(GRID_OF.values())
        if unknown:
            raise ValueError(f"grid has unknown entries {sorted(unknown)}")
        if self.selection is None and any(len(rates) > 1 for rates in self.grid.values()):
            raise ValueError("a grid of several values needs selection: which shots and seeds judge")


@dataclass(frozen=True)
class SimilaritySpec(Settings):
    """Figures 7 and 8: CKA of every upstream adapter with a LoRA trained on all of the new task's data.

    Args:
        examples: of the new task's test split, equally many of each class.
    """

    examples: int = 256


@dataclass(frozen=True)
class SplitSpec(Settings):
    """What is kept apart of a data set that comes without a test or a validation split, as shares of its rest."""

    test: float = 0.2
    validation: float = 0.1


@dataclass(frozen=True)
class Scenario(Settings):
    """One experiment.

    Args:
        name: the file's name without its suffix.
        title: for tables and plots.
        scale: "offline" (packages alone) or "hub".
        shift: what sets the downstream task apart from the upstream tasks.
        paper: the table or figure of arXiv 2402.15414 that it repeats, or None.
        plot: the figure's form: accuracy over K, over the number of adapters, gain at one shot, or none.
        similarity: compares learned weights with CKA; default: does not.
        notes: what a reader of the results must know.
    """

    name: str
    title: str
    scale: Literal["offline", "hub"]
    shift: Literal["label", "covariate", "task"]
    model: ModelSpec
    data: Mapping[str, Annotated[DataSpec, BeforeValidator(_with_options)]]
    rounds: tuple[RoundSpec, ...]
    downstream: DownstreamSpec
    upstream: UpstreamSpec = UpstreamSpec()
    splits: SplitSpec = SplitSpec()
    tasks: Mapping[str, TaskSpec] = field(default_factory=dict)
    methods: Several[str] = ()
    paper: str | None = None
    plot: Literal["shots", "adapters", "none"] = "shots"
    similarity: SimilaritySpec | None = None
    notes: str = ""

    def __post_init__(self) -> None:
        own_tasks = self.tasks or {name: TaskSpec(name) for name in self.data}
        object.__setattr__(self, "tasks", _expanded(own_tasks))
        if not self.methods:
            object.__setattr__(self, "methods", self._all_methods())
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"unknown method {method!r}: choose among {', '.join(METHODS)}")
            if method in ADDED and self.is_language:
                raise ValueError(f"method {method!r} is for classifiers, and the model is {self.model.kind!r}")
        for name, task in self.tasks.items():
            if task.data not in self.data:
                raise ValueError(f"task {name!r}: unknown data {task.data!r}")
        for setting in self.settings():
            for name in (setting.target, *setting.upstream):
                if name not in self.tasks:
                    raise ValueError(f"unknown task {name!r}: there are {', '.join(self.tasks)}")

    @property
    def is_language(self) -> bool:
        """Whether answers are texts, and there is no classifier."""
        return self.model.kind in LANGUAGE

    def settings(self) -> Iterator[Setting]:
        """Every downstream task with every set of adapters that it is met with."""
        for spec in self.rounds:
            for target in spec.target:
                names = [name for entry in spec.upstream for name in self._upstream(entry, target)]
                sizes = range(1, len(names) + 1) if spec.subsets else (len(names),)
                for rank in self.upstream.ranks:
                    for size in sizes:
                        for chosen in combinations(names, size):
                            yield Setting(target, chosen, rank, spec.label)

    def shared_classes(self, target: str, other: str) -> float:
        """The share of a task's classes that another task has, too; 0 for tasks that do not list their classes."""
        own, others = self.tasks[target], self.tasks[other]
        if own.data != others.data or own.classes is None or others.classes is None:
            return 0.0
        classes = set(_listed(target, own))
        return len(classes & set(_listed(other, others))) / len(classes)

    def judges(self) -> dict[Key, Setting]:
        """For every target the setting with most adapters, on which its grid search judges."""
        judges: dict[Key, Setting] = {}
        for setting in self.settings():
            key = (setting.target, setting.label)
            if key not in judges or len(setting.upstream) > len(judges[key].upstream):
                judges[key] = setting
        return judges

    def grid(self, method: str) -> tuple[float, ...]:
        """The learning rates that are searched for a method."""
        if self.is_language and GRID_OF.get(method, "head") == "head":
            return (0.0,)  # nothing is trained
        if method in RECIPES:
            return (RECIPE_RATE,)
        return self.downstream.grid[GRID_OF[method]]

    def trained_for(self, setting: Setting) -> tuple[str, ...]:
        """The tasks that a setting needs a LoRA of."""
        return setting.upstream if self.similarity is None else (*setting.upstream, setting.target)

    def wanted(self) -> dict[tuple[str, int], None]:
        """The LoRAs that all settings need, by task and rank, in the order in which they are trained."""
        return dict.fromkeys((name, own.rank) for own in self.settings() for name in self.trained_for(own))

    def _upstream(self, entry: str, target: str) -> list[str]:
        if entry == OTHERS:
            return [name for name in self.tasks if name != target]
        family = [name for name in self.tasks if re.fullmatch(re.escape(entry) + r"/\d+", name)]
        return family or [entry]

    def _all_methods(self) -> tuple[str, ...]:
        without = ("classifier" if self.is_language else "zero-shot", *ADDED)
        return tuple(method for method in METHODS if method not in without)


@dataclass(frozen=True)
class Setting:
    """A downstream task, the upstream tasks whose adapters are at hand, and the rank of these."""

    target: str
    upstream: tuple[str, ...]
    rank: int
    label: str | None = None


def names(scale: str | None = None) -> list[str]:
    """The names of the scenarios that ship with the study, all or those of one scale."""
    found = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return [name for name in found if scale is None or load(name).scale == scale]


def load(name: str) -> Scenario:
    """Reads a scenario.

    Args:
        name: one of `names()`, or the path of a YAML file.

    Raises:
        ValueError: if there is no such scenario, or the file says something that is not understood; the message
            names the file and the field.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no scenario {name!r}: choose among {', '.join(names())}, or give a YAML file")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a mapping")
    content.pop("anchors", None)  # a place for YAML anchors
    try:
        # As JSON, in which pydantic's strict mode takes lists for tuples and mappings for dataclasses.
        return TypeAdapter(Scenario).validate_json(json.dumps({"name": path.stem, **content}, default=str))
    except ValidationError as error:
        raise ValueError(f"{path}: {_explained(error)}") from error


def smoke(scenario: Scenario) -> Scenario:
    """The same scenario, cut down to see that everything runs; its figures mean nothing."""
    downstream = replace(
        scenario.downstream,
        shots=scenario.downstream.shots[:1],
        seeds=min(2, scenario.downstream.seeds),
        warmup_epochs=2,
        epochs=2,
        max_steps=2,
        grid={name: rates[:1] for name, rates in scenario.downstream.grid.items()},
        selection=None,
        validation_size=20,
        test_size=20,
        lorahub_budget=3,
        recipe_steps=2,
    )
    upstream = replace(scenario.upstream, ranks=scenario.upstream.ranks[:1], max_steps=6, limit=64, checkpoint_steps=2)
    model = scenario.model
    if model.pretraining is not None:
        model = replace(model, pretraining=replace(model.pretraining, steps=4))
    first = scenario.rounds[0]
    rounds = (replace(first, target=first.target[:1], subsets=False),)
    similarity = scenario.similarity and replace(scenario.similarity, examples=16)
    return replace(
        scenario, downstream=downstream, upstream=upstream, model=model, rounds=rounds, similarity=similarity
    )


def class_indices(spec: Sequence[int | str] | None, class_names: Sequence[str]) -> list[int]:
    """The classes that a task names, as indices.

    Args:
        spec: indices, names, or ranges such as "0-24"; None: all.
        class_names: of the data set.

    Raises:
        ValueError: for a class that the data set does not have, or that is named twice.
    """
    if spec is None:
        return list(range(len(class_names)))
    chosen: list[int] = []
    for entry in spec:
        chosen += _class_range(entry, class_names)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"classes {list(spec)} name a class twice")
    return chosen


def _class_range(entry: int | str, class_names: Sequence[str]) -> list[int]:
    if entry in class_names:
        return [class_names.index(str(entry))]
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(entry))
    if match is None:
        raise ValueError(f"no class {entry!r} among {', '.join(class_names)}")
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if not first <= last < len(class_names):
        raise ValueError(f"classes {entry!r} asked for, there are 0 to {len(class_names) - 1}")
    return list(range(first, last + 1))


def _expanded(tasks: Mapping[str, TaskSpec]) -> dict[str, TaskSpec]:
    """Families replaced by their members, "name/0" and so on, which share the classes in order."""
    expanded: dict[str, TaskSpec] = {}
    for name, task in tasks.items():
        if task.parts is None:
            expanded[name] = task
            continue
        indices = _listed(name, task)
        if len(indices) % task.parts:
            raise ValueError(f"task {name!r}: {len(indices)} classes do not make {task.parts} equal parts")
        size = len(indices) // task.parts
        for part in range(task.parts):
            expanded[f"{name}/{part}"] = TaskSpec(task.data, tuple(indices[part * size : (part + 1) * size]))
    return expanded


def _listed(name: str, task: TaskSpec) -> list[int | str]:
    if task.classes is None:
        raise ValueError(f"task {name!r} has parts, so it must list its classes")
    listed: list[int | str] = []
    for entry in task.classes:
        match = re.fullmatch(r"(\d+)-(\d+)", str(entry))
        listed += range(int(match[1]), int(match[2]) + 1) if match else [entry]
    return listed


def _explained(error: ValidationError) -> str:
    """Each thing that is wrong in a scenario, with the field where it is wrong."""
    return "; ".join(
        f"{'.'.join(map(str, entry['loc'])) or 'scenario'}: {_problem(entry)}" for entry in error.errors()
    )


def _problem(entry: ErrorDetails) -> str:
    if entry["type"] == "unexpected_keyword_argument":
        return "there is no such field"
    if entry["type"] in ("missing", "value_error"):  # of the whole object, which is too long to show
        return entry["msg"].removeprefix("Value error, ")
    return f"{entry['msg']}, got {entry['input']!r}"
