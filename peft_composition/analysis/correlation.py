"""How well the mixing weights agree with the similarity of the adapters: rank correlations by part of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .report import WHOLE_MODEL, Part, Similarities, Weights, grid_of, rows_and_columns


@dataclass(frozen=True)
class RankCorrelation:
    """How far two rankings of the upstream adapters agree, in one part of the model or on the average over its parts.

    Attributes:
        part: name of the block or module, or "all".
        adapters: number of adapters that were ranked.
        rho: Spearman's correlation, -1 to 1; NaN where all weights or all similarities are equal, or fewer than 2
            adapters are ranked.
        p_value: of a two-sided permutation test; NaN with `rho`. See `rank_correlations`.
    """

    part: str
    adapters: int
    rho: float
    p_value: float


def rank_correlations(weights: Weights, similarities: Similarities, by: Part = "module") -> list[RankCorrelation]:
    """Spearman's correlation between mixing weights and similarities, for every part of the model and pooled.

    Adapters are ranked within each part, so that parts which are more alike than others as a whole do not count as
    agreement; in each part those that have both a weight and a similarity there. The pooled value, the last, is the
    mean of the parts' correlations, between the adapters that all of these parts have; NaN where these are fewer than
    2.

    The p-values are exact (or, for more than 7 adapters, from 9999 random orders, seeded): the share of all ways to
    hand out the adapters' names anew, in all parts of the model alike, that give a correlation as far from zero. Parts
    of one network are not independent of each other, and a test that took each pair of a part and an adapter for an
    observation of its own would find significance in noise. What they can say: whether these adapters' order is more
    than chance. With 3 adapters none falls below 1/3, with 5 none below 1/60. What they cannot: whether another
    training run, another target task or other adapters would agree, for which runs must be repeated; nor, where many
    parts are looked at one by one, that the least p-value of them means anything.

    Args:
        weights: `{module: {adapter: weight}}`.
        similarities: `{module: {adapter: similarity}}`.
        by: rank within each "module" (default) or "block" (mean of its modules), or the means over the whole "model".

    Returns:
        One entry for each part in the order of the weights, then "all"; by "model" that one alone.

    Raises:
        ValueError: fewer than 2 adapters, or nowhere both weights and similarities of 2 that differ.
        ImportError: scipy is not installed.
    """
    parts, adapters = rows_and_columns(weights, by)
    if len(adapters) < 2:
        raise ValueError(f"one adapter has no rank among others: {adapters[0]!r}")
    own = {m: {a: w for a, w in row.items() if a in similarities.get(m, {})} for m, row in weights.items()}
    if not any(own.values()):
        raise ValueError("weights and similarities have no module and adapter in common")
    grid = grid_of(own, by, parts, adapters)
    similar = grid_of({m: {a: similarities[m][a] for a in row} for m, row in own.items()}, by, parts, adapters)
    ranked = []
    for part, row, other in zip(parts, grid, similar):
        columns = [number for number, value in enumerate(row) if not math.isnan(value)]
        ranked.append(_correlate(part, [_of(row, columns)], [_of(other, columns)]))
    if all(entry.adapters < 2 for entry in ranked):
        module = next(module for module, row in own.items() if row)
        raise ValueError(
            "there is nothing to rank: no part has both weights and similarities of 2 adapters; "
            f"module {module!r}, for one, has both of {', '.join(map(repr, own[module]))} alone"
        )
    defined = [number for number, entry in enumerate(ranked) if not math.isnan(entry.rho)]
    if not defined:
        raise ValueError("there is nothing to rank: in no part do both weights and similarities differ")
    if by == "model":
        return ranked
    everywhere = [n for n in range(len(adapters)) if not any(math.isnan(grid[number][n]) for number in defined)]
    rows = [(_of(grid[number], everywhere), _of(similar[number], everywhere)) for number in defined]
    rows = [pair for pair in rows if not any(map(_is_constant, pair))]
    if not rows:
        return [*ranked, RankCorrelation(WHOLE_MODEL, len(everywhere), math.nan, math.nan)]
    return [*ranked, _correlate(WHOLE_MODEL, [one for one, _ in rows], [other for _, other in rows])]


def _of(row: list[float], columns: list[int]) -> list[float]:
    return [row[number] for number in columns]


def _correlate(part: str, weights: list[list[float]], similarities: list[list[float]]) -> RankCorrelation:
    """Mean over rows of Spearman's correlation, with the p-value of permuting the columns of one side."""
    try:
        import numpy as np
        from scipy import stats
    except ImportError as error:
        raise ImportError("Rank correlations need scipy: pip install 'peft-composition[analysis]'") from error
    count = len(weights[0])
    if any(_is_constant(row) for row in (*weights, *similarities)):
        return RankCorrelation(part, count, math.nan, math.nan)
    ranks, others = (stats.zscore(stats.rankdata(rows, axis=1), axis=1) for rows in (weights, similarities))
    products = ranks.T @ others / ranks.size  # (N, N): what pairing adapter i's weights with j's similarities adds
    columns = np.arange(count)

    def correlation(order: np.ndarray, axis: int = -1) -> np.ndarray:
        return products[columns, np.moveaxis(order, axis, -1)].sum(-1)

    test = stats.permutation_test(
        (columns,), correlation, permutation_type="pairings", vectorized=True, n_resamples=9999, random_state=0
    )
    return RankCorrelation(part, count, float(test.statistic), float(test.pvalue))


def _is_constant(row: list[float]) -> bool:
    """Whether values differ by no more than rounding: uniform weights are no ranking."""
    return len(row) < 2 or max(row) - min(row) <= 1e-9 * max(map(abs, row))
