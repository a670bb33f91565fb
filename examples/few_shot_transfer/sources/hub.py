"""Data sets of the Hugging Face Hub, or of a local folder in the same format, with their columns renamed to ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from datasets import ClassLabel, Dataset

from . import Splits


LETTERS = "ABCDEFGH"


def load(
    path: str,
    config: str | None = None,
    revision: str | None = None,
    input: str = "image",
    label: str = "label",
    train: Sequence[str] = ("train",),
    validation: Sequence[str] = (),
    test: Sequence[str] = (),
    where: Mapping[str, Any] | None = None,
    question: Mapping[str, Any] | None = None,
) -> Splits:
    """Reads a data set.

    Args:
        path: its id on the Hub, or a folder.
        config: its configuration, where it has several.
        revision: a commit or tag. Default: the newest.
        input: column of the image or text.
        label: column of the class, a `ClassLabel`, or a text or number of which classes are made.
        train, validation, test: names of its splits, joined in order; none: made from the rest (see `SplitSpec`).
        where: columns and the value that a row must have there to be kept.
        question: makes it multiple choice; how its columns give question, options and answer (see `question_of`).

    Raises:
        ValueError: if a column is missing; the message names those there are.
    """
    splits = {}
    for name, parts in {"train": train, "validation": validation, "test": test}.items():
        if not parts:
            continue
        own = [datasets.load_dataset(path, config, split=part, revision=revision) for part in parts]
        data = datasets.concatenate_datasets(own)
        _require(data, path, [*(where or ()), *([] if question else [input, label])])
        for column, value in (where or {}).items():
            matching = [row for row, found in enumerate(data[column][:]) if _name(data, column, found) == value]
            data = data.select(matching)
        if question is not None:
            splits[name] = data.map(lambda row: question_of(row, question), remove_columns=data.column_names)
            splits[name] = splits[name].cast_column("label", ClassLabel(names=list(LETTERS)))
        else:
            splits[name] = data.select_columns([input, label]).rename_columns({input: "input", label: "label"})
    return splits if question is not None else _with_class_labels(splits)


def question_of(row: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a text-to-text example: the question and its lettered options; the answer is the option's text.

    Args:
        row: of the data set.
        spec: `question`, the question's column; `context`, a column that comes before it, or none; the options either
            as `options`, the path to a list of texts such as "choices.text", or as `correct` and `wrong`, columns;
            with `options`, `key`, the column of the answer, and `labels`, the path to the options' labels, or none
            where the answer is an index.

    Raises:
        ValueError: if the answer is not among the options.
    """
    text = row[spec["question"]]
    if "correct" in spec:
        # Sorted, so that the place of the right option says nothing.
        options = sorted([row[spec["correct"]], *(row[column] for column in spec["wrong"])])
        right = options.index(row[spec["correct"]])
    else:
        options = list(_at(row, spec["options"]))
        key = row[spec["key"]]
        labels = list(_at(row, spec["labels"])) if "labels" in spec else list(range(len(options)))
        if key not in labels:
            raise ValueError(f"the answer {key!r} is not among {labels}")
        right = labels.index(key)
    context = f"{row[spec['context']]}\n" if spec.get("context") else ""
    listed = " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options))
    return {"input": f"{context}{text}\n{listed}", "answer": options[right], "label": right}


def _at(row: Mapping[str, Any], path: str) -> Any:
    value: Any = row
    for part in path.split("."):
        value = value[part]
    return value


def _require(data: Dataset, path: str, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in data.column_names]
    if missing:
        raise ValueError(f"{path} has no columns {missing}; it has {data.column_names}")


def _name(data: Dataset, column: str, value: Any) -> Any:
    feature = data.features[column]
    return feature.int2str(value) if isinstance(feature, ClassLabel) else value


def _with_class_labels(splits: Splits) -> Splits:
    """Classes in the order of the data set, or of their names where it does not say."""
    if isinstance(splits["train"].features["label"], ClassLabel):
        return splits
    names = sorted({str(value) for data in splits.values() for value in data["label"][:]})
    numbered = {}
    for split, data in splits.items():
        column = [names.index(str(value)) for value in data["label"][:]]
        numbered[split] = data.remove_columns("label").add_column("label", column)
        numbered[split] = numbered[split].cast_column("label", ClassLabel(names=names))
    return numbered
