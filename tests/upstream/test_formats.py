"""LoRAs of other programs and vocabularies that grew: the error says what it is, and what it advises works.

Layouts are those that the programs write; names of files and keys were read in their sources and in public files.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_composition import AdapterError, CompositionConfig
from peft_composition.analysis.inspection import inspect_adapters

from .. import tiny
from ..reference import Reference
from .test_adapters import assert_products, compose, refuse


MLX_CONFIG = {
    "batch_size": 4,
    "fine_tune_type": "lora",
    "iters": 1000,
    "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 20.0},
    "model": "mlx-community/Llama-3.2-1B-Instruct-4bit",
    "num_layers": 16,
}
ADAPTER_HUB_CONFIG = {
    "config": {"alpha": 8, "architecture": "lora", "attn_matrices": ["q", "v"], "composition_mode": "add", "r": 4},
    "hidden_size": 16,
    "model_class": "BertAdapterModel",
    "model_name": "bert-base-uncased",
    "model_type": "bert",
    "name": "sst",
    "version": "adapters.1.0.0",
}
KOHYA_KEYS = [
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
    "lora_unet_down_blocks_0_attentions_0_proj_in.alpha",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight",
]
OF_FORMAT = {
    "MLX": "it is an MLX adapter. To convert it, save the transposes of lora_a and lora_b",
    "AdapterHub": "it is an adapter of AdapterHub's library. To convert it",
    "kohya": "it is in the format of kohya's scripts, for image models. To convert it, load it in diffusers",
    "diffusers": "it is in the format of diffusers. To convert it",
    "sharded": "its weights are sharded over several files",
    "GGUF": "it is a llama.cpp adapter (GGUF)",
    "model": "it is a whole model, not an adapter",
    "alone": "the weights of a LoRA do not contain its scale",
    "subfolder": "there are adapters in its subfolders ('checkpoint-10', 'checkpoint-20'). Choose one: ",
}


def folder_of(path: Path, config: dict[str, Any] | None, *names: str, keys: list[str] | None = None) -> Path:
    """A folder with a config, if any, and with files of some names."""
    path.mkdir()
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        save_file({key: torch.ones(2, 2) for key in keys or ["weight"]}, path / name)
    return path


@pytest.mark.parametrize(
    ("config", "names", "of_format"),
    [
        (MLX_CONFIG, ["adapters.safetensors"], "MLX"),
        (None, ["adapters.npz"], "MLX"),
        (MLX_CONFIG, ["adapter_model.safetensors"], "MLX"),
        (ADAPTER_HUB_CONFIG, ["pytorch_adapter.bin", "pytorch_model_head.bin"], "AdapterHub"),
        (ADAPTER_HUB_CONFIG, ["adapter_model.bin"], "AdapterHub"),
        (None, ["pytorch_lora_weights.safetensors"], "diffusers"),
        (None, ["pytorch_lora_weights.bin"], "diffusers"),
        (
            LoraConfig(r=4).to_dict(),
            ["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"],
            "sharded",
        ),
        (LoraConfig(r=4).to_dict(), ["adapter_model.safetensors.index.json"], "sharded"),
        (None, ["lora-Q8_0.gguf"], "GGUF"),
        (None, ["config.json", "model.safetensors"], "model"),
        (None, ["model-00001-of-00002.safetensors", "model.safetensors.index.json"], "model"),
        (None, ["pytorch_model.bin"], "model"),
        (None, ["roberta_lora.pt"], "alone"),
        (None, ["adapter_model.safetensors"], "alone"),
        (None, ["README.md", "checkpoint-10/adapter_config.json", "checkpoint-20/adapter_config.json"], "subfolder"),
    ],
    ids=lambda value: value if isinstance(value, str) else ("+".join(value) if isinstance(value, list) else ""),
)
def test_folders_of_other_programs(
    config: dict[str, Any] | None, names: list[str], of_format: str, tmp_path: Path
) -> None:
    def plain(value: object) -> object:
        return sorted(value) if isinstance(value, set) else value

    if config is not None:
        config = {key: plain(value) for key, value in config.items()}
    folder = folder_of(tmp_path / "bad", config, *names)
    refuse(tiny.build("mlp"), folder, message=OF_FORMAT[of_format])


@pytest.mark.parametrize(
    "keys", [KOHYA_KEYS, ["unet.mid_block.attentions.0.to_q.lora_A.weight"]], ids=["kohya", "diffusers"]
)
def test_weights_under_any_name_without_a_config(
    keys: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = folder_of(tmp_path / "bad", None, "my-style.safetensors", keys=keys)
    refuse(tiny.build("mlp"), folder, message=OF_FORMAT[request.node.callspec.id])


@pytest.mark.parametrize(
    ("keys", "of_format"),
    [
        (KOHYA_KEYS, "kohya"),
        (["lora_unet_single_blocks_0_linear1.lora_down.weight"], "kohya"),
        (["lycoris_down_blocks_0_attentions_0_proj_in.lokr_w1"], "kohya"),
        (["transformer.single_transformer_blocks.0.attn.to_k.lora_down.weight"], "kohya"),
        (["down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"], "diffusers"),
        (["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora.down.weight"], "diffusers"),
        (["text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.down.weight"], "diffusers"),
        (
            [f"transformer.single_transformer_blocks.0.attn.to_k.lora_{factor}.weight" for factor in "AB"],
            "diffusers",
        ),
        ([f"model.layers.0.self_attn.q_proj.lora_{factor}" for factor in "ab"], "MLX"),
        ([f"bert.encoder.layer.0.attention.self.query.loras.sst.lora_{factor}" for factor in "AB"], "AdapterHub"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_keys_of_other_programs_under_the_names_of_peft(keys: list[str], of_format: str, tmp_path: Path) -> None:
    """As people get them who write a config for what they found."""
    folder = folder_of(tmp_path / "bad", None, "adapter_model.safetensors", keys=keys)
    LoraConfig(r=2, target_modules=["to_k"]).save_pretrained(str(folder))
    refuse(tiny.build("mlp"), folder, message=OF_FORMAT[of_format])


def test_the_advice_for_mlx_gives_its_product(tmp_path: Path) -> None:
    """MLX computes scale * (x @ lora_a) @ lora_b."""
    base, rank, scale = tiny.build("mlp").double(), 4, 20.0
    lora_a, lora_b = torch.randn(10, rank), torch.randn(rank, 20)
    folder = tmp_path / "converted"
    LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=["lin0"]).save_pretrained(str(folder))
    factors = {"A": lora_a, "B": lora_b}
    save_file(
        {f"base_model.model.lin0.lora_{name}.weight": t.T.contiguous() for name, t in factors.items()},
        folder / "adapter_model.safetensors",
    )
    model = compose(base, folder).base_model.model
    x = torch.randn(3, 10, dtype=torch.float64)
    expected = base.lin0.base_layer(x) + 0.75 * scale * (x @ lora_a.double()) @ lora_b.double()
    assert torch.allclose(model.lin0(x), expected, rtol=1e-12)


def test_the_advice_for_adapter_hub_gives_its_product(tmp_path: Path) -> None:
    """Its LoRA is alpha / r * B A, with factors in PEFT's shapes (A: (r, in), B: (out, r))."""
    base, settings = tiny.build("mlp").double(), ADAPTER_HUB_CONFIG["config"]
    stored = {"lin0.loras.sst.lora_A": torch.randn(4, 10), "lin0.loras.sst.lora_B": torch.randn(20, 4)}
    folder = tmp_path / "converted"
    config = LoraConfig(r=settings["r"], lora_alpha=settings["alpha"], target_modules=["lin0"])
    config.save_pretrained(str(folder))
    save_file(
        {f"base_model.model.{key.replace('.loras.sst', '')}.weight": t for key, t in stored.items()},
        folder / "adapter_model.safetensors",
    )
    A, B = (t.double() for t in stored.values())
    found = compose(base, folder).base_model.model.lin0.get_delta_weight("default")
    assert torch.allclose(found, 0.75 * 8 / 4 * B @ A, rtol=1e-12)


def test_the_advice_for_shards_gives_the_adapter(tmp_path: Path) -> None:
    base = tiny.build("mlp").double()
    folder = tiny.save_lora(tmp_path / "bad", base, ["lin0", "lin1"])
    reference = Reference(base, [folder])
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    shards = [folder / f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for shard, keys in zip(shards, ([*tensors][:1], [*tensors][1:])):
        save_file({key: tensors[key] for key in keys}, shard)
    refuse(base, folder, message=OF_FORMAT["sharded"])
    save_file(
        {key: t for shard in shards for key, t in load_file(shard).items()}, folder / "adapter_model.safetensors"
    )
    assert_products(compose(base, folder), reference)


def test_the_advised_subfolder_composes(tmp_path: Path) -> None:
    """PEFT saves an adapter of another name than "default" in a folder of that name."""
    base = tiny.build("mlp").double()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "README.md").write_text("# Adapter")
    inner = tiny.save_lora(tmp_path / "bad" / "sst", base, ["lin0"])
    reference = Reference(base, [inner])
    advice = '{"path": ..., "subfolder": "sst"}'
    refuse(base, tmp_path / "bad", message=f"there are adapters in its subfolders ('sst'). Choose one: {advice}")
    assert_products(compose(base, {"path": tmp_path / "bad", "subfolder": "sst"}), reference)


def test_the_advised_subfolder_of_a_subfolder_composes(tmp_path: Path) -> None:
    """Of the last folder alone it was advised, which the repository does not have."""
    base = tiny.build("mlp").double()
    inner = tiny.save_lora(tmp_path / "repository" / "runs" / "last", base, ["lin0"])
    path = tmp_path / "repository"
    advice = f'Choose one: {{"path": "{path}", "subfolder": "runs/last"}}'
    refuse(base, {"path": path, "subfolder": "runs"}, message=advice)
    reference = Reference(base, [inner])
    assert_products(compose(base, {"path": path, "subfolder": "runs/last"}), reference)


def test_a_folder_that_hides_a_repository_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.build("mlp").double()
    monkeypatch.chdir(tmp_path)
    Path("org/repo").mkdir(parents=True)
    refuse(base, "org/repo", message="; org is a folder here, so the Hub was not asked: for the Hub's org/repo run")
    with pytest.raises(AdapterError) as caught:
        compose(base, tmp_path / "org")
    assert "is a folder here" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a Git LFS pointer, not the file"),
        (b"<!doctype html>\n<html>", "is a web page, not the file itself"),
    ],
    ids=["Git LFS", "web page"],
)
def test_something_else_in_place_of_the_config(content: bytes, message: str, tmp_path: Path) -> None:
    folder = tiny.save_lora(tmp_path / "bad", tiny.build("mlp"), ["lin0"])
    (folder / "adapter_config.json").write_bytes(content)
    refuse(tiny.build("mlp"), folder, message=f"{folder}/adapter_config.json {message}")


# Vocabularies


class Causal(nn.Module):
    """An embedding, a layer and an output layer, by the names of causal language models."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, 12)
        self.lin = nn.Linear(12, 12)
        self.lm_head = nn.Linear(12, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.lin(self.embed_tokens(input_ids)).tanh())


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize(("trained", "used", "when"), [(44, 40, "when"), (40, 44, "since")], ids=["then", "since"])
def test_a_vocabulary_that_was_enlarged(module: str, trained: int, used: int, when: str, tmp_path: Path) -> None:
    folder = tiny.save_lora(tmp_path / "bad", Causal(trained), [module, "lin"])
    base = Causal(used).double()
    message = (
        f"Its vocabulary has {trained} entries, not {used}: the model's vocabulary was enlarged {when} the adapter"
    )
    refuse(base, folder, message=message)

    # Both ways out that it names.
    left = compose(copy.deepcopy(base), folder, exclude_modules=[module])
    assert list(left.peft_config["default"].composed_modules) == ["lin"]
    assert_products(compose(Causal(trained).double(), folder), Reference(Causal(trained).double(), [folder]))


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_adapters_with_different_vocabularies_side_by_side(module: str, tmp_path: Path) -> None:
    """Without a base model they are compared with each other."""
    folders = [
        tiny.save_lora(tmp_path / str(number), Causal(vocabulary), [module, "lin"])
        for number, vocabulary in enumerate([40, 40, 44])
    ]
    reports = inspect_adapters(CompositionConfig(adapters=folders).references)
    assert [report.is_composable for report in reports] == [True, True, False]
    assert "Its vocabulary has 44 entries, not 40" in str(reports[2].reason)


def test_another_width_is_another_model(tmp_path: Path) -> None:
    """Not taken for another vocabulary."""
    wide = Causal(44)
    wide.embed_tokens = nn.Embedding(44, 16)
    folder = tiny.save_lora(tmp_path / "bad", wide, ["embed_tokens"])
    refuse(Causal(40), folder, message="Was it trained on another base model?")
