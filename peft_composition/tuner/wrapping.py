"""PEFT's names and nesting of the LoRA factors of `nn.MultiheadAttention` and of parameters (`target_parameters`).

In both directions: from the keys of a saved adapter to parameter names, and back for an export.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ..references import LoraLayout
from ..upstream.adapter import UpstreamAdapter
from ..upstream.errors import AdapterError
from ..upstream.keys import FactorKeys, ranked
from .base_parameter import IN_PROJ, OUT_PROJ


_WRAPPED = ".base_layer"
_WRAPPERS = re.compile(r"(\.base_layer)+(?=\.)")


def unwrap(
    adapter: UpstreamAdapter, layers: Mapping[str, nn.Module], current_name: Callable[[str], str]
) -> UpstreamAdapter:
    """Rename the factors of wrapped parameters of an adapter to the names of these parameters.

    PEFT puts nested wrappers around a module, one per parameter, and saves the factors under the path of the wrapper.
    Their parameter follows from the depth of the wrapper and the order of the parameters.

    Args:
        adapter: the adapter as read.
        layers: the modules of the base model by name.
        current_name: from a module's name in the adapter to its name in the model (or the name itself).

    Returns:
        The adapter, with the ranks and scales of the parameters.

    Raises:
        AdapterError: the factors do not fit the parameters that the adapter's config targets.
    """
    targets: Collection[str] = adapter.config.get("target_parameters") or ()
    modules: dict[str, FactorKeys] = {}
    nests: dict[str, dict[int, FactorKeys]] = {}
    for spelled, factors in adapter.modules.items():
        plain, depth = _without_wrappers(spelled)
        module = current_name(plain)
        parent, _, last = plain.rpartition(".")
        if last == OUT_PROJ and isinstance(layers.get(current_name(parent)), nn.MultiheadAttention):
            if spelled.endswith(f"{_WRAPPED}.{OUT_PROJ}"):
                name = f"{current_name(parent)}.{OUT_PROJ}"
                factors = _of_attention(adapter, factors, parent)
                factors = replace(factors, scale=factors.scale * attention_output_times())
            else:
                name = f"{module}.weight"
        elif module in layers and _targeted(layers[module], plain, targets):
            nests.setdefault(plain, {})[depth] = factors
            continue
        elif isinstance(layers.get(module), nn.MultiheadAttention):
            name, factors = f"{module}.{IN_PROJ}", _of_attention(adapter, factors, plain)
        else:
            _require_targeted(adapter, module, plain, targets)
            name = plain if depth == 0 else spelled
            factors = ranked(adapter.name, adapter.config, adapter.weights, factors, plain)
        _enter(adapter, modules, name, factors)
    for plain, nest in nests.items():
        module = current_name(plain)
        for name, factors in _of_parameters(adapter, layers[module], plain, module, nest).items():
            _enter(adapter, modules, name, factors)
    return replace(adapter, modules=modules)


def needs_unwrapping(adapters: Iterable[UpstreamAdapter], layers: Mapping[str, nn.Module]) -> bool:
    """Whether any adapter or the model needs `unwrap`."""
    return any(isinstance(layer, nn.MultiheadAttention) for layer in layers.values()) or any(
        adapter.config.get("target_parameters") for adapter in adapters
    )


def _without_wrappers(spelled: str) -> tuple[str, int]:
    """A module's name without the wrappers on its path, and the number of wrappers."""
    plain = spelled
    while plain.endswith(_WRAPPED):
        plain = plain.removesuffix(_WRAPPED)
    depth = (len(spelled) - len(plain)) // len(_WRAPPED)
    return _WRAPPERS.sub("", plain), depth


def _targeted(layer: nn.Module, plain: str, targets: Collection[str]) -> list[str]:
    """The parameters of a module that `target_parameters` selects, in the order in which PEFT wraps them."""
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    return [n for n in names if any(f".{plain}.{n}".endswith(f".{target}") for target in targets)]


def _require_targeted(adapter: UpstreamAdapter, module: str, plain: str, targets: Collection[str]) -> None:
    """Refuse the factors of a parameter that the module does not have."""
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        if owner and f".{plain}".endswith(f".{owner}"):
            raise AdapterError(
                adapter.name, f"its config targets the parameter {parameter!r}, which module {module!r} does not have"
            )


def _of_attention(adapter: UpstreamAdapter, factors: FactorKeys, attention: str) -> FactorKeys:
    """Give both projections of an attention the rank and alpha that the config has for the attention."""
    if factors.bias is not None and adapter.weights.read(factors.bias).count_nonzero():
        raise AdapterError(
            adapter.name, f"module {attention!r} has a LoRA bias, which PEFT does not add to an nn.MultiheadAttention"
        )
    return replace(ranked(adapter.name, adapter.config, adapter.weights, factors, attention), bias=None)


def _of_parameters(
    adapter: UpstreamAdapter, layer: nn.Module, plain: str, module: str, nest: Mapping[int, FactorKeys]
) -> dict[str, FactorKeys]:
    """The factors of all targeted parameters of one module; the first parameter has the innermost wrapper."""
    targeted = _targeted(layer, plain, adapter.config["target_parameters"])
    if sorted(nest) != list(range(len(targeted))):
        raise AdapterError(
            adapter.name,
            f"module {module!r}: its config targets the parameters {', '.join(targeted)}, but its weights hold "
            f"{len(nest)} pairs of factors, which cannot be assigned to them",
        )
    found = {}
    for name, depth in zip(targeted, reversed(range(len(targeted)))):
        parameter = layer.get_parameter(name)
        experts = parameter.shape[0] if parameter.dim() == 3 else 1
        factors = ranked(adapter.name, adapter.config, adapter.weights, nest[depth], f"{plain}.{name}", experts)
        # A LoRA on the weight of a linear layer is the LoRA of that layer.
        is_layer = type(layer) is nn.Linear and name == "weight"
        found[module if is_layer else f"{module}.{name}"] = factors
    return found


def _enter(adapter: UpstreamAdapter, modules: dict[str, FactorKeys], name: str, factors: FactorKeys) -> None:
    if name in modules:
        raise AdapterError(adapter.name, f"it has two pairs of factors for {name!r}")
    modules[name] = factors


@cache
def attention_output_times() -> int:
    """How often the installed PEFT adds the update of the output projection of an `nn.MultiheadAttention`.

    PEFT 0.21.2 adds it twice, in training and when merging (huggingface/peft#3774): such an adapter therefore needs
    twice its product to work as trained.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(
            nn.ModuleDict({"attention": nn.MultiheadAttention(1, 1)}),
            LoraConfig(r=1, lora_alpha=1, target_modules=["attention"]),
        )
        for module in model.modules():  # set in the tables: within accelerate's init_empty_weights all are on meta
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.ones(parameter.shape, device="cpu"))
        attention = model.base_model.model["attention"]
        attention.merge()
        return round(attention.out_proj.weight.item()) - 1


def target_of(name: str, layout: LoraLayout) -> str:
    """The name of a composed module or parameter in a LoRA's `rank_pattern`; for an attention, that of the module."""
    owner, _, key = name.rpartition(".")
    return owner if key in (IN_PROJ, OUT_PROJ) and owner in layout.get("attentions", ()) else name


def is_attention_output(name: str, layout: LoraLayout) -> bool:
    """Whether a composed name is that of the output projection of an attention."""
    return target_of(name, layout) != name and name.endswith(f".{OUT_PROJ}")


def wrapped_path(name: str, layout: LoraLayout) -> str:
    """The path under which PEFT saves the factors of a composed module or parameter."""
    owners: Mapping[str, Sequence[str]] = layout.get("parameters", {})
    path, (owner, _, key) = target_of(name, layout), name.rpartition(".")
    inside = [outer for outer in owners if name.startswith(f"{outer}.")]
    if is_attention_output(name, layout):
        path = f"{path}{_WRAPPED}.{OUT_PROJ}"
    elif key in owners.get(owner, ()):
        path = owner + _WRAPPED * (len(owners[owner]) - 1 - list(owners[owner]).index(key))
        inside.remove(owner)
    for outer in sorted(inside, key=len, reverse=True):
        path = outer + _WRAPPED * len(owners[outer]) + path.removeprefix(outer)
    return path
