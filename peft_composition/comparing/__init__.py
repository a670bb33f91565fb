"""Compares adapters with what needs none, on the same examples and budget, with a verdict and its uncertainty."""

from .broken import BrokenAdapter
from .compare import compare_methods
from .plot import plot_comparison
from .table import Comparison, MethodScore
from .verdict import Verdict


__all__ = ["BrokenAdapter", "Comparison", "MethodScore", "Verdict", "compare_methods", "plot_comparison"]
