"""Analyses adapters and mixing weights: reports, similarity, tables and plots. Nothing is trained or saved."""

from .cka import MinibatchCKA, linear_cka, linear_hsic
from .correlation import RankCorrelation, rank_correlations
from .inspection import AdapterReport, inspect_adapters
from .report import WeightRow, plot_weights, plot_weights_and_similarity, weights_table
from .similarity import layerwise_cka
from .views import View, single_adapters


__all__ = [
    "AdapterReport",
    "inspect_adapters",
    "WeightRow",
    "weights_table",
    "plot_weights",
    "plot_weights_and_similarity",
    "View",
    "single_adapters",
    "layerwise_cka",
    "linear_cka",
    "linear_hsic",
    "MinibatchCKA",
    "RankCorrelation",
    "rank_correlations",
]
