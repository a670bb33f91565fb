"""Reads rows of examples from csv, json, jsonl and parquet files, folders of images, and data sets of the Hub."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..text import one_line, quoted, shown


SEPARATORS = (",", ";", "\t", "|")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
EXTRA = "pip install 'peft-composition[train]'"
_MOST_OF_A_FIELD = 1 << 30  # characters; csv's own limit is 131,072


@dataclass(frozen=True)
class Table:
    """Rows, and where they come from.

    Attributes:
        source: the file, folder or data set, as the user named it.
        rows: a mapping for each example, by column.
        numbers: of the rows as people count in that source: the line in a csv or jsonl file where it begins.
        names: by column the names of its classes, where the source has numbers for them.
    """

    source: str
    rows: Sequence[Mapping[str, Any]]
    numbers: Sequence[int]
    names: Mapping[str, Sequence[str]]

    def where(self, row: int) -> str:
        """A row's place, for a message."""
        return f"{one_line(self.source)}, row {self.numbers[row]}"


def read_table(data: str | os.PathLike[str] | Sequence[Mapping[str, Any]], split: str, subset: str | None) -> Table:
    """The rows of a source.

    Args:
        data: a file that ends with .csv, .tsv, .json, .jsonl or .parquet; a folder with a subfolder of images for each
            class, or one that `Dataset.save_to_disk` wrote; the id of a data set on the Hub; or rows in memory: a
            `datasets.Dataset` or a list of dicts.
        split: of a data set with splits.
        subset: configuration of a data set on the Hub.

    Raises:
        ValueError: there is no such source, it cannot be read, or it has no rows.
        ImportError: it needs a package that is not installed.
    """
    table = _read(data, split, subset)
    if not len(table.rows):
        raise ValueError(f"{one_line(table.source)} has no rows")
    return table


def _read(data: Any, split: str, subset: str | None) -> Table:
    if not isinstance(data, (str, os.PathLike)):
        return _in_memory(data, split)
    source = os.fspath(data)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, source, split)
    reader = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}.get(
        path.suffix.lower()
    )
    if path.is_file() and reader is None:
        raise ValueError(
            f"{one_line(source)} ends with {quoted(path.suffix)}; give a file that ends with .csv, .tsv, .json, "
            ".jsonl or .parquet"
        )
    if path.is_file() and reader is not None:
        return Table(source, *reader(path, source), {})
    if reader is not None or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ValueError(f"there is no file or folder {one_line(source)}")
    return _from_hub(source, split, subset)


def _in_memory(data: Any, split: str) -> Table:
    if isinstance(data, Mapping) and split in data and not isinstance(data[split], (list, str)):  # a DatasetDict
        data = data[split]
    if hasattr(data, "to_dict") and hasattr(data, "itertuples"):  # a pandas DataFrame
        data = data.to_dict("records")
    if isinstance(data, (str, Mapping)) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise ValueError(f"data must be a path, a Hub id, a data set or a list of rows, got a {type(data).__name__}")
    for number in range(min(len(data), 1)):
        if not isinstance(data[number], Mapping):
            raise ValueError(
                f"a row must be a mapping of columns to values, got a {type(data[number]).__name__}: "
                f"{shown(data[number])}"
            )
    return Table("the given data", data, range(len(data)), _class_names(data))


def _class_names(data: Any) -> dict[str, Sequence[str]]:
    """The names of classes that a `datasets.Dataset` knows."""
    features = getattr(data, "features", None) or {}
    return {column: list(own.names) for column, own in features.items() if getattr(own, "names", None)}


def _csv(path: Path, source: str) -> tuple[list[dict[str, Any]], Sequence[int]]:
    with _readable(source), _long_fields(), open(path, encoding="utf-8-sig", newline="") as file:
        header = next((line for line in file if line.strip()), "")
        file.seek(0)
        stated = re.fullmatch(r'"?sep=(.)"?\s*', header)  # a line that Excel writes and reads
        given = "\t" if path.suffix.lower() == ".tsv" else stated and stated[1]
        separator = given or max(SEPARATORS, key=header.count)
        rows: list[dict[str, Any]] = []
        lines: list[int] = []
        columns: list[str] | None = None
        reader = csv.reader(file, delimiter=separator, strict=True)
        end = 0
        for cells in reader:
            number, end = end + 1, reader.line_num
            if not any(cell.strip() for cell in cells):  # spreadsheets write separators alone for empty rows
                continue
            if stated is not None:
                stated = None
                continue
            if columns is None:
                columns = [cell.strip() for cell in cells]
                while not columns[-1]:  # and for empty columns
                    columns.pop()
                twice = [column for column in columns if columns.count(column) > 1]
                if twice:
                    raise ValueError(f"{one_line(source)} has two columns called {quoted(twice[0])}")
                continue
            while len(cells) > len(columns) and not cells[-1].strip():
                cells.pop()
            if len(cells) != len(columns):
                raise ValueError(
                    f"{one_line(source)}, row {number} has {len(cells)} values, but the header has {len(columns)} "
                    f"columns ({_listed(columns)}). A text with {separator!r} or line breaks in it needs quotes"
                )
            rows.append(dict(zip(columns, cells)))
            lines.append(number)
    return rows, lines


def _json(path: Path, source: str) -> tuple[list[Any], Sequence[int]]:
    with _readable(source):
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        are_columns = len(lists) == len(found) and len({len(values) for values in lists}) == 1
        if are_columns and not (len(lists) == 1 and lists[0] and isinstance(lists[0][0], dict)):
            found = [dict(zip(found, values)) for values in zip(*lists)]
        elif len(lists) == 1:
            found = lists[0]
    if not isinstance(found, list):
        raise ValueError(f"{one_line(source)} must hold a list of objects, one for each example")
    return _objects(found, source, 1), range(1, len(found) + 1)


def _jsonl(path: Path, source: str) -> tuple[list[Any], Sequence[int]]:
    rows = []
    with _readable(source), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line) if line.strip() else None)
            except json.JSONDecodeError as error:
                raise ValueError(f"{one_line(source)}, row {number} is not JSON: {error}") from None
    while rows and rows[-1] is None:
        rows.pop()
    return _objects(rows, source, 1), range(1, len(rows) + 1)


def _objects(rows: list[Any], source: str, first: int) -> list[Any]:
    for number, row in enumerate(rows, first):
        if not isinstance(row, dict):
            raise ValueError(f"{one_line(source)}, row {number} is not an object, but {shown(row)}")
    return rows


def _parquet(path: Path, source: str) -> tuple[list[Any], Sequence[int]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"{one_line(source)} needs pyarrow, which comes with datasets: {EXTRA}") from None
    with _readable(source):
        rows = parquet.read_table(path).to_pylist()
    return rows, range(len(rows))


def _from_folder(path: Path, source: str, split: str) -> Table:
    saved = ("dataset_info.json", "dataset_dict.json")
    if any((path / name).is_file() for name in saved):
        found = _datasets(source).load_from_disk(source)
        return _of_dataset(found, source, split)
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    rows = [
        {"image": str(file), "label": folder.name}
        for folder in classes
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
    ]
    if not rows:
        raise ValueError(
            f"{one_line(source)} has no images in subfolders: a folder must have one for each class, named after it, "
            f"with its images ({', '.join(IMAGE_SUFFIXES)})"
        )
    empty = [folder.name for folder in classes if not any(row["label"] == folder.name for row in rows)]
    if empty:
        raise ValueError(f"{one_line(source)} has no images in its subfolder {quoted(empty[0])}")
    return Table(source, rows, range(len(rows)), {})


def _from_hub(source: str, split: str, subset: str | None) -> Table:
    datasets = _datasets(source)
    try:
        found = datasets.load_dataset(source, subset)
    except Exception as error:  # of datasets, the Hub's client or the network
        raise ValueError(
            f"{one_line(source)} is neither a file or folder here nor a data set that could be loaded from the Hub: "
            f"{one_line(error, 600) or type(error).__name__}"
        ) from error
    return _of_dataset(found, source, split)


def _of_dataset(found: Any, source: str, split: str) -> Table:
    if isinstance(found, Mapping):
        if split not in found:
            raise ValueError(f"{one_line(source)} has no split {quoted(split)}; it has {_listed(found)}")
        found = found[split]
    return Table(source, found, range(len(found)), _class_names(found))


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{one_line(source)} is no file of rows and no folder of images; to read it as a data set, install "
            f"datasets: {EXTRA}"
        ) from None
    return datasets


def _listed(names: Any) -> str:
    found = list(map(str, names))
    return ", ".join(map(quoted, found[:20])) + (" and more" if len(found) > 20 else "")


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Name the file in errors about what is in it."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, (UnicodeDecodeError, json.JSONDecodeError)):
            kind = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "JSON"
            raise ValueError(f"{one_line(source)} is not {kind}: {one_line(error)}") from error
        if one_line(source) in str(error):
            raise
        raise ValueError(f"{one_line(source)} could not be read: {one_line(error)}") from error
    except csv.Error as error:
        raise ValueError(f"{one_line(source)} is not csv: {error}") from error
    except OSError as error:
        raise ValueError(f"{one_line(source)} could not be read: {one_line(error)}") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_MOST_OF_A_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
