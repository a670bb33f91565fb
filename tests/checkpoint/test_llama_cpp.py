"""An export read by llama.cpp itself; runs where llama-cpp-python is installed and its source is at hand.

Set LLAMA_CPP to the folder `vendor/llama.cpp` of llama-cpp-python's source package: the converter is not in its wheel.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from packages import default_cache_dir
from peft import get_peft_model
from smollm2 import NAME, model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_composition import CompositionConfig, to_lora

from .. import tiny


llama_cpp = pytest.importorskip("llama_cpp")
F32 = 0  # ggml_type of the key-value cache, which is float16 by default
SOURCE = os.environ.get("LLAMA_CPP", "")
pytestmark = pytest.mark.skipif(not Path(SOURCE, "convert_lora_to_gguf.py").is_file(), reason="LLAMA_CPP is not set")


def converted(script: str, source: Path, target: Path, *arguments: str | Path) -> Path:
    command = [sys.executable, Path(SOURCE, script), source, "--outfile", target, "--outtype", "f32", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


@pytest.fixture(scope="module")
def base_folder() -> Path:
    return model_folder(default_cache_dir())


@pytest.fixture(scope="module")
def base_gguf(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted("convert_hf_to_gguf.py", base_folder, tmp_path_factory.mktemp("gguf") / f"{NAME}.gguf")


def logits_of(base: Path, lora: Path | None, ids: list[int]) -> np.ndarray:
    """Logits of all positions as llama.cpp computes them."""
    path = None if lora is None else str(lora)
    llama = llama_cpp.Llama(
        str(base),
        lora_path=path,
        logits_all=True,
        verbose=False,
        n_ctx=64,
        n_threads=1,
        n_batch=64,
        type_k=F32,
        type_v=F32,
    )
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)])


def test_logits_are_those_of_the_composition(base_folder: Path, base_gguf: Path, tmp_path: Path) -> None:
    """Adapters of ranks 4 and 8 on different modules: llama.cpp divides one alpha by the rank of every tensor."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    first = tiny.save_lora(tmp_path / "a", base, ["q_proj", "v_proj"], seed=1, r=4, lora_alpha=8)
    second = tiny.save_lora(tmp_path / "b", base, ["v_proj", "down_proj"], seed=2, r=8, lora_alpha=8)
    ids = AutoTokenizer.from_pretrained(base_folder)("Adapters that were trained for other tasks")["input_ids"]

    def logits(model: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].double().numpy()

    plain = logits(base)
    config = CompositionConfig(
        adapters=[str(first), str(second)], mixing="fixed", weights=[0.7, 0.3], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).eval()
    composed = logits(model)
    rounding = np.abs(logits_of(base_gguf, None, ids) - plain).max()  # what both runtimes differ by without a LoRA
    effect = np.abs(composed - plain).max()
    assert effect > 100 * rounding, (effect, rounding)

    off = {}
    for one_rank in (True, False):
        with pytest.warns(UserWarning, match=r"llama\.cpp") if not one_rank else nullcontext():
            export = to_lora(model, one_rank=one_rank)
        export.save_pretrained(tmp_path / f"{one_rank}")
        lora = converted(
            "convert_lora_to_gguf.py", tmp_path / f"{one_rank}", tmp_path / f"{one_rank}.gguf", "--base", base_folder
        )
        off[one_rank] = np.abs(logits_of(base_gguf, lora, ids) - composed).max()
    print(
        f"effect {effect:.3g}, rounding {rounding:.3g}, off with one rank {off[True]:.3g}, with own {off[False]:.3g}"
    )
    assert off[True] < 5 * rounding
    assert off[False] > 0.1 * effect  # what the warning is about
