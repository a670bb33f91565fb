"""Unties weights that several modules share when a layer is merged, which gets a separate weight.

Merging into a tied weight would change every module that holds it. Ties are read from the model itself, not from its
config; the flags of configs that request a tie are cleared while a layer is untied.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import nn
from transformers import PreTrainedModel


FLAG = "tie_word_embeddings"


class Place(NamedTuple):
    """Where a parameter is held: an entry in a module's own table of parameters."""

    module: nn.Module
    name: str


class TiedLayer(Protocol):
    """The methods of a composed layer that are used here."""

    base_layer: nn.Module
    tie: Tie | None

    def get_base_layer(self) -> nn.Module:
        """The layer below."""

    def base_parameters(self) -> list[Place]:
        """Where its weights are."""


@dataclass
class Flag:
    """A config that requests tied weights; its flag is cleared while layers are untied."""

    config: Any
    leavers: int = 0

    def lower(self) -> None:
        """Called when a layer is untied."""
        self.leavers += 1
        setattr(self.config, FLAG, False)

    def hoist(self) -> None:
        """Called when a layer is tied again; the last one restores the flag."""
        self.leavers -= 1
        if not self.leavers:
            setattr(self.config, FLAG, True)


@dataclass
class Tie:
    """The parameters of one composed layer that other modules hold, too.

    Attributes:
        places: the tied parameters.
        others: names of the other modules that hold them.
        flags: the configs that request the tie.
        shared_module: the base layer, if other modules hold the whole layer.
        kept: the tied parameters, while the layer is untied.
    """

    places: list[Place]
    others: list[str]
    flags: list[Flag]
    shared_module: nn.Module | None = None
    kept: list[nn.Parameter] = field(default_factory=list)
    has_left: bool = False

    @property
    def nbytes(self) -> int:
        """The size of a second copy of its parameters in bytes."""
        return sum(_held(place).nbytes for place in self.places)

    def leave(self, layer: TiedLayer) -> None:
        """Give the layer separate parameters; their values stay shared until new ones are set."""
        if self.has_left:
            return
        self.has_left = True
        if self.shared_module is not None:
            layer.base_layer = _copy_of(self.shared_module)
        self.kept = [_held(place) for place in self.places]
        for place, parameter in zip(self._own_places(layer), self.kept):
            own = type(parameter)(parameter.data, requires_grad=parameter.requires_grad)
            own.__dict__.update(parameter.__dict__)  # a quantized one says there what its codes mean
            place.module._parameters[place.name] = own
        for flag in self.flags:
            flag.lower()

    def rejoin(self, layer: TiedLayer) -> None:
        """Give the layer the tied parameters back, whose values have not changed."""
        if not self.has_left:
            return
        self.has_left = False
        for place, parameter in zip(self._own_places(layer), self.kept):
            own = _held(place)  # moves with the model, unlike the tied one, which may have no other holder
            if (parameter.device, parameter.dtype) != (own.device, own.dtype):
                parameter.data = parameter.data.to(own.device, own.dtype)
            place.module._parameters[place.name] = parameter
        if self.shared_module is not None:
            layer.base_layer = self.shared_module
        self.kept = []
        for flag in self.flags:
            flag.hoist()

    def _own_places(self, layer: TiedLayer) -> list[Place]:
        if self.shared_module is None:
            return self.places
        return [Place(layer.get_base_layer(), place.name) for place in self.places]


def find_ties(model: nn.Module, layers: Mapping[str, TiedLayer]) -> dict[str, Tie]:
    """Find the parameters of composed layers that other modules hold, too, and store the ties in the layers.

    Args:
        model: the model.
        layers: its composed layers by name.

    Returns:
        The ties by the names of their layers; an untied layer keeps its tie.
    """
    found: dict[str, Tie] = {}
    several = held_more_than_once(model.modules())
    holders = _holders(model)
    flags: dict[int, Flag] = {}
    for layer in layers.values():  # a config has one flag for all layers
        flags.update({id(flag.config): flag for flag in (layer.tie.flags if layer.tie else ())})
    names: dict[int, str] | None = None
    for name, layer in layers.items():
        if layer.tie is not None and layer.tie.has_left:
            found[name] = layer.tie
            continue
        layer.tie = None
        held = layer.base_parameters()
        base = layer.get_base_layer()
        is_shared = id(base) in several and all(place.module is base for place in held)
        tied = held if is_shared else [place for place in held if id(_held(place)) in several]
        if not tied:
            continue
        names = names or {id(module): _plain(path) for path, module in model.named_modules()}
        others = {id(place.module) for own in tied for place in holders[id(_held(own))]} - {id(p.module) for p in tied}
        layer.tie = found[name] = Tie(
            places=tied,
            others=sorted(names[number] for number in others),
            flags=_flags(model, tied, flags),
            shared_module=base if is_shared else None,
        )
    return found


def warn_about_leaving(before: Iterable[str], ties: Mapping[str, Tie], more_bytes: int) -> None:
    """Warn about layers that were untied, and about the memory that it costs.

    Args:
        before: the layers that were already untied.
        ties: all ties by the names of their layers.
        more_bytes: the additional size of the model in bytes.
    """
    left = {name: tie for name, tie in ties.items() if tie.has_left and name not in before}
    if not left:
        return
    whose = "; ".join(
        f"{name} with {', '.join(tie.others)}" if tie.others else f"{name}, used in several places"
        for name, tie in left.items()
    )
    says = f" Its config says {FLAG}=False now." if any(tie.flags for tie in left.values()) else ""
    warnings.warn(
        f"Merged into tied weights ({whose}). The tie was undone, so that the other modules keep their weights; this "
        f"makes the model {more_bytes:,} bytes larger.{says}",
        stacklevel=5,  # the caller of merge_adapter
    )


def separate(model: nn.Module, ties: Iterable[Tie]) -> int:
    """Undo the remaining ties of configs whose flag is cleared, which would be lost when the model is saved.

    A file holds shared values once, and without the config's flag, loading does not put them into the other modules.

    Args:
        model: a model whose compositions are merged permanently.
        ties: the ties of untied layers.

    Returns:
        The size of the copies in bytes, minus the size of tied weights that no module holds any more.
    """
    ties = list(ties)
    held = _holders(model)
    tied = {id(parameter): parameter for tie in ties for parameter in tie.kept}
    configs = {id(flag.config) for tie in ties for flag in tie.flags if flag.leavers}
    more = -sum(parameter.nbytes for number, parameter in tied.items() if number not in held)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and id(part.config) in configs:
            for places in _holders(part).values():
                for place in places[1:]:
                    parameter = _held(place)
                    place.module._parameters[place.name] = nn.Parameter(
                        parameter.data.clone(), requires_grad=parameter.requires_grad
                    )
                    more += parameter.nbytes
        if isinstance(part, PreTrainedModel) and hasattr(part, "all_tied_weights_keys"):
            part.all_tied_weights_keys = {
                target: source
                for target, source in part.all_tied_weights_keys.items()
                if part.get_parameter_or_buffer(target) is part.get_parameter_or_buffer(source)
            }
    return more


def computes_by_flag(model: PreTrainedModel) -> bool:
    """Whether the forward pass of a model reads the flag, like that of UMT5, which scales its output if it is set."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and FLAG in code.co_names


def _flags(model: nn.Module, places: Sequence[Place], known: dict[int, Flag]) -> list[Flag]:
    """The configs that request a tie: those of the models that hold the parameter more than once."""
    parameters = {id(_held(place)) for place in places}
    flags: dict[int, Flag] = {}
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or computes_by_flag(part):
            continue
        holders = _holders(part)
        if not any(len(holders.get(number, ())) > 1 for number in parameters):
            continue
        for config in (part.config, part.config.get_text_config()):
            if getattr(config, FLAG, False) or id(config) in known:
                flags[id(config)] = known.setdefault(id(config), Flag(config))
    return list(flags.values())


def _holders(model: nn.Module) -> dict[int, list[Place]]:
    """The places that hold each parameter, by its id."""
    holders: dict[int, list[Place]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(Place(module, name))
    return holders


def held_more_than_once(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of parameters and modules that are held by several modules, or under several names."""
    once: set[int] = set()
    again: set[int] = set()
    for module in modules:
        for held in (*module._parameters.values(), *module._modules.values()):
            if held is not None:
                (again if id(held) in once else once).add(id(held))
    return again


def _held(place: Place) -> nn.Parameter:
    parameter = place.module._parameters[place.name]
    assert parameter is not None
    return parameter


def _copy_of(module: nn.Module) -> nn.Module:
    """A module with the same values and separate tables."""
    copy = module.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[table] = dict(module.__dict__[table])
    return copy


def _plain(path: str) -> str:
    """A module's name in the base model."""
    return ".".join(part for part in path.split(".") if part not in ("base_layer", "original_module"))
