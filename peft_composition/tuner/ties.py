"""Weights that several modules of a model hold: a layer that is merged leaves the tie and gets a weight of its own.

Merging into a tied weight would change every module that holds it. Which weights are tied is read from the model as it
is, not from its config; the configs that ask for the tie stop doing so as long as a layer has left it.
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
    """What is needed of a composed layer here."""

    base_layer: nn.Module
    tie: Tie | None

    def get_base_layer(self) -> nn.Module:
        """The layer below."""

    def base_parameters(self) -> list[Place]:
        """Where its weights are."""


@dataclass
class Flag:
    """A config that asks for tied weights; it stops asking while layers are outside the tie."""

    config: Any
    leavers: int = 0

    def lower(self) -> None:
        """One more layer is outside the tie."""
        self.leavers += 1
        setattr(self.config, FLAG, False)

    def hoist(self) -> None:
        """A layer is back in the tie; the last one restores the flag."""
        self.leavers -= 1
        if not self.leavers:
            setattr(self.config, FLAG, True)


@dataclass
class Tie:
    """The parameters of one composed layer that other modules hold, too.

    Attributes:
        places: which of its parameters.
        others: names of the modules that hold them as well.
        flags: the configs that ask for it.
        shared_module: the base layer, where the other modules hold it as a whole.
        kept: the tied parameters, while the layer has others.
    """

    places: list[Place]
    others: list[str]
    flags: list[Flag]
    shared_module: nn.Module | None = None
    kept: list[nn.Parameter] = field(default_factory=list)
    has_left: bool = False

    @property
    def nbytes(self) -> int:
        """What a second copy of its parameters takes."""
        return sum(_held(place).nbytes for place in self.places)

    def leave(self, layer: TiedLayer) -> None:
        """Give the layer parameters of its own; their values stay shared until somebody sets new ones."""
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
        """Give the layer the tied parameters back, with the values that they have had all along."""
        if not self.has_left:
            return
        self.has_left = False
        for place, parameter in zip(self._own_places(layer), self.kept):
            own = _held(place)  # moves with the model, while the tied one may be held by nobody else
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
    """Tell the composed layers of a model which of their parameters other modules hold, too.

    Args:
        model: the model.
        layers: its composed layers by name.

    Returns:
        The ties by the names of their layers; a layer that has left one keeps it.
    """
    found: dict[str, Tie] = {}
    several = held_more_than_once(model.modules())
    holders = _holders(model)
    flags: dict[int, Flag] = {}
    for layer in layers.values():  # a config has one flag, whatever layer has lowered it
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
    """Say once which layers have left a tie, and what that costs.

    Args:
        before: the layers that had left it already.
        ties: all ties by the names of their layers.
        more_bytes: how much larger the model is now.
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
        f"Merged into tied weights ({whose}): so that the other modules keep theirs, the tie was undone, which makes "
        f"the model {more_bytes:,} bytes larger.{says}",
        stacklevel=5,  # whoever called merge_adapter
    )


def separate(model: nn.Module, ties: Iterable[Tie]) -> int:
    """Undo the rest of the ties of configs that no longer ask for them, which would be lost when the model is saved.

    A file holds shared values once, and without the config's word nothing puts them into the other modules again.

    Args:
        model: a model whose compositions are merged for good.
        ties: those that layers have left.

    Returns:
        How many bytes the copies take, less those of tied weights that nobody holds any more.
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
    """Whether the forward pass of a model reads the flag, as that of UMT5 does, which scales its output by it."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and FLAG in code.co_names


def _flags(model: nn.Module, places: Sequence[Place], known: dict[int, Flag]) -> list[Flag]:
    """The configs that ask for a tie: those of the models that hold the parameter more than once."""
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
    """Where each parameter is held, by its id."""
    holders: dict[int, list[Place]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(Place(module, name))
    return holders


def held_more_than_once(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the parameters, and of the modules, that several modules hold, or one under several names."""
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
    """A module of the same values with tables of its own."""
    copy = module.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[table] = dict(module.__dict__[table])
    return copy


def _plain(path: str) -> str:
    """A module's name in the base model."""
    return ".".join(part for part in path.split(".") if part not in ("base_layer", "original_module"))
