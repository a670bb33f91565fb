"""Recognises LoRAs of other programs, and files that are not LoRAs, and says how to turn them into PEFT adapters.

It goes by file names, by a config, or by the keys of the weights; nothing is converted here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..text import in_python


MLX = (
    "it is an MLX adapter. To convert it, save the transposes of lora_a and lora_b as "
    "base_model.model.<module>.lora_A.weight and .lora_B.weight, beside a LoraConfig with r = rank and "
    "lora_alpha = scale * rank"
)
ADAPTER_HUB = (
    "it is an adapter of AdapterHub's library. To convert it, save <module>.loras.<name>.lora_A as "
    "base_model.model.<module>.lora_A.weight, lora_B likewise, beside a LoraConfig with its r and lora_alpha = alpha"
)
_THROUGH_DIFFUSERS = (
    "To convert it, load it in diffusers with pipe.load_lora_weights(..., adapter_name='a'), and for each model of "
    "the pipeline save get_peft_model_state_dict(pipe.unet, adapter_name='a') beside pipe.unet.peft_config['a']"
)
KOHYA = f"it is in the format of kohya's scripts, for image models. {_THROUGH_DIFFUSERS}"
DIFFUSERS = f"it is in the format of diffusers. {_THROUGH_DIFFUSERS}"
SHARDED = (
    "its weights are sharded over several files, which PEFT cannot read either. Merge them into one file: load the "
    f"tensors of all shards and call safetensors.torch.save_file(tensors, '{SAFETENSORS_WEIGHTS_NAME}')"
)
GGUF = "it is a llama.cpp adapter (GGUF). Give the PEFT adapter that it was converted from"
WHOLE_MODEL = (
    "it is a whole model, not an adapter. To turn its difference from the base model into a LoRA, use for example "
    "mergekit-extract-lora"
)
WEIGHTS_ALONE = (
    "the weights of a LoRA do not contain its scale. If they are in PEFT's format (keys end with lora_A.weight), save "
    "the config of its training beside them, LoraConfig(r=..., lora_alpha=..., target_modules=[...])"
    f".save_pretrained(folder), and name the file {SAFETENSORS_WEIGHTS_NAME}"
)
LFS_POINTER = (
    "is a Git LFS pointer, not the file itself: the repository was cloned without git-lfs. Run `git lfs install` and "
    "`git lfs pull` in it, or download it with `hf download`"
)
WEB_PAGE = (
    "is a web page, not the file itself. Download the file with `hf download`, or from its address with /resolve/ "
    "instead of /blob/"
)
_SHARD = re.compile(r"^adapter_model(-\d+-of-\d+\.(safetensors|bin)|\.(safetensors|bin)\.index\.json)$")
_MODEL = re.compile(r"^(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$")
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt)$")
_KOHYA_KEY = re.compile(r"^(lora_(unet|te\d?|transformer)|lycoris)_|\.lora_(down|up|mid)\.weight$")
_DIFFUSERS_KEY = re.compile(
    r"[._]lora\.(down|up)\.weight$|\.lora_linear_layer\.|^(unet|text_encoder(_\d)?)\.|^transformer\..*transformer_blocks\."
)
_NAMES_SHOWN = 3
ENOUGH_BYTES = 256


def of_files(names: Collection[str], inside: tuple[str, str] | None = None) -> str | None:
    """Recognise a folder without PEFT's two files.

    Args:
        names: the relative paths of its files; those in subfolders may be missing.
        inside: the path and the subfolder, if it is one of these.

    Returns:
        What it is and what to do; None if it is unknown.
    """
    adapters = sorted(name.removesuffix(f"/{CONFIG_NAME}") for name in names if name.endswith(f"/{CONFIG_NAME}"))
    if adapters and CONFIG_NAME not in names:
        path, parent = ("...", "") if inside is None else (in_python(inside[0]), f"{inside[1]}/")
        return (
            f"there are adapters in its subfolders ({_some(adapters)}). Choose one: "
            f'{{"path": {path}, "subfolder": {in_python(parent + adapters[0])}}}'
        )
    files = {name for name in names if "/" not in name}
    if files & {"adapters.safetensors", "adapters.npz"}:
        return MLX
    if "pytorch_adapter.bin" in files:
        return ADAPTER_HUB
    if files & {"pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"}:
        return DIFFUSERS
    if any(map(_SHARD.match, files)):
        return SHARDED
    if any(name.endswith(".gguf") for name in files):
        return GGUF
    if any(map(_MODEL.match, files)):
        return WHOLE_MODEL
    weights = sorted(name for name in files if _WEIGHTS.search(name))
    return f"of {_some(weights)}: {WEIGHTS_ALONE}" if weights and CONFIG_NAME not in files else None


def of_config(config: Mapping[str, Any]) -> str | None:
    """What an `adapter_config.json` without a `peft_type` describes; None if it is unknown."""
    if config.keys() & {"fine_tune_type", "lora_parameters", "lora_layers"}:
        return MLX
    inner = config.get("config")
    if isinstance(inner, Mapping) and "architecture" in inner:
        return ADAPTER_HUB
    return None


def of_keys(keys: Iterable[str]) -> str | None:
    """The format that the keys of some weights are in; None if it is unknown."""
    for key in keys:
        if _KOHYA_KEY.search(key):
            return KOHYA
        if _DIFFUSERS_KEY.search(key):
            return DIFFUSERS
        if key.endswith((".lora_a", ".lora_b")):
            return MLX
        if ".loras." in key:
            return ADAPTER_HUB
    return None


def without_factors(keys: Collection[str]) -> str:
    """Why weights with these keys are not a LoRA."""
    if not keys:
        return (
            "its weights file holds no tensors. Some old training scripts replaced model.state_dict, after which "
            "save_pretrained wrote nothing: save it again from a training checkpoint"
        )
    shown = f"they are {_some(sorted(keys))}"
    return f"its weights hold no LoRA factors: {of_keys(keys) or f'none of their {len(keys)} keys is one, {shown}'}"


def placeholder(start: bytes) -> str | None:
    """What was stored instead of a file's content, if so; continues a sentence that begins with the file's name.

    Args:
        start: at least the first `ENOUGH_BYTES` of the file.
    """
    if start.startswith(b"version https://git-lfs"):
        return LFS_POINTER
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return WEB_PAGE
    return None if start else "is empty: a download or a save was interrupted"


def _some(names: Collection[str]) -> str:
    shown = ", ".join(repr(name) for name in [*names][:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown}, ... {len(names)} in all"
