"""Checks the record of a saved composition against the model that it is loaded into."""

from __future__ import annotations

from collections.abc import Collection

from ..config import CompositionConfig
from ..record import Recorded
from ..text import one_line, quoted
from ..upstream.matching import CompositionPlan
from ..upstream.shapes import LayerShape
from .base_model import BaseModel


# Factors of one adapter that exceed this size, and this number of copies of the weight that they update, mean a wrong
# number in the record.
_MOST_ELEMENTS = 2**26
_MOST_COPIES = 4


def require_fitting_record(config: Recorded, module: str, shape: LayerShape) -> None:
    """Check the record of a module against the model, before anything is changed or allocated.

    Args:
        config: a config with a valid record.
        module: name of the module.
        shape: shape of its factors in the model.

    Raises:
        ValueError: the module's sizes differ from the recorded ones, or a rank is far too large for it.
    """
    assert config.composed_modules is not None
    found = sizes_of(shape)
    recorded = (config.layer_sizes or {}).get(module, found)
    if recorded != found:
        raise ValueError(
            f"Module {quoted(module)} has the sizes {found} (out, in) in the model and {one_line(recorded)} in the "
            f"saved composition. It was made for {quoted(config.base_model_name_or_path)}."
        )
    per_rank = _product(shape.shape_of_A(1)) + _product(shape.shape_of_B(1))
    most = max(_MOST_ELEMENTS, _MOST_COPIES * _product(found)) // per_rank
    for name, rank in zip(config.adapter_names, config.composed_modules[module]):
        if rank > most:
            raise ValueError(
                f"The saved composition says that adapter {quoted(name)} has rank {rank} in module {quoted(module)}. "
                f"Its sizes are {found} (out, in), and no adapter for them has a rank above {most}: "
                "adapter_config.json is damaged."
            )


def sizes_of(shape: LayerShape) -> list[int]:
    """The sizes of a module in the form of the record: number of matrices (if several), out, in (and kernel)."""
    return [*([] if shape.experts is None else [shape.experts]), shape.out_features, *shape.in_shape]


def _product(sizes: Collection[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def rename_recorded_modules(config: CompositionConfig, base: BaseModel) -> None:
    """Update the module names of a checkpoint from older transformers."""
    composed = config.composed_modules or {}
    config.composed_modules = {base.current_name(module): ranks for module, ranks in composed.items()}
    config.biased_modules = [base.current_name(module) for module in config.biased_modules or ()]
    if config.layer_sizes is not None:
        config.layer_sizes = {base.current_name(module): sizes for module, sizes in config.layer_sizes.items()}


def require_recorded_modules(config: CompositionConfig, base: BaseModel) -> None:
    """Refuse a model that lacks modules of the checkpoint."""
    for module in config.composed_modules or {}:
        shape = base.shape_of(module)
        if shape is None:
            raise ValueError(
                f"The saved composition has module {module!r}, which does not exist in the model. It was made for "
                f"{config.base_model_name_or_path!r}."
            )
        if shape.refusal is not None:
            raise ValueError(f"Module {module!r} ({shape.kind}) cannot hold the saved composition: {shape.refusal}.")
        require_fitting_record(config, module, shape)


def require_recorded_ranks(config: CompositionConfig, plan: CompositionPlan) -> None:
    """Refuse adapters whose ranks differ from those of the saved composition."""
    found = {module: plan.ranks(module) for module in plan.factors}
    for module, ranks in (config.composed_modules or {}).items():
        if found.get(module) != ranks:
            raise ValueError(
                f"The upstream adapters do not match the saved composition: module {module!r} has ranks "
                f"{found.get(module)}, but {ranks} are recorded."
            )
