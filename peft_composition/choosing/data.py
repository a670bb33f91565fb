"""Labelled examples of a task: read and checked, their classes numbered, K of a class drawn at random."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from ..text import one_line, plural, quoted, shown
from .oddities import warn_about
from .tables import Table, read_table


Kind = Literal["text", "image", "answer"]
TEXTS = ("text", "sentence")
LABELS = ("label", "labels")


@dataclass(frozen=True)
class LabelledData:
    """Labelled examples. Slices, draws and splits of it are of this class, too.

    Attributes:
        kind: "text" (one text or a pair) or "image", with a class each; "answer": prompts with answers in words.
        inputs: of each example a tuple of one or two texts, a tuple with the image (or its path), or a tuple with the
            prompt.
        labels: of each example the number of its class; empty for answers.
        answers: of each example the answer; empty for classes.
        classes: names of the classes by number, as they stand in the data; empty for answers.
        source: where the examples come from.
    """

    kind: Kind
    inputs: tuple[tuple[Any, ...], ...]
    labels: tuple[int, ...]
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Sequence[int]) -> LabelledData:
        """These examples, in this order. Classes keep their numbers, even those without an example here."""
        return LabelledData(
            self.kind,
            tuple(self.inputs[row] for row in rows),
            tuple(self.labels[row] for row in rows) if self.labels else (),
            tuple(self.answers[row] for row in rows) if self.answers else (),
            self.classes,
            self.source,
        )

    def draw(self, k: int, seed: int = 0) -> tuple[LabelledData, LabelledData]:
        """K examples of each class, drawn at random, and all others. Of answers: K in all.

        Comparing methods over splits calls it with one seed after the other: every method is trained on the first part
        and tested on the second.

        Args:
            k: how many of each class.
            seed: the same seed draws the same examples.

        Raises:
            ValueError: a class has fewer than K examples.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        groups: dict[int, list[int]] = {}
        for row in range(len(self)):
            groups.setdefault(self.labels[row] if self.labels else 0, []).append(row)
        chosen: list[int] = []
        generator = random.Random(seed)
        for label in range(len(self.classes) or 1):
            rows = groups.get(label, [])
            if len(rows) < k:
                of = f" of class {quoted(self.classes[label])}" if self.classes else ""
                raise ValueError(f"k={k}, but {one_line(self.source)} has {plural(len(rows), 'example')}{of}")
            chosen += sorted(generator.sample(rows, k))
        left = set(range(len(self))).difference(chosen)
        return self.take(sorted(chosen)), self.take(sorted(left))


def read_data(
    data: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    text: str | Sequence[str] | None = None,
    image: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    split: str = "train",
    subset: str | None = None,
    classes: Sequence[str] | None = None,
) -> LabelledData:
    """Read labelled examples: a support set, or the larger data of a task.

    Args:
        data: a file that ends with .csv, .tsv, .json, .jsonl or .parquet; a folder with a subfolder of images for each
            class; the id of a data set on the Hub, or a folder that `save_to_disk` wrote; or rows in memory (a
            `datasets.Dataset`, a pandas `DataFrame`, a list of dicts).
        text: column of the texts, or two columns of pairs. Default: `text` or `sentence`.
        image: column of the images, or of paths to them.
        label: column of the classes: names or whole numbers. Default: `label` or `labels`.
        prompt: column of what a language model reads; with `answer`, and without `text`, `image` and `label`.
        answer: column of what it should answer.
        split: of a data set with splits.
        subset: configuration of a data set on the Hub.
        classes: names of the classes in the order of their numbers, for test data that must have those of the training
            data (`training.classes`). Default: the data set's own order, or sorted.

    Returns:
        The examples. `draw` takes K of a class, `take` any rows; `EncodedRows(examples, processor)` makes of them what
        `score_adapters` and a Trainer take.

    Raises:
        ValueError: no such file or column; a value that is missing or no class; one class only. The message names the
            file, the row, the column and the value.
        ImportError: the file needs a package that is not installed.

    Example:
        >>> training = read_data("reviews.csv", text="review", label="stars")
        >>> test = read_data("test.csv", text="review", label="stars", classes=training.classes)
        >>> support, _ = training.draw(5, seed=0)
    """
    table = read_table(data, split, subset)
    is_answered = prompt is not None or answer is not None
    if is_answered and (prompt is None or answer is None):
        raise ValueError("prompts and answers go together: give both columns, prompt=... and answer=...")
    if is_answered and (text is not None or image is not None or label is not None):
        raise ValueError(
            "give prompt=... and answer=... for a language model, or text=... or image=... with label=... for a "
            "classifier"
        )
    if text is not None and image is not None:
        raise ValueError("give text=... or image=..., a column of texts or of images, and not both")
    if prompt is not None and answer is not None:
        prompts = _column(table, prompt, _text)
        answers = _column(table, answer, _text)
        return _told(LabelledData("answer", tuple((own,) for own in prompts), (), tuple(answers), (), table.source))
    kind, columns = _inputs(table, text, image)
    parts = [_column(table, column, _text if kind == "text" else _image) for column in columns]
    label = label if label is not None else _default(table, LABELS, "label")
    numbers, names = _classes(table, label, classes)
    return _told(LabelledData(kind, tuple(zip(*parts)), tuple(numbers), (), tuple(names), table.source))


def _told(data: LabelledData) -> LabelledData:
    """The same, after warnings."""
    rows = [*zip(data.inputs, data.labels or data.answers)]
    warn_about(data.source, rows, [data.classes[label] for label in data.labels])
    return data


def _inputs(table: Table, text: str | Sequence[str] | None, image: str | None) -> tuple[Kind, list[str]]:
    if image is not None:
        return "image", [image]
    if text is None and "image" in table.rows[0] and not any(own in table.rows[0] for own in TEXTS):
        return "image", ["image"]
    columns = [text] if isinstance(text, str) else list(text or [_default(table, TEXTS, "text")])
    if len(columns) > 2:
        raise ValueError(f"text is one column or two, got {len(columns)}: {', '.join(map(quoted, columns))}")
    return "text", columns


def _default(table: Table, usual: Sequence[str], argument: str) -> str:
    for name in usual:
        if name in table.rows[0]:
            return name
    raise ValueError(f"{one_line(table.source)} has no column {usual[0]!r}: give {argument}=..., one of {_of(table)}")


def _of(table: Table) -> str:
    return ", ".join(quoted(own) for own in list(table.rows[0])[:20])


def _column(table: Table, column: str, read: Any) -> list[Any]:
    """The checked values of a column."""
    if column not in table.rows[0]:
        raise ValueError(f"{one_line(table.source)} has no column {quoted(column)}; it has {_of(table)}")
    values = []
    for number in range(len(table.rows)):
        row = table.rows[number]
        value = row.get(column)
        try:
            is_nan = isinstance(value, float) and math.isnan(value)  # so pandas says that there is none
            if value is None or is_nan or (isinstance(value, str) and not value.strip()):
                raise ValueError("is empty")
            values.append(read(value))
        except ValueError as error:
            raise ValueError(f"{table.where(number)}: column {quoted(column)} {error}") from None
    return values


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, Real)):
        raise ValueError(f"must be text, got {shown(value)}")
    return str(value)


def _image(value: Any) -> Any:
    if isinstance(value, (str, os.PathLike)) and not os.path.isfile(value):
        raise ValueError(f"must be an image or the path of one; there is no file {quoted(value)}")
    return value


def _classes(table: Table, column: str, given: Sequence[str] | None) -> tuple[list[int], list[str]]:
    """The class of every row as a number, and the names of the classes."""
    values = _column(table, column, _class)
    known = table.names.get(column)
    if known is not None and all(isinstance(own, int) for own in values):
        for number, own in enumerate(values):
            if not 0 <= own < len(known):
                raise ValueError(
                    f"{table.where(number)}: column {quoted(column)} is {own}, but its classes are numbered 0 to "
                    f"{len(known) - 1}; -1 stands for rows without a label: drop them"
                )
        values = [known[own] for own in values]
    words = [str(own) for own in values]
    names = list(map(str, given or known or _sorted(set(words))))
    place = {name: number for number, name in enumerate(names)}
    for number, word in enumerate(words):
        if word not in place:
            raise ValueError(
                f"{table.where(number)}: column {quoted(column)} has {quoted(word)}, which is none of the classes "
                f"{', '.join(map(quoted, names[:20]))}"
            )
    if given is None and known is None and len(names) > max(2, 0.7 * len(words)):
        raise ValueError(
            f"{one_line(table.source)}: column {quoted(column)} has {len(names)} different values in {len(words)} "
            f"rows ({', '.join(map(quoted, names[:3]))}, ...); classes must repeat, two examples of each at least"
        )
    if len(set(words)) == 1 and given is None:
        raise ValueError(
            f"{one_line(table.source)}: column {quoted(column)} has one class only, {quoted(words[0])}, in all "
            f"{len(words)} rows; give examples of two classes or more"
        )
    return [place[word] for word in words], names


def _class(value: Any) -> str | int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = int(value)
    elif isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer():
        value = int(float(value))
    if not isinstance(value, (str, int)):
        raise ValueError(f"must be a class, a name or a whole number, got {shown(value)}")
    return value.strip() if isinstance(value, str) else value


def _sorted(names: set[str]) -> list[str]:
    """Numbers by size, names by the alphabet."""
    try:
        return sorted(names, key=lambda name: (int(name), name))  # "1" and "01" are two
    except ValueError:
        return sorted(names)
