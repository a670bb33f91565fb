"""Chooses adapters and mixing weights by evidence from the K examples themselves, without a validation set."""

from .fit import fit_mixing_weights
from .score import score_adapters
from .table import AdapterScore, AdapterScores, EvidenceReport


__all__ = ["AdapterScore", "AdapterScores", "EvidenceReport", "fit_mixing_weights", "score_adapters"]
