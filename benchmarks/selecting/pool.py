"""A pool of candidates on disk: of the task, of other tasks and what is made of these, random ones, and broken ones.

A folder's name begins with its kind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, count, islice
from pathlib import Path

import torch
from random_lora import with_random_factors
from safetensors.torch import load_file, save_file
from torch import Tensor


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RELATED, UNRELATED, RANDOM, BROKEN = KINDS = ("related", "unrelated", "random", "broken")
FAULTS = ("truncated", "not-finite", "other-width", "no-b", "no-weights", "dora")
TWICE = 2  # each fault


def fill(folder: Path, related: Sequence[Path], unrelated: Sequence[Path], size: int) -> list[Path]:
    """Fill a folder up to `size` candidates, of which a third are of other tasks.

    Args:
        folder: has the adapters of the task already, under names that begin with "related".
        related: adapters of the study that belong there, too.
        unrelated: adapters of other tasks. They come as they are, then half as large, then the means of two, then
            with noise of half the norm of every product B A.
        size: of the pool.

    Returns:
        The candidates' folders.
    """
    for number, source in enumerate(related):
        copy(source, folder / f"{RELATED}-study-{number}")
    sources = [*sorted(folder.glob(f"{RELATED}-*")), *unrelated]
    for number in range(TWICE):
        for fault in FAULTS:
            _break(sources[-1 - number], folder / f"{BROKEN}-{fault}-{number}", fault)
    for number, make in enumerate(islice(_of_other_tasks(unrelated), size // 3)):
        make(folder / f"{UNRELATED}-{number:03}")
    for number in range(size - len(candidates_in(folder))):
        own = copy(sources[number % len(sources)], folder / f"{RANDOM}-{number:03}")
        save_file(with_random_factors(load_file(own / WEIGHTS), number), own / WEIGHTS)
    return candidates_in(folder)


def candidates_in(folder: Path) -> list[Path]:
    """The candidates' folders, by name."""
    return sorted(path for path in folder.iterdir() if path.name.partition("-")[0] in KINDS)


def copy(source: Path, target: Path) -> Path:
    """An adapter's config and weights."""
    target.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copy(source / name, target / name)
    return target


def _of_other_tasks(sources: Sequence[Path]) -> Iterator[Callable[[Path], object]]:
    for source in sources:
        yield partial(copy, source)
    for source in sources:
        yield partial(_halve, source)
    for first, second in combinations(sources, 2):
        yield partial(_average, first, second)
    for number in count():
        yield partial(_add_noise, sources[number % len(sources)], number)


def _halve(source: Path, target: Path) -> None:
    copy(source, target)
    _configure(target, lora_alpha=0.5 * json.loads((target / CONFIG).read_text())["lora_alpha"])


def _average(first: Path, second: Path, target: Path) -> None:
    """Half of each product B A, by factors side by side."""
    copy(first, target)
    one, other = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    configs = [json.loads((own / CONFIG).read_text()) for own in (first, second)]
    scales = [own["lora_alpha"] / own["r"] for own in configs]
    for name, tensor in one.items():
        if ".lora_A." in name:
            one[name] = torch.cat([tensor, other[name]])
        elif ".lora_B." in name:
            one[name] = torch.cat([tensor, other[name] * scales[1] / scales[0]], dim=1) / 2
    rank = configs[0]["r"] + configs[1]["r"]
    save_file(one, target / WEIGHTS)
    _configure(target, r=rank, lora_alpha=scales[0] * rank)


def _add_noise(source: Path, seed: int, target: Path) -> None:
    """A product B A and half of a random one of the same norm."""
    copy(source, target)
    tensors = load_file(source / WEIGHTS)
    noise = with_random_factors(tensors, seed)
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([tensor, noise[name]])
        elif ".lora_B." in name:
            tensors[name] = torch.cat([tensor, noise[name] / 2], dim=1)
    config = json.loads((source / CONFIG).read_text())
    save_file(tensors, target / WEIGHTS)
    _configure(target, r=2 * config["r"], lora_alpha=2 * config["lora_alpha"])


def _break(source: Path, target: Path, fault: str) -> None:
    copy(source, target)
    file = target / WEIGHTS
    tensors = load_file(source / WEIGHTS)
    name = next(own for own in tensors if ".lora_B." in own)
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif fault == "no-weights":
        file.unlink()
    elif fault == "dora":
        _configure(target, use_dora=True)
    else:
        changed: dict[str, dict[str, Tensor]] = {
            "not-finite": {**tensors, name: tensors[name] * torch.nan},
            "other-width": {**tensors, name: torch.cat([tensors[name], tensors[name]])},
            "no-b": {own: tensor for own, tensor in tensors.items() if own != name},
        }
        save_file(changed[fault], file)


def _configure(target: Path, **changes: object) -> None:
    file = target / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
