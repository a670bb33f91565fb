"""Everything that can fail, done before a model is changed: reading, matching, and checking a checkpoint's record."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import compat
from ..config import CompositionConfig
from ..names import CONTAINER, name_in_checkpoint
from ..references import AdapterReference, LoraLayout
from ..text import LONG, one_line
from ..upstream.adapter import UpstreamAdapter, read_adapters
from ..upstream.matching import CompositionPlan, match, require_same_base, warn_about_extras, warn_about_other_names
from ..upstream.processes import locate
from ..upstream.shapes import LayerShape
from ..upstream.stacking import StackedFactors, stack
from .base_copies import warn_about_other_bases
from .base_model import BaseModel
from .base_parameter import TargetParameter
from .fingerprint import carrier
from .layer import CompositionLayer
from .mixing import Mixing
from .recorded import rename_recorded_modules, require_recorded_modules, require_recorded_ranks, sizes_of
from .wrapping import needs_unwrapping, unwrap


@dataclass
class Injection:
    """The prepared data for one composition, until its layers are built.

    `parameters` are the directly composed parameters, by their module and their composed name. `layers` are the layers
    built so far. `awaits_fingerprint` is the module that carries the fingerprint, if a saved composition is built.
    """

    ranks: dict[str, list[int]]
    parameters: dict[str, dict[str, TargetParameter]]
    biased: set[str]
    shapes: dict[str, LayerShape]
    dtypes: dict[str, torch.dtype]
    mixings: dict[str, Mixing]
    layers: dict[str, CompositionLayer]
    stacked: dict[str, StackedFactors] | None
    awaits_fingerprint: str | None
    quantization_kwargs: dict[str, Any]

    def key_at_the_module(self, key: str) -> str:
        """A key of a checkpoint as PEFT looks for it: at the module, also where a parameter of it is composed."""
        path, found, rest = key.partition(".composition_")
        if not found:
            return key
        name = name_in_checkpoint(path, self.ranks)
        owner = next((owner for owner, parameters in self.parameters.items() if name in parameters), name)
        return f"{owner}{found}{rest}"


def prepare(config: CompositionConfig, base: BaseModel) -> Injection:
    """Read the adapters of a config, check them against the base model, and record the result in the config."""
    stacked = None
    sealed = None
    if config.is_restored:
        sealed = base.current_name(carrier(config))
        rename_recorded_modules(config, base)
        require_recorded_modules(config, base)
    if not config.is_restored or not config.save_adapters:
        plan = _read(config, base)
        stacked = stack(plan, {name: base.dtype_of(name) for name in plan.factors})
        config.record(
            {module: plan.ranks(module) for module in plan.factors},
            [module for module in plan.factors if plan.is_biased(module)],
            (config.provenance if config.is_restored else None) or [adapter.provenance for adapter in plan.adapters],
        )
    config.num_labels = base.num_labels
    if isinstance(base.model, PreTrainedModel):  # PEFT records it only without a task type
        kind = type(base.model)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    assert config.composed_modules is not None
    config.lora_layout = lora_layout_of(config.composed_modules, base, config.lora_layout)
    shapes = {module: cast(LayerShape, base.shape_of(module)) for module in config.composed_modules}
    config.layer_sizes = {module: sizes_of(shape) for module, shape in shapes.items()}
    return Injection(
        ranks=config.composed_modules,
        parameters=base.parameters(config.composed_modules),
        biased=set(config.biased_modules or ()),
        shapes=shapes,
        dtypes={module: base.dtype_of(module) for module in config.composed_modules},
        mixings={},
        layers={},
        stacked=stacked,
        awaits_fingerprint=sealed,
        quantization_kwargs=base.quantization_kwargs,
    )


def require_usable_name(adapter_name: str, module_names: Iterable[str]) -> None:
    """Refuse names that would clash with other parts of keys in the state dict, or with `nn.ModuleDict`.

    PEFT selects the tensors of one adapter by excluding all keys that have another adapter's name as a part.
    """
    taken = {"base_model", "model", "base_layer", "original_module", "modules_to_save", "A", "B", "weight", "bias"}
    taken |= {"composition", "mixing", "factors", "composition_mixing", "composition_factors", CONTAINER}
    taken = taken.union(*(module.split(".") for module in module_names))
    if not adapter_name or "." in adapter_name or adapter_name in taken or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"A composition cannot be named {adapter_name!r}: the name becomes part of the keys of its weights. "
            "Choose a name without a dot that is not the name of a module or a parameter."
        )


def require_new(adapter_name: str, layers: Iterable[CompositionLayer]) -> None:
    """Refuse the name of a composition that the layers already hold."""
    if any(adapter_name in layer.composition_factors for layer in layers):
        raise ValueError(
            f"This model already holds a composition {adapter_name!r}. Use a fresh base model, or call "
            '`.unload()` of the PeftModel around it first, or pass another name: adapter_name="...".'
        )


def require_composable(config: CompositionConfig, model: nn.Module, adapters: list[UpstreamAdapter]) -> None:
    """Check adapters that were already read as building a composition does, without changing the model.

    Args:
        config: the composition that they would be part of, which says which modules are left out.
        model: the base model; may be on the meta device.
        adapters: the adapters.

    Raises:
        AdapterError: one of them cannot be composed.
        ValueError: nothing is left to compose.
    """
    base = BaseModel(model)
    if config.check_base_model:
        require_same_base(adapters, base.name)
        warn_about_other_names(adapters, base.name)
    plan = _match(config, base, adapters)
    stack(plan, {name: base.dtype_of(name) for name in plan.factors})


def _match(config: CompositionConfig, base: BaseModel, adapters: list[UpstreamAdapter]) -> CompositionPlan:
    """Find the modules and parameters of the model that the adapters' factors belong to."""
    names: Iterable[str] = base.layers
    if needs_unwrapping(adapters, base.layers):
        adapters = [unwrap(adapter, base.layers, base.current_name) for adapter in adapters]
        names = _names_in_order(adapters, base)
    plan = match(adapters, base.shape_of, names, base.current_name, _module_filter(config, base, adapters))
    owners = base.parameters(plan.factors)
    for owner, parameters in owners.items():
        if owner in plan.factors:
            raise ValueError(
                f"Some adapters touch the module {owner!r} and others its parameter {', '.join(parameters)} directly "
                "(target_parameters); compose without one of them (exclude_modules)"
            )
    return plan


def _names_in_order(adapters: list[UpstreamAdapter], base: BaseModel) -> list[str]:
    """The modules in the model's order, each followed by its parameters that adapters touch."""
    touched = {base.current_name(name) for adapter in adapters for name in adapter.modules}
    parameters = base.parameters(touched)
    names = []
    for module, layer in base.layers.items():
        names.append(module)
        keys = {parameter.key: name for name, parameter in parameters.get(module, {}).items()}
        names += [keys[key] for key in layer._parameters if key in keys]
    return names


def lora_layout_of(composed: Collection[str], base: BaseModel, recorded: LoraLayout | None) -> LoraLayout:
    """The layout of a plain LoRA on these modules; with a regex if no list of suffixes selects exactly them."""
    owners, layers = base.parameters(composed), base.layers
    attentions = [owner for owner in owners if isinstance(layers[owner], nn.MultiheadAttention)]
    parameters = {
        owner: [key for key in layers[owner]._parameters if f"{owner}.{key}" in names]
        for owner, names in owners.items()
        if owner not in attentions
    }
    wrapped = {name for names in owners.values() for name in names}
    modules = [*(name for name in composed if name not in wrapped), *attentions]
    suffixes = _suffixes(modules, layers, recorded.get("target_modules") if recorded else None)
    layout = LoraLayout(
        target_modules="|".join(map(re.escape, modules)) if suffixes is None else suffixes,
        embeddings=[name for name in modules if isinstance(layers[name], nn.Embedding)],
        fan_in_fan_out=any(isinstance(layers[name], Conv1D) for name in modules),
    )
    if attentions:
        layout["attentions"] = attentions
    if parameters:
        names = [f"{owner}.{key}" for owner, keys in parameters.items() for key in keys]
        everything = [f"{name}.{key}" for name, layer in layers.items() for key in layer._parameters]
        layout["target_parameters"] = _suffixes(names, everything) or names
        layout["parameters"] = parameters
    return layout


def _suffixes(wanted: Collection[str], names: Iterable[str], recorded: object = None) -> list[str] | None:
    """The fewest suffixes that select exactly these names; None if that is impossible.

    Recorded suffixes are used if they still select these names, because finding suffixes takes a while.
    """
    if not wanted:
        return []
    known = recorded if isinstance(recorded, list) and all(isinstance(suffix, str) for suffix in recorded) else []
    if known and _selected(known, names) == set(wanted):
        return known
    suffixes = sorted(compat.find_minimal_target_modules(set(wanted), set(names) - set(wanted)))
    return suffixes if _selected(suffixes, names) == set(wanted) else None


def _selected(suffixes: Iterable[str], names: Iterable[str]) -> set[str]:
    dotted = tuple(f".{suffix}" for suffix in suffixes)
    return {name for name in names if f".{name}".endswith(dotted)}


def _read(config: CompositionConfig, base: BaseModel) -> CompositionPlan:
    """Read the upstream adapters; at the recorded commits and hashes if the config describes a checkpoint."""
    references = config.references
    hashes: list[str | None] = [None] * len(references)
    if config.is_restored:
        assert config.provenance is not None
        hashes = [entry["sha256"] for entry in config.provenance]
        references = [
            cast(AdapterReference, {**reference, "revision": entry["commit"] or reference.get("revision")})
            for reference, entry in zip(references, config.provenance)
        ]
    located = locate(references, with_cards=not config.is_restored)
    adapters = read_adapters(located, hashes)
    if config.check_base_model:
        require_same_base(adapters, base.name)
    plan = _match(config, base, adapters)
    if config.is_restored:
        require_recorded_ranks(config, plan)
    else:
        _warn_about_what_is_not_mixed(config, base, adapters)
        if config.check_base_model:
            warn_about_other_names(adapters, base.name)
        warn_about_other_bases(adapters, base)
    return plan


def _warn_about_what_is_not_mixed(config: CompositionConfig, base: BaseModel, adapters: list[UpstreamAdapter]) -> None:
    is_saved = cache(lambda module: _is_saved(config, base.current_name(module)))
    trained = {f"{a.name!r}: {module}" for a in adapters for module in a.modules if is_saved(module)}
    if trained:
        warnings.warn(
            "These modules are trained in full (modules_to_save), so the upstream adapters' LoRA factors for them "
            f"are not mixed: {one_line(', '.join(sorted(trained)), LONG)}.",
            stacklevel=2,
        )
    warn_about_extras(adapters, is_saved)


def _is_saved(config: CompositionConfig, module: str) -> bool:
    """Whether a module is in `modules_to_save` or inside such a module, and so is trained in full, not composed."""
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in config.modules_to_save or ())


def _module_filter(
    config: CompositionConfig, base: BaseModel, adapters: list[UpstreamAdapter]
) -> Callable[[str], bool]:
    """PEFT's own rules for `target_modules`, `exclude_modules`, `layers_to_transform` and `modules_to_save`.

    In a checkpoint they have already been applied. The rule for a module also applies to its parameters.
    """
    if config.is_restored:
        return (config.composed_modules or {}).__contains__

    def names_of(name: str) -> list[str]:
        parameter = base.parameter(name)
        if parameter is None:
            return [name]
        # As in PEFT, an attention is composed completely or not at all.
        is_attention = isinstance(parameter.module, nn.MultiheadAttention)
        return [parameter.owner] if is_attention else [name, parameter.owner]

    target_modules = config.requested_target_modules
    if target_modules is None:
        # As a list of last name parts, because PEFT applies layers_to_transform to such lists alone.
        spelled = {module for adapter in adapters for module in adapter.modules}
        names = {name for module in spelled for name in (module, *names_of(base.current_name(module)))}
        target_modules = {name.rpartition(".")[2] for name in names}
    rules = SimpleNamespace(
        target_modules=target_modules,
        target_parameters=None,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        task_type=config.task_type,
    )
    compat.maybe_include_all_linear_layers(cast(PeftConfig, rules), base.model)

    def is_wanted(name: str) -> bool:
        found = [check_target_module_exists(rules, candidate) for candidate in names_of(name)]
        return any(found) and not any(isinstance(result, compat.ExcludedModule) for result in found)

    return is_wanted
