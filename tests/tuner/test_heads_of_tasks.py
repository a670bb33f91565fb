"""Task types whose head PEFT names after the model is built: tokens and questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification, LlamaForTokenClassification

from peft_composition import CompositionConfig

from .. import tiny


def _bert_config(labels: int) -> BertConfig:
    return BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=labels,
    )


def _bert_for_tokens() -> nn.Module:
    return BertForTokenClassification(_bert_config(3))


def _bert_for_questions() -> nn.Module:
    return BertForQuestionAnswering(_bert_config(2))


def _llama_for_tokens() -> nn.Module:
    config = tiny.llama_config()
    config.num_labels = 3
    return LlamaForTokenClassification(config)


def _tokens_loss(model: nn.Module) -> Tensor:
    ids = torch.arange(1, 7)[None]
    return model(input_ids=ids, labels=ids % 3).loss


def _questions_loss(model: nn.Module) -> Tensor:
    ids = torch.arange(1, 7)[None]
    return model(input_ids=ids, start_positions=torch.tensor([1]), end_positions=torch.tensor([2])).loss


CASES: dict[str, tuple[Callable[[], nn.Module], str, str, str, Callable[[nn.Module], Tensor]]] = {
    "bert-tokens": (_bert_for_tokens, "TOKEN_CLS", "classifier", "query", _tokens_loss),
    "bert-questions": (_bert_for_questions, "QUESTION_ANS", "qa_outputs", "query", _questions_loss),
    "llama-tokens": (_llama_for_tokens, "TOKEN_CLS", "score", "q_proj", _tokens_loss),
}


@pytest.mark.parametrize("saved", [None, ["embed_tokens", "word_embeddings"]], ids=["default", "more"])
@pytest.mark.parametrize("case", CASES)
def test_the_new_head_trains_and_comes_back_from_a_checkpoint(tmp_path: Path, case: str, saved: Any) -> None:
    build, task, head, target, loss = CASES[case]

    def base() -> nn.Module:
        torch.manual_seed(0)
        return build().eval()

    adapters = [str(tiny.save_lora(tmp_path / str(n), base(), [target], seed=n, task_type=task)) for n in range(2)]
    config = CompositionConfig(adapters=adapters, task_type=task, modules_to_save=saved)
    model = get_peft_model(base(), config).eval()
    own = {name: value for name, value in model.named_parameters() if f".{head}." in name and value.requires_grad}
    assert own, f"nothing of {head} trains"
    before = float(loss(model).detach())
    optimizer = torch.optim.SGD([*own.values()], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    after = float(loss(model).detach())
    assert after < before - 1e-3

    model.save_pretrained(str(tmp_path / "composed"))
    again = PeftModel.from_pretrained(base(), str(tmp_path / "composed")).eval()
    assert float(loss(again).detach()) == pytest.approx(after, abs=1e-6)

    twice = get_peft_model(base(), config)  # the same config object serves for a second model, and a second adapter
    twice.add_adapter("second", CompositionConfig(adapters=adapters, task_type=task, modules_to_save=saved))
    twice.set_adapter("second")
    assert any(
        value.requires_grad and f"{head}.modules_to_save.second" in name for name, value in twice.named_parameters()
    )
    assert torch.isfinite(loss(twice))
