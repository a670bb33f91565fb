"""Small data sets with the splits and columns of those that the study takes from the Hub, as their cards give them.

Written as Parquet with a card that names the configurations, so that `datasets.load_dataset` reads them from a folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
from PIL import Image as PillowImage


ROWS = 24  # of every split of questions
PER_CLASS = 6
SIDE = 8
MODES = ("RGB", "RGB", "L", "RGBA")
PACS_DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
CHOICES = {"text": Sequence(Value("string")), "label": Sequence(Value("string"))}


def write(folder: Path, name: str, config: str | None = None) -> Path:
    """Writes the look-alike of a data set, by its id on the Hub, and returns its folder."""
    home = folder / name.replace("/", "--")
    splits = SPLITS[name]
    files = []
    for seed, split in enumerate(splits):
        data = MAKERS[name](np.random.default_rng(seed))
        data.to_parquet(home / (config or "data") / f"{split}-00000-of-00001.parquet")
        files.append({"split": split, "path": f"{config or 'data'}/{split}-*"})
    card = {"configs": [{"config_name": config or "default", "data_files": files}]}
    (home / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n", encoding="utf-8")
    return home


def _images(classes: int, image: str, label: str, **more: Any) -> Callable[[np.random.Generator], Dataset]:
    def make(generator: np.random.Generator) -> Dataset:
        labels = [row % classes for row in range(classes * PER_CLASS)]
        # A class is a colour.
        pixels = [
            np.clip(generator.normal(40 + 170 * own / classes, 20, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
            for own in labels
        ]
        # Data sets of photographs have some in grey or with transparency.
        images = [PillowImage.fromarray(own).convert(MODES[row % len(MODES)]) for row, own in enumerate(pixels)]
        columns = {image: images, label: labels}
        features = {image: Image(), label: ClassLabel(names=[f"class {own}" for own in range(classes)])}
        for column, (feature, value) in more.items():
            columns[column], features[column] = [value(row) for row in range(len(labels))], feature
        return Dataset.from_dict(columns, features=Features(features))

    return make


def _pacs(generator: np.random.Generator) -> Dataset:
    classes = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    rows = [(domain, own) for domain in PACS_DOMAINS for own in range(len(classes)) for _ in range(10)]
    pixels = [generator.integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8) for _ in rows]
    features = Features({"image": Image(), "domain": Value("string"), "label": ClassLabel(names=classes)})
    columns = {
        "image": [PillowImage.fromarray(own) for own in pixels],
        "domain": [domain for domain, _ in rows],
        "label": [own for _, own in rows],
    }
    return Dataset.from_dict(columns, features=features)


def _sciq(generator: np.random.Generator) -> Dataset:
    columns: dict[str, list[str]] = {"question": [f"What is {row}?" for row in range(ROWS)]}
    for number in (3, 1, 2):
        columns[f"distractor{number}"] = [f"wrong {number} {row}" for row in range(ROWS)]
    columns["correct_answer"] = [f"{'az'[row % 2]} right {row}" for row in range(ROWS)]
    columns["support"] = ["" for _ in range(ROWS)]
    return Dataset.from_dict(columns)


def _choices(*labels: str, **more: str) -> Callable[[np.random.Generator], Dataset]:
    """Questions whose options are labelled in each of these ways in turn."""

    def make(generator: np.random.Generator) -> Dataset:
        columns: dict[str, list[Any]] = {"id": [str(row) for row in range(ROWS)]}
        columns["question"] = [f"Which of them is {row}?" for row in range(ROWS)]
        columns.update({column: [value] * ROWS for column, value in more.items()})
        own = [labels[row % len(labels)] for row in range(ROWS)]
        columns["choices"] = [
            {"text": [f"option {label} {row}" for label in letters], "label": list(letters)}
            for row, letters in enumerate(own)
        ]
        columns["answerKey"] = [letters[row // len(labels) % len(letters)] for row, letters in enumerate(own)]
        features = {column: Value("string") for column in columns}
        return Dataset.from_dict(columns, features=Features({**features, "choices": CHOICES}))

    return make


def _quail(generator: np.random.Generator) -> Dataset:
    columns: dict[str, list[Any]] = {"id": [f"f{row}" for row in range(ROWS)]}
    columns["question_type"] = ["Unanswerable" if row % 4 == 3 else "Factual" for row in range(ROWS)]
    columns["context"] = [f"It was {row}." for row in range(ROWS)]
    columns["question"] = [f"What was {row}?" for row in range(ROWS)]
    columns["answers"] = [[f"this {row}", f"that {row}", f"it {row}", "not enough information"] for row in range(ROWS)]
    columns["correct_answer_id"] = [row % 4 for row in range(ROWS)]
    features = {column: Value("string") for column in columns}
    more = {"answers": Sequence(Value("string")), "correct_answer_id": Value("int32")}
    return Dataset.from_dict(columns, features=Features({**features, **more}))


COARSE = {"coarse_label": (ClassLabel(names=["one", "two"]), lambda row: row % 2)}
MAKERS: dict[str, Callable[[np.random.Generator], Dataset]] = {
    "uoft-cs/cifar100": _images(100, "img", "fine_label", **COARSE),
    "ethz/food101": _images(101, "image", "label"),
    "tanganke/stanford_cars": _images(196, "image", "label"),
    "tanganke/sun397": _images(397, "image", "label"),
    "tanganke/eurosat": _images(10, "image", "label"),
    "dpdl-benchmark/oxford_flowers102": _images(102, "image", "label"),
    "flwrlabs/pacs": _pacs,
    "allenai/sciq": _sciq,
    "tau/commonsense_qa": _choices("ABCDE", question_concept="thing"),
    # Most of its rows have four letters; a few have digits, three options or five.
    "allenai/ai2_arc": _choices("ABCD", "1234", "ABC", "ABCDE"),
    "textmachinelab/quail": _quail,
}
SPLITS: dict[str, tuple[str, ...]] = {
    "uoft-cs/cifar100": ("train", "test"),
    "ethz/food101": ("train", "validation"),
    "tanganke/stanford_cars": ("train", "test", "contrast"),  # and six more, disturbed copies of "test"
    "tanganke/sun397": ("train", "test"),
    "tanganke/eurosat": ("train", "test", "contrast"),  # and six more, disturbed copies of "test"
    "dpdl-benchmark/oxford_flowers102": ("train", "validation", "test"),
    "flwrlabs/pacs": ("train",),
    "allenai/sciq": ("train", "validation", "test"),
    "tau/commonsense_qa": ("train", "validation", "test"),
    "allenai/ai2_arc": ("train", "validation", "test"),
    "textmachinelab/quail": ("train", "validation", "challenge"),
}
