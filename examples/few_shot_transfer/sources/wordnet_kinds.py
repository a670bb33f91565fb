"""What kind of thing a gloss or a word of WordNet 3.0 is about: the lexicographer file that it stands in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from datasets import ClassLabel, Dataset, Features, Value

from . import Splits
from .wordnet import FOLDER, entries


def load(
    files: Sequence[str],
    text: Literal["gloss", "word"] = "gloss",
    half: Literal[0, 1] | None = None,
    folder: str = FOLDER,
) -> Splits:
    """Makes the data set, which has no splits of its own.

    Args:
        files: lexicographer files, one class each.
        text: what is seen of an entry.
        half: every other entry, from the first (0) or the second (1) one on, so that two tasks share none; None: all.
        folder: where data.noun and data.verb are.
    """
    place = ("word", "gloss").index(text)
    step = slice(half, None, None if half is None else 2)
    rows = [(own[place], name) for name, found in entries(files, folder).items() for own in found[step]]
    features = Features({"input": Value("string"), "label": ClassLabel(names=list(files))})
    columns = {"input": [told for told, _ in rows], "label": [name for _, name in rows]}
    return {"train": Dataset.from_dict(columns, features=features)}
