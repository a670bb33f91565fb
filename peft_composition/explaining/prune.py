"""`prune_adapters`: drops the adapters of a composition that its predictions do not need, by evidence."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..evidence.batches import Collate, rank
from ..evidence.passes import Composition, Examples, Precision, candidates, composition_in, passes, read_examples
from ..evidence.score import require_pairs
from ..evidence.scores import NotFiniteError
from ..evidence.table import Measure
from ..progress import progress_bar
from ..text import one_line, plural
from ..tuner.dropping import drop_adapters, is_mix
from ..tuner.factors import Factors
from .left_out import THE_MIX, Change, LeftOutAdapter, Outcome, left_out_rows, without


TOLERANCE = 0.01
_MEANING: dict[Measure, str] = {
    "margin": "log-likelihood of an example's class, predicted from the others",
    "log-likelihood": "log-likelihood of an answer's token",
}


@dataclass(frozen=True)
class PruneReport:
    """What `prune_adapters` did. `print` shows it.

    Attributes:
        rows: the adapters in their order, each with what leaving it alone out of the mix costs.
        dropped: the names of those that are gone, in the order in which they were dropped.
        kept: the names of the others.
        change: of the predictions, from the mix before to the mix after.
        accuracy_before: share of examples that were named rightly before: classes by class means of the other
            examples, answers where every token is the most likely one.
        accuracy_after: the same afterwards.
        parameters_before: number of values in the factors of all adapters.
        parameters_after: the same afterwards.
        measure: "margin" for classes, "log-likelihood" for answers in tokens.
        tolerance: what dropping may cost.
        examples: on how many.
        seconds: in all.
    """

    rows: tuple[LeftOutAdapter, ...]
    dropped: tuple[str, ...]
    kept: tuple[str, ...]
    change: Change
    accuracy_before: float
    accuracy_after: float
    parameters_before: int
    parameters_after: int
    measure: Measure
    tolerance: float
    examples: int
    seconds: float

    def __str__(self) -> str:
        change = self.change
        lines = [
            f"{len(self.dropped)} of {plural(len(self.rows), 'adapter')} dropped on "
            f"{plural(self.examples, 'example')}, "
            f"{self.seconds:.1f} s; factors {self.parameters_before:,} -> {self.parameters_after:,} values",
            f"change: {_signed(change)}, accuracy {100 * self.accuracy_before:.1f} % -> "
            f"{100 * self.accuracy_after:.1f} % ({_MEANING[self.measure]})",
        ]
        width = max(len(one_line(row.name)) for row in self.rows)
        lines.append(f"{'':{width}}  weight  left out alone, 95% interval     lost  won")
        for row in self.rows:
            own = row.change
            fate = "dropped" if row.name in self.dropped else "kept"
            facts = f"{row.weight:6.3f}  {_signed(own):31}  {own.lost:4}  {own.won:3}  {fate}"
            lines.append(f"{one_line(row.name):{width}}  {facts}")
        if not self.dropped:
            lines.append(
                f"Each stays: without it an example might lose more than {self.tolerance:g} (the lower end). "
                "More examples make intervals narrower; a larger tolerance drops more."
            )
        return "\n".join(lines)


def prune_adapters(
    model: nn.Module,
    data: Any,
    *,
    tolerance: float = TOLERANCE,
    adapter_name: str | None = None,
    head: str | nn.Module | None = None,
    collate: Collate | None = None,
    batch_size: int = 16,
    mixed_precision: Precision = "no",
    seed: int = 0,
    progress: bool = False,
) -> PruneReport:
    """Drop the adapters whose removal does not cost, judged on a few labelled examples; in place.

    First each adapter alone is left out of the mix, and the examples are predicted by what remains, in all modules as
    it would be without it: softmax weights grow in proportion to their old sum, so that the base model's share stays.
    Then they are dropped one after the other, that which costs least first. An adapter stays if the mix without it and
    without those dropped before might be worse than the mix at the beginning: if the lower end of the 95% interval of
    the paired difference in log-likelihood is below `-tolerance`. At least one adapter stays. This takes up to two
    passes over the examples for each adapter.

    Classes are predicted from the features, by the class means of the other examples (leave-one-out), and not by the
    head: a head that was trained with the mix sees slightly other features afterwards, so test it or train it a little
    more. Prune before an optimizer is made: learned weights are new parameters. A checkpoint that is saved afterwards
    has the factors of the remaining adapters alone.

    Args:
        model: a model with a composition, neither merged nor disabled; learned, fixed or uniform.
        data: the examples, as for `score_adapters`.
        tolerance: the loss of log-likelihood per example that is no cost. Default: 0.01, one percent of a probability.
        adapter_name: of the composition. Default: the active one.
        head: as for `score_adapters`.
        collate: as for `score_adapters`.
        batch_size: as for `score_adapters`.
        mixed_precision: as for `score_adapters`.
        seed: of the bootstraps behind the intervals.
        progress: whether to show a progress bar; the command line writes a line every 30 seconds into a log file.

    Returns:
        What leaving each adapter out costs, which were dropped, and how the predictions changed.

    Raises:
        ValueError: as `score_adapters`; or the tolerance is not a number of zero or more. The model is as it was.
        RuntimeError: factors are sharded or offloaded. The model is as it was.

    Example:
        >>> print(prune_adapters(model, support_set))
        >>> model.save_pretrained("smaller")
    """
    started = time.perf_counter()
    if not (isinstance(tolerance, (int, float)) and math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be a number of zero or more, got {tolerance!r}")
    composition = composition_in(model, adapter_name)
    examples = read_examples(composition.model, data, head, collate, batch_size)
    if examples.labels is not None:
        require_pairs(examples.labels)
    names = composition.config.adapter_names
    alone = [without(composition, {number}) for number in range(len(names))]
    with progress_bar(1 + 2 * len(names), "Pruning", "pass", progress and rank() == 0) as bar:
        try:
            first, *others = passes(composition.model, [THE_MIX, *alone], examples, mixed_precision, bar=bar)
        except NotFiniteError:
            passes(composition.model, candidates(composition, ("adapter",)), examples, mixed_precision)  # names whose
            raise
        whole = Outcome.of(first)
        rows = left_out_rows(composition, whole, dict(enumerate(others)), seed)
        dropped, left = _choose(composition, examples, mixed_precision, whole, rows, tolerance, seed, bar)
    before = _values_in(composition)
    if dropped:
        drop_adapters(model, composition.name, composition.config, composition.layers, dropped)
    return PruneReport(
        rows=tuple(rows),
        dropped=tuple(names[number] for number in dropped),
        kept=tuple(name for number, name in enumerate(names) if number not in dropped),
        change=whole.change_to(left, seed),
        accuracy_before=whole.accuracy,
        accuracy_after=left.accuracy,
        parameters_before=before,
        parameters_after=_values_in(composition),
        measure="log-likelihood" if examples.labels is None else "margin",
        tolerance=tolerance,
        examples=len(whole.values),
        seconds=time.perf_counter() - started,
    )


def _choose(
    composition: Composition,
    examples: Examples,
    mixed_precision: Precision,
    whole: Outcome,
    rows: list[LeftOutAdapter],
    tolerance: float,
    seed: int,
    bar: Any,
) -> tuple[list[int], Outcome]:
    """The numbers of the adapters to drop, in that order, and what the mix without them did."""
    dropped: list[int] = []
    outcome = whole
    # What costs least first; of what costs the same, the smaller weight.
    for number in sorted(range(len(rows)), key=lambda n: (-rows[n].change.mean, abs(rows[n].weight))):
        others = [other for other in range(len(rows)) if other not in (*dropped, number)]
        if not is_mix(composition.config, others):
            bar.update()
            continue
        left_out = [without(composition, [*dropped, number])]
        (passed,) = passes(composition.model, left_out, examples, mixed_precision, bar=bar)
        left = Outcome.of(passed)
        if whole.change_to(left, seed).low >= -tolerance:
            dropped.append(number)
            outcome = left
    return dropped, outcome


def _values_in(composition: Composition) -> int:
    return sum(
        parameter.numel()
        for layer in composition.layers.values()
        if composition.name in layer.composition_factors
        for parameter in cast(Factors, layer.composition_factors[composition.name]).parameters()
    )


def _signed(change: Change) -> str:
    return f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
