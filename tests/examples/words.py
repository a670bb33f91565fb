"""Tiny language models of whole words, and small data sets of questions, for tests of the study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors


NUMBERS = [str(number) for number in range(12)]
WORDS = ["<pad>", "</s>", "<unk>", "what", "is", "next", "after", "before", "?", "it", "was", "said", *NUMBERS]


def save(folder: Path, kind: str, words: Sequence[str] = WORDS) -> Path:
    """Saves an untrained model, "causal" or "text-to-text", and its tokenizer."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind != "causal":  # as T5's own tokenizer ends a text
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    if kind == "causal":
        shape = {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "pad_token_id": 0,
            "initializer_range": 0.1,
        }
        config = transformers.LlamaConfig(
            vocab_size=len(words), hidden_size=32, bos_token_id=1, eos_token_id=1, **shape
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.T5Config(
            vocab_size=len(words),
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
        model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    return folder
