"""`explain`: looks at a composition on a few labelled examples, and reports what it is made of and why."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any, cast

import torch
from torch import nn

from ..analysis.report import Similarities, weights_table
from ..evidence.batches import Collate, rank
from ..evidence.passes import (
    ALL_KINDS,
    Composition,
    Examples,
    Precision,
    candidates,
    composition_in,
    passes,
    read_examples,
)
from ..evidence.score import require_pairs
from ..evidence.scores import LeftOut
from ..evidence.table import tabulate
from ..progress import progress_bar
from ..references import is_hub_id
from ..text import plural
from ..tuner.mixing_weights import mixing_weights
from .classes import class_names, left_out_table, predictions, table_of
from .explanation import Explanation
from .findings import AdapterFacts, Tested
from .left_out import THE_MIX, Outcome, left_out_rows, without
from .updates import updates_in


PACKAGES = ("peft-composition", "peft", "transformers", "torch")
SAME = 1e-6


def explain(
    model: nn.Module,
    data: Any,
    *,
    test: Any = None,
    labels: Sequence[str] | Mapping[int, str] | None = None,
    similarities: Similarities | None = None,
    title: str | None = None,
    data_name: str | None = None,
    command: str | None = None,
    adapter_name: str | None = None,
    head: str | nn.Module | None = None,
    collate: Collate | None = None,
    batch_size: int = 16,
    mixed_precision: Precision = "no",
    seed: int = 0,
    progress: bool = False,
) -> Explanation:
    """Explain a composition: which adapter is where, what each is worth, and what the mix would be without it.

    On the examples it scores each adapter alone, their uniform mix, the base model and the mix as it is, and the mix
    without each adapter, all by leave-one-out (see `score_adapters`). That takes two passes over the examples for each
    adapter, and three more. From the factors it computes how large and how alike the adapters' updates are. Nothing is
    trained, and the model is as before afterwards. Of a mix that is uniform itself there is one row.

    Args:
        model: a model with a composition, neither merged nor disabled.
        data: the examples, as for `score_adapters`.
        test: further examples of the same form, which the composition predicts with its own head. Default: none.
        labels: names of the classes, by label. Default: those in the model's config, or the labels.
        similarities: `{module: {adapter: similarity}}`, as from `layerwise_cka`, to be shown beside the weights.
            Default: none.
        title: of the report. Default: the number of adapters and the base model.
        data_name: what the examples are, for the report. Default: their number alone.
        command: that made it, for the report, as it is to be shown to others. Default: none.
        adapter_name: of the composition. Default: the active one.
        head: as for `score_adapters`.
        collate: as for `score_adapters`.
        batch_size: as for `score_adapters`.
        mixed_precision: as for `score_adapters`.
        seed: of the bootstraps behind the intervals.
        progress: whether to show a progress bar; the command line writes a line every 30 seconds into a log file.

    Returns:
        The explanation; `save("report.html")` writes it as a page that needs no other file.

    Raises:
        ValueError: as `score_adapters`; or a class has no name in `labels`, or test data are of another kind.
        RuntimeError: factors are sharded.

    Example:
        >>> explanation = explain(model, support_set)
        >>> explanation.save("report.html")
        >>> push_to_hub(model, "me/composed", explanation=explanation)
    """
    started = time.perf_counter()
    composition = composition_in(model, adapter_name)
    called, config = composition.model, composition.config
    examples = read_examples(called, data, head, collate, batch_size)
    tests = None if test is None else read_examples(called, test, head, collate, batch_size)
    names: dict[int, str] = {}
    if examples.labels is not None:
        require_pairs(examples.labels)
        known = {*examples.labels.tolist(), *([] if tests is None or tests.labels is None else tests.labels.tolist())}
        names = dict(zip(sorted(known), class_names(called, labels, sorted(known))))
    if tests is not None and (tests.labels is None) != (examples.labels is None):
        kinds = ("answers in tokens", "classes")
        own, other = (kinds[found.labels is not None] for found in (examples, tests))
        raise ValueError(f"test must have labels of the same kind as data: there they are {own}, here {other}")

    count = len(config.adapter_names)
    others = [kind for kind in ALL_KINDS if kind != "uniform" or not _is_uniform(composition)]
    mixes = [*candidates(composition, others), THE_MIX]
    left = [without(composition, {number}) for number in range(count)]
    with progress_bar(len(mixes) + count, "Explaining", "pass", progress and rank() == 0) as bar:
        passed = passes(called, [*mixes, *left], examples, mixed_precision, bar=bar)
    of_mixes, of_left = passed[: len(mixes)], passed[len(mixes) :]
    whole = Outcome.of(of_mixes[-1])
    classes = None
    if examples.labels is not None:
        columns = cast(list[int], examples.labels.unique().tolist())
        by_kind = {mix.kind: cast(LeftOut, own.found) for mix, own in zip(mixes, of_mixes)}
        found: dict[str, LeftOut] = {kind: by_kind[kind] for kind in ("mix", "uniform", "base") if kind in by_kind}
        classes = left_out_table(found, [names[label] for label in columns])
    explanation = Explanation(
        title=title or f"A composition of {plural(count, 'LoRA adapter')}",
        adapter_name=composition.name,
        mixing=config.mixing,
        normalization=config.normalization,
        base_model=_public(config.base_model_name_or_path),
        adapters=_facts(composition),
        weights=mixing_weights(called, composition.name),
        scores=tabulate(mixes, of_mixes, len(examples), seed),
        left_out=tuple(left_out_rows(composition, whole, dict(enumerate(of_left)), seed)),
        updates=updates_in(composition),
        classes=classes,
        tested=None if tests is None else _tested(composition, tests, names, mixed_precision),
        similarities=similarities,
        data=_described(examples, data_name),
        command=command,
        versions={package: _version(package) for package in PACKAGES},
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        seconds=0.0,
    )
    return replace(explanation, seconds=time.perf_counter() - started)


def _is_uniform(composition: Composition) -> bool:
    """Whether the mix is the uniform mix of its adapters, which then need not be scored twice."""
    each = 1 / len(composition.config.adapter_names)
    return all(
        bool((layer.mixing_weights(composition.name).detach() - each).abs().max() < SAME)
        for layer in composition.layers.values()
    )


def _facts(composition: Composition) -> tuple[AdapterFacts, ...]:
    config = composition.config
    rows = {row.adapter: row for row in weights_table(mixing_weights(composition.model, composition.name))}
    found = []
    for number, (name, entry) in enumerate(zip(config.adapter_names, config.provenance or [])):
        ranks = [row[number] for row in (config.composed_modules or {}).values() if row[number]]
        row = rows.get(name)
        source = "a local folder"
        if entry["commit"] is not None and is_hub_id(entry["path"]):
            inner = f"/{entry['subfolder']}" if entry["subfolder"] else ""
            source = f"{entry['path']}{inner} at {entry['commit'][:12]}"
        weights = (0.0, 0.0, 0.0) if row is None else (row.mean, row.min, row.max)
        license_ = entry.get("license") or "not stated"
        span = (min(ranks, default=0), max(ranks, default=0))
        found.append(AdapterFacts(name, source, license_, span, len(ranks), *weights))
    return tuple(found)


def _tested(composition: Composition, tests: Examples, names: Mapping[int, str], mixed_precision: Precision) -> Tested:
    if tests.labels is None:
        (passed,) = passes(composition.model, [THE_MIX], tests, mixed_precision)
        outcome = Outcome.of(passed)
        return Tested(len(tests), outcome.accuracy, float(outcome.values.mean()), None)
    predicted = predictions(composition.model, tests)
    labels = sorted({*names, *cast(list[int], predicted.tolist())})
    place = {label: number for number, label in enumerate(labels)}
    shown = [names.get(label) or class_names(composition.model, None, [label])[0] for label in labels]
    truth, taken = (
        torch.tensor([place[label] for label in cast(list[int], found.tolist())])
        for found in (tests.labels, predicted)
    )
    table = table_of(truth, {"mix": taken}, shown)
    return Tested(len(tests), table.accuracy("mix"), None, table)


def _described(examples: Examples, name: str | None) -> str:
    said = plural(len(examples), "example")
    if examples.labels is not None:
        counts = cast(list[int], examples.labels.unique(return_counts=True)[1].tolist())
        each = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        said += f" of {len(counts)} classes, {each} of each"
    return f"{name}: {said}" if name else said


def _public(name: str | None) -> str | None:
    """A Hub id, or of a local folder its last part alone: the rest would tell of your machine."""
    if name is None or is_hub_id(name):
        return name
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
