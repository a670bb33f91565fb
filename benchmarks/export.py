"""The table `export`: a composition as one LoRA of low rank, beside what PEFT has for that; relative to this library.

All of them compute the nearest update of rank 16; that they do is checked before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from peft import PeftModel, convert_to_lora
from peft.tuners.lora import LoraLayer
from torch import Tensor

from peft_composition import to_lora

from .cells import in_order, require_same
from .measure import race
from .memory import give_back
from .models import RANK, Workbench
from .peers import COMPOSITION, MOST_FOR_PEFT, TOO_MANY_FOR_PEFT, Peer, compose, target_names
from .results import Cell, Measurement
from .settings import Settings, Table


CONVERT = Peer(
    "convert", "PEFT, convert_to_lora", "`peft.convert_to_lora(model, rank)` of the same composition", is_leading=True
)
WEIGHTED = Peer(
    "svd",
    "PEFT, add_weighted_adapter",
    '`add_weighted_adapter(..., combination_type="svd")` of the same N LoRAs, loaded one after the other',
    is_leading=True,
)
NAME = "combined"

Factors = dict[str, tuple[Tensor, Tensor]]  # module -> A (rank, in), B (out, rank)


def run(settings: Settings) -> Iterator[Cell]:
    """Measure every model and N."""
    for key in settings.models:
        for count in settings.adapters:
            yield _cell(settings, key, count)


def _cell(settings: Settings, key: str, count: int) -> Cell:
    give_back()
    bench = settings.workbench(key)
    composed = compose(bench, bench.shared_base(), count)
    calls: dict[Peer, Callable[[], Factors]] = {
        COMPOSITION: lambda: _by_module(bench, to_lora(composed, rank=RANK).state_dict),
        CONVERT: lambda: _by_module(bench, convert_to_lora(composed, rank=RANK)[1]),
    }
    skipped = {}
    if count > MOST_FOR_PEFT:
        skipped[WEIGHTED.title] = Measurement(skipped=TOO_MANY_FOR_PEFT)
    elif WEIGHTED in settings.peers:
        calls[WEIGHTED] = partial(_add_weighted, bench, bench.peft_model(count), count)
    chosen = {peer.title: call for peer, call in calls.items() if peer in settings.peers}
    require_same({title: _updates(call()) for title, call in chosen.items()})
    timed = race(chosen, COMPOSITION.title, settings.rounds[key], settings.device, f"export {key} N={count}")
    return Cell(key, count, COMPOSITION.title, in_order(settings.peers, {**timed, **skipped}))


def _add_weighted(bench: Workbench, model: PeftModel, count: int) -> Factors:
    """Combines, reads the result and takes it out again, so that every call finds the same model."""
    names = [reference["name"] for reference in bench.references(count)]
    tuner = model.base_model
    tuner.add_weighted_adapter(  # type: ignore[operator]
        names, [1 / count] * count, NAME, combination_type="svd", svd_rank=RANK
    )
    factors = {}
    for module in target_names(bench):
        layer = model.get_base_model().get_submodule(module)
        assert isinstance(layer, LoraLayer)
        A, B = (part[NAME].get_parameter("weight") for part in (layer.lora_A, layer.lora_B))
        factors[module] = (A.detach(), B.detach() * layer.scaling[NAME])
    model.delete_adapter(NAME)
    return factors


def _by_module(bench: Workbench, state_dict: dict[str, Tensor]) -> Factors:
    """The factors of an adapter whose scale is 1 in every module."""
    prefix = "base_model.model."
    return {
        module: (
            state_dict[f"{prefix}{module}.lora_A.weight"].to(bench.device),
            state_dict[f"{prefix}{module}.lora_B.weight"].to(bench.device),
        )
        for module in target_names(bench)
    }


def _updates(factors: Factors) -> Tensor:
    """B A of all modules in one vector."""
    return torch.cat([(B.float() @ A.float()).flatten() for A, B in factors.values()])


TABLE = Table(
    peers=(COMPOSITION, CONVERT, WEIGHTED),
    models=("vit",),
    adapters=(5, 20),
    rounds={"vit": 3, "t5": 3, "llama": 3, "tiny-vit": 3, "tiny-llama": 3},
    describe=lambda model: model.name,
    run=run,
)
