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
GLOSS, WORDS, WORD = "{gloss}", "{words}", "{word}"
QUESTION = f"Which word means: {GLOSS}? Answer with one of these words: {WORDS}."
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


def load(
    files: Sequence[str], limit: int = 2000, question: str = QUESTION, answer: str = WORD, folder: str = FOLDER
) -> Splits:
    """Makes questions; the data set has no splits of its own.

    Args:
        files: lexicographer files, among `LEXICOGRAPHER_FILES`.
        limit: how many questions, drawn at random from all files.
        question: with `{gloss}` and `{words}` where the gloss and the four options go.
        answer: with `{word}` where an option goes.
        folder: where data.noun and data.verb are.

    Raises:
        ValueError: for a file that there is not, or a question or an answer without a place for what goes into it.
        RuntimeError: if WordNet is not there.
    """
    missing = [place for place, text in ((GLOSS, question), (WORDS, question), (WORD, answer)) if place not in text]
    if missing:
        raise ValueError(f"a question needs {GLOSS} and {WORDS}, an answer {WORD}, got {question!r} and {answer!r}")
    generator = random.Random(f"wordnet {sorted(files)}")
    questions = [
        own for name, found in entries(files, folder).items() for own in _questions(found, question, answer, generator)
    ]
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


def entries(files: Sequence[str], folder: str) -> dict[str, list[tuple[str, str]]]:
    """The first word and the gloss, without its examples, of every synset of some lexicographer files.

    Raises:
        ValueError: for a file that there is not.
        RuntimeError: if WordNet is not there.
    """
    unknown = set(files) - set(LEXICOGRAPHER_FILES)
    if unknown:
        raise ValueError(f"unknown files {sorted(unknown)}: choose among {', '.join(LEXICOGRAPHER_FILES)}")
    if not Path(folder).is_dir():
        raise RuntimeError(
            f"WordNet is not in {folder}: on Debian, `apt-get install wordnet-base`; elsewhere put data.noun and "
            "data.verb of WordNet 3.0 there or name their folder in the scenario, data: {source: wordnet, folder: ...}"
        )
    return {name: _entries(Path(folder) / f"data.{name.split('.')[0]}", LEXICOGRAPHER_FILES[name]) for name in files}


def _questions(
    found: Sequence[tuple[str, str]], question: str, answer: str, generator: random.Random
) -> list[tuple[str, list[str], int]]:
    """Questions, their options, and the places of the right ones among these."""
    words = sorted({word for word, _ in found})
    questions = []
    for word, gloss in found:
        wrong = [other for other in generator.sample(words, OPTIONS) if other != word][: OPTIONS - 1]
        right = generator.randrange(OPTIONS)
        options = [*wrong[:right], word, *wrong[right:]]
        asked = question.replace(WORDS, ", ".join(options)).replace(GLOSS, gloss)
        questions.append((asked, [answer.replace(WORD, option) for option in options], right))
    return questions


def _entries(path: Path, file: int) -> list[tuple[str, str]]:
    found = []
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith(LICENSE_LINE):
            continue
        fields, gloss = line.split("|", 1)
        _, number, _, _, word, *_ = fields.split(" ")
        if int(number) == file:
            found.append((word.replace("_", " "), gloss.split(";")[0].strip()))
    return found
