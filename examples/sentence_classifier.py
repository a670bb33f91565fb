"""A sentence encoder with a linear head on the mean of its token vectors, for the demo and the study."""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor, nn
from transformers import BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class SentenceClassifier(BertPreTrainedModel):
    """A BERT encoder with a linear head on the mean of its token vectors.

    `AutoModelForSequenceClassification` would put the head on BERT's pooler, which a sentence encoder's training
    leaves untouched: every control that starts from the bare model would look worse than it is.
    """

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """Logits (batch, classes) from token ids and mask (batch, length); the loss too where labels are given."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        logits = self.classifier((states * mask).sum(dim=1) / mask.sum(dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
