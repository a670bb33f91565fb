"""An adapter under which answers or features are not finite: every function names it and says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_composition import CompositionConfig, fit_mixing_weights, score_adapters
from peft_composition.choosing import select_adapters
from peft_composition.comparing import compare_methods
from peft_composition.explaining import explain, prune_adapters

from .. import tiny
from .test_fit import points


MESSAGE = (
    r"Scoring adapter 'huge' alone: \d of 8 answers have a likelihood that is NaN or infinite. In float16 "
    "large values overflow: load the base model in bfloat16 or float32, or leave the adapter out"
)


def base() -> nn.Module:
    return tiny.build("gpt2").half()


def answered() -> list[dict[str, torch.Tensor]]:
    """A batch of eight answers."""
    ids = torch.randint(3, 60, (8, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": torch.where(torch.arange(9) < 5, -100, ids)}]


def rows() -> list[dict[str, torch.Tensor]]:
    (batch,) = answered()
    return [{name: value[number] for name, value in batch.items()} for number in range(8)]


def collate(own: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in own]) for name in own[0]}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters, and one that overflows in float16 although its values are finite there."""
    folder = tmp_path_factory.mktemp("pool")
    names = ["first", "second", "huge"]
    found = [
        tiny.save_lora(folder / name, tiny.build("gpt2"), ["c_attn", "c_fc"], seed=number, r=2, lora_alpha=4)
        for number, name in enumerate(names, 1)
    ]
    file = Path(found[-1]) / "adapter_model.safetensors"
    save_file({name: value * 400 for name, value in load_file(file).items()}, file)
    return [str(own) for own in found]


@pytest.mark.parametrize("function", [score_adapters, fit_mixing_weights, explain, prune_adapters])
def test_the_adapter_is_named(function: Callable[..., Any], pool: list[str]) -> None:
    model = get_peft_model(base(), CompositionConfig(adapters=pool, mixing="fixed", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=MESSAGE):
        function(model, answered())


def test_read_one_after_the_other(pool: list[str]) -> None:
    with pytest.raises(ValueError, match=MESSAGE):
        score_adapters(base(), answered(), adapters=pool)


def test_methods_that_are_compared(pool: list[str]) -> None:
    options: dict[str, Any] = {"collate": collate, "steps": 1, "methods": ["base", "best single", "evidence"]}
    result = compare_methods(base(), pool, rows(), **options)
    (broken,) = result.broken
    assert broken.adapter == "huge"
    assert re.fullmatch(
        r". of 8 answers have a likelihood that is NaN or infinite\..*or leave the adapter out", broken.reason
    )
    expected = compare_methods(base(), pool[:2], rows(), **options)
    assert [row.score for row in result] == [row.score for row in expected]
    assert [row.loss for row in result] == [row.loss for row in expected]
    with pytest.raises(ValueError, match=r"none of 1 adapter can be composed and scored; of 'huge': . of 8 answers"):
        compare_methods(base(), pool[2:], rows(), **options)


def test_a_head_whose_logits_are_not_numbers(tmp_path: Path) -> None:
    """Features are fine, and so only the head's own predictions of test data can show it."""
    model = tiny.compose("mlp", tiny.save_pair(tmp_path, "mlp"))
    with torch.no_grad():
        for name, own in model.named_parameters():
            if "head" in name and name.endswith("bias"):
                own.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"test: \d+ of \d+ logits are NaN"):
        explain(model, points(), test=points())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_it_is_a_row_of_a_selection_wherever_it_stands(place: int, pool: list[str]) -> None:
    good, huge = pool[:2], pool[2]
    found = select_adapters(base(), [*good[:place], huge, *good[place:]], rows(), collate=collate, progress=False)
    assert sorted(row.name for row in found.ranking if row.score is not None) == ["first", "second"]
    (broken,) = [row for row in found.ranking if row.score is None]
    assert broken.name == "huge"
    assert "NaN or infinite" in (broken.reason or "")
    assert 0 <= found.risk_worse_than_base <= 1
    assert "huge" not in found.chosen
