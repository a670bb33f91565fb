"""Reports for each upstream adapter what it is and whether it can be composed, even if others fail."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from types import TracebackType
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn

from ..config import CompositionConfig
from ..references import AdapterReference, is_hub_id, place_of
from ..selection import HEADS
from ..text import LONG, one_line, quoted
from ..tuner.preparation import require_composable
from ..upstream.adapter import UpstreamAdapter, read_adapters, read_config
from ..upstream.base_names import original
from ..upstream.errors import AdapterError
from ..upstream.files import PARALLEL_DOWNLOADS, AdapterFiles, locate_one
from ..upstream.front_matter import stated_license
from ..upstream.keys import FactorKeys
from ..upstream.matching import match, warn_about_other_names
from ..upstream.misfits import Sizes, why_another_shape
from ..upstream.shapes import LayerShape
from ..upstream.stacking import require_finite


# Without a base model, the values of larger files are not read.
MOST_BYTES = 8 << 30


@dataclass
class AdapterReport:
    """The properties of one adapter, as far as it could be read.

    Attributes:
        name: its name in a composition.
        path: Hub id or folder, with its subfolder.
        revision: the requested revision.
        commit: the commit of that revision, for an adapter from the Hub.
        license: the license that its card states.
        base: the base model that its config states.
        task_type: the task type that its config states.
        ranks: smallest and largest rank.
        targets: suffixes of its module names.
        modules: number of modules.
        parameters: number of values in its factors.
        bytes: size of its weights file in bytes.
        reason: why it cannot be composed; None if it can.
        notes: warnings about it.
    """

    name: str
    path: str
    revision: str | None = None
    commit: str | None = None
    license: str | None = None
    base: str | None = None
    task_type: str | None = None
    ranks: tuple[int, int] | None = None
    targets: list[str] = field(default_factory=list)
    modules: int | None = None
    parameters: int | None = None
    bytes: int | None = None
    reason: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_composable(self) -> bool:
        """Whether it can be composed."""
        return self.reason is None


def inspect_adapters(
    references: Sequence[AdapterReference],
    model: nn.Module | None = None,
    task_type: str | None = None,
    check_base_model: bool = True,
) -> list[AdapterReport]:
    """Check every adapter as composing would, including its values, and continue after one that fails.

    Args:
        references: the adapters, as in `CompositionConfig.references`.
        model: the base model, which may be on the meta device. Default: none; then the adapters are compared with each
            other, and those that differ from the majority are refused.
        task_type: task type of the composition; heads that it trains in full are not checked.
        check_base_model: whether to compare the names of base models, as in `CompositionConfig`. Default: True.

    Returns:
        One report per adapter, in the order of `references`.
    """
    reports: list[AdapterReport] = []
    read: list[tuple[AdapterReport, UpstreamAdapter]] = []
    same = _Agreement(check_base_model)
    for found, reference in zip(_locate_each(references), references):
        report = AdapterReport(reference["name"], place_of(reference), reference.get("revision"))
        reports.append(report)
        with _Judging(report):
            if isinstance(found, Exception):
                raise found
            _describe_config(report, found)
            (adapter,) = read_adapters([found], [None], hashed=False)
            _describe_factors(report, adapter)
            same.add(adapter)
            read.append((report, adapter))
    same.count()
    for report, adapter in read:
        with _Judging(report):
            if model is None:
                same.require(adapter)
            else:
                config = CompositionConfig(
                    adapters=[report.path],
                    modules_to_save=HEADS.get(task_type or ""),
                    check_base_model=check_base_model,
                )
                require_composable(config, model, [adapter])
        if adapter.extras:
            report.notes.append(one_line(f"not LoRA factors, not mixed: {', '.join(adapter.extras)}", LONG))
    return reports


class _Judging:
    """A context that turns an error into the reason of a report, and warnings into its notes."""

    def __init__(self, report: AdapterReport) -> None:
        self._report = report
        self._catching = warnings.catch_warnings(record=True)

    def __enter__(self) -> None:
        self._warnings = self._catching.__enter__()
        warnings.simplefilter("always")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._catching.__exit__(kind, error, trace)
        prefix = f"adapter {self._report.name!r} "
        self._report.notes += [str(caught.message).removeprefix(prefix) for caught in self._warnings or ()]
        if error is None or isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            return False
        self._report.reason = _reason(error)
        return True


def _reason(error: BaseException) -> str:
    """The reason why an adapter failed, also for unexpected errors."""
    if isinstance(error, AdapterError):
        return error.reason
    return one_line(error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}", LONG)


def _locate_each(references: Sequence[AdapterReference]) -> Iterator[AdapterFiles | Exception]:
    """The files of every adapter, or the error; several downloads run at the same time."""

    def locate(reference: AdapterReference) -> AdapterFiles | Exception:
        try:
            return locate_one(reference)
        except Exception as error:
            return error

    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        yield from tqdm(pool.map(locate, references), total=len(references), desc="Reading adapters", unit="adapter")


def _describe_config(report: AdapterReport, files: AdapterFiles) -> None:
    """Add what the config alone says, also for an adapter that is refused later."""
    report.commit = files.commit
    report.bytes = files.weights.stat().st_size
    report.license = stated_license(files.card)
    config = read_config(files)
    report.base = config.get("base_model_name_or_path")
    report.task_type = config.get("task_type")
    rank, targets = config.get("r"), config.get("target_modules")
    report.ranks = (rank, rank) if isinstance(rank, int) else None
    report.targets = [targets] if isinstance(targets, str) else sorted(targets or [])


def _describe_factors(report: AdapterReport, adapter: UpstreamAdapter) -> None:
    factors = adapter.modules.values()
    ranks = [entry.rank for entry in factors]
    if adapter.config.get("target_parameters"):  # only the model shows how many matrices share the rows of a factor
        ranks = [
            rank for rank in (adapter.config.get("r"), *(adapter.config.get("rank_pattern") or {}).values()) if rank
        ]
    report.ranks = min(ranks), max(ranks)
    report.targets = sorted({module.rpartition(".")[2] for module in adapter.modules})
    report.modules = len(adapter.modules)
    keys = [key for entry in factors for key in (entry.A, entry.B, entry.bias) if key]
    report.parameters = sum(prod(adapter.weights.shape(key)) for key in keys)


class _Agreement:
    """What most adapters have in common, used instead of a base model."""

    def __init__(self, check_base_model: bool) -> None:
        self._check_base_model = check_base_model
        self._bases: list[str] = []
        self._base: str | None = None
        self._shapes: dict[str, list[tuple[LayerShape, UpstreamAdapter]]] = {}
        self._usual: dict[str, tuple[LayerShape, UpstreamAdapter]] = {}

    def add(self, adapter: UpstreamAdapter) -> None:
        """Add an adapter."""
        base = adapter.config.get("base_model_name_or_path")
        shapes = {module: _shape_of(adapter, factors) for module, factors in adapter.modules.items()}
        if base and is_hub_id(base):
            self._bases.append(base)
        for module, shape in shapes.items():
            self._shapes.setdefault(module, []).append((shape, adapter))

    def count(self) -> None:
        """Compute what most of them have."""
        self._base = _most_common(self._bases, key=original)
        self._usual = {m: _most_common(shapes, key=lambda entry: entry[0]) for m, shapes in self._shapes.items()}

    def require(self, adapter: UpstreamAdapter) -> None:
        """Raise AdapterError if an adapter does not fit most others, or holds values that are not finite."""
        trained_on = adapter.config.get("base_model_name_or_path")
        base = self._base
        if self._check_base_model and base and is_hub_id(trained_on):
            if original(str(trained_on)) != original(base):
                raise AdapterError(
                    adapter.name,
                    f"it was trained on {quoted(trained_on)}, but most others on {quoted(base)}. If these are "
                    "the same weights under another name, use --no-check-base",
                )
            warn_about_other_names([adapter], base)
        shapes = {module: _shape_of(adapter, factors) for module, factors in adapter.modules.items()}
        for module, shape in shapes.items():
            wanted, other = self._usual[module]
            if shape != wanted:
                is_embedding = shape.is_embedding and wanted.is_embedding
                has, needs = (Sizes(s.in_shape, s.out_features) for s in (shape, wanted))
                raise AdapterError(
                    adapter.name,
                    f"module {module!r} has the factors of {_words(shape)}, but {_words(wanted)} in {other.name!r}. "
                    + why_another_shape(module, is_embedding, has, needs),
                )
        match([adapter], shapes.get, shapes, lambda module: module, lambda module: True)
        if adapter.weights.nbytes > MOST_BYTES:
            warnings.warn(
                f"its values were not checked: they take {adapter.weights.nbytes / 1e9:.3g} GB", stacklevel=2
            )
        else:
            require_finite(adapter, torch.float32)


def _most_common(entries: list[Any], key: Any) -> Any:
    """The first entry with the most frequent key; None if there are no entries."""
    counts = Counter(map(key, entries))
    return max(entries, key=lambda entry: counts[key(entry)], default=None)


def _shape_of(adapter: UpstreamAdapter, factors: FactorKeys) -> LayerShape:
    A, B = adapter.weights.shape(factors.A), adapter.weights.shape(factors.B)
    return LayerShape("the layer", tuple(A[1:]), next(iter(B), 0), factors.is_embedding)


def _words(shape: LayerShape) -> str:
    kind = "an embedding" if shape.is_embedding else "a layer"
    return f"{kind} from {' x '.join(map(str, shape.in_shape))} to {shape.out_features}"
