"""Finds parameters of the base model that are composed directly, and the shapes of their factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..upstream.shapes import LayerShape


IN_PROJ, OUT_PROJ = "in_proj_weight", "out_proj"


@dataclass(frozen=True)
class TargetParameter:
    """A parameter that is composed directly, because its module uses it without calling a layer.

    Attributes:
        owner: name of the wrapped module.
        module: the module.
        key: name of the parameter for the composition: `gate_up_proj`; `in_proj_weight` or `out_proj` of an attention.
        path: from the module to the parameter: `gate_up_proj`, `out_proj.weight`.
    """

    owner: str
    module: nn.Module
    key: str
    path: str

    @property
    def parameter(self) -> Tensor | None:
        """The parameter itself; None if it no longer exists."""
        module, _, name = self.path.rpartition(".")
        return self.module.get_submodule(module)._parameters.get(name)


def find_parameter(layers: Mapping[str, nn.Module], name: str) -> TargetParameter | None:
    """The parameter with a composed name; None if the name is that of a layer, or unknown.

    Args:
        layers: the modules of the base model by name.
        name: `mlp.experts.gate_up_proj`, or `attn.in_proj_weight` and `attn.out_proj` of an `nn.MultiheadAttention`.
    """
    owner, _, key = name.rpartition(".")
    module = layers.get(owner)
    if module is None:
        return None
    if isinstance(module, nn.MultiheadAttention) and key in (IN_PROJ, OUT_PROJ):
        return TargetParameter(owner, module, key, f"{OUT_PROJ}.weight" if key == OUT_PROJ else IN_PROJ)
    if isinstance(module._parameters.get(key), nn.Parameter):
        return TargetParameter(owner, module, key, key)
    return None


def parameter_shape(layers: Mapping[str, nn.Module], target: TargetParameter) -> LayerShape:
    """The shape of the factors of a parameter, as in PEFT's `ParamWrapper` and `MultiheadAttention`."""
    kind, parameter = f"{type(target.module).__name__}.{target.path}", target.parameter
    if parameter is None:
        return LayerShape(kind, (), 0, refusal="its queries, keys and values have separate weights")
    refusal = _refusal(layers, target, parameter)
    if parameter.dim() == 2:
        return LayerShape(kind, (parameter.shape[1],), parameter.shape[0], refusal=refusal)
    if parameter.dim() != 3:
        return LayerShape(kind, (), 0, refusal=f"LoRA needs a parameter of 2 or 3 dimensions, not {parameter.dim()}")
    experts, first, last = parameter.shape
    is_transposed = bool(getattr(target.module, "is_transposed", False))
    if experts == 1 and is_transposed:
        refusal = "PEFT adds the update of a single transposed expert the wrong way round"
    in_features, out_features = (first, last) if is_transposed else (last, first)
    return LayerShape(
        kind, (in_features,), out_features, refusal=refusal, experts=experts, is_transposed=is_transposed
    )


def _refusal(layers: Mapping[str, nn.Module], target: TargetParameter, parameter: Tensor) -> str | None:
    parent, _, name = target.owner.rpartition(".")
    if name == OUT_PROJ and isinstance(layers.get(parent), nn.MultiheadAttention):
        return (
            f"nn.MultiheadAttention never calls its {OUT_PROJ}, so that a LoRA on it alone has no effect. Add it to "
            f"exclude_modules, or train a LoRA on {parent!r}"
        )
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return f"its values are quantized ({parameter.dtype}), and an update cannot be added to them"
    return None
