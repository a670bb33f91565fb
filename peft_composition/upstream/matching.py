"""Matches the factors of adapters to the modules of a model and checks that they fit."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from ..references import is_local, looks_like_path
from ..selection import HEADS
from ..text import LONG, one_line, quoted
from . import formats, misfits
from .adapter import UpstreamAdapter, logger
from .base_names import original, without_owner
from .errors import AdapterError
from .keys import FactorKeys
from .shapes import LayerShape


@dataclass
class CompositionPlan:
    """Which factors of which adapter go into which module of the model.

    Attributes:
        adapters: the adapters, in the order of the mixing weights.
        shapes: the composed modules, in the model's order.
        factors: for each composed module the factors of every adapter, or None if the adapter does not touch it.
    """

    adapters: list[UpstreamAdapter]
    shapes: dict[str, LayerShape]
    factors: dict[str, list[FactorKeys | None]] = field(default_factory=dict)

    def ranks(self, module: str) -> list[int]:
        """The rank of every adapter in a module; 0 if the adapter does not touch it."""
        return [entry.rank if entry is not None else 0 for entry in self.factors[module]]

    def is_biased(self, module: str) -> bool:
        """Whether an adapter has a LoRA bias for a module."""
        return any(entry is not None and entry.bias is not None for entry in self.factors[module])


def match(
    adapters: Sequence[UpstreamAdapter],
    shape_of: Callable[[str], LayerShape | None],
    module_names: Iterable[str],
    current_name: Callable[[str], str],
    is_wanted: Callable[[str], bool],
) -> CompositionPlan:
    """Find the model's module for all factors and check that the factors fit.

    Args:
        adapters: the result of `read_adapters`.
        shape_of: from a module's name to the shape of its factors; None if the model has no such module.
        module_names: all modules of the model, in its order.
        current_name: from a module's name in an adapter to its name in the model (or the name itself).
        is_wanted: whether the config allows a module to be composed (`target_modules` and the like).

    Returns:
        The plan.

    Raises:
        AdapterError: a module does not exist, cannot hold a composition, or has another shape.
        ValueError: nothing is left to compose.
    """
    by_module: dict[str, list[FactorKeys | None]] = {}
    shapes: dict[str, LayerShape] = {}

    @cache  # adapters have most names in common
    def find(spelled: str) -> tuple[str, LayerShape | None, bool]:
        module = current_name(spelled)
        return module, shape_of(module), is_wanted(module)

    for number, adapter in enumerate(adapters):
        touched = 0
        for spelled, factors in adapter.modules.items():
            module, shape, is_composed = find(spelled)
            if not is_composed:
                continue
            if shape is None:
                foreign = formats.of_keys(adapter.weights)
                raise AdapterError(adapter.name, foreign or _unknown_module(spelled, module_names))
            _require_fit(adapter, module, factors, shape)
            row = by_module.setdefault(module, [None] * len(adapters))
            if row[number] is not None:
                raise AdapterError(
                    adapter.name, f"two of its modules are {module!r} in this model; one of them is {spelled!r}"
                )
            row[number] = factors
            shapes[module] = shape
            touched += 1
        if not touched:
            warnings.warn(
                f"adapter {adapter.name!r} touches none of the composed modules, so its mixing weight has no effect",
                stacklevel=2,
            )
    if not by_module:
        touched_names = sorted({module for adapter in adapters for module in adapter.modules})
        raise ValueError(
            "nothing to compose: target_modules, exclude_modules, layers_to_transform or modules_to_save leave out "
            f"every module that the adapters touch ({', '.join(touched_names[:4])}, ... {len(touched_names)} in all)"
        )
    in_model_order = [module for module in module_names if module in by_module]
    return CompositionPlan(
        list(adapters),
        {module: shapes[module] for module in in_model_order},
        {module: by_module[module] for module in in_model_order},
    )


def _unknown_module(module: str, module_names: Iterable[str]) -> str:
    similar = difflib.get_close_matches(module, list(module_names), n=1, cutoff=0.6)
    hint = f"; the nearest name is {similar[0]!r}" if similar else ""
    return (
        f"module {module!r} does not exist in the model{hint}. Was it trained on another base model? To leave the "
        "module out, name it in exclude_modules"
    )


def _require_fit(adapter: UpstreamAdapter, module: str, factors: FactorKeys, shape: LayerShape) -> None:
    if shape.refusal is not None:
        raise AdapterError(adapter.name, f"module {module!r} ({shape.kind}) cannot be composed: {shape.refusal}")
    if factors.is_embedding != shape.is_embedding:
        kinds = ("an embedding", "a linear or convolutional layer")
        has, needs = kinds if factors.is_embedding else kinds[::-1]
        raise AdapterError(adapter.name, f"module {module!r} has the factors of {has}, but is {needs} in the model")
    expected = [(factors.A, shape.saved_shape_of_A(factors.rank)), (factors.B, shape.saved_shape_of_B(factors.rank))]
    if factors.bias is not None:
        expected.append((factors.bias, (shape.out_features,)))
    for key, wanted in expected:
        actual = adapter.weights.shape(key)
        if actual != wanted:
            stored = misfits.Sizes(adapter.weights.shape(factors.A)[1:], adapter.weights.shape(factors.B)[0])
            wished = misfits.Sizes(shape.in_shape, shape.out_features)
            doubt = misfits.why_another_shape(module, shape.is_embedding, stored, wished)
            raise AdapterError(
                adapter.name,
                f"module {module!r}: tensor {key.rpartition(module)[2].lstrip('.') or key} has shape {actual}, but "
                f"{shape.kind} in the model needs {wanted}. {doubt}",
            )


def require_same_base(adapters: Iterable[UpstreamAdapter], model_name: str | None) -> None:
    """Refuse adapters whose config names another base model on the Hub.

    Only Hub ids are compared, because folders move. Copies such as `org/model-bnb-4bit` count as the model itself.

    Args:
        adapters: the adapters.
        model_name: `name_or_path` of the model, if it has one.

    Raises:
        AdapterError: the names differ.
    """
    for adapter, trained_on in _otherwise_named(adapters, model_name):
        if original(trained_on) != original(str(model_name)):
            raise AdapterError(
                adapter.name,
                f"it was trained on {trained_on!r}, but the model is {model_name!r}. If these are the same weights "
                "under another name, pass CompositionConfig(check_base_model=False). Modules and shapes are always "
                "compared",
            )


def warn_about_other_names(adapters: Iterable[UpstreamAdapter], model_name: str | None) -> None:
    """Say once which adapters were trained on a copy of the model: its name says so, which is no proof.

    A local folder has no name to compare with; then the adapters' own are compared with each other.
    """
    adapters = list(adapters)
    if not model_name or is_local(model_name) or looks_like_path(model_name):
        _warn_about_each_other(adapters)
    copies: dict[str, list[str]] = {}
    for adapter, trained_on in _otherwise_named(adapters, model_name):
        copies.setdefault(trained_on, []).append(adapter.name)
    if copies:
        lists = "; ".join(f"{trained_on!r} ({', '.join(map(repr, names))})" for trained_on, names in copies.items())
        warnings.warn(
            f"Going by their names, these models are copies of the base model {model_name!r} in another format. The "
            f"adapters trained on them are composed without a change: {lists}.",
            stacklevel=2,
        )


def _warn_about_each_other(adapters: Sequence[UpstreamAdapter]) -> None:
    """Say once that adapters name different base models, only one of which the model can be."""
    trained_on: dict[str, list[str]] = {}
    for adapter in adapters:
        name = adapter.config.get("base_model_name_or_path")
        if name and not is_local(name) and not looks_like_path(name):
            trained_on.setdefault(original(name), []).append(adapter.name)
    if len(trained_on) > 1:
        lists = "; ".join(f"{quoted(name)} ({', '.join(map(quoted, names))})" for name, names in trained_on.items())
        warnings.warn(
            f"The adapters say that they were trained on different base models: {one_line(lists, LONG)}. The model is "
            "a local folder or has no name, so that nothing shows which of them it is; modules and shapes fit all of "
            "them. Leave out those of another model, or load the base model by its name on the Hub.",
            stacklevel=3,
        )


def _otherwise_named(
    adapters: Iterable[UpstreamAdapter], model_name: str | None
) -> Iterator[tuple[UpstreamAdapter, str]]:
    """The adapters whose config names another model on the Hub, each with that name."""
    if not model_name or is_local(model_name) or looks_like_path(model_name):
        return
    for adapter in adapters:
        trained_on = adapter.config.get("base_model_name_or_path")
        if not trained_on or is_local(trained_on) or looks_like_path(trained_on):
            continue
        if without_owner(trained_on) != without_owner(model_name):
            yield adapter, trained_on


def warn_about_extras(adapters: Iterable[UpstreamAdapter], is_trained_anew: Callable[[str], bool]) -> None:
    """Warn about tensors of the adapters that are not mixed.

    Heads of other tasks are only logged: every classifier has one, and leaving it out is the method. Retrained
    embeddings and the like are a warning, because without them an adapter is not what its author trained, and users
    may prefer another one.

    Args:
        adapters: the adapters.
        is_trained_anew: whether the composition itself trains the module of this name in full.
    """
    heads: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    names = {name for names in HEADS.values() for name in names}
    for adapter in adapters:
        for key in adapter.extras:
            module = key.rpartition(".")[0]
            is_head = not names.isdisjoint(module.split(".")) or is_trained_anew(module)
            (heads if is_head else others).append((adapter.name, key))
    if heads:
        logger.info("The heads of the upstream adapters are not mixed: %s.", _listed_by_name(heads))
    if others:
        warnings.warn(
            "These tensors of the upstream adapters are not LoRA factors and are not mixed: "
            f"{_listed_by_name(others)}. Without them, these adapters are not exactly what was trained.",
            stacklevel=2,
        )


def _listed_by_name(entries: Iterable[tuple[str, str]]) -> str:
    keys: dict[str, list[str]] = {}
    for name, key in entries:
        keys.setdefault(name, []).append(key)
    return one_line("; ".join(f"{quoted(name)}: {', '.join(own)}" for name, own in keys.items()), LONG)
