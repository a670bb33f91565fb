"""A pool of candidates for a tiny network, with adapters of the very task planted in it: selecting in seconds.

The class of a point says whether two of its ten coordinates have the same sign. Planted adapters learned that, longer
or shorter; others learned it of other coordinates.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from random_lora import with_random_factors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_composition.evidence.heads import Features
from peft_composition.evidence.streamed import read_in_turn


RELATED_STEPS = (300, 100, 40)
WEIGHTS = "adapter_model.safetensors"


class Network(nn.Module):
    """Two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (..., 10) -> (..., 2)."""
        return self.head(self.lin1(self.lin0(x).relu()))


def network() -> Network:
    """The base model."""
    torch.manual_seed(0)
    return Network()


def points(count: int, seed: int, of: tuple[int, int] = (0, 1)) -> tuple[Tensor, Tensor]:
    """Points and their classes."""
    x = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, of[0]] * x[:, of[1]] > 0).long()


def make_pool(folder: Path, count: int, broken: int) -> list[Path]:
    """Write the candidates: 12 of the task, 28 of other coordinates, some that are broken, random ones."""
    base = network()
    others = [(first, second) for first in range(2, 10) for second in range(first + 1, 10)]
    for steps in RELATED_STEPS:
        for seed in range(4):
            _train(base, folder / f"related-{steps}-{seed}", seed, (0, 1), steps)
    for number, of in enumerate(others):
        _train(base, folder / f"unrelated-{of[0]}-{of[1]}", number, of, RELATED_STEPS[number % 3])
    sources = sorted(folder.iterdir())
    for number in range(count - len(sources)):
        source, own = sources[number % len(sources)], folder / f"random-{number:03}"
        is_broken = number < broken
        own = folder / f"broken-{number}" if is_broken else own
        own.mkdir()
        (own / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
        save_file(with_random_factors(load_file(source / WEIGHTS), number), own / WEIGHTS)
        if is_broken:
            (own / WEIGHTS).write_bytes((own / WEIGHTS).read_bytes()[:500])
    return sorted(folder.iterdir())


def features(pool: list[Path], x: Tensor) -> dict[str, Tensor]:
    """What the head gets to see under each candidate that can be read, and under the base."""
    base = network().eval()
    watched = Features(base.head)
    found: dict[str, Tensor] = {}
    for path in pool:
        alone, bare = read_in_turn(base, [str(path)])
        for candidate in (alone, bare) if not found else (alone,):
            try:
                with candidate.switch(), torch.no_grad(), watched.watching():
                    output = base(x)
                found[candidate.name] = watched.read(output, len(x))
            except ValueError:
                continue
    return found


def _train(base: nn.Module, folder: Path, seed: int, of: tuple[int, int], steps: int) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["lin0", "lin1"], modules_to_save=["head"])
    model = get_peft_model(copy.deepcopy(base), config)
    x, labels = points(4000, seed + 100, of)
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=1e-2)
    for step in range(steps):
        batch = torch.randint(len(x), (128,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), labels[batch]).backward()
        optimizer.step()
    model.save_pretrained(str(folder))
