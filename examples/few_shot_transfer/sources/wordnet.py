"""Multiple choice questions from WordNet 3.0, as the Debian package wordnet-base installs it.

Which word has this gloss? Three other words of the same lexicographer file are the wrong options; the label is the
place of the right one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, List, Value

from . import Splits


FOLDER = "/usr/share/wordnet"
OPTIONS = 4
# The numbers of wninput(5WN) and lexnames(5WN).
LEXICOGRAPHER_FILES = {
    "noun.act": 4,
    "noun.animal": 5,
    "noun.artifact": 6,
    "noun.body": 8,
    "noun.cognition": 9,
    "noun.communication": 10,
    "noun.food": 13,
    "noun.location": 15,
    "noun.person": 18,
    "noun.plant": 20,
    "noun.state": 26,
    "noun.substance": 27,
    "verb.change": 30,
    "verb.communication": 32,
    "verb.contact": 35,
    "verb.motion": 38,
    "verb.social": 41,
}
LICENSE_LINE = "  "  # begins the lines of the license


def load(files: Sequence[str], limit: int = 2000, folder: str = FOLDER) -> Splits:
    """Makes questions; the data set has no splits of its own.

    Args:
        files: lexicographer files, among `LEXICOGRAPHER_FILES`.
        limit: how many questions, drawn at random from all files.
        folder: where data.noun and data.verb are.
    """
    unknown = set(files) - set(LEXICOGRAPHER_FILES)
    if unknown:
        raise ValueError(f"unknown files {sorted(unknown)}: choose among {', '.join(LEXICOGRAPHER_FILES)}")
    if not Path(folder).is_dir():
        raise RuntimeError(
            f"WordNet is not in {folder}: on Debian, `apt-get install wordnet-base`; elsewhere put data.noun and "
            "data.verb of WordNet 3.0 there or name their folder in the scenario, data: {source: wordnet, folder: ...}"
        )
    generator = random.Random(f"wordnet {sorted(files)}")
    questions = [question for name in files for question in _questions(Path(folder), name, generator)]
    chosen = generator.sample(questions, min(limit, len(questions)))
    features = Features(
        {
            "input": Value("string"),
            "answer": Value("string"),
            "options": List(Value("string")),
            "label": ClassLabel(names=[str(place + 1) for place in range(OPTIONS)]),
        }
    )
    texts, options, labels = map(list, zip(*chosen))
    answers = [own[label] for own, label in zip(options, labels)]
    columns = {"input": texts, "answer": answers, "options": options, "label": labels}
    return {"train": Dataset.from_dict(columns, features=features)}


def _questions(folder: Path, name: str, generator: random.Random) -> list[tuple[str, list[str], int]]:
    """Questions, their options, and the places of the right ones among these."""
    entries = _entries(folder / f"data.{name.split('.')[0]}", LEXICOGRAPHER_FILES[name])
    words = sorted({word for word, _ in entries})
    questions = []
    for word, gloss in entries:
        wrong = [other for other in generator.sample(words, OPTIONS) if other != word][: OPTIONS - 1]
        right = generator.randrange(OPTIONS)
        options = [*wrong[:right], word, *wrong[right:]]
        questions.append(
            (f"Which word means: {gloss}? Answer with one of these words: {', '.join(options)}.", options, right)
        )
    return questions


def _entries(path: Path, file: int) -> list[tuple[str, str]]:
    """The first word and the gloss, without its examples, of every synset of a lexicographer file."""
    entries = []
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith(LICENSE_LINE):
            continue
        fields, gloss = line.split("|", 1)
        _, number, _, _, word, *_ = fields.split(" ")
        if int(number) == file:
            entries.append((word.replace("_", " "), gloss.split(";")[0].strip()))
    return entries
