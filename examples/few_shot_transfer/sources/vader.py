"""The sentiment sentences of VADER: one domain is one data set."""

from __future__ import annotations

from datasets import ClassLabel, Dataset, Features, Value
from vader import load_domain

from . import Splits


def load(domain: str) -> Splits:
    """Reads a domain: "amazon", "movies", "nyt" or "tweets"; it has no splits of its own."""
    examples = load_domain(domain)
    columns = {"input": [e.text for e in examples], "label": [e.label for e in examples]}
    features = Features({"input": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    return {"train": Dataset.from_dict(columns, features=features)}
