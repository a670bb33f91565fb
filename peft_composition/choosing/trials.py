"""Tries candidates on a rung: shared over processes, remembered on disk, a broken one is a reason and not the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..evidence.batches import processes, rank
from ..evidence.own_heads import head_name, own_head
from ..evidence.passes import Candidate, Examples, Precision, one_pass
from ..evidence.scores import has_pairs
from ..evidence.streamed import read_in_turn
from ..evidence.table import per_example
from ..evidence.together import together
from ..evidence.weights import are_known
from ..references import AdapterReference
from ..text import LONG, one_line
from ..tuner.single import evaluating
from ..upstream.errors import AdapterError
from .downloads import Downloads
from .identity import files_of
from .journal import Journal
from .kept import Kept, KeptOutputs
from .ladder import Ladder
from .slopes import Slopes


SLOPES = -1  # the rung before the first: no example is passed, the slope alone is found


@dataclass(frozen=True)
class Trial:
    """What one candidate did on a rung.

    Attributes:
        values: its score on every example that could be left out, shape (m,): margins or log-likelihoods.
        is_right: whether it named the example rightly, shape (m,).
        slope: by the one backward pass; on the rung `SLOPES`, and where there is one.
        information: of the classes in the output of the head that the adapter was saved with, in nats; None where it
            has none, or where labels are tokens.
        apart: where there is one example of each class, how far these are from each other.
    """

    values: Tensor
    is_right: Tensor
    slope: float | None = None
    information: float | None = None
    apart: float | None = None

    @property
    def score(self) -> float:
        """The mean."""
        return float(self.values.mean())


def values_on(steps: Ladder) -> dict[int, int]:
    """How many examples can be left out on each rung."""

    def of_rung(examples: Examples) -> int:
        if examples.labels is None:
            return len(examples)
        counts = cast(Tensor, examples.labels.unique(return_counts=True)[1])
        return int(counts[counts > 1].sum())

    return {SLOPES: 0} | {
        rung: of_rung(own) if rung >= steps.first_scored else 0 for rung, own in enumerate(steps.rungs)
    }


def ranked(trials: Mapping[int, Trial]) -> list[int]:
    """Candidates, the best first, as `in_order` has them."""
    return in_order(
        {number: own.score for number, own in trials.items()},
        {number: own.information for number, own in trials.items()},
    )


def in_order(scores: Mapping[int, float], informations: Mapping[int, float | None]) -> list[int]:
    """Candidates by their places in two orders, the best first: by score, and by what their own heads tell.

    A candidate without a head is in the middle of the second one. Where fewer than two have one, the score decides.

    Args:
        scores: by number.
        informations: in nats; None where there is no head.
    """
    by_score = sorted(scores, key=lambda own: (-scores[own], own))
    if not are_known([*informations.values()]):
        return by_score
    told = {number: own for number, own in informations.items() if own is not None}
    by_head = sorted(told, key=lambda own: (-told[own], own))
    places = {number: place / (len(by_score) - 1) for place, number in enumerate(by_score)}
    of_heads = {number: place / (len(by_head) - 1) for place, number in enumerate(by_head)}
    return sorted(by_score, key=lambda own: places[own] + of_heads.get(own, 0.5))


class Trials:
    """Candidates 1 to N and the base model, which is number 0, on a base model that stays as it is.

    Args:
        base: a model without adapters.
        references: the candidates.
        journal: what was scored before, and where to write what is scored now.
        downloads: the budget for what candidates fetch.
        mixed_precision: as for `score_adapters`.
        slopes: finds those of candidates.
        bar: of progress.

    Attributes:
        reasons: of the candidates that could not be scored.
        passed: examples that went through the model, in all processes together. What the journal has did not.
    """

    def __init__(
        self,
        base: nn.Module,
        references: Sequence[AdapterReference],
        journal: Journal,
        downloads: Downloads,
        mixed_precision: Precision,
        slopes: Slopes,
        bar: Any,
    ) -> None:
        self._base = base
        self._references = references
        self._journal = journal
        self._downloads = downloads
        self._mixed_precision = mixed_precision
        self._bar = bar
        self._seen: dict[int, str | None] = {}
        self._outputs = KeptOutputs()
        self.reasons: dict[int, str] = {}
        self._own_passed = 0
        self._slopes = slopes
        self.passed = 0

    def run(self, rung: int, numbers: Sequence[int], examples: Examples) -> dict[int, Trial]:
        """Try some candidates, and where there are scores, the base; every process gets all results.

        A candidate stays with one process in all rungs: the other ones do not wait for its files, and it runs over the
        examples alone that the rung before did not have.

        Args:
            rung: its number, or `SLOPES`.
            numbers: the candidates.
            examples: of the rung.

        Returns:
            By number; those that could not be scored are in `reasons` instead.

        Raises:
            ValueError: the base model itself cannot be scored.
        """
        world, own_rank = processes(), rank()
        has_base = rung != SLOPES and (examples.labels is None or has_pairs(examples.labels))
        self._outputs.drop_others({0, *numbers})

        def share() -> tuple[dict[int, dict[str, Any] | str], int]:
            own: dict[int, dict[str, Any] | str] = {}
            for number in [*([0] if has_base else []), *numbers]:
                if number % world == own_rank:
                    own[number] = self._remembered(rung, number, examples)
                    self._bar.update()
            return own, self._own_passed + self._slopes.passed

        parts = together(share)
        found = {number: result for part, _ in parts for number, result in part.items()}
        if isinstance(of_base := found.get(0), str):
            raise ValueError(of_base)
        self.passed = sum(passed for _, passed in parts)
        self.reasons.update({number: own for number, own in found.items() if isinstance(own, str)})
        return {
            number: Trial(
                torch.tensor(line["values"], dtype=torch.float64),
                torch.tensor(line["right"]),
                line.get("slope"),
                line.get("head"),
                line.get("apart"),
            )
            for number, line in sorted(found.items())
            if not isinstance(line, str)
        }

    def _remembered(self, rung: int, number: int, examples: Examples) -> dict[str, Any] | str:
        try:
            line = self._line(rung, number, examples)
        except (torch.OutOfMemoryError, MemoryError):
            raise  # of the machine, and not of the candidate
        except AdapterError as error:
            return error.reason
        except Exception as error:  # whatever a file that others made can cause
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return one_line(f"{kind}{error}", LONG)
        if line is not self._journal.found.get((rung, number)):
            self._journal.add(rung, number, line)
        return line

    def _line(self, rung: int, number: int, examples: Examples) -> dict[str, Any]:
        """What the journal has about these files of a candidate, or else what a pass gives."""
        with self._downloads.of(self._references[number - 1]) if number else nullcontext():
            files = self._files(number)
            known = self._journal.found.get((rung, number))
            if known is not None and known.get("files") == files and (number == 0 or files is not None):
                return known
            trial = self._slope(number) if rung == SLOPES else self._trial(number, examples)
        line = {"values": trial.values.tolist(), "right": trial.is_right.tolist(), "files": files}
        told = {"slope": trial.slope} if rung == SLOPES else {"head": trial.information, "apart": trial.apart}
        return {**line, **told}

    def _files(self, number: int) -> str | None:
        if number and self._journal.is_kept and number not in self._seen:
            self._seen[number] = files_of(self._references[number - 1])
        return self._seen.get(number)

    def _slope(self, number: int) -> Trial:
        slope = None
        if self._slopes.is_possible:  # else it need not be read
            with _without_warnings(), evaluating([self._base]), torch.no_grad(), self._read(number).switch():
                slope = self._slopes.of_what_is_on()
        return Trial(torch.empty(0), torch.empty(0, dtype=torch.bool), slope)

    def _trial(self, number: int, examples: Examples) -> Trial:
        kept, head = self._outputs.take(number), None
        before = None if kept is None else kept.outputs
        with _without_warnings():
            mix = Candidate("base", "base", nullcontext)
            if number:
                name = head_name(self._base, examples.head)
                if kept is not None:
                    head = kept.head
                elif name is not None:
                    head = own_head(name, self._references[number - 1])
                mix = replace(self._read(number), own_head=head, is_asked=True)
            new = examples.batches[0 if before is None else before.batches :]
            mix = replace(mix, switch=self._counted(mix, sum(len(batch["labels"]) for batch in new)))
            passed, outputs = one_pass(self._base, mix, examples, self._mixed_precision, before)
        values, is_right = per_example(passed)
        apart = None if len(values) else apartness(outputs.found[0])
        told = passed.information
        trial = Trial(values, is_right, information=None if told is None else told.nats, apart=apart)
        self._outputs.put(number, trial.score if apart is None else apart, Kept(outputs, head))
        return trial

    def _read(self, number: int) -> Candidate:
        return read_in_turn(self._base, [self._references[number - 1]])[0]

    def _counted(self, mix: Candidate, examples: int) -> Callable[[], AbstractContextManager[None]]:
        """A candidate's switch that counts the examples, once the adapter could be read."""

        @contextmanager
        def switch() -> Iterator[None]:
            with mix.switch():
                self._own_passed += examples
                yield

        return switch


def apartness(features: Tensor) -> float:
    """The mean of 1 - cosine over the pairs of examples, of shape (n, width)."""
    wide = torch.nn.functional.normalize(features.double(), dim=1)
    cosines = (wide @ wide.T)[torch.ones(len(wide), len(wide)).tril(-1).bool()]
    return float(1 - cosines.mean())


@contextmanager
def _without_warnings() -> Iterator[None]:
    """A context without the warnings of adapters, which `inspect` shows: here they would be one for each candidate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
