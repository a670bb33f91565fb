"""Weights that several modules hold: merging leaves the others alone, unmerging restores the tie."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from typer.testing import CliRunner

from peft_composition import CompositionConfig, to_lora
from peft_composition.tuner.locating import composition_layers
from peft_composition_cli import app

from .. import tiny
from ..reference import TOLERANCE, Reference, read_lora, relative_error


IDS = torch.tensor([[1, 5, 9, 33, 17, 4]])
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"vocab_size": 60, "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 0, **SMALL}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
BART = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "gemma": lambda: Gemma3ForCausalLM(Gemma3TextConfig(head_dim=8, **TEXT)),  # scales its embeddings
    "llava": lambda: LlavaForConditionalGeneration(  # its config has a config for the text
        LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **SMALL},
            text_config={"model_type": "llama", **TEXT},
            tie_word_embeddings=True,
        )
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=60, **SMALL)),  # ties a bias, too
    "t5": lambda: T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **T5)),  # always ties, and scales
    "umt5": lambda: UMT5ForConditionalGeneration(UMT5Config(decoder_start_token_id=0, **T5)),  # scales when it ties
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),  # four modules with one weight
}
LAYERS = {
    "llama": ("lm_head", "model.embed_tokens"),
    "gemma": ("lm_head", "model.embed_tokens"),
    "llava": ("lm_head", "model.language_model.embed_tokens"),
    "bert": ("cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    "t5": ("lm_head", "decoder.embed_tokens"),
    "umt5": ("lm_head", "decoder.embed_tokens"),
    "bart": ("lm_head", "model.decoder.embed_tokens"),
}
CASES = [(name, ends) for name in MODELS for ends in ([0], [1], [0, 1])]


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def untied(base: nn.Module, modules: tuple[str, ...] | list[str]) -> nn.Module:
    """A copy in which these modules have weights of their own, of the same values."""
    base = copy.deepcopy(base)
    for name in modules:
        layer = base.get_submodule(name)
        layer._parameters["weight"] = nn.Parameter(layer.weight.detach().clone())
    return base


def logits(model: nn.Module) -> Tensor:
    decodes = model.config.is_encoder_decoder if hasattr(model, "config") else False
    with torch.no_grad():
        result = model(IDS, decoder_input_ids=IDS[:, :4]) if decodes else model(IDS)
    return result if isinstance(result, Tensor) else result.logits


def expected(base: nn.Module, folders: list[str], modules: list[str]) -> Tensor:
    """What the uniform composition computes, in float64, from the files of the adapters."""
    reference = Reference(untied(base, modules), folders)
    w = torch.full((len(folders),), 1 / len(folders), dtype=torch.float64)
    decodes = base.config.is_encoder_decoder if hasattr(base, "config") else False
    inputs = {"decoder_input_ids": IDS[:, :4]} if decodes else {}
    return reference(dict.fromkeys(reference.modules, w), IDS, **inputs)


def composed(base: nn.Module, folders: list[str], **fields: object) -> PeftModel:
    config = CompositionConfig(adapters=folders, mixing="uniform", **fields)
    return get_peft_model(copy.deepcopy(base), config).eval()


def save_loras(folder: Path, base: nn.Module, targets: list[str]) -> list[str]:
    return [str(tiny.save_lora(folder / f"{seed}", base, targets, seed=seed)) for seed in (1, 2)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'-'.join(LAYERS[case[0]][i] for i in case[1])}")
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, list[str], list[str]]:
    """A model with ties, the tied modules that two adapters touch, and the adapters."""
    name, ends = request.param
    base, modules = build(name), [LAYERS[name][end] for end in ends]
    return base, modules, save_loras(tmp_path, base, modules)


def test_merging_for_good_computes_what_the_composition_did_also_after_saving(case, tmp_path: Path) -> None:
    base, modules, folders = case
    target = expected(base, folders, modules)
    assert relative_error(logits(base), target) > 0.01
    model = composed(base, folders)
    assert relative_error(logits(model), target) < TOLERANCE[torch.float32]

    with pytest.warns(UserWarning, match="makes the model [0-9,]+ bytes larger") as caught:
        merged = model.merge_and_unload()

    assert sum("bytes larger" in str(entry.message) for entry in caught) == 1
    assert relative_error(logits(merged), target) < TOLERANCE[torch.float32]
    assert size_of(merged) - size_of(base) == bytes_in(caught)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(base).from_pretrained(tmp_path / "merged").eval()
    assert relative_error(logits(reloaded), target) < TOLERANCE[torch.float32]


def test_unmerging_restores_every_tie_to_the_bit(case) -> None:
    base, modules, folders = case
    target = expected(base, folders, modules)
    model = composed(base, folders)
    plain = model.get_base_model()
    ties = sharing(plain)
    before = {name: parameter.clone() for name, parameter in plain.named_parameters(remove_duplicate=False)}
    flags = flags_of(plain)

    with pytest.warns(UserWarning, match="bytes larger"):
        model.merge_adapter()
    assert relative_error(logits(model), target) < TOLERANCE[torch.float32]
    if "t5" not in base.config.model_type:
        assert flags_of(plain) == [False] * len(flags)
    model.unmerge_adapter()

    assert sharing(plain) == ties
    assert flags_of(plain) == flags
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, before[name]), name
    assert relative_error(logits(model), target) < TOLERANCE[torch.float32]


def test_disabled_while_merged_computes_what_the_base_does(case) -> None:
    base, modules, folders = case
    model = composed(base, folders)
    ties = sharing(model.get_base_model())
    model.merge_adapter()

    with model.disable_adapter():
        assert relative_error(logits(model), logits(base).double()) < TOLERANCE[torch.float32]

    assert sharing(model.get_base_model()) == ties
    assert relative_error(logits(model), expected(base, folders, modules)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", MODELS)
def test_adapters_elsewhere_leave_the_tie_alone(name: str, tmp_path: Path) -> None:
    base = build(name)
    target = "q_proj" if name in ("llama", "gemma", "llava", "bart") else "query" if name == "bert" else "q"
    folders = save_loras(tmp_path, base, [target])

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tie", category=UserWarning)
        merged = composed(base, folders).merge_and_unload()

    assert sharing(merged) == sharing(base)
    assert flags_of(merged) == flags_of(base)
    assert size_of(merged) == size_of(base)


def test_ways_to_merge_agree(tmp_path: Path) -> None:
    """Several compositions, safe_merge, first in place and then for good, one layer after the other."""
    base, modules = build("llama"), list(LAYERS["llama"])
    folders = save_loras(tmp_path, base, modules)
    model = composed(base, folders[:1])
    model.add_adapter("other", CompositionConfig(adapters=folders[1:], mixing="uniform"))
    model.base_model.set_adapter(["default", "other"])
    reference = Reference(untied(base, modules), folders)
    one = torch.ones(2, dtype=torch.float64)
    target = reference(dict.fromkeys(reference.modules, one), IDS)
    ties = sharing(model.get_base_model())

    for _, layer in composition_layers(model):
        layer.merge(adapter_names=["other"])
    model.merge_adapter(["default"], safe_merge=True)
    assert relative_error(logits(model), target) < TOLERANCE[torch.float32]
    for _, layer in composition_layers(model):
        layer.unmerge()
    assert sharing(model.get_base_model()) == ties
    assert model.config.tie_word_embeddings

    model.merge_adapter()
    copied = copy.deepcopy(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert relative_error(logits(merged), target) < TOLERANCE[torch.float32]
    assert not merged.config.tie_word_embeddings
    copied.unmerge_adapter()
    assert sharing(copied.get_base_model()) == ties
    assert copied.config.tie_word_embeddings
    assert relative_error(logits(copied), target) < TOLERANCE[torch.float32]


def test_safe_merge_that_refuses_leaves_the_tie(tmp_path: Path) -> None:
    base = build("llama")
    model = composed(base, save_loras(tmp_path, base, ["lm_head"]))
    layer = dict(composition_layers(model.get_base_model()))["lm_head"]
    layer.composition_factors["default"].B.data[0, 0] = float("inf")
    ties = sharing(model.get_base_model())

    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)

    assert sharing(model.get_base_model()) == ties
    assert model.config.tie_word_embeddings


def test_a_model_that_moves_while_merged_gets_its_tie_back_in_the_new_dtype(tmp_path: Path) -> None:
    base, modules = build("llama"), list(LAYERS["llama"])
    folders = save_loras(tmp_path, base, modules)
    model = composed(base, folders)
    ties = sharing(model.get_base_model())
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()

    assert sharing(model.get_base_model()) == ties
    assert model.get_base_model().lm_head.weight.dtype == torch.float64
    assert relative_error(logits(model), expected(base, folders, modules)) < TOLERANCE[torch.float32]


class Pair(nn.Module):
    """Two layers that share a weight and a bias, and one that is used in two places as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(60, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.whole = nn.Linear(6, 6)
        self.again = self.whole

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(self.emb(x)).tanh()).tanh()
        return self.again(self.whole(h).tanh())


@pytest.mark.parametrize("target", ["first", "second", "whole"])
def test_layers_of_any_model_that_share_a_weight_or_are_used_twice(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Pair()
    folders = []
    for seed in (1, 2):
        folders.append(str(tiny.save_lora(tmp_path / f"{seed}", base, [target], seed=seed, lora_bias=True)))
    apart = copy.deepcopy(base)
    apart.second.weight, apart.second.bias = (nn.Parameter(p.detach().clone()) for p in base.first.parameters())
    apart.again = copy.deepcopy(apart.whole)
    reference = Reference(apart, folders)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    expected = reference({target: half}, IDS)
    model = composed(base, folders)
    plain = model.get_base_model()
    ties = sharing(plain)
    before = [parameter.clone() for parameter in plain.parameters()]
    assert relative_error(logits(model), expected) < TOLERANCE[torch.float32]

    model.merge_adapter()
    assert relative_error(logits(model), expected) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert sharing(plain) == ties
    assert all(map(torch.equal, plain.parameters(), before))
    assert relative_error(logits(model.merge_and_unload()), expected) < TOLERANCE[torch.float32]


class Experts(nn.Module):
    """A stack of matrices that it uses without calling a layer."""

    def __init__(self, stack: nn.Parameter) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x, self.stack)


def test_parameters_that_two_modules_share(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 8, 8) / 8)
    base = nn.Sequential(nn.Embedding(60, 8), Experts(stack), Experts(stack))
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=[], target_parameters=["1.stack"]))
    for key, parameter in lora.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2)
    lora.save_pretrained(tmp_path / "lora")
    tensors = {
        key.rpartition(".lora_")[2]: t.double() for key, t in load_file(adapter_file(tmp_path / "lora")).items()
    }
    A = tensors["A.weight"].reshape(3, 2, 8)
    B = torch.stack([tensors["B.weight"][:, expert::3] for expert in range(3)])
    apart = copy.deepcopy(base).double()
    apart[2].stack = nn.Parameter(apart[1].stack.detach().clone())
    apart[1].stack.data += 8 / 2 * B @ A  # PEFT's default alpha over the rank
    expected = apart(IDS)
    model = composed(base, [str(tmp_path / "lora")])
    ties = sharing(model.get_base_model())

    assert relative_error(logits(model), expected) < TOLERANCE[torch.float32]
    model.merge_adapter()
    assert relative_error(logits(model), expected) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert sharing(model.get_base_model()) == ties
    assert relative_error(logits(model.merge_and_unload()), expected) < TOLERANCE[torch.float32]


def test_a_quantized_base_with_a_tied_head(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings).eval()
    assert isinstance(base.model.layers[0].self_attn.q_proj, bnb.nn.Linear8bitLt)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    folders = save_loras(tmp_path, build("llama"), ["lm_head"])
    w = sum(0.5 * read_lora(folder)["lm_head"].delta() for folder in folders)
    plain = logits(base)
    hidden = base.model(IDS).last_hidden_state.double()
    expected = plain.double() + hidden @ w.t()
    config = CompositionConfig(adapters=folders, mixing="uniform")
    merged = get_peft_model(base, config).eval().merge_and_unload()

    # The hidden states are computed in 16 bits.
    assert relative_error(logits(merged), expected) < 2e-3
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative_error(logits(reloaded), expected) < 2e-3


def test_the_command_line_merges_untied(tmp_path: Path) -> None:
    base, modules = build("llama"), list(LAYERS["llama"])
    base.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    folders = save_loras(tmp_path, base, modules)
    composed(base, folders, task_type="CAUSAL_LM").save_pretrained(tmp_path / "composed")

    result = CliRunner().invoke(app, ["merge", str(tmp_path / "composed"), "--out", str(tmp_path / "merged")])

    assert result.exit_code == 0, result.output
    assert "3,840 bytes larger" in result.stderr
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative_error(logits(merged), expected(base, folders, modules)) < TOLERANCE[torch.float32]


def test_the_export_of_a_tied_base_is_the_same_adapter_for_stock_peft(case, tmp_path: Path) -> None:
    base, modules, folders = case
    to_lora(composed(base, folders)).save_pretrained(tmp_path / "lora")

    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora")).eval()

    assert relative_error(logits(stock), expected(base, folders, modules)) < TOLERANCE[torch.float32]


class TestCopiesOfTheBase:
    """PEFT saves `lm_head.base_layer.weight` beside the factors of a tied layer."""

    def test_one_that_is_the_weight_of_the_model_is_not_mentioned(self, tmp_path: Path) -> None:
        base = build("llama")
        folders = save_loras(tmp_path, base, ["lm_head", "q_proj"])
        assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter_file(folders[0]))

        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(not mixed|base weights)")
            composed(base, folders)
            composed(copy.deepcopy(base).bfloat16(), folders)

    def test_another_one_is_named_with_the_difference(self, tmp_path: Path) -> None:
        base = build("llama")
        folders = save_loras(tmp_path, base, ["lm_head", "q_proj"])
        tensors = load_file(adapter_file(folders[1]))
        tensors["base_model.model.lm_head.base_layer.weight"][7, 3] += 0.25
        save_file(tensors, adapter_file(folders[1]))

        with pytest.warns(UserWarning, match=r"other base weights .*: adapter '2', lm_head \(by up to 0\.25\)\. "):
            composed(base, folders)


def adapter_file(folder: str | Path) -> Path:
    return Path(folder, "adapter_model.safetensors")


def sharing(model: nn.Module) -> list[set[str]]:
    """Which parameters are one, by their names in the base model."""
    found: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), set()).add(name.replace("base_layer.", ""))
    return sorted((names for names in found.values() if len(names) > 1), key=sorted)


def size_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def bytes_in(caught: list[warnings.WarningMessage]) -> int:
    text = next(str(entry.message) for entry in caught if "bytes larger" in str(entry.message))
    return int(text.partition("makes the model ")[2].partition(" ")[0].replace(",", ""))


def flags_of(model: nn.Module) -> list[bool]:
    configs = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for config in (module.config, module.config.get_text_config()):
                if module.config.model_type in ("t5", "umt5", "bart") and module is not model:
                    continue  # each stack has a copy, which ties nothing
                configs[id(config)] = config
    return [config.tie_word_embeddings for config in configs.values() if hasattr(config, "tie_word_embeddings")]
