"""Fashion-MNIST, as the Debian package dataset-fashion-mnist installs it."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from datasets import Dataset

from . import Splits
from .mnist import SIDE, image_dataset


FOLDER = "/usr/share/datasets/fashion-mnist"
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
IMAGE_HEADER, LABEL_HEADER = 16, 8  # bytes


def load(folder: str = FOLDER, limit: int | None = None) -> Splits:
    """Reads the training and the test split, each with the first `limit` images only; default: all."""
    if not Path(folder).is_dir():
        raise RuntimeError(
            f"Fashion-MNIST is not in {folder}: on Debian, `apt-get install dataset-fashion-mnist`; elsewhere put the "
            "four .gz files of https://github.com/zalandoresearch/fashion-mnist there or name their folder in the "
            "scenario, data: {source: fashion_mnist, folder: ...}"
        )
    return {split: _split(Path(folder), prefix, limit) for split, prefix in (("train", "train"), ("test", "t10k"))}


def _split(folder: Path, prefix: str, limit: int | None) -> Dataset:
    images = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[IMAGE_HEADER:]
    labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[LABEL_HEADER:]
    pixels = np.frombuffer(images, np.uint8).reshape(-1, SIDE, SIDE)
    return image_dataset(pixels[:limit], np.frombuffer(labels, np.uint8)[:limit], CLASSES)
