"""Compositions in the libraries that people train with beside PEFT: TRL, sentence-transformers, SetFit, timm.

What is not installed is skipped; all of them are in the `test` extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from peft_composition import CompositionConfig

from . import tiny


TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
WORDS = ["good", "bad", "film", "book", "very", "not", "the", "a", "is", "was", "dull", "fine", "plot", "end", "we"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")


def thetas(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if f".composition_mixing.{adapter}." in name]


def require_trained(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Mixing weights have moved, and nothing else that is frozen."""
    assert all(torch.any(theta != 0) for theta in thetas(model))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def causal(pair: Any) -> PeftModel:
    config = CompositionConfig(adapters=pair("llama"), task_type="CAUSAL_LM")
    return get_peft_model(tiny.build("llama"), config)


def trl_arguments(cls: type, folder: Path, **fields: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return cls(**settings, **fields)


def require_reload(model: nn.Module, base: nn.Module, folder: Path, name: str) -> None:
    reloaded = PeftModel.from_pretrained(base, str(folder)).eval()
    torch.testing.assert_close(tiny.output(reloaded, name), tiny.output(model.eval(), name), **TOLERANCE)


def test_supervised_fine_tuning_of_trl(causal: PeftModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    before = state(causal)
    trainer = trl.SFTTrainer(
        causal,
        args=trl_arguments(trl.SFTConfig, tmp_path / "run", max_length=16, dataset_text_field="text"),
        train_dataset=Dataset.from_dict({"text": ["the film was good", "a dull plot", "we was not fine"] * 4}),
        processing_class=tokenizer,
    )
    trainer.train()
    require_trained(causal, before)
    trainer.save_model(str(tmp_path / "out"))
    require_reload(causal, tiny.build("llama"), tmp_path / "out", "llama")


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_direct_preference_optimization_of_trl(
    causal: PeftModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, is_reloaded: bool
) -> None:
    """The reference is a second composition beside it, made by TRL from the config of the first and its parameters."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    if is_reloaded:
        with torch.no_grad():
            for name, parameter in causal.named_parameters():
                if ".composition_mixing." in name:
                    parameter.copy_(torch.tensor([0.02, -0.01]))
        causal.save_pretrained(str(tmp_path / "saved"))
        causal = PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "saved"), is_trainable=True)
    start, logits = thetas(causal), tiny.output(causal.eval(), "llama")
    pairs = {"prompt": ["the film is"] * 6, "chosen": [" very good"] * 6, "rejected": [" not good"] * 6}
    trainer = trl.DPOTrainer(
        causal,
        args=trl_arguments(trl.DPOConfig, tmp_path / "run", max_length=16),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
    )
    before = state(causal)
    trainer.train()
    require_trained(causal, before)
    assert all(torch.equal(theta, was) for theta, was in zip(thetas(causal, "ref"), start, strict=True))
    assert not any(torch.equal(theta, was) for theta, was in zip(thetas(causal), start, strict=True))
    causal.set_adapter("ref")
    torch.testing.assert_close(tiny.output(causal.eval(), "llama"), logits, **TOLERANCE)


@pytest.fixture
def encoder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A sentence encoder in a folder."""
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    ).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def upstream(tmp_path: Path, encoder: Path) -> list[str]:
    base = BertModel.from_pretrained(encoder)
    return [
        str(tiny.save_lora(tmp_path / name, base, ["query", "value"], seed, task_type="FEATURE_EXTRACTION"))
        for seed, name in enumerate(("first", "second"))
    ]


def sentence_transformer(encoder: Path) -> Any:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    transformer = modules.Transformer(str(encoder))
    return sentence_transformers.SentenceTransformer(
        modules=[transformer, modules.Pooling(transformer.get_word_embedding_dimension())], device="cpu"
    )


def test_sentence_transformers(encoder: Path, upstream: list[str], tmp_path: Path) -> None:
    """Its own `add_adapter` takes a composition like any other method of PEFT."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from datasets import Dataset

    model = sentence_transformer(encoder)
    model.add_adapter(CompositionConfig(adapters=upstream, task_type="FEATURE_EXTRACTION"))
    before = state(model)
    assert len(thetas(model)) == 4
    sentences = ["the film was good", "a dull plot"]
    wanted = sentence_transformer(encoder)
    by_hand = tiny.composed_by_hand(wanted[0].auto_model, upstream, [0.5, 0.5])
    wanted[0].auto_model.load_state_dict(by_hand.state_dict())
    torch.testing.assert_close(
        model.encode(sentences, convert_to_tensor=True), wanted.encode(sentences, convert_to_tensor=True), **TOLERANCE
    )
    data = Dataset.from_dict({"anchor": sentences * 4, "positive": ["a good film", "the plot is dull"] * 4})
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=trl_arguments(sentence_transformers.SentenceTransformerTrainingArguments, tmp_path / "run"),
        train_dataset=data,
        loss=pytest.importorskip("sentence_transformers.losses").MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    require_trained(model, before)


def test_setfit(encoder: Path, upstream: list[str], tmp_path: Path) -> None:
    """Its contrastive training moves the mixing weights of the sentence encoder."""
    setfit = pytest.importorskip("setfit")
    from datasets import Dataset

    body = sentence_transformer(encoder)
    body.add_adapter(CompositionConfig(adapters=upstream, task_type="FEATURE_EXTRACTION"))
    before = state(body)
    head = pytest.importorskip("sklearn.linear_model").LogisticRegression()
    model = setfit.SetFitModel(model_body=body, model_head=head)
    trainer = setfit.Trainer(
        model=model,
        args=setfit.TrainingArguments(
            output_dir=str(tmp_path / "run"), num_epochs=1, batch_size=4, max_steps=3, report_to="none"
        ),
        train_dataset=Dataset.from_dict(
            {"text": ["good film", "very good", "dull plot", "bad end"], "label": [1, 1, 0, 0]}
        ),
    )
    trainer.train()
    require_trained(model.model_body, before)
    assert set(model.predict(["good film", "dull plot"]).tolist()) <= {0, 1}


def test_timm(tmp_path: Path) -> None:
    """A model that is none of transformers: composed, trained by hand, saved and loaded."""
    timm = pytest.importorskip("timm")

    def build() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=3
        ).eval()

    folders = [str(tiny.save_lora(tmp_path / f"n{n}", build(), ["qkv"], seed=n, r=n + 1)) for n in range(2)]
    model = get_peft_model(build(), CompositionConfig(adapters=folders, modules_to_save=["head"])).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            model(images), tiny.composed_by_hand(build(), folders, [0.5, 0.5])(images), **TOLERANCE
        )
    before = state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    require_trained(model, before)
    model.save_pretrained(str(tmp_path / "out"))
    with torch.no_grad():
        reloaded = PeftModel.from_pretrained(build(), str(tmp_path / "out")).eval()
        torch.testing.assert_close(reloaded(images), model.eval()(images), **TOLERANCE)
