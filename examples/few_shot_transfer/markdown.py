"""Tables in Markdown, and what the methods are called in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .analysis import BEST_SINGLE, MEAN_SINGLE, ORACLE_SINGLE, scaled_lora
from .scenario import FACTORS


NAMES = {
    "zero-shot": "Zero-shot",
    "classifier": "Classifier tuning",
    "full": "Full fine-tuning",
    "lora": "LoRA",
    "uniform": "Uniform composition",
    "learned": "Learned composition",
    "learned-free": "Learned, free weights",
    MEAN_SINGLE: "Mean single adapter",
    BEST_SINGLE: "Best single adapter (by validation)",
    ORACLE_SINGLE: "Best single adapter (oracle, by test)",
    "random-uniform": "Random LoRAs, uniform",
    "random-learned": "Random LoRAs, learned",
    "lorahub": "LoraHub",
    "evidence": "Weights by evidence",
    "cold": "Head and weights together, from uniform",
    "cold-block": "The same, weights shared in a block",
    "cold-model": "The same, weights shared by all modules",
    "evidence-learned": "Head and weights together, from evidence",
    "fresh-member": "The same from uniform, with a fresh LoRA as a member",
    "lambda-lora": "LoRA times a factor (by validation)",
    **{scaled_lora(factor): scaled_lora(factor) for factor in FACTORS},
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column holds names, the others numbers."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(page: str, tables: Mapping[str, str]) -> str:
    """A page with its tables written anew, each between `<!-- table: NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: the page has a table that is not among these, or lacks one of them.
    """
    found = re.findall(r"<!-- table: ([\w-]+) -->", page)
    if sorted(found) != sorted(tables):
        raise ValueError(f"the page has the tables {sorted(found)}, and there are {sorted(tables)}")
    for name, text in tables.items():
        before, mark, rest = page.partition(f"<!-- table: {name} -->\n")
        page = f"{before}{mark}\n{text}\n\n{rest[rest.index('<!-- end -->') :]}"
    return page
