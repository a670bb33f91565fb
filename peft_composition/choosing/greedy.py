"""Chooses from the best candidates those that make a better mix together, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from ..config import CompositionConfig
from ..evidence.fit import fit_mixing_weights
from ..evidence.passes import Candidate, Composition, Examples, Precision, composition_in, passes
from ..evidence.table import per_example
from ..evidence.temporary import adapted
from ..evidence.weights import CAUTION
from ..references import AdapterReference
from ..tuner.single import mixed_by
from .trials import Trial


def choose_together(
    base: nn.Module,
    references: Sequence[AdapterReference],
    trials: Sequence[Trial],
    examples: Examples,
    most: int,
    mixed_precision: Precision,
) -> tuple[list[int], int]:
    """Forward selection: the best adapter, then the one that improves the uniform mix with it the most, and so on.

    It ends where none improves the mix by half a standard error of the difference, paired by example.

    Args:
        base: a model without adapters.
        references: the candidates, the best first.
        trials: what each did on all examples.
        examples: these.
        most: how many to choose at most.
        mixed_precision: as for `score_adapters`.

    Returns:
        The places of the chosen ones, and how many mixes were tried.
    """
    chosen, tried = [0], 0
    if len(references) == 1 or most == 1:
        return chosen, tried
    best = trials[0].values
    with _composed(base, references) as composition:
        while len(chosen) < min(most, len(references)):
            others = [place for place in range(len(references)) if place not in chosen]
            mixes = [_mix(composition, len(references), [*chosen, place]) for place in others]
            found = [per_example(own)[0] for own in passes(composition.model, mixes, examples, mixed_precision)]
            tried += len(mixes)
            gains = [own - best for own in found]
            place = max(range(len(others)), key=lambda number: float(gains[number].mean()))
            if float(gains[place].mean()) <= _caution(gains[place]):
                break
            chosen.append(others[place])
            best = found[place]
    return chosen, tried


def weigh(
    base: nn.Module, references: Sequence[AdapterReference], examples: Examples, mixed_precision: Precision, seed: int
) -> list[float]:
    """Mixing weights of the chosen adapters by evidence, as `fit_mixing_weights` gives them."""
    with _composed(base, references) as composition:
        report = fit_mixing_weights(
            composition.model,
            list(examples.batches),
            adapter_name=composition.name,
            head=examples.head,
            mixed_precision=mixed_precision,
            seed=seed,
        )
    return list(report.weights.values())


def _caution(gains: Tensor) -> float:
    return CAUTION * float(gains.std()) / len(gains) ** 0.5 if len(gains) > 1 else 0.0


def _mix(composition: Composition, count: int, places: Sequence[int]) -> Candidate:
    weights = [1 / len(places) if place in places else 0.0 for place in range(count)]
    return Candidate("mix", "uniform", partial(mixed_by, list(composition.layers.values()), composition.name, weights))


@contextmanager
def _composed(base: nn.Module, references: Sequence[AdapterReference]) -> Iterator[Composition]:
    """A context with a composition of these adapters on the base; afterwards the model is as before."""
    weights = [1 / len(references)] * len(references)
    config = CompositionConfig(adapters=[*references], mixing="fixed", weights=weights)
    with adapted(base, config, ignored="") as model:
        yield composition_in(model, None)
