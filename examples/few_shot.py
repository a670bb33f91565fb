"""What the few-shot scripts share: their arguments, drawing K examples, building the model, reporting.

Copy it together with the script that you start from.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
import transformers
from datasets import ClassLabel, Dataset, Image, load_dataset, load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import ModelOutput

from peft_composition import CompositionCardMixin, CompositionConfig, fit_mixing_weights
from peft_composition.analysis.report import weights_table
from peft_composition.checkpoint.saved import saved_mixing_weights
from peft_composition.training import HeadWarmupCallback, MixingWeightsCallback, composition_optimizer


BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SAME_TEST_EXAMPLES = 0  # the seed of --max_test_samples: another --seed is tested on the same examples
LORA_RANK = 8  # of --method lora
DEFAULTS = {  # of TrainingArguments
    "learning_rate": 1e-3,
    "max_steps": 150,
    "lr_scheduler_type": "constant",
    "per_device_eval_batch_size": 32,
    "logging_steps": 25,
    "save_strategy": "no",
    "ddp_find_unused_parameters": False,
}
WITH_A_HEAD = {"max_steps": 100, "lr_scheduler_type": "linear"}  # of classifiers, in place of the above
RATES = {
    "evidence": 1e-2,
    "learned": 1e-2,
    "uniform": 1e-2,
    "base": 1e-2,
    "lora": 1e-3,
}  # of classifiers: a new head moves by these, too
MIXINGS: dict[str, Literal["fixed", "learned", "uniform"]] = {
    "evidence": "fixed",
    "learned": "learned",
    "uniform": "uniform",
    "lora": "uniform",  # composed to see on which modules, then taken off
}
METRICS = ("accuracy", "exact_match")


# The command line


@dataclass
class FewShotArguments:
    """What all few-shot scripts ask for."""

    _argument_group_name = "few-shot learning"

    model_name_or_path: str = field(metadata={"help": "Base model: a Hub id or a local folder."})
    dataset_name: str = field(
        metadata={
            "help": "Data set: a Hub id; a local folder that datasets can read (csv, json, parquet, images in one "
            "folder per class, or what save_to_disk wrote); or one csv, json, jsonl or parquet file."
        }
    )
    adapters: list[str] = field(
        default_factory=list,
        metadata={"help": "LoRA adapters trained on that base model, to be mixed: Hub ids or local folders."},
    )
    method: Literal["evidence", "learned", "uniform", "lora", "base"] = field(
        default="evidence",
        metadata={
            "help": "evidence: compose the adapters with weights by how well each of them predicts training examples "
            "that were left out; they stay. learned: weights that train. The others are controls: uniform, the "
            "average of the adapters; lora, a fresh LoRA on the same modules; base, the untouched base model."
        },
    )
    k: int = field(default=5, metadata={"help": "Training examples per class; where there are no classes, in all."})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a data set that has several."}
    )
    train_split: str = field(default="train", metadata={"help": "Split that the K examples are drawn from."})
    test_split: str = field(
        default="test",
        metadata={"help": "Split to test on; the same as --train_split: the examples that were not drawn."},
    )
    max_test_samples: int | None = field(
        default=None, metadata={"help": "Test on that many examples, drawn at random. Default: on all."}
    )

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"--k must be at least 1, got {self.k}")
        if self.max_test_samples is not None and self.max_test_samples < 1:
            raise ValueError(f"--max_test_samples must be at least 1, got {self.max_test_samples}")
        if not self.adapters and self.method != "base":
            raise ValueError(f"--method {self.method} needs --adapters")


@dataclass
class HeadArguments:
    """How a composition with a new head starts, and how that head is trained."""

    _argument_group_name = "head"

    start: Literal["evidence", "uniform"] = field(
        default="evidence",
        metadata={
            "help": "Mixing weights at the start of --method learned. evidence: by how well each adapter tells the "
            "training examples apart, each example left out in turn; uniform: 1/N, as in the paper."
        },
    )

    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the new head. Default: that of the mixing weights."}
    )
    head_warmup_steps: int = field(
        default=0,
        metadata={"help": "Steps at the start in which the head trains alone, as in the paper. Default: none."},
    )


def parse_arguments(kinds: Sequence[type], description: str | None, **defaults: Any) -> tuple[Any, ...]:
    """Reads the command line.

    Args:
        kinds: dataclasses of arguments.
        description: what `--help` says first.
        **defaults: of arguments, in place of their own.

    Returns:
        One instance of each dataclass.
    """
    parser = HfArgumentParser(kinds, description=description)  # type: ignore[arg-type]  # wants NewTypes
    if TrainingArguments in kinds:
        parser.set_defaults(**DEFAULTS)
    if HeadArguments in kinds:
        method = parser.parse_known_args()[0].method
        own = WITH_A_HEAD if TrainingArguments in kinds else {}
        parser.set_defaults(**own, learning_rate=RATES.get(method, RATES["learned"]))
    parser.set_defaults(**defaults)
    try:
        parsed = parser.parse_args_into_dataclasses(look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    found: dict[type, Any] = {type(part): part for part in parsed}
    if {HeadArguments, TrainingArguments} <= found.keys() and parsed[0].method == "learned":
        require_short_warmup(found[HeadArguments].head_warmup_steps, found[TrainingArguments].max_steps)
    return parsed


def require_short_warmup(warmup_steps: int, steps: int) -> None:
    """Ends the script with a line where the mixing weights would never move; steps of 0 or less are not known yet."""
    if warmup_steps >= steps > 0:
        raise SystemExit(
            f"Error: --head_warmup_steps {warmup_steps} takes the whole training of {steps} steps, and the mixing "
            "weights would never move: make it smaller (0: no warm-up), or train longer"
        )


def prepare_process(settings: TrainingArguments) -> None:
    """Seeds this process, and leaves warnings and progress bars to the main one."""
    require_one_group(settings.world_size)
    if settings.process_index:
        be_quiet()
    set_seed(settings.seed)


def require_one_group(processes: int) -> None:
    """Refuses to run when a launcher started several processes that do not know of each other.

    Without a GPU that happens unless the CPU is asked for; each process would train alone, and all would write the
    same files.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != processes:
        raise RuntimeError(
            f"{started} processes were started, but each would train alone: without GPUs, set ACCELERATE_USE_CPU=true"
        )


def be_quiet() -> None:
    """No warnings and no progress bars: for all processes but the main one."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")


# Data


def load_splits(arguments: FewShotArguments) -> tuple[Dataset, Dataset | None]:
    """Reads the data set.

    Returns:
        The split to draw from, and the split to test on; None if that is the same one.

    Raises:
        ValueError: there is no such split.
    """
    path = Path(arguments.dataset_name)
    if (path / "dataset_dict.json").is_file():
        splits = load_from_disk(str(path))
    elif path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"--dataset_name {path}: cannot read {path.suffix!r}, only {', '.join(BUILDERS)}")
        splits = load_dataset(BUILDERS[path.suffix], data_files=str(path))
    else:
        splits = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    for option, name in (("train", arguments.train_split), ("test", arguments.test_split)):
        if name not in splits:
            raise ValueError(
                f"--{option}_split {name}: {arguments.dataset_name} has only {', '.join(splits)}; "
                "with --test_split the same as --train_split, the examples that were not drawn are tested on"
            )
    train = splits[arguments.train_split]
    return train, None if arguments.test_split == arguments.train_split else splits[arguments.test_split]


def draw(
    arguments: FewShotArguments, seed: int, inputs: Sequence[str], label: str | None = None
) -> tuple[Dataset, Dataset]:
    """Reads the data set and draws K training examples, per class where there are classes.

    No training example has the same inputs as a test example, also if the data set has it in both splits.

    Args:
        arguments: which data set, how many examples.
        seed: of the draw.
        inputs: the columns that the model gets to see.
        label: the column of the classes. Default: there are none.

    Returns:
        Training examples, ordered by class, and test examples.

    Raises:
        ValueError: a column is missing, or there are not enough examples.
    """
    train, test = load_splits(arguments)
    for name in [*inputs, *([label] if label else [])]:
        if name not in train.column_names:
            raise ValueError(f"{arguments.dataset_name} has no column {name!r}, but {', '.join(train.column_names)}")
    known = set() if test is None else set(fingerprints(test, inputs))
    classes = train[label][:] if label else [None] * len(train)
    drawn: dict[Any, list[int]] = {name: [] for name in sorted(set(classes), key=_numbers_first)}
    for index in np.random.default_rng(seed).permutation(len(train)):
        of_class = drawn[classes[index]]
        if len(of_class) == arguments.k:
            continue
        (fingerprint,) = fingerprints(train.select([index]), inputs)
        if fingerprint not in known:
            known.add(fingerprint)
            of_class.append(int(index))
    for name, indices in drawn.items():
        if len(indices) < arguments.k:
            where = f"class {name!r}" if label else arguments.train_split
            raise ValueError(f"--k {arguments.k}: {where} has only {len(indices)} examples that are not tested on")
    support = train.select([index for indices in drawn.values() for index in indices])
    if test is None:
        test = train.select([n for n, found in enumerate(fingerprints(train, inputs)) if found not in known])
    if arguments.max_test_samples is not None and arguments.max_test_samples < len(test):
        test = test.shuffle(seed=SAME_TEST_EXAMPLES).select(range(arguments.max_test_samples))
    return support, test


def fingerprints(data: Dataset, columns: Sequence[str]) -> Iterator[str]:
    """One text for each example, the same for the same inputs; case and spacing of texts do not count."""
    for name in columns:
        if isinstance(data.features[name], Image):
            data = data.cast_column(name, Image(decode=False))
    for row in data.select_columns(list(columns)):
        yield "\0".join(_fingerprint(row[name]) for name in columns)


def _fingerprint(value: Any) -> str:
    if isinstance(value, Mapping) and "bytes" in value:
        content = Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
        return hashlib.sha256(content).hexdigest()
    return " ".join(str(value).lower().split())


def _numbers_first(name: Any) -> tuple[bool, Any]:
    return (isinstance(name, str), name)


def encode_classes(support: Dataset, test: Dataset, column: str) -> tuple[Dataset, Dataset, list[str]]:
    """Numbers the classes from 0, in a column `labels`.

    Returns:
        Both data sets, and the names of the classes.

    Raises:
        ValueError: the test examples have a class that was not drawn from.
    """
    classes = sorted(set(support[column][:]), key=_numbers_first)
    unknown = set(test[column][:]) - set(classes)
    if unknown:
        raise ValueError(f"test examples of classes without training examples: {sorted(map(str, unknown))}")
    numbers = {name: number for number, name in enumerate(classes)}
    feature = support.features[column]
    names = [feature.int2str(name) if isinstance(feature, ClassLabel) else str(name) for name in classes]
    encoded = []
    for data in (support, test):
        labels = [numbers[name] for name in data[column][:]]
        encoded.append(data.remove_columns(column).add_column("labels", labels))
    return encoded[0], encoded[1], names


# The model


def build_model(
    base: nn.Module, arguments: FewShotArguments, task_type: str | None = None, head: Sequence[str] = ()
) -> nn.Module:
    """The model of `--method`; only what that method trains is trainable.

    Args:
        base: base model, changed in place.
        arguments: the method and the adapters.
        task_type: PEFT's task type. Default: none.
        head: names of the modules that are new for this task, and trained by every method.
    """
    if arguments.method == "base":
        base.requires_grad_(False)
        for name in head:
            base.get_submodule(name).requires_grad_(True)
        return base
    shared: dict[str, Any] = {"task_type": task_type, "modules_to_save": list(head) or None}
    config = CompositionConfig(adapters=list(arguments.adapters), mixing=MIXINGS[arguments.method], **shared)
    model = get_peft_model(base, config)
    if arguments.method == "lora":
        targets = sorted(model.mixing_weights())
        lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets, **shared)
        return get_peft_model(model.unload(), lora)
    return model


def trainable(model: nn.Module) -> int:
    """Number of parameters that train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# Training


class HeadWarmup(HeadWarmupCallback):
    """The callback, where the number of steps follows from that of the epochs: its complaint names the argument."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        require_short_warmup(self.steps or 0, state.max_steps)
        super().on_train_begin(args, state, control, **kwargs)


class FewShotTrainer(CompositionCardMixin, Trainer):
    """The Trainer, with what the method needs: learning rates, warm-up of the head, logs and card of a composition."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        few_shot: FewShotArguments,
        head: HeadArguments | None = None,
        **kwargs: Any,
    ) -> None:
        if few_shot.method != "lora" and head is not None:
            kwargs["optimizer_cls_and_kwargs"] = composition_optimizer(args, head_lr=head.head_learning_rate)
        super().__init__(model, args, **kwargs)
        self.few_shot = few_shot
        self.takes_evidence = takes_evidence(few_shot.method, head)
        if few_shot.method == "learned":
            self.add_callback(MixingWeightsCallback(self))
            if head is not None and head.head_warmup_steps:
                self.add_callback(HeadWarmup(steps=head.head_warmup_steps))

    def run(self) -> None:
        """Trains, tests, saves and reports; pushes with `--push_to_hub`."""
        model = cast(nn.Module, self.model)
        count = trainable(model)
        if self.takes_evidence:
            weigh_by_evidence(model, self.train_dataset, self.data_collator, self.is_world_process_zero(), self.args)
        if count:
            self.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        metrics = self.evaluate()
        self.save_model()
        if isinstance(model, PeftModel):
            self.create_model_card()
        if self.is_world_process_zero():
            record = Record(
                method=self.few_shot.method,
                k=self.few_shot.k,
                seed=self.args.seed,
                processes=self.args.world_size,
                support=len(cast(Dataset, self.train_dataset)),
                test=len(cast(Dataset, self.eval_dataset)),
                trainable=count,
                metrics={name.removeprefix("eval_"): value for name, value in metrics.items()},
            )
            report(record, Path(cast(str, self.args.output_dir)))
        if self.args.push_to_hub:
            self.push_to_hub()


def takes_evidence(method: str, head: HeadArguments | None) -> bool:
    """Whether mixing weights come from the training examples: to stay, or as the start of those that train."""
    return method == "evidence" or (method == "learned" and head is not None and head.start == "evidence")


def weigh_by_evidence(
    model: nn.Module,
    support: Any,
    collate: Any,
    is_main: bool,
    args: TrainingArguments | None = None,
) -> None:
    """Put the mixing weights that the training examples speak for into a composition, and print why."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    if args is not None and (args.bf16 or args.fp16):
        precision = "bf16" if args.bf16 else "fp16"
    chosen = fit_mixing_weights(model, support, collate=collate, mixed_precision=precision)
    if is_main:
        Console().print(str(chosen), highlight=False, markup=False)


def cross_entropy(outputs: ModelOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Mean cross entropy of the classes over the whole batch, however many processes share it; for the Trainer.

    The loss that some models compute themselves, BERT's for one, grows with the number of processes under the
    Trainer: it expects a sum divided by `num_items_in_batch` of them.

    Args:
        outputs: with `logits`, (batch, classes).
        labels: (batch,).
        num_items_in_batch: examples in the batch, of all processes.
    """
    total = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of right predictions."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


# Report


@dataclass
class Record:
    """What `results.json` holds.

    Attributes:
        method: what was trained.
        k: training examples per class, or in all.
        seed: of the draw and of the training.
        processes: that trained together.
        support: training examples.
        test: test examples.
        trainable: number of parameters that were trained.
        metrics: on the test examples.
        mixing_weights: mean over the modules for every adapter; empty for methods that do not mix.
    """

    method: str
    k: int
    seed: int
    processes: int
    support: int
    test: int
    trainable: int
    metrics: dict[str, float]
    mixing_weights: dict[str, float] = field(default_factory=dict)


def report(record: Record, folder: Path) -> None:
    """Prints the mixing weights and the results of a saved model, and writes `results.json` beside it."""
    console = Console()
    if record.method in ("evidence", "learned", "uniform"):
        rows = weights_table(saved_mixing_weights(folder))
        record.mixing_weights = {row.adapter: row.mean for row in rows}
        table = Table(title=f"{record.method} mixing weights", caption=f"over {rows[0].modules} modules")
        table.add_column("adapter")
        for heading in ("mean", "min", "max"):
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(row.adapter, f"{row.mean:.3f}", f"{row.min:.3f}", f"{row.max:.3f}")
        console.print(table)
    (folder / "results.json").write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    for name, value in record.metrics.items():
        if name in METRICS:
            console.print(f"{name}: {100 * value:.1f}% of {record.test} test examples", highlight=False)
    console.print(
        f"{record.method}, {record.support} training examples, seed {record.seed}, {record.trainable:,} trained "
        f"parameters, {record.processes} process{'es' * (record.processes > 1)}; all of it is in {folder}",
        highlight=False,
        soft_wrap=True,
    )
