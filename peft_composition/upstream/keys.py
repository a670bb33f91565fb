"""Finds the LoRA factors among the keys of an adapter's weights, and their rank and scale in its config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from ..scalars import LARGEST_FLOAT32
from ..text import quoted
from . import formats, misfits
from .errors import AdapterError
from .patterns import PatternError, value_for
from .schema import UNPRINTABLE
from .weights import MAX_KEY, WeightsFile


# PEFT's names for its copy of the base weight, saved with the factors of an embedding or of the output layer.
BASE_COPY = ".base_layer.weight"


@dataclass
class FactorKeys:
    """Keys of the factors of one module in an adapter's weights, and the scale s = alpha / r."""

    rank: int
    scale: float
    A: str
    B: str
    bias: str | None = None
    is_embedding: bool = False


_FACTOR_KEY = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])"
    r"(?:\.(?P<label>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?$"
)
# What torch.compile, FSDP and activation checkpointing insert into the names of wrapped modules.
_WRAPPED = re.compile(r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")


class _Key(NamedTuple):
    """A key of an adapter's weights, taken apart; `part` is None if it is not a LoRA factor."""

    plain: str
    module: str = ""
    part: str | None = None
    is_embedding: bool = False


@lru_cache(maxsize=1 << 16)  # adapters of one kind have their keys in common
def _parse_key(key: str) -> _Key:
    plain = _WRAPPED.sub("", key).removeprefix("module.").removeprefix("base_model.model.")
    match = _FACTOR_KEY.match(plain)
    if match is None or not (match["embedding"] or match["leaf"]):  # a name of an adapter is no tensor of a layer's
        return _Key(plain)
    part = match["factor"] + (".bias" if match["leaf"] == "bias" else "")
    return _Key(plain, match["module"], part, is_embedding=match["embedding"] is not None)


def index_factors(
    name: str, config: Mapping[str, Any], weights: WeightsFile
) -> tuple[dict[str, FactorKeys], list[str]]:
    """Sort the keys of an adapter into factors by module and the rest."""
    found: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    extras: list[str] = []
    for key in weights:
        if len(key) > MAX_KEY or UNPRINTABLE.search(key):
            raise AdapterError(
                name, f"the name of a tensor has {len(key)} characters or unprintable ones: {quoted(key)}"
            )
        plain, module, part, is_embedding = _parse_key(key)
        if part is None:
            if "lora_magnitude_vector" in plain:
                raise AdapterError(name, f"it is a DoRA adapter ({key}); convert it first with peft.convert_to_lora")
            if ".lora_" in plain:
                raise AdapterError(
                    name, formats.of_keys(weights) or f"tensor {key!r} is not part of a plain product B A"
                )
            extras.append(plain)
            continue
        parts = found.setdefault(module, {})
        if part in parts:
            raise AdapterError(name, f"module {module!r} has two tensors {part}: {parts[part]!r} and {key!r}")
        parts[part] = key
        if is_embedding:
            embeddings.add(module)
    if not found:
        found, embeddings, extras = _cut_keys(weights)
    if not found:
        raise AdapterError(name, formats.without_factors([*weights]))
    modules = {
        module: _factors(name, config, weights, module, parts, module in embeddings) for module, parts in found.items()
    }
    return modules, [extra for extra in extras if extra.removesuffix(BASE_COPY) not in modules]


_CUT_KEY = re.compile(r"^(?P<module>.+)_(?P<factor>[AB])\.(?P<leaf>weight|bias)$")
_CUT_EMBEDDING_KEY = re.compile(r"^(?P<module>.+)_embedding_(?P<factor>[AB])$")


def _cut_keys(weights: WeightsFile) -> tuple[dict[str, dict[str, str]], set[str], list[str]]:
    """Like `index_factors`, for an adapter that an old version of PEFT saved under the name "lora".

    It removed the adapter's name from the keys wherever it occurred, which turned `q_proj.lora_A.lora.weight` into
    `q_proj_A.weight`. Factors are accepted only in pairs whose ranks agree.
    """
    found: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    plain_names = {key: _parse_key(key).plain for key in weights}
    for key, plain in plain_names.items():
        match = _CUT_KEY.match(plain) or _CUT_EMBEDDING_KEY.match(plain)
        if match is None:
            continue
        is_bias = match.re is _CUT_KEY and match["leaf"] == "bias"
        found.setdefault(match["module"], {})[match["factor"] + (".bias" if is_bias else "")] = key
        if match.re is _CUT_EMBEDDING_KEY:
            embeddings.add(match["module"])

    def is_product(parts: Mapping[str, str]) -> bool:
        A, B = (weights.shape(parts[factor]) if factor in parts else () for factor in "AB")
        return len(A) > 1 and len(B) > 1 and A[0] == B[1]

    found = {module: parts for module, parts in found.items() if is_product(parts)}
    taken = {key for parts in found.values() for key in parts.values()}
    return found, embeddings & found.keys(), [plain for key, plain in plain_names.items() if key not in taken]


def _factors(
    name: str,
    config: Mapping[str, Any],
    weights: WeightsFile,
    module: str,
    parts: Mapping[str, str],
    is_embedding: bool,
) -> FactorKeys:
    for factor, other in (("A", "B"), ("B", "A")):
        if factor not in parts:
            raise AdapterError(name, f"module {module!r} has lora_{other} but no lora_{factor}")
    if "A.bias" in parts:
        raise AdapterError(name, f"module {module!r} has a bias on lora_A, which is not part of a plain product B A")
    for key in parts.values():
        if not weights.is_floating_point(key):
            raise AdapterError(
                name,
                f"module {module!r}: tensor {key!r} has dtype {weights.dtype(key)}; LoRA factors are real floating-"
                "point numbers. Save them as float32, bfloat16 or float16 (dequantize quantized values first)",
            )
    for factor in ("A", "B"):
        shape = weights.shape(parts[factor])
        if len(shape) < 2 or 0 in shape:
            reason = misfits.why_no_matrix(shape, [weights.shape(key) for key in weights])
            raise AdapterError(name, f"module {module!r}: lora_{factor} {reason}")
    rows = weights.shape(parts["A"])[0]
    factors = FactorKeys(rows, math.nan, parts["A"], parts["B"], parts.get("B.bias"), is_embedding)
    if config.get("target_parameters") or ".base_layer" in module:
        # Which module these factors belong to, and so their rank and alpha, depends on the model: see
        # `wrapping.unwrap`.
        return replace(factors, scale=_scale(name, config, module, config.get("r") or rows))
    return ranked(name, config, weights, factors, module)


def ranked(
    name: str, config: Mapping[str, Any], weights: WeightsFile, factors: FactorKeys, module: str, experts: int = 1
) -> FactorKeys:
    """Add the rank and the scale from an adapter's config to the factors of a module.

    Args:
        name: the adapter's name.
        config: its config.
        weights: its tensors.
        factors: the factors of a module, their rank and scale still unknown.
        module: the name of the module or parameter, as the patterns of the config spell it.
        experts: how many matrices share the rows of A.

    Raises:
        AdapterError: config and factors disagree.
    """
    rows = next(iter(weights.shape(factors.A)), 0)
    rank = rows // experts
    expected = _by_pattern(name, config, "rank_pattern", module, config.get("r"))
    if (expected is not None and rank != expected) or rows != rank * experts:
        of_experts = f" for {experts} experts" if experts > 1 else ""
        raise AdapterError(
            name,
            f"module {module!r}: its config says rank {expected}{of_experts}, but lora_A has {rows} rows, so that the "
            "scale is unknown",
        )
    return replace(factors, rank=rank, scale=_scale(name, config, module, rank))


def _scale(name: str, config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = float(_by_pattern(name, config, "alpha_pattern", module, config.get("lora_alpha", 8)))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if rank else 0.0
    if abs(scale) > LARGEST_FLOAT32:
        raise AdapterError(name, f"module {quoted(module)}: lora_alpha is {alpha:g}, which float32 cannot hold")
    return scale


def _by_pattern(name: str, config: Mapping[str, Any], pattern: str, module: str, default: Any) -> Any:
    try:
        return value_for(config.get(pattern), module, default)
    except PatternError as error:
        raise AdapterError(name, f"{pattern}: {error}") from error
