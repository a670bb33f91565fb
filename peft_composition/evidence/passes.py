"""One forward pass over the K examples for every candidate mix: each adapter alone, their uniform mix, the base."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from ..config import CompositionConfig
from ..text import quoted
from ..tuner.layer import CompositionLayer
from ..tuner.locating import composition_of, unwrapped
from ..tuner.single import evaluating, mixed_by, one_adapter
from .batches import Batch, Collate, all_labels, inputs_on, is_encoder_decoder, processes, rank, read_batches
from .choices import Choices
from .heads import Features, find_head, original_head
from .own_heads import OwnHead, head_name, information, own_head
from .posterior import Answers, answers
from .scores import LeftOut, NotFiniteError, has_pairs, leave_one_out_distances, nothing_left_out
from .together import sendable, together
from .weights import Information


Kind = Literal["adapter", "uniform", "base", "mix", "without"]
ALL_KINDS: tuple[Kind, ...] = ("adapter", "uniform", "base")
Precision = Literal["no", "bf16", "fp16"]
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Composition:
    """A composition in a model.

    Attributes:
        model: what is called.
        name: of the composition.
        config: its config.
        layers: its composed modules and parameters, by their names in the base model.
    """

    model: nn.Module
    name: str
    config: CompositionConfig
    layers: Mapping[str, CompositionLayer]


@dataclass(frozen=True)
class Candidate:
    """A mix that can be scored.

    Attributes:
        name: of the adapter, or "uniform" or "base".
        kind: what it is; "mix" for the composition as it is, "without" for the mix without an adapter.
        switch: makes a context inside of which the model is so, and after which it is as before.
        own_head: the head that the adapter was saved with, which is asked about the examples. Default: none is.
        is_asked: whether a pass over one example of each class is something, too, though none can be left out.
    """

    name: str
    kind: Kind
    switch: Callable[[], AbstractContextManager[None]]
    own_head: OwnHead | None = None
    is_asked: bool = False


@dataclass(frozen=True)
class Examples:
    """What candidates are scored on.

    Attributes:
        batches: the examples.
        labels: the class of each, shape (n,); None where they have answers.
        head: whose features are scored; for classes.
    """

    batches: Sequence[Batch]
    labels: Tensor | None
    head: nn.Module | None

    def __len__(self) -> int:
        return sum(len(batch["labels"]) for batch in self.batches)


@dataclass(frozen=True)
class Passed:
    """What one pass of a candidate gave.

    Attributes:
        found: of classes or of answers; or, of several answers to each example, which is chosen.
        seconds: it took.
        information: of the classes in the output of the adapter's own head; None where it was not asked.
    """

    found: LeftOut | Answers | Choices
    seconds: float
    information: Information | None = None


class Outputs(NamedTuple):
    """What a candidate put out on the first batches of some examples, on the CPU.

    Attributes:
        batches: how many.
        found: pooled features, shape (n, width), alone in a tuple; or `Answers`.
    """

    batches: int
    found: tuple[Tensor, ...]


def composition_in(model: nn.Module, adapter_name: str | None) -> Composition:
    """The composition that is to be scored.

    Args:
        model: a model with a composition, in whatever wrapper.
        adapter_name: its name. Default: the active one.

    Raises:
        ValueError: there is none, or several are active and none is named, or it is merged or disabled.
    """
    adapter_name, config, layers = composition_of(model, adapter_name)
    own = {name: layer for name, layer in layers.items() if adapter_name in layer.composition_factors}
    for name, layer in own.items():
        if layer.merged or layer.disable_adapters:
            state = "merged into" if layer.merged else "disabled in"
            raise ValueError(f"Adapters are {state} module {quoted(name)}: every mix would give the same there.")
        if adapter_name not in layer.active_adapters:
            raise ValueError(
                f"The composition {adapter_name!r} is not active: call set_adapter({adapter_name!r}) first."
            )
    return Composition(unwrapped(model), adapter_name, config, own)


def candidates(composition: Composition, kinds: Sequence[Kind]) -> list[Candidate]:
    """The mixes of a composition: its adapters alone in their order, then their uniform mix, then the base model."""
    layers, name = list(composition.layers.values()), composition.name
    names = composition.config.adapter_names
    found = [
        Candidate(adapter, "adapter", partial(one_adapter, layers, name, number))
        for number, adapter in enumerate(names)
    ]
    count = len(names)
    found.append(Candidate("uniform", "uniform", partial(mixed_by, layers, name, [1 / count] * count)))
    found.append(Candidate("base", "base", partial(mixed_by, layers, name, [0.0] * count)))
    return [candidate for candidate in found if candidate.kind in kinds]


def asking_own_heads(composition: Composition, mixes: Sequence[Candidate], head: nn.Module | None) -> list[Candidate]:
    """The same candidates, each adapter alone with the head that it was saved with.

    Every process gets the same heads, though some may not have the files of all adapters.

    Args:
        composition: that they are of.
        mixes: the candidates.
        head: of the model.
    """
    name = head_name(composition.model, head)
    recorded = {own["name"]: own for own in composition.config.provenance or ()}
    references = composition.config.references

    def read() -> list[OwnHead | None]:
        return [None if name is None else own_head(name, own, recorded.get(own["name"])) for own in references]

    parts = together(read)
    found = {
        own["name"]: next((heads[number] for heads in parts if heads[number] is not None), None)
        for number, own in enumerate(references)
    }
    return [replace(own, own_head=found[own.name], is_asked=True) if own.kind == "adapter" else own for own in mixes]


def read_examples(
    model: nn.Module, data: Any, head: str | nn.Module | None, collate: Collate | None, batch_size: int
) -> Examples:
    """The examples, with the head that sees features of them.

    Args:
        model: that is called, without wrappers.
        data: as `score_adapters` takes it.
        head: likewise.
        collate: likewise.
        batch_size: likewise.
    """
    batches = read_batches(data, collate, batch_size)
    labels = all_labels(batches)
    return Examples(batches, labels, None if labels is None else find_head(model, head))


def passes(
    model: nn.Module,
    mixes: Sequence[Candidate],
    examples: Examples,
    mixed_precision: Precision = "no",
    are_shared: bool = True,
    bar: Any = None,
) -> list[Passed]:
    """Run every candidate over the examples, in eval mode and without gradients.

    Args:
        model: what the candidates switch.
        mixes: the candidates.
        examples: what they are scored on.
        mixed_precision: as accelerate has it.
        are_shared: whether several processes share out the candidates; else each runs all of them.
        bar: counts the candidates, as `progress_bar` makes it; that of the first process counts all. Default: none.

    Raises:
        ValueError: a candidate's features or likelihoods cannot be scored; the message names it.
    """

    def run(candidate: Candidate, counts: int = 1) -> Passed:
        found, _ = _pass_on(model, candidate, examples, mixed_precision, None)
        if bar is not None:
            bar.update(counts)
        return found

    with evaluating([model]), torch.no_grad():
        # What is sharded is gathered by all processes at once.
        if processes() == 1 or not are_shared or _is_sharded(model):
            return [run(candidate) for candidate in mixes]
        return _shared(mixes, run)


def one_pass(
    model: nn.Module,
    candidate: Candidate,
    examples: Examples,
    mixed_precision: Precision = "no",
    before: Outputs | None = None,
) -> tuple[Passed, Outputs]:
    """Run a candidate over the examples that it has not seen, in eval mode and without gradients.

    Args:
        model: what the candidate switches.
        candidate: the candidate.
        examples: what it is scored on.
        mixed_precision: as accelerate has it.
        before: what it put out on the first of these batches.

    Returns:
        What the examples give together, and what it put out on all of them.

    Raises:
        ValueError: as `passes`.
    """
    with evaluating([model]), torch.no_grad():
        return _pass_on(model, candidate, examples, mixed_precision, before)


def _pass_on(
    model: nn.Module, candidate: Candidate, examples: Examples, mixed_precision: Precision, before: Outputs | None
) -> tuple[Passed, Outputs]:
    started = time.perf_counter()
    found: LeftOut | Answers
    outputs: Outputs
    told = None
    new = replace(examples, batches=examples.batches[0 if before is None else before.batches :])
    with candidate.switch():
        try:
            if examples.labels is None:
                found = read_answers(model, new.batches, mixed_precision)
                if before is not None:
                    found = Answers(*(torch.cat(parts) for parts in zip(before.found, found)))
                outputs = Outputs(len(examples.batches), found)
            else:
                features = read_features(model, new, mixed_precision)
                if before is not None:
                    features = torch.cat([before.found[0].to(features.device), features])
                if candidate.own_head is not None:
                    told = information(features, examples.labels, candidate.own_head, original_head(examples.head))
                found = (
                    nothing_left_out(features, examples.labels)
                    if candidate.is_asked and not has_pairs(examples.labels)
                    else leave_one_out_distances(features, examples.labels)
                )
                outputs = Outputs(len(examples.batches), (features.cpu(),))
        except NotFiniteError as error:
            raise NotFiniteError(
                f"Scoring {_what(candidate)}: {error}. {advice(candidate.kind == 'adapter')}"
            ) from error
        except ValueError as error:
            raise ValueError(f"Scoring {_what(candidate)}: {error}") from error
    return Passed(type(found)(*(part.cpu() for part in found)), time.perf_counter() - started, told), outputs


def _what(candidate: Candidate) -> str:
    name = quoted(candidate.name)
    named = {"adapter": f"adapter {name} alone", "without": f"the mix without adapter {name}"}
    return named.get(candidate.kind, f"the {candidate.kind}")


def advice(is_of_adapter: bool) -> str:
    """What to do where scores are not finite."""
    if is_of_adapter:
        return "In float16 large values overflow: load the base model in bfloat16 or float32, or leave the adapter out"
    return "In float16 large values overflow: load the base model in bfloat16 or float32"


def read_features(model: nn.Module, examples: Examples, mixed_precision: Precision) -> Tensor:
    """Pooled features of all examples, shape (n, width), from the model as it is."""
    assert examples.head is not None
    features, seen = Features(examples.head), []
    for batch in examples.batches:
        with features.watching(), autocast(model, mixed_precision):
            output = model(**inputs_on(batch, model, with_labels=False))
        seen.append(features.read(output, len(batch["labels"])))
    return torch.cat(seen)


def read_answers(model: nn.Module, batches: Sequence[Batch], mixed_precision: Precision) -> Answers:
    """Scores of the answers of all examples, from the model as it is.

    Raises:
        NotFiniteError: a likelihood is NaN or infinite.
    """
    is_seq2seq = is_encoder_decoder(model)
    found = []
    for batch in batches:
        with autocast(model, mixed_precision):
            output = model(**inputs_on(batch, model, with_labels=is_seq2seq))
        found.append(answers(output.logits, batch["labels"], is_shifted=not is_seq2seq))
    whole = Answers(*(torch.cat(parts) for parts in zip(*found)))
    broken = int((~whole.nll.isfinite()).sum())
    if broken:
        raise NotFiniteError(f"{broken} of {len(whole.nll)} answers have a likelihood that is NaN or infinite")
    return whole


def _shared(mixes: Sequence[Candidate], run: Callable[[Candidate, int], Passed]) -> list[Passed]:
    """Every process runs its part of the candidates, and all get all results. An error is everybody's."""
    own: dict[int, Passed | Exception] = {}
    for number in range(rank(), len(mixes), processes()):
        try:
            own[number] = run(mixes[number], min(processes(), len(mixes) - number))  # others run theirs meanwhile
        except Exception as error:  # raised below, in all processes
            own[number] = sendable(error)
            break
    found = {number: result for part in together(lambda: own) for number, result in part.items()}
    for number in sorted(found):
        result = found[number]
        if isinstance(result, Exception):
            raise result
    return [cast(Passed, found[number]) for number in range(len(mixes))]


def _is_sharded(model: nn.Module) -> bool:
    return any(
        hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") for parameter in model.parameters()
    ) or any(hasattr(module, "_is_fsdp_managed_module") for module in model.modules())


def autocast(model: nn.Module, mixed_precision: Precision) -> AbstractContextManager[object]:
    """A context for passes in this precision."""
    if mixed_precision == "no":
        return nullcontext()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return torch.autocast(device.type, dtype=_PRECISIONS[mixed_precision])
