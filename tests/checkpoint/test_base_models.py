"""Which class of transformers loads a base model, and that the command line and the card load it with that one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    LlamaConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from peft_composition.checkpoint.base_models import AUTO_CLASSES, class_to_load, loaders
from peft_composition_cli.options import Task

from .. import tiny
from ..cli.test_commands import run as run_command
from ..cli.test_commands import run_json
from .test_card import code_blocks
from .test_card import run as run_code


TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize(
    ("config", "task", "stated", "names"),
    [
        (LlamaConfig(), "CAUSAL_LM", None, ["AutoModelForCausalLM"]),
        (Qwen2VLConfig(), "CAUSAL_LM", None, ["AutoModelForImageTextToText"]),
        (SmolVLMConfig(), "CAUSAL_LM", None, ["AutoModelForImageTextToText"]),
        (T5Config(), "SEQ_2_SEQ_LM", None, ["AutoModelForSeq2SeqLM"]),
        (WhisperConfig(), "SEQ_2_SEQ_LM", None, ["AutoModelForSpeechSeq2Seq"]),
        (WhisperConfig(), "CAUSAL_LM", None, ["AutoModelForCausalLM", "AutoModelForSpeechSeq2Seq"]),
        (WhisperConfig(), None, "WhisperForConditionalGeneration", ["WhisperForConditionalGeneration"]),
        (WhisperConfig(), None, "BertModel", ["AutoModel"]),
        (WhisperConfig(), None, "pipeline", ["AutoModel"]),
        (ViTConfig(), "SEQ_CLS", None, ["AutoModelForImageClassification"]),
        (ViTConfig(architectures=["ViTForImageClassification"]), None, None, ["ViTForImageClassification"]),
        (BertConfig(architectures=["NoSuchModel"]), None, None, ["AutoModel"]),
        (BertConfig(), "SEQ_CLS", "BertForSequenceClassification", ["AutoModelForSequenceClassification"]),
        (Qwen2VLConfig(), "TOKEN_CLS", None, ["AutoModelForTokenClassification"]),
    ],
)
def test_the_classes_for_a_base(config: Any, task: str | None, stated: str | None, names: list[str]) -> None:
    assert [loader.name for loader in loaders(task, config, stated)] == names


def test_every_class_is_one_of_transformers_and_every_task_one_of_the_command_line() -> None:
    for classes in AUTO_CLASSES.values():
        for name, table in classes.items():
            assert hasattr(transformers, name)
            assert hasattr(transformers, table)
    assert [task.value for task in Task] == list(AUTO_CLASSES)


@pytest.mark.parametrize(
    ("task", "model_class", "name"),
    [
        ("CAUSAL_LM", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("CAUSAL_LM", "Qwen2VLForConditionalGeneration", "AutoModelForImageTextToText"),
        ("CAUSAL_LM", "WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
        (None, "ViTForImageClassification", "ViTForImageClassification"),
        ("SEQ_CLS", "LlamaForCausalLM", "LlamaForCausalLM"),
    ],
)
def test_the_class_of_a_known_model(task: str | None, model_class: str, name: str) -> None:
    assert class_to_load(task, model_class) == name


def qwen2_vl() -> nn.Module:
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={
                "vocab_size": 64,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            vision_config={
                "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4
            },
        )
    )  # fmt: skip


def whisper() -> nn.Module:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10,
            max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip


def bart() -> nn.Module:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16,
        )
    )  # fmt: skip


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(seed))


def sound() -> Tensor:
    return torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("build", "task", "auto_class", "inputs"),
    [
        (qwen2_vl, "CAUSAL_LM", "AutoModelForImageTextToText", lambda: {"input_ids": tokens()}),
        (
            whisper,
            None,
            "WhisperForConditionalGeneration",
            lambda: {"input_features": sound(), "decoder_input_ids": tokens()},
        ),
        # `AutoModelForCausalLM` knows it and builds the decoder alone.
        (
            bart,
            "CAUSAL_LM",
            "AutoModelForSeq2SeqLM",
            lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(1)},
        ),
    ],
    ids=["qwen2-vl", "whisper without a task", "bart as causal"],
)
def test_a_base_that_the_class_of_the_task_does_not_build(
    build: Callable[[], nn.Module],
    task: str | None,
    auto_class: str,
    inputs: Callable[[], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    base = build().eval()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    targets = ["q_proj", "v_proj"]
    loras = [tiny.save_lora(tmp_path / f"{n}", base, targets, seed=n, r=n, task_type=task) for n in (1, 2)]

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(**inputs()).logits

    wanted = logits(tiny.composed_by_hand(base, [str(lora) for lora in loras], [0.5, 0.5]))
    assert (wanted - logits(base)).abs().max() > 0.01

    rows = run_json("inspect", *loras, "--base", tmp_path / "base")["adapters"]
    assert [row["composable"] for row in rows] == [True, True]
    run_json("compose", "--base", tmp_path / "base", "--adapters", *loras, "--out", tmp_path / "mix")
    for code in code_blocks((tmp_path / "mix" / "README.md").read_text()):
        assert f"import {auto_class}\n" in code
        pasted = code.replace("path/to/base", str(tmp_path / "base")).replace('"."', f'"{tmp_path / "mix"}"')
        torch.testing.assert_close(logits(run_code(pasted)["model"]), wanted, **TOLERANCE)
    told = run_json("merge", tmp_path / "mix", "--out", tmp_path / "merged")
    assert told["model"] == type(base).__name__
    torch.testing.assert_close(logits(type(base).from_pretrained(tmp_path / "merged")), wanted, **TOLERANCE)  # type: ignore[attr-defined]
    run_json("export", tmp_path / "mix", "--rank", "2", "--out", tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_merge_of_a_checkpoint_that_does_not_record_the_class(tmp_path: Path) -> None:
    """As they were saved before; the class is found by the recorded modules, or given by the task."""
    torch.manual_seed(0)
    base = bart()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    lora = tiny.save_lora(tmp_path / "lora", base, ["q_proj"], task_type="CAUSAL_LM")
    run_json("compose", "--base", tmp_path / "base", "--adapters", lora, "--out", tmp_path / "mix")
    path = tmp_path / "mix" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": None}))
    told = run_json("merge", tmp_path / "mix", "--out", tmp_path / "found")
    assert told["model"] == "BartForConditionalGeneration"
    told = run_json("merge", tmp_path / "mix", "--task", "SEQ_2_SEQ_LM", "--out", tmp_path / "given")
    assert told["model"] == "BartForConditionalGeneration"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("no\x1bbase", r"no\x1bbase is neither a local folder nor a valid Hub id"),
        ("/no/such/base", "/no/such/base is neither a local folder nor a valid Hub id"),
        (
            "me/nobase",
            "me/nobase is neither a local folder nor in the Hub cache, and the Hub could not be reached",
        ),
    ],
)
def test_a_base_model_that_is_not_there_is_named(name: str, complaint: str, tmp_path: Path) -> None:
    base = tiny.build("bert")
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    lora = tiny.save_lora(tmp_path / "lora", base, ["query"])
    run_json("compose", "--base", tmp_path / "base", "--adapters", lora, "--out", tmp_path / "mix")
    for command in (
        ["inspect", lora],
        ["compose", "--adapters", lora, "--out", tmp_path / "o"],
        ["merge", tmp_path / "mix", "--out", tmp_path / "o"],
    ):
        result = run_command(*command, "--base", name)
        assert result.exit_code == 1
        assert result.stderr.strip().splitlines()[-1] == f"Error: base model {complaint}"
