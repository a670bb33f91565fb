"""Compositions of parameters that a module uses without calling a layer: fused experts, `nn.MultiheadAttention`.

A wrapper around the module calls it with the composed parameters in place of its own. What PEFT calls them is in
`wrapping.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import functional
from .base_parameter import OUT_PROJ, TargetParameter
from .folding import Folded, Source
from .layer import CompositionLayer
from .merged import composed_parameter
from .ties import Place


class ParameterComposition(CompositionLayer):
    """The composition of one parameter of a module.

        W = W0 + B diag(u) A          for every expert, if W0 holds several matrices

    It is never called: the wrapper of the module asks it for W. The module, its `base_layer`, is registered there.

    Args:
        target: the parameter, and the module it belongs to.
        is_transposed: whether W0 is stored as (E, in, out).
    """

    def __init__(self, target: TargetParameter, is_transposed: bool) -> None:
        super().__init__(target.module)
        del self.base_layer
        self.__dict__["base_layer"] = target.module
        self.path = target.path
        self.is_transposed = is_transposed

    def composed_weight(self) -> Tensor:
        """W with the active compositions; the parameter itself where there are none, or where they are merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        weight = self._parameter()
        if self.disable_adapters or self.merged:
            return weight
        active = [name for name in self.active_adapters if name in self.composition_factors]
        for adapter_name in active:
            weight = self._composed(weight, adapter_name, is_only=len(active) == 1)
        return weight

    def _composed(self, weight: Tensor, adapter_name: str, is_only: bool) -> Tensor:
        factors, _, folds = self._pass(adapter_name)
        if weight.is_meta and not factors.A.is_meta:
            raise RuntimeError(
                f"{type(self.get_base_layer()).__name__}.{self.path} is offloaded (device_map): a composition of a "
                "parameter needs it in memory. Load the model without offloading this module, or merge_and_unload."
            )
        if not folds:
            u = factors.spread(self._weights(adapter_name))
            return self._add(weight, factors.A.detach(), factors.B.detach(), u)
        trains_base = type(weight) is not nn.Parameter or weight.requires_grad
        folded = self.folded(adapter_name, into_base=is_only and not trains_base)
        if folded.merged is not None:
            return folded.merged
        return self._add(weight, cast(Tensor, folded.A), cast(Tensor, folded.B), None)

    def _add(self, weight: Tensor, A: Tensor, B: Tensor, u: Tensor | None) -> Tensor:
        return composed_parameter(weight, A.to(weight.dtype), B.to(weight.dtype), u, self.is_transposed)

    def _fold(self, adapter_name: str, into_base: bool) -> Folded:
        factors = self._ready_factors(adapter_name)
        u = factors.spread(self._weights(adapter_name).detach())
        A, B = factors.A.detach(), factors.B.detach()
        if into_base:
            return Folded(merged=self._add(self._parameter().detach(), A, B, u))
        wide = torch.promote_types(B.dtype, torch.float32)
        return Folded(A=A, B=(B.to(wide) * u.to(wide)).to(B.dtype))

    def _sources(self, adapter_name: str, into_base: bool) -> list[Source | None]:
        sources = super()._sources(adapter_name, into_base=False)
        if into_base:
            owner, _, name = self.path.rpartition(".")
            sources.append(Source.of(self.get_base_layer().get_submodule(owner), name))
        return sources

    def _delta_weight(self, adapter_name: str, weights: Tensor) -> Tensor:
        factors = self.whole_factors(adapter_name)
        delta = functional.parameter_delta(factors.A, factors.B, factors.spread(weights))
        return delta.mT if self.is_transposed else delta

    def _parameter(self) -> Tensor:
        return cast(Tensor, attrgetter(self.path)(self.get_base_layer()))

    def base_parameters(self) -> list[Place]:
        """The parameter of the module that is composed."""
        owner, _, name = self.path.rpartition(".")
        return [Place(self.get_base_layer().get_submodule(owner), name)]

    def get_base_weight(self) -> Tensor:
        """The values of the parameter, without the update unless it is merged."""
        return self._parameter().data

    def set_base_weight(self, weight: Tensor) -> None:
        """Put other values into the parameter."""
        self._parameter().data = weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: PEFT converts linear layers alone."""
        return False

    def extra_repr(self) -> str:
        """Which parameter it is."""
        return f"parameter={self.path}"


class ParameterWrapper(nn.Module):
    """A module of the base model, called with composed parameters in place of its own.

    To the code around it it looks like the module itself, with the composed values for the composed parameters.

    Args:
        base_layer: the module.
    """

    base_layer: nn.Module
    composed_parameters: nn.ModuleDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.composed_parameters = nn.ModuleDict()  # first, as a module's own parameters come before its children's
        self.base_layer = base_layer

    def composition_of(self, target: TargetParameter, is_transposed: bool) -> ParameterComposition:
        """The place for compositions of one parameter, made where there is none yet."""
        if target.key not in self.composed_parameters:
            self.composed_parameters[target.key] = ParameterComposition(target, is_transposed)
        return cast(ParameterComposition, self.composed_parameters[target.key])

    def get_base_layer(self) -> nn.Module:
        """The module of the base model."""
        return self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, with the active compositions added to its parameters."""
        composed: dict[str, Tensor] = {}
        for composition in self._compositions().values():
            weight = composition.composed_weight()
            if weight is not composition._parameter():
                composed[composition.path] = weight
        if not composed:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, composed, args, kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module as it was, or with the compositions merged into it; also those of layers inside it."""
        if merge:
            for composition in self._compositions().values():
                composition.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        _unload_children(self.base_layer, merge, safe_merge, adapter_names)
        return self.base_layer

    def _compositions(self) -> Mapping[str, ParameterComposition]:
        compositions = cast("Mapping[str, ParameterComposition]", self.composed_parameters._modules)
        if "_is_replica" in self.__dict__:  # of nn.DataParallel, which relinks registered modules alone
            for composition in compositions.values():
                composition.__dict__["base_layer"] = self.base_layer
        return compositions

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What begins with an underscore belongs to the module alone, such as the hooks of accelerate.
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        if name in self._compositions():
            return self._compositions()[name].composed_weight()
        return getattr(self.base_layer, name)


class OutputProjection(NamedTuple):
    """What `nn.TransformerEncoderLayer` reads of an attention's output projection."""

    weight: Tensor
    bias: Tensor | None


class MultiheadAttention(ParameterWrapper):
    """A composition of `in_proj_weight` and `out_proj.weight` of an `nn.MultiheadAttention`.

    Its weights are read from outside as well: in eval mode `nn.TransformerEncoderLayer` hands them to a kernel instead
    of calling the attention.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return cast(bool, self.base_layer._qkv_same_embed_dim)

    @property
    def out_proj(self) -> OutputProjection:
        """The output projection as PyTorch's fast path reads it, with the active compositions."""
        base = cast(nn.Linear, cast(nn.MultiheadAttention, self.base_layer).out_proj)
        composition = self._compositions().get(OUT_PROJ)
        return OutputProjection(base.weight if composition is None else composition.composed_weight(), base.bias)


def wrapper_for(module: nn.Module) -> ParameterWrapper:
    """A wrapper around a module whose parameters are to be composed."""
    return (MultiheadAttention if isinstance(module, nn.MultiheadAttention) else ParameterWrapper)(module)


def _unload_children(module: nn.Module, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Put back every module that is wrapped somewhere inside a module: PEFT no longer finds them by their names."""
    for name, child in list(module.named_children()):
        if isinstance(child, ParameterWrapper):
            setattr(module, name, child.unload_and_optionally_merge_module(merge, safe_merge, adapter_names))
        elif isinstance(child, CompositionLayer):
            if merge:
                child.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            setattr(module, name, child.get_base_layer())
        else:
            _unload_children(child, merge, safe_merge, adapter_names)
