"""Where the pooled features of a classifier are taken, in the shapes that heads have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_composition.evidence.heads import Features, find_head

from .. import tiny


IDS = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0], [9, 3, 0, 0, 0]])
MASK = (IDS > 0).long()
SMALL = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def features_of(model: nn.Module, head: str | nn.Module | None = None, **inputs: Tensor) -> Tensor:
    features = Features(find_head(model, head))
    with torch.no_grad(), features.watching():
        output = model(**inputs)
    return features.read(output, len(next(iter(inputs.values()))))


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_head_on_all_tokens_is_taken_where_the_model_pools(padding_side) -> None:
    ids, mask, last = IDS, MASK, MASK.sum(1) - 1
    if padding_side == "left":
        ids, mask, last = IDS.flip(1), MASK.flip(1), torch.tensor([4, 4, 4])
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, pad_token_id=0, num_labels=2)).eval()
    found = features_of(model, input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = model(input_ids=ids, attention_mask=mask).logits  # nothing of the watching is left
    assert torch.equal(found, hidden[torch.arange(3), last])
    torch.testing.assert_close(found @ model.score.weight.T, logits)


def test_a_head_that_pools_itself_is_taken_after_it_has() -> None:
    model = RobertaForSequenceClassification(RobertaConfig(**SMALL, num_labels=3)).eval()
    found = features_of(model, input_ids=IDS, attention_mask=MASK)
    with torch.no_grad():
        hidden = model.roberta(input_ids=IDS, attention_mask=MASK).last_hidden_state
    assert torch.equal(found, hidden[:, 0])


def test_a_head_behind_the_wrapper_of_peft() -> None:
    model = get_peft_model(tiny.build("bert"), LoraConfig(target_modules=["query"], task_type="SEQ_CLS")).eval()
    found = features_of(model, input_ids=IDS)
    with torch.no_grad():
        pooled = model.get_base_model().bert(input_ids=IDS).pooler_output
    assert torch.equal(found, pooled)
    named = features_of(model, "classifier", input_ids=IDS)
    inner = model.get_base_model().classifier.modules_to_save["default"]
    assert torch.equal(found, named)
    assert torch.equal(found, features_of(model, inner, input_ids=IDS))


def test_a_mean_of_classes_over_tokens_is_no_token() -> None:
    class MeanOfTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.head(x).mean(1))

    with pytest.raises(ValueError, match=r"The head \(Linear\) is given no pooled features.*head=\.\.\."):
        features_of(MeanOfTokens(), x=torch.randn(3, 5, 4))


def test_a_head_that_does_not_run() -> None:
    model = tiny.build("mlp")
    model.fc = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"called classifier, score.*there are 'fc', 'head'"):
        find_head(model, None)
    with pytest.raises(ValueError, match="did not run"):
        features_of(model, "fc", x=torch.randn(3, 10))


def test_the_outermost_of_usual_names() -> None:
    model = nn.Module()
    model.body = nn.Module()
    model.body.head = nn.Linear(2, 2)
    model.score = nn.Linear(2, 2)
    assert find_head(model, None) is model.score
    assert find_head(model, "body.head") is model.body.head
    with pytest.raises(ValueError, match="there is none"):
        find_head(nn.Linear(2, 2), None)
