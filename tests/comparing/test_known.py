"""Verdicts where the answer is known: adapters of the very task among tiny models, and adapters of another one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_composition import compare_methods

from .. import tiny


def points(count: int, seed: int, of: tuple[int, int] = (0, 1)) -> tuple[Tensor, Tensor]:
    """Points whose class says whether two coordinates have the same sign: few examples of it teach little."""
    x = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, of[0]] * x[:, of[1]] > 0).long()


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": label} for x, label in zip(*points(count, seed))]


def trained(base: nn.Module, folder: Path, seed: int, of: tuple[int, int]) -> str:
    """A LoRA that learned its task from many examples."""
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["lin0", "lin1"], modules_to_save=["head"])
    model = get_peft_model(copy.deepcopy(base), config)
    x, labels = points(4000, seed + 100, of)
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=1e-2)
    for step in range(300):
        batch = torch.randint(len(x), (128,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), labels[batch]).backward()
        optimizer.step()
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize(("of", "is_related"), [((0, 1), True), ((2, 3), False)])
def test_adapters_of_the_task_help_and_others_do_not(of: tuple[int, int], is_related: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny.build("mlp")
    adapters = [trained(base, tmp_path / f"of-{of[0]}-{seed}", seed, of) for seed in (1, 2)]
    words, differences = [], []
    for seed in range(3):
        result = compare_methods(base, adapters, rows(30, seed), test=rows(1000, 50 + seed), steps=50, batch_size=8)
        words.append(result.verdict.word)
        differences.append(result.verdict.difference)
    if is_related:
        assert words == ["helps"] * 3
        assert min(differences) > 0.1
    else:
        assert "helps" not in words
        assert max(differences) < 0.05
