"""Checks the record of a built composition in its config."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .references import Provenance
from .text import one_line, plural, quoted


if TYPE_CHECKING:
    pass


_SHA256 = re.compile(r"[0-9a-f]{64}")


class Recorded(Protocol):
    """The fields of a `CompositionConfig` that are used here; they are set once its composition is built."""

    mixing: Literal["learned", "uniform", "fixed"]
    weights: list[float] | None
    normalization: Literal["softmax", "none"]
    gain: float | None
    weight_sharing: Literal["module", "block", "model"]
    layers_pattern: list[str] | str | None
    composed_modules: dict[str, list[int]] | None
    biased_modules: list[str] | None
    layer_sizes: dict[str, list[int]] | None
    provenance: list[Provenance] | None
    base_model_name_or_path: str | None
    num_labels: int | None
    class_names: list[str] | None

    @property
    def adapter_names(self) -> list[str]:
        """The names of the adapters."""


def summary(config: Recorded) -> dict[str, Any]:
    """The fields of a config that describe its weights, in types of JSON.

    Paths are left out, because checkpoints and adapters can move; so is everything that follows from the base model.
    Class names are there if they are known: what older versions saved has none.
    """
    named = {} if config.class_names is None else {"class_names": list(config.class_names)}
    return {
        **named,
        "adapters": [entry["name"] for entry in config.provenance or ()],
        "sha256": [entry["sha256"] for entry in config.provenance or ()],
        "composed_modules": dict(config.composed_modules or {}),
        "biased_modules": sorted(config.biased_modules or ()),
        "mixing": config.mixing,
        "weights": config.weights,
        "normalization": config.normalization,
        "gain": config.gain,
        "weight_sharing": config.weight_sharing,
        "layers_pattern": config.layers_pattern if config.weight_sharing == "block" else None,
    }


def require_valid_record(config: Recorded) -> None:
    """Check the record of a config that was read from a file, field by field.

    Raises:
        ValueError: a field is not what `CompositionConfig.record` writes; the message names it, the module or the
            adapter, and the value.
    """
    names = config.adapter_names
    composed = config.composed_modules
    if not isinstance(composed, Mapping) or not composed:
        raise _refusal("composed_modules must be a dict with at least one module", composed)
    for module, ranks in composed.items():
        if not isinstance(ranks, list) or len(ranks) != len(names):
            raise _refusal(
                f"composed_modules must have {plural(len(names), 'rank')} for module {quoted(module)}", ranks
            )
        if all(type(rank) is int and rank >= 0 for rank in ranks) and any(ranks):
            continue
        for name, rank in zip(names, ranks):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
                raise _refusal(
                    f"the rank of adapter {quoted(name)} in module {quoted(module)} must be 0 or more", rank
                )
        if not any(ranks):
            raise _refusal(f"composed_modules must have a rank above 0 for module {quoted(module)}", ranks)
    _require_modules("biased_modules", config.biased_modules, composed)
    if config.layer_sizes is not None:
        _require_modules("layer_sizes", config.layer_sizes, composed)
        if not isinstance(config.layer_sizes, Mapping):
            raise _refusal("layer_sizes must be a dict", config.layer_sizes)
    _require_class_names(config)
    _require_provenance(config.provenance, names)


def _require_modules(field: str, modules: object, composed: Mapping[str, Any]) -> None:
    if modules is None:
        return
    if isinstance(modules, str) or not isinstance(modules, Collection) or not all(isinstance(m, str) for m in modules):
        raise _refusal(f"{field} must name modules", modules)
    unknown = next((module for module in modules if module not in composed), None)
    if unknown is not None:
        raise _refusal(f"{field} names a module that composed_modules does not have", unknown)


def _require_class_names(config: Recorded) -> None:
    names = config.class_names
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _refusal("class_names must be a list of names", names)
    if len(names) != config.num_labels or len(set(names)) != len(names):
        raise _refusal(f"class_names must be {config.num_labels} different names, as many as num_labels", names)


def _require_provenance(provenance: object, names: list[str]) -> None:
    """Require the hashes, without which adapters that are downloaded again could be any others."""
    if not isinstance(provenance, list) or len(provenance) != len(names):
        raise _refusal(f"provenance must have an entry for each of the {len(names)} adapters", provenance)
    for name, entry in zip(names, provenance):
        if not isinstance(entry, dict) or entry.get("name") != name:
            raise _refusal(
                f"provenance must have the entry for adapter {quoted(name)} at the adapter's position", entry
            )
        if not isinstance(entry.get("sha256"), str) or not _SHA256.fullmatch(entry["sha256"]):
            raise _refusal(f"provenance must have the sha256 of adapter {quoted(name)}", entry.get("sha256"))
        for key in ("path", "subfolder", "commit", "base_model_name_or_path", "license"):
            if not isinstance(entry.setdefault(key, None), (str, type(None))):
                raise _refusal(f"provenance of adapter {quoted(name)}: {key} must be text", entry[key])


def _refusal(what: str, value: object) -> ValueError:
    return ValueError(
        f"The record of the saved composition is damaged: {what}, got {one_line(repr(value))}. Save the composition "
        "again, or build a new one of its adapters: dataclasses.replace(config, composed_modules=None)."
    )
