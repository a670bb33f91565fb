"""A base model is exactly as before when adapters were on it for a while, also with gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from peft_composition import compare_methods, score_adapters, select_adapters
from peft_composition.evidence.temporary import adapted

from .. import tiny


def rows() -> list[dict[str, Any]]:
    tokens = torch.randint(3, 60, (12, 7), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": torch.cat([torch.full((4,), -100), row[4:]])} for row in tokens]


def state(base: nn.Module) -> list[Any]:
    """What adapters could leave: hooks, trained parameters, attributes, modules and the config."""
    return [
        [(name, list(module._forward_hooks.items())) for name, module in base.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in base.named_parameters()],
        [
            set(vars(base)),
            id(getattr(base, "_require_grads_hooks", None)),
            id(getattr(base, "_require_grads_hook", None)),
        ],
        [(name, id(module)) for name, module in base.named_modules()],
        base.config.to_dict(),  # type: ignore[union-attr,operator]
    ]


USES: dict[str, Callable[[nn.Module, list[str]], Any]] = {
    "score": lambda base, adapters: score_adapters(base, rows(), adapters=adapters),
    "select": lambda base, adapters: select_adapters(base, adapters, rows(), task_type="CAUSAL_LM", progress=False),
    "compare": lambda base, adapters: compare_methods(base, adapters, rows(), folds=2, steps=2, lora_rank=2),
}


@pytest.mark.parametrize("has_hooks", [False, True])
@pytest.mark.parametrize("use", USES)
def test_with_gradient_checkpointing_the_base_is_as_before(use: str, has_hooks: bool, pair: Any) -> None:
    base: Any = tiny.build("llama")
    base.gradient_checkpointing_enable()
    base.disable_input_require_grads()
    assert not any(module._forward_hooks for module in base.modules())
    next(base.parameters()).requires_grad = False
    base.config.pretraining_tp = 2
    if has_hooks:  # as of a user who trains it
        base.enable_input_require_grads()
    before = state(base)
    USES[use](base, pair("llama"))
    assert state(base) == before
    if has_hooks:
        base.disable_input_require_grads()
        assert not any(module._forward_hooks for module in base.modules())


class WithEmbeddings(nn.Module):
    """A model that is none of transformers'; PEFT takes it for one with gradient checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(5, 4), nn.Linear(4, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x))


def test_what_others_hook_within_stays_and_an_error_restores_too() -> None:
    base = WithEmbeddings()
    handles = []

    def use() -> None:
        with adapted(base, LoraConfig(target_modules=["out"]), ignored="none"):
            assert base.table._forward_hooks
            handles.append(base.table.register_forward_hook(lambda *_: None))
            raise KeyError

    with pytest.raises(KeyError):
        use()
    handle = handles[0]
    assert list(base.table._forward_hooks) == [handle.id]
    assert all(parameter.requires_grad for parameter in base.parameters())
    with pytest.raises(ValueError, match="nowhere"), adapted(base, LoraConfig(target_modules=["nowhere"]), "none"):
        pass
    assert list(base.table._forward_hooks) == [handle.id]
    assert all(parameter.requires_grad for parameter in base.parameters())
