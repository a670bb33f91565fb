"""`compose` and `merge` for classifiers: a head that nobody has trained is not written unless that is asked for."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from peft_composition.checkpoint.base_models import Loader

from .. import tiny
from .test_commands import CONFIG, TOLERANCE, WEIGHTS, load_base, run, run_json


CARD = "README.md"


def config(num_labels: int) -> BertConfig:
    return BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        num_labels=num_labels,
    )  # fmt: skip


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A base model that was pretrained for no task."""
    torch.manual_seed(0)
    BertModel(config(2)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def loras(tmp_path: Path, encoder: Path) -> list[Path]:
    """Two adapters for tasks of four labels."""
    base = BertForSequenceClassification.from_pretrained(encoder, num_labels=4)
    return [tiny.save_lora(tmp_path / name, base, ["query"], n, task_type="SEQ_CLS") for n, name in enumerate("ab")]


def heads(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if "classifier" in key}


def hidden(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**tiny.TINY["bert"].inputs(), output_hidden_states=True).hidden_states[-1]


def test_without_a_number_of_labels_there_is_no_head(tmp_path: Path, encoder: Path, loras: list[Path]) -> None:
    out = tmp_path / "mix"
    result = run("compose", "--base", encoder, "--adapters", *loras, "--out", out)
    assert result.exit_code == 0, result.output
    assert "It has no head" in result.stdout
    assert "--num-labels" in result.stdout
    assert heads(out) == heads(out / "lora") == {}
    saved = json.loads((out / CONFIG).read_text())
    assert (saved["num_labels"], saved["modules_to_save"], saved["task_type"]) == (None, None, None)
    card = (out / CARD).read_text()
    assert "There is no head in it" in card
    assert 'AutoModelForSequenceClassification.from_pretrained("path/to/encoder")' in card or (
        'BertForSequenceClassification.from_pretrained("path/to/encoder")' in card
    )

    torch.manual_seed(5)
    base = BertForSequenceClassification.from_pretrained(encoder, num_labels=7)
    wanted = hidden(tiny.composed_by_hand(base, [str(lora) for lora in loras], [0.5, 0.5]))
    for folder in (out, out / "lora"):
        torch.manual_seed(5)
        base = BertForSequenceClassification.from_pretrained(encoder, num_labels=7)  # whoever has a task of seven
        torch.testing.assert_close(hidden(PeftModel.from_pretrained(base, str(folder))), wanted, **TOLERANCE)


def test_a_head_that_is_asked_for_is_said_to_be_untrained(tmp_path: Path, encoder: Path, loras: list[Path]) -> None:
    out = tmp_path / "mix"
    result = run("compose", "--base", encoder, "--adapters", *loras, "--num-labels", 4, "--out", out)
    assert result.exit_code == 0, result.output
    assert "Its head for 4 labels is new and untrained (classifier): train it before use." in result.stdout
    for folder in (out, out / "lora"):
        assert {tuple(tensor.shape) for tensor in heads(folder).values()} == {(4, 16), (4,)}
    card = (out / CARD).read_text()
    assert "**Its head (`classifier`) is new and untrained" in card
    assert "num_labels=4)" in card

    base = BertForSequenceClassification.from_pretrained(encoder, num_labels=4)
    model = PeftModel.from_pretrained(base, str(out), is_trainable=True)
    model.save_pretrained(str(tmp_path / "again"))
    assert "is new and untrained" in (tmp_path / "again" / CARD).read_text()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "classifier" in name and parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(str(tmp_path / "trained"))
    assert "untrained" not in (tmp_path / "trained" / CARD).read_text()


def test_a_head_that_the_base_has_stays(tmp_path: Path, encoder: Path, loras: list[Path]) -> None:
    torch.manual_seed(1)
    base = BertForSequenceClassification(config(4))
    base.save_pretrained(tmp_path / "classifier")
    for number, options in enumerate(([], ["--num-labels", 4])):
        out = tmp_path / f"mix{number}"
        told = run_json("compose", "--base", tmp_path / "classifier", "--adapters", *loras, "--out", out, *options)
        assert (told["head"], told["num_labels"]) == ("base", 4)
        found = heads(out)
        assert torch.equal(found["base_model.model.classifier.weight"], base.classifier.weight)
        assert "untrained" not in (out / CARD).read_text()
    out = tmp_path / "three"
    told = run_json(
        "compose", "--base", tmp_path / "classifier", "--adapters", *loras, "--num-labels", 3, "--out", out
    )
    assert (told["head"], told["num_labels"]) == ("new", 3)


def test_a_new_head_of_a_model_without_a_task_type_is_written(tmp_path: Path) -> None:
    """Image classifiers have none; PEFT takes no module of theirs for a head by itself."""
    base = tiny.build("vit")
    base.vit.save_pretrained(tmp_path / "base")
    loras = tiny.save_pair(tmp_path, "vit")
    headless = run_json("compose", "--base", tmp_path / "base", "--adapters", *loras, "--out", tmp_path / "without")
    assert headless["head"] is None
    assert heads(tmp_path / "without") == {}
    told = run_json(
        "compose", "--base", tmp_path / "base", "--adapters", *loras, "--num-labels", 5, "--out", tmp_path / "with"
    )
    assert (told["head"], told["num_labels"]) == ("new", 5)
    assert {tuple(tensor.shape) for tensor in heads(tmp_path / "with").values()} == {(5, 16), (5,)}
    merged = run_json("merge", tmp_path / "with", "--out", tmp_path / "merged")
    assert (merged["model"], merged["untrained"]) == ("ViTForImageClassification", ["classifier"])


def test_labels_of_a_model_that_has_none_are_refused(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    lora = tiny.save_lora(tmp_path / "lora", tiny.build("llama"), ["q_proj"], task_type="CAUSAL_LM")
    result = run(
        "compose", "--base", tmp_path / "base", "--adapters", lora, "--num-labels", 2, "--out", tmp_path / "o"
    )
    assert result.exit_code == 1
    assert "--num-labels is for classifiers, but the model is a LlamaForCausalLM" in result.stderr
    assert not (tmp_path / "o").exists()


def test_labels_for_adapters_that_state_no_task(tmp_path: Path) -> None:
    """It was advised to leave the labels out."""
    base = tiny.build("bert").bert
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    lora = tiny.save_lora(tmp_path / "lora", base, ["query"])
    options = ("--base", tmp_path / "base", lora, "--num-labels", 2, "--no-check-base", "--out")
    refused = run("compose", *options, tmp_path / "o")
    assert refused.exit_code == 1
    assert (
        "the model is a BertModel; the adapters state no task: give --task SEQ_CLS, or leave it out" in refused.stderr
    )
    assert run("compose", *options, tmp_path / "o", "--task", "SEQ_CLS").exit_code == 0


def test_merge_says_what_nobody_has_trained(tmp_path: Path, encoder: Path, loras: list[Path]) -> None:
    run_json("compose", "--base", encoder, "--adapters", *loras, "--out", tmp_path / "mix")
    result = run("merge", tmp_path / "mix", "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "has weights for classifier: these are new and untrained." in result.stdout
    assert load_base(tmp_path / "merged").config.num_labels == 2


def test_merge_does_not_lose_a_trained_head(tmp_path: Path, encoder: Path, loras: list[Path]) -> None:
    out = tmp_path / "mix"
    run_json("compose", "--base", encoder, "--adapters", *loras, "--num-labels", 4, "--out", out)
    merged = run("merge", out, "--out", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    assert "Its head (classifier) was saved as new and untrained: train it before use." in merged.stdout
    dropped = run("merge", out, "--task", "CAUSAL_LM", "--out", tmp_path / "language")
    assert dropped.exit_code == 0, dropped.output
    assert "a BertLMHeadModel has no such module: classifier." in dropped.stdout

    model = PeftModel.from_pretrained(
        BertForSequenceClassification.from_pretrained(encoder, num_labels=4), str(out), is_trainable=True
    )
    with torch.no_grad():
        model.get_submodule("base_model.model.classifier.modules_to_save.default").bias.add_(0.1)
    model.save_pretrained(str(tmp_path / "trained"))
    refused = run("merge", tmp_path / "trained", "--task", "CAUSAL_LM", "--out", tmp_path / "lost")
    assert refused.exit_code == 1
    assert "a BertLMHeadModel has no module for the trained classifier of" in refused.stderr
    assert "leave out --task CAUSAL_LM" in refused.stderr
    assert not (tmp_path / "lost").exists()
    told = run_json("merge", tmp_path / "trained", "--out", tmp_path / "kept")
    assert told["untrained"] == []
    kept = BertForSequenceClassification.from_pretrained(tmp_path / "kept")
    assert torch.equal(kept.classifier.bias, heads(tmp_path / "trained")["base_model.model.classifier.bias"])


def test_no_report_of_transformers_contradicts_what_is_said(
    tmp_path: Path, encoder: Path, loras: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that its messages can be seen
    BertForSequenceClassification.from_pretrained(encoder)
    assert "LOAD REPORT" in caplog.text
    caplog.clear()
    run_json("compose", "--base", encoder, "--adapters", *loras, "--num-labels", 4, "--out", tmp_path / "mix")
    run_json("merge", tmp_path / "mix", "--out", tmp_path / "merged")
    assert "LOAD REPORT" not in caplog.text
    with pytest.raises(RuntimeError, match="above report"):  # an error that refers to it
        Loader("BertModel", BertModel).from_pretrained(str(broken(encoder, tmp_path)), is_reported=False)
    assert "LOAD REPORT" in caplog.text


def broken(encoder: Path, folder: Path) -> Path:
    """A base whose weights have another size than its config says."""
    shutil.copytree(encoder, folder / "broken")
    path = folder / "broken" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 50}))
    return folder / "broken"
