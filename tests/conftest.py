"""Runs every test offline, with a fixed seed, and on one thread where OMP_NUM_THREADS does not say otherwise."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile


# Data sets that tests write and read again belong into no cache of the user's. Subprocesses inherit this.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait let go of the core: test processes side by side would slow each other down many times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import peft_composition  # noqa: F401  (registers the method)

from . import tiny


atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


# Files that take long, the longest first: begun last, one of them would keep one process busy and the others idle.
LONGEST_FIRST = (
    "examples/test_scripts.py",
    "examples/test_study.py",
    "tuner/test_big_models.py",
    "test_distributed.py",
    "examples/test_few_shot.py",
    "test_registration.py",
    "examples/test_quickstart.py",
    "benchmarks/test_gpu_check.py",
    "test_training.py",
    "checkpoint/test_checkpoints.py",
    "checkpoint/test_hub_push.py",
    "tuner/test_model.py",
    "checkpoint/test_export.py",
    "cli/test_commands.py",
    "checkpoint/test_kills.py",
    "upstream/test_hub.py",
    "test_docs.py",
    "tuner/test_quantized_training.py",
    "benchmarks/test_tables.py",
    "analysis/test_fuzz.py",
    "upstream/test_adapters.py",
    "test_trainer.py",
    "analysis/test_report.py",
    "tuner/test_layer.py",
    "tuner/test_ties.py",
    "tuner/test_fingerprint.py",
)


# One thread, so that two workers share two cores; with more, sums are taken in another order.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {Path(__file__).parent / file: place for place, file in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look through millions of objects again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_warning()  # programs that ran in this process before may have silenced it


@pytest.fixture
def base(request: pytest.FixtureRequest) -> nn.Module:
    """A tiny model; parametrize indirectly with its name, default the MLP."""
    return tiny.build(getattr(request, "param", "mlp"))


@pytest.fixture
def two_adapters(tmp_path: Path) -> list[str]:
    """Two LoRAs of different rank and overlapping targets for the MLP."""
    model = tiny.build("mlp")
    first = tiny.save_lora(tmp_path / "first", model, ["lin0", "lin1"], seed=1, r=2, lora_alpha=8)
    second = tiny.save_lora(tmp_path / "second", model, ["lin1"], seed=2, r=3, lora_alpha=6)
    return [str(first), str(second)]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A healthy LoRA for the MLP, which stands before the bad one."""
    return tiny.save_lora(tmp_path / "good", tiny.build("mlp"), ["lin0", "lin1"], seed=1, r=2, lora_alpha=8)


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Another one, called 'bad', for a test to break."""
    return tiny.save_lora(tmp_path / "bad", tiny.build("mlp"), ["lin0", "lin1"], seed=2, r=4, lora_alpha=16)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Two LoRAs for a tiny model, by its name; written once, and left as they are."""
    written: dict[str, list[str]] = {}

    def folders(name: str) -> list[str]:
        if name not in written:
            written[name] = tiny.save_pair(tmp_path_factory.mktemp(name), name)
        return written[name]

    return folders
