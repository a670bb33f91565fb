"""Reading labelled examples: every format gives the same; faults are named with their file, row, column and value."""

from __future__ import annotations

import csv
import json
import re
import sys
import warnings
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from peft_composition.choosing import LabelledData, read_data
from peft_composition.choosing.data import _sorted


ROWS = [
    {"text": "good, really", "label": "pos"},
    {"text": "bad\nindeed", "label": "neg"},
    {"text": "fine", "label": "pos"},
    {"text": "awful", "label": "neg"},
    {"text": "ä", "label": "neg"},
]


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"data.{kind}"
    if kind in ("csv", "tsv"):
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ";")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same(tmp_path: Path, kind: str) -> None:
    found = read_data(written(tmp_path, kind, ROWS))
    assert found.kind == "text"
    assert found.inputs == tuple((row["text"],) for row in ROWS)
    assert found.classes == ("neg", "pos")
    assert found.labels == (1, 0, 1, 0, 0)
    assert found.source == str(tmp_path / f"data.{kind}")


def test_other_shapes_of_json(tmp_path: Path) -> None:
    (tmp_path / "columns.json").write_text(json.dumps({"text": ["a", "b"], "label": ["x", "y"]}))
    (tmp_path / "inside.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read_data(tmp_path / "columns.json").inputs == (("a",), ("b",))
    assert read_data(tmp_path / "inside.json").labels == (1, 0, 1, 0, 0)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_numbers_of_classes_are_sorted_as_numbers(tmp_path: Path, kind: str) -> None:
    rows = [{"t": f"row {number}", "c": number % 11} for number in range(33)]
    found = read_data(written(tmp_path, kind, rows), text="t", label="c")
    assert found.classes == tuple(map(str, range(11)))
    assert found.labels == tuple(number % 11 for number in range(33))


def test_pairs_and_answers_in_memory() -> None:
    rows = [{"a": f"{n}", "b": f"{n + 1}", "c": "xy"[n % 2]} for n in range(4)]
    pairs = read_data(rows, text=["a", "b"], label="c")
    assert pairs.inputs == (("0", "1"), ("1", "2"), ("2", "3"), ("3", "4"))
    answers = read_data(rows, prompt="a", answer="b")
    assert (answers.kind, answers.inputs[0], answers.answers[0], answers.classes) == ("answer", ("0",), "1", ())


def test_a_data_set_keeps_the_names_and_numbers_of_its_classes(tmp_path: Path) -> None:
    """Also when it is read again, and then with its splits."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    own = datasets.Dataset.from_list([{"text": f"{n}", "label": n % 2} for n in range(6)], features)
    datasets.DatasetDict({"train": own, "test": own.select([0, 1, 2])}).save_to_disk(str(tmp_path / "saved"))
    for found in (read_data(own), read_data(tmp_path / "saved")):
        assert found.classes == ("z", "a")
        assert found.labels == (0, 1, 0, 1, 0, 1)
    assert len(read_data(tmp_path / "saved", split="test")) == 3
    with pytest.raises(ValueError, match=r"saved has no split 'validation'; it has 'train', 'test'"):
        read_data(tmp_path / "saved", split="validation")


def test_a_folder_of_images(tmp_path: Path) -> None:
    for name, count in (("cat", 2), ("ant", 3)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{number}.PNG")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    found = read_data(tmp_path)
    assert (found.kind, found.classes, found.labels) == ("image", ("ant", "cat"), (0, 0, 0, 1, 1))
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match="has no images in its subfolder 'dog'"):
        read_data(tmp_path)


def test_classes_of_the_training_data_number_those_of_the_test_data() -> None:
    training = read_data(ROWS)
    test = read_data([{"text": "one", "label": "pos"}], classes=training.classes)
    assert test.labels == (1,)
    with pytest.raises(
        ValueError, match=r"row 0: column 'label' has 'odd', which is none of the classes 'neg', 'pos'"
    ):
        read_data([{"text": "one", "label": "odd"}], classes=training.classes)


def test_a_draw_has_k_of_each_class_and_the_rest_is_the_rest() -> None:
    rows = [{"text": f"{n}", "label": "abc"[n % 3]} for n in range(30)]
    data = read_data(rows)
    seen: Counter[str] = Counter()
    for seed in range(200):
        drawn, rest = data.draw(4, seed)
        assert Counter(drawn.labels) == {0: 4, 1: 4, 2: 4}
        assert sorted(drawn.inputs + rest.inputs) == sorted(data.inputs)
        assert data.draw(4, seed)[0] == drawn
        for part in (drawn, rest):
            assert all(int(own) % 3 == label for (own,), label in zip(part.inputs, part.labels))
        seen.update(own for (own,) in drawn.inputs)
    # 200 draws take each of 30 rows with chance 0.4: 80 times, give or take 4.5 standard errors of 6.9
    assert len(seen) == 30
    assert all(49 < count < 111 for count in seen.values())
    answers = read_data([{"p": f"{n}", "a": "yes"} for n in range(9)], prompt="p", answer="a")
    assert len(answers.draw(4)[0]) == 4


def test_too_few_for_a_draw() -> None:
    with pytest.raises(ValueError, match="k=3, but the given data has 2 examples of class 'pos'"):
        read_data(ROWS).draw(3)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        read_data(ROWS).draw(0)


@pytest.mark.parametrize(
    ("name", "content", "arguments", "complaint"),
    [
        ("d.csv", "text,label\na,x\nb\n", {}, r"d\.csv, row 3 has 1 values, but the header has 2 columns"),
        ("d.csv", "text,label\na,x\n,y\n", {}, r"d\.csv, row 3: column 'text' is empty"),
        ("d.csv", 'text,label\n\n\n"a\nb",x\n,y\n', {}, r"d\.csv, row 6: column 'text' is empty"),
        ("d.csv", 'text,label\n,\n"a\nb",x\n"a\n",y,z\n', {}, r"d\.csv, row 5 has 3 values"),
        ("d.csv", "text,label\na,x\nb,  \n", {}, r"d\.csv, row 3: column 'label' is empty"),
        ("d.csv", "text,label\na,x\nb,x\n", {}, "column 'label' has one class only, 'x', in all 2 rows"),
        ("d.csv", "a,b\n1,2\n", {}, r"d\.csv has no column 'text': give text=\.\.\., one of 'a', 'b'"),
        ("d.csv", "text,b\n1,2\n", {}, r"has no column 'label': give label=\.\.\., one of 'text', 'b'"),
        ("d.csv", "text,label\n1,2\n", {"text": "body"}, r"has no column 'body'; it has 'text', 'label'"),
        ("d.csv", "text,text\n1,2\n", {}, "has two columns called 'text'"),
        ("d.csv", "text,label\n", {}, r"d\.csv has no rows"),
        ("d.csv", b"text,label\n\xff,x\n", {}, r"d\.csv is not UTF-8 text"),
        ("d.csv", 'text,label\n"a,x\n', {}, r"d\.csv is not csv"),
        ("d.csv", "text,label\na,1\nb,2\nc,3\nd,4\n", {}, "column 'label' has 4 different values in 4 rows"),
        ("d.jsonl", '{"text": "a", "label": 1}\n{oops\n', {}, r"d\.jsonl, row 2 is not JSON"),
        ("d.jsonl", '{"text": "a", "label": 1}\n[2]\n', {}, r"d\.jsonl, row 2 is not an object, but \[2\]"),
        ("d.jsonl", '{"text": "a", "label": 1.5}\n', {}, r"row 1: column 'label' must be a class, .* got 1\.5"),
        ("d.jsonl", '{"text": ["a"], "label": 1}\n', {}, r"row 1: column 'text' must be text, got \['a'\]"),
        ("d.json", "{", {}, r"d\.json is not JSON"),
        ("d.json", '"x"', {}, r"d\.json must hold a list of objects"),
        ("d.parquet", "x", {}, "Could not open Parquet input source"),
        ("d.txt", "x", {}, r"d\.txt ends with '\.txt'; give a file that ends with \.csv"),
        ("d.csv", "text,label\na,x\nb,y\n", {"image": "text"}, "row 2: column 'text' must be an image or the path"),
        ("d.csv", "p,a\nx,y\n", {"prompt": "p"}, "prompts and answers go together"),
        ("d.csv", "p,a\nx,y\n", {"prompt": "p", "answer": "a", "label": "a"}, "give prompt=... and answer=... for a"),
        ("d.csv", "p,a\nx,y\n", {"text": ["p", "a", "p"]}, "text is one column or two, got 3"),
    ],
)  # fmt: skip
def test_faults_are_named(
    tmp_path: Path, name: str, content: str | bytes, arguments: dict[str, Any], complaint: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=complaint):
        read_data(tmp_path / name, **arguments)


@pytest.mark.parametrize(
    "content",
    [
        "text,label,,\na,x,,\nb,y,,\nc,x,,\n",
        "text,label,\na,x\nb,y,\nc,x\n",
        "text,label\na,x\nb,y\nc,x\n,\n,\n",
        "sep=;\ntext;label\na;x\nb;y\nc;x\n",
        '"sep=|"\r\ntext|label\r\na|x\r\nb|y\r\nc|x\r\n',
        "\n\ntext;label\na;x\nb;y\nc;x\n",
    ],
)
def test_csv_as_spreadsheets_write_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "d.csv").write_bytes(content.encode())
    found = read_data(tmp_path / "d.csv")
    assert (found.inputs, found.labels, found.classes) == ((("a",), ("b",), ("c",)), (0, 1, 0), ("x", "y"))


@pytest.mark.parametrize("order", list(permutations(["1", "01", "+1"])))
def test_numbers_that_are_written_in_several_ways_have_one_order(order: tuple[str, ...]) -> None:
    rows = [{"text": f"{number}", "label": order[number % 3]} for number in range(9)]
    assert read_data(rows).classes == ("+1", "01", "1")
    assert _sorted(dict.fromkeys(order)) == ["+1", "01", "1"]  # type: ignore[arg-type]  (a set in this order)


def test_labels_of_numpy_and_rows_without_text_or_label() -> None:
    kinds = (numpy.int64, numpy.int8, numpy.float32)
    for kind in kinds:
        rows = [{"text": f"{number}", "label": kind(number % 2)} for number in range(6)]
        assert read_data(rows).classes == ("0", "1")
    with pytest.raises(ValueError, match="row 1: column 'text' is empty"):
        read_data([{"text": "a", "label": 0}, {"text": float("nan"), "label": 1}])
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "p"])})
    own = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, -1, 0]}, features)
    with pytest.raises(ValueError, match=r"row 2: column 'label' is -1, but its classes are numbered 0 to 1; .*drop"):
        read_data(own)


def test_a_frame_of_pandas_is_its_rows(tmp_path: Path) -> None:
    rows = [{"text": "a, b", "label": "x"}, {"text": "c", "label": "y"}]
    assert read_data(pandas.DataFrame(rows, index=[7, 3])) == read_data(rows)
    with pytest.raises(ValueError, match="row 1: column 'label' is empty"):
        read_data(pandas.DataFrame([rows[0], {"text": "c"}]))


def test_copies_are_counted_and_told() -> None:
    """A text with two labels is no copy."""
    rows = [{"text": f"{number % 5}", "label": number % 2} for number in range(12)]
    with pytest.warns(UserWarning, match="the given data: 2 of 12 rows are copies of others; copies count several"):
        read_data(rows)
    with pytest.warns(UserWarning, match="7 of 12 rows are copies"):
        read_data(rows, prompt="text", answer="text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_data(rows[:10])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            ["positive"] * 3 + ["negative"] * 3 + ["postive"],
            "class 'postive' has 1 of 7 examples. If .* for 'positive',",
        ),
        (
            ["Good", "good", "good", "bad", "Good", "good", "bad"],
            "class 'Good' has 2 of 7 examples. If .* for 'good',",
        ),
        (["positive"] * 3 + ["negative"] * 3 + ["neutral"], None),
        (["class 1"] * 3 + ["class 2"] + ["class 3"] * 3, None),  # they are numbered
        (["positive"] * 4 + ["postive"] * 2 + ["negative"], None),  # several times
        (["rain", "train"], None),  # of each one
        (["entailment"] * 3 + ["not_entailment"], None),  # opposites
        (["unhappy"] * 3 + ["happy"], None),
        ([1, 1, 1, 10, 2, 2], None),
    ],
)
def test_classes_that_look_like_typing_errors_are_told(labels: list[Any], said: str | None) -> None:
    rows = [{"text": str(number), "label": label} for number, label in enumerate(labels)]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        data = read_data(rows)
    assert data.classes == tuple(
        sorted(set(map(str, labels)), key=lambda own: (len(own), own) if own.isdigit() else own)
    )
    assert len(found) == (said is not None)
    if said is not None:
        assert re.search(said, str(found[0].message))
        assert found[0].filename == __file__


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file or folder .*gone\.csv"):
        read_data("gone.csv")
    with pytest.raises(ValueError, match="me/nothing is neither a file or folder here nor a data set that could be"):
        read_data("me/nothing")
    with pytest.raises(ValueError, match="has no images in subfolders"):
        read_data(tmp_path)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, "parquet", ROWS)
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for source in (file, "me/data"):
        with pytest.raises(ImportError, match=r"pip install 'peft-composition\[train\]'"):
            read_data(source)
    assert isinstance(read_data(written(tmp_path, "csv", ROWS)), LabelledData)


def test_a_long_text_and_a_hostile_name(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = written(tmp_path, "csv", [{"text": "x" * 300_000, "label": "\x1b[2J"}, {"text": "y", "label": "b"}])
    assert len(read_data(path).inputs[0][0]) == 300_000
    assert csv.field_size_limit() == limit
    with pytest.raises(ValueError, match="which is none of the classes 'b'") as error:
        read_data(path, classes=["b"])
    assert str(error.value).isprintable()
