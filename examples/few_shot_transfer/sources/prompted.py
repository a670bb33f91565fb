"""A classification data set as questions to a language model: a prompt around each text, an answer for each class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import ClassLabel, Dataset, Features, List, Value

from . import Splits
from . import load as load_source


TEXT = "{input}"


def load(of: str, prompt: str, answers: Mapping[str, str], characters: int = 200, **options: Any) -> Splits:
    """Puts the texts of another source into a prompt.

    Args:
        of: the other source, which has the columns `input` (a text) and `label`.
        prompt: with `{input}` where the text goes.
        answers: by class; classes without an answer are left out.
        characters: how much of a text is kept, from its beginning.
        **options: of the other source.

    Raises:
        ValueError: for a prompt without a place for the text, or a class that the source does not have.
    """
    if prompt.count(TEXT) != 1:
        raise ValueError(f"a prompt needs {TEXT} once, where the text goes, got {prompt!r}")
    return {split: _asked(data, prompt, dict(answers), characters) for split, data in load_source(of, options).items()}


def _asked(data: Dataset, prompt: str, answers: dict[str, str], characters: int) -> Dataset:
    names = data.features["label"].names
    unknown = sorted(set(answers) - set(names))
    if unknown:
        raise ValueError(f"no class {unknown[0]!r} to answer: there are {', '.join(names)}")
    places = {names.index(name): place for place, name in enumerate(answers)}
    pairs = [(text, places[label]) for text, label in zip(data["input"][:], data["label"][:]) if label in places]
    told = list(answers.values())
    features = Features(
        {
            "input": Value("string"),
            "answer": Value("string"),
            "options": List(Value("string")),
            "label": ClassLabel(names=list(answers)),
        }
    )
    columns = {
        "input": [prompt.replace(TEXT, " ".join(text.split())[:characters]) for text, _ in pairs],
        "answer": [told[place] for _, place in pairs],
        "options": [told] * len(pairs),
        "label": [place for _, place in pairs],
    }
    return Dataset.from_dict(columns, features=features)
