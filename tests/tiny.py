"""Small models with random weights, one per architecture, and real LoRA checkpoints trained for none of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from peft_composition import CompositionConfig

from .reference import read_lora, weight_of


class MLP(nn.Module):
    """Two linear layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin1(self.relu(self.lin0(x))))


class ConvNet(nn.Module):
    """Convolutions of one, two and three dimensions, with stride, padding and dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 6, (3, 2), stride=2, padding=1, dilation=(1, 2))
        self.conv3 = nn.Conv3d(1, 5, 2, padding=1, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x).tanh()  # (batch, 8, length)
        h = self.conv2(h.unsqueeze(1)).tanh()  # (batch, 6, ., .)
        h = self.conv3(h.unsqueeze(1)).tanh()  # (batch, 5, ., ., .)
        return self.head(h.mean(dim=(2, 3, 4)))


class EmbeddingNet(nn.Module):
    """An embedding with a padding token and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(40, 12, padding_idx=0)
        self.lin = nn.Linear(12, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin(self.emb(x)).tanh().mean(dim=1))


class AttentionNet(nn.Module):
    """A linear layer and PyTorch's own attention, which uses its weights without calling a layer for them."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(10, 12)
        self.attn = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x).tanh()  # (batch, length, 12)
        h, _ = self.attn(h, h, h, need_weights=False)
        return self.head(h.mean(dim=1))


@dataclass(frozen=True)
class Tiny:
    """An architecture: how to build it, what LoRA targets in it, its head, its task type and an input.

    Targets are modules and, for PEFT's `target_parameters`, ends of the names of parameters.
    """

    build: Callable[[], nn.Module]
    targets: list[str]
    head: list[str]
    inputs: Callable[[], dict[str, Tensor]]
    task_type: str | None = None


def _tokens(vocabulary: int, length: int = 9) -> Tensor:
    return torch.randint(1, vocabulary, (4, length), generator=torch.Generator().manual_seed(0))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    )


def llama_config(vocab_size: int = 60, hidden_size: int = 16, intermediate_size: int = 24) -> LlamaConfig:
    """Two blocks; wider where weights are to be quantized, which is done block by block."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def _vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=16,
            patch_size=8,
            num_labels=3,
        )
    )


_MIXTURE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}


def _mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**_MIXTURE))


def _gpt_oss() -> nn.Module:
    return GptOssForCausalLM(GptOssConfig(head_dim=8, pad_token_id=0, **_MIXTURE))


TINY: dict[str, Tiny] = {
    "mlp": Tiny(MLP, ["lin0", "lin1"], ["head"], lambda: {"x": _noise(4, 10)}),
    "conv": Tiny(ConvNet, ["conv1", "conv2", "conv3"], ["head"], lambda: {"x": _noise(4, 4, 12)}),
    "embedding": Tiny(EmbeddingNet, ["emb", "lin"], ["head"], lambda: {"x": _tokens(40)}),
    "bert": Tiny(_bert, ["query", "key", "value"], ["classifier"], lambda: {"input_ids": _tokens(60)}, "SEQ_CLS"),
    "gpt2": Tiny(_gpt2, ["c_attn", "c_fc"], [], lambda: {"input_ids": _tokens(60)}, "CAUSAL_LM"),
    "llama": Tiny(
        lambda: LlamaForCausalLM(llama_config()),
        ["q_proj", "v_proj"],
        [],
        lambda: {"input_ids": _tokens(60)},
        "CAUSAL_LM",
    ),
    "t5": Tiny(
        _t5,
        ["q", "v"],
        [],
        lambda: {"input_ids": _tokens(60), "decoder_input_ids": _tokens(60, 5)},
        "SEQ_2_SEQ_LM",
    ),
    "vit": Tiny(_vit, ["q_proj", "k_proj", "v_proj"], ["classifier"], lambda: {"pixel_values": _noise(4, 3, 16, 16)}),
    "attention": Tiny(AttentionNet, ["lin", "attn"], ["head"], lambda: {"x": _noise(4, 5, 10)}),
    "mixtral": Tiny(  # experts as (out, in)
        _mixtral,
        ["q_proj", "experts.gate_up_proj", "experts.down_proj"],
        [],
        lambda: {"input_ids": _tokens(60)},
        "CAUSAL_LM",
    ),
    "gpt_oss": Tiny(  # experts as (in, out)
        _gpt_oss,
        ["q_proj", "experts.gate_up_proj", "experts.down_proj"],
        [],
        lambda: {"input_ids": _tokens(60)},
        "CAUSAL_LM",
    ),
}
# Where parameters are composed that their modules use without calling a layer.
WITH_PARAMETERS = ("attention", "mixtral", "gpt_oss")


def build(name: str, seed: int = 0) -> nn.Module:
    """A model with the same random weights for the same seed, in eval mode."""
    torch.manual_seed(seed)
    return TINY[name].build().eval()


def save_lora(folder: Path, base: nn.Module, targets: list[str] | str, seed: int = 0, r: int = 4, **lora: Any) -> Path:
    """Save a LoRA for a copy of `base`, with random factors of about the size that training gives.

    Args:
        folder: where to.
        base: left as it is.
        targets: PEFT's `target_modules` and, by ends of the names of parameters, its `target_parameters`.
        seed: of the factors.
        r: rank.
        **lora: further fields of `LoraConfig`.

    Returns:
        `folder`.
    """
    if not isinstance(targets, str):
        names = [f".{name}" for name, _ in base.named_parameters()]
        parameters = [target for target in targets if any(name.endswith(f".{target}") for name in names)]
        if parameters:
            targets = [target for target in targets if target not in parameters]
            lora["target_parameters"] = parameters
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=r, target_modules=targets, **lora))
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    return folder


def save_pair(folder: Path, name: str) -> list[str]:
    """Two LoRAs for a tiny model that differ in rank, scale and targets: the second touches only the last target."""
    base, targets = build(name), TINY[name].targets
    first = save_lora(folder / "first", base, targets, seed=1, r=2, lora_alpha=8)
    second = save_lora(folder / "second", base, targets[-1:], seed=2, r=3, lora_alpha=6, use_rslora=True)
    return [str(first), str(second)]


def compose(name: str, adapters: Sequence[str], base: nn.Module | None = None, **fields: Any) -> PeftModel:
    """A composition of saved LoRAs on a tiny model, with its head among the trained modules.

    Args:
        name: of the tiny model.
        adapters: folders of LoRAs for it.
        base: the model to compose on. Default: a new one.
        **fields: further fields of `CompositionConfig`.

    Returns:
        The model, in eval mode.
    """
    fields = {"task_type": TINY[name].task_type, "modules_to_save": TINY[name].head[:] or None, **fields}
    config = CompositionConfig(adapters=list(adapters), **fields)
    return get_peft_model(build(name) if base is None else base, config)


def touched_modules(folders: Sequence[str]) -> list[str]:
    """The full names of the modules and parameters that saved LoRAs have factors for, read from their files."""
    return sorted({name for folder in folders for name in read_lora(folder)})


def name_in_base(path: str) -> str:
    """The name in the base model of a composed module or parameter, from its path in a composed model."""
    return path.replace(".base_layer", "").replace(".composed_parameters", "")


def path_of(name: str) -> str:
    """The path of a composed module or parameter in a composed model, from its name in the base model."""
    owner, _, key = name.rpartition(".")
    return f"{owner}.composed_parameters.{key}" if _is_parameter(name) else name


def base_weight(name: str) -> str:
    """The path of the base weight of a composed module or parameter in a composed model."""
    owner, _, key = name.rpartition(".")
    if _is_parameter(name):
        return f"{owner}.base_layer.{key}" + (".weight" if key == "out_proj" else "")
    return f"{name}.base_layer.weight"


def _is_parameter(name: str) -> bool:
    return name.rpartition(".")[2] in ("in_proj_weight", "out_proj", "gate_up_proj", "down_proj")


def composed_by_hand(
    base: nn.Module, folders: Sequence[str], weights: Sequence[float] | Mapping[str, Sequence[float]]
) -> nn.Module:
    """A copy of `base` with the weights W0 + sum_n w_n s_n B_n A_n, summed in float64 from the files of the LoRAs.

    Args:
        base: left as it is.
        folders: the LoRAs.
        weights: w, the same for all modules, or by module name.

    Returns:
        A plain model.
    """
    model = copy.deepcopy(base)
    for number, folder in enumerate(folders):
        for name, lora in read_lora(folder).items():
            w = (weights[name] if isinstance(weights, Mapping) else weights)[number]
            _, W, is_transposed = weight_of(model, name)
            delta = w * (lora.delta().mT if is_transposed else lora.delta())
            W.data = (W.double() + delta).to(W.dtype)
    return model


def output(model: nn.Module, name: str) -> Tensor:
    """The logits of a tiny model for its fixed input, without gradient."""
    with torch.no_grad():
        result = model(**TINY[name].inputs())
    return result if isinstance(result, Tensor) else result.logits


def randomised(adapter: Path, folder: Path, seed: int) -> Path:
    """A copy of a LoRA whose factors are noise of the same norms."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    factors = load_file(adapter / "adapter_model.safetensors")
    for key, tensor in factors.items():
        if ".lora_" in key:
            noise = torch.randn(tensor.shape, generator=generator)
            factors[key] = noise * (tensor.norm() / noise.norm())
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return folder
