"""Rank correlations between mixing weights and the similarity of the adapters, by part of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .report import WHOLE_MODEL, Part, Similarities, Weights, grid_of, rows_and_columns


@dataclass(frozen=True)
class RankCorrelation:
    """The agreement of two rankings of the upstream adapters, in one part of the model or averaged over its parts.

    Attributes:
        part: name of the block or module, or "all".
        adapters: number of ranked adapters.
        rho: Spearman's correlation, -1 to 1; NaN if all weights or all similarities are equal, or if fewer than 2
            adapters are ranked.
        p_value: p-value of a two-sided permutation test; NaN if `rho` is NaN. See `rank_correlations`.
    """

    part: str
    adapters: int
    rho: float
    p_value: float


def rank_correlations(weights: Weights, similarities: Similarities, by: Part = "module") -> list[RankCorrelation]:
    """Spearman's correlation between mixing weights and similarities, for every part of the model and pooled.

    In each part, the adapters that have both a weight and a similarity are ranked. Ranking within parts prevents that
    parts with larger similarities overall count as agreement. The last entry is pooled: the mean of the parts'
    correlations over the adapters that all of these parts have, or NaN if these are fewer than 2.

    The p-values are exact (for more than 7 adapters, from 9999 random permutations with a fixed seed): the share of
    all permutations of the adapters' names, applied to all parts alike, that give a correlation at least as far from
    zero. Parts of one network are not independent, and a test that treats each pair of part and adapter as one
    observation would find significance in noise. The p-values show whether the order of these adapters is more than
    chance. With 3 adapters they cannot be below 1/3, with 5 not below 1/60. They do not show whether another training
    run, another target task or other adapters would agree, which needs repeated runs. And if you look at many parts
    separately, the smallest of their p-values means nothing.

    Args:
        weights: `{module: {adapter: weight}}`.
        similarities: `{module: {adapter: similarity}}`.
        by: rank within each "module" (default) or "block" (mean of its modules), or the means over the whole "model".

    Returns:
        One entry per part in the order of the weights, then "all"; with "model" only "all".

    Raises:
        ValueError: there are fewer than 2 adapters, or no part has weights and similarities of 2 adapters that differ.
        ImportError: scipy is not installed.
    """
    parts, adapters = rows_and_columns(weights, by)
    if len(adapters) < 2:
        raise ValueError(f"there is nothing to rank: {adapters[0]!r} is the only adapter")
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
            f"module {module!r}, for example, has both only for {', '.join(map(repr, own[module]))}"
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
    products = (
        ranks.T @ others / ranks.size
    )  # (N, N): the contribution of pairing adapter i's weights with j's similarities
    columns = np.arange(count)

    def correlation(order: np.ndarray, axis: int = -1) -> np.ndarray:
        return products[columns, np.moveaxis(order, axis, -1)].sum(-1)

    test = stats.permutation_test(
        (columns,), correlation, permutation_type="pairings", vectorized=True, n_resamples=9999, random_state=0
    )
    return RankCorrelation(part, count, float(test.statistic), float(test.pvalue))


def _is_constant(row: list[float]) -> bool:
    """Whether values differ only by rounding: uniform weights have no ranking."""
    return len(row) < 2 or max(row) - min(row) <= 1e-9 * max(map(abs, row))
