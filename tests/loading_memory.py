"""Measures the memory that loading takes, in a process of its own: `python -m tests.loading_memory FOLDER CASE...`.

Prints for each case the bytes of the loaded factors, and by how much resident memory rose at most and in the end.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from peft_composition import CompositionConfig


ADAPTERS, RANK, LAYERS, WIDTH = 20, 16, 48, 1024


def build(dtype: torch.dtype) -> nn.Module:
    """Some large linear layers."""
    return nn.ModuleDict({f"lin{n}": nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for n in range(LAYERS)})


def adapters(folder: Path) -> list[str]:
    return [str(folder / f"adapter-{n}") for n in range(ADAPTERS)]


def write(folder: Path) -> None:
    """Adapters as safetensors and as pickles, and their compositions in float32 and bfloat16."""
    targets = [f"lin{n}" for n in range(LAYERS)]
    for number in range(ADAPTERS):
        tensors = {}
        for target in targets:
            tensors[f"base_model.model.{target}.lora_A.weight"] = torch.randn(RANK, WIDTH)
            tensors[f"base_model.model.{target}.lora_B.weight"] = torch.randn(WIDTH, RANK)
        for kind in ("safetensors", "pickled"):
            path = folder / kind / f"adapter-{number}"
            LoraConfig(r=RANK, lora_alpha=32, target_modules=targets).save_pretrained(str(path))
            if kind == "safetensors":
                save_file(tensors, path / "adapter_model.safetensors")
            else:
                torch.save(tensors, path / "adapter_model.bin")
    for dtype in (torch.float32, torch.bfloat16):
        config = CompositionConfig(adapters=adapters(folder / "safetensors"))
        get_peft_model(build(dtype), config).save_pretrained(str(folder / f"composed-{dtype.itemsize}"))


def kilobytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def measure(load: Callable[[nn.Module], nn.Module], dtype: torch.dtype) -> dict[str, int]:
    base = build(dtype)
    gc.collect()
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    model = load(base)
    rise = {"peak": kilobytes("VmHWM") - before, "end": kilobytes("VmRSS") - before}
    factors = [p for name, p in model.named_parameters() if "composition_factors" in name]
    assert {p.dtype for p in factors} == {dtype}
    assert not any(p.is_meta for p in factors)
    return {"factors": sum(p.nbytes for p in factors), **{key: 1024 * value for key, value in rise.items()}}


def loading(folder: Path, case: str) -> Callable[[nn.Module], nn.Module]:
    way, _, kind = case.partition(" ")
    if way == "compose":
        config = CompositionConfig(adapters=adapters(folder / ("pickled" if "pickled" in kind else "safetensors")))
        return lambda base: get_peft_model(base, config)
    saved = folder / f"composed-{dtype_of(case).itemsize}"
    return lambda base: PeftModel.from_pretrained(base, str(saved), low_cpu_mem_usage="low_cpu_mem_usage" in kind)


def dtype_of(case: str) -> torch.dtype:
    return torch.bfloat16 if "bfloat16" in case else torch.float32


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    config = CompositionConfig(adapters=adapters(folder / "safetensors")[:1], target_modules=["lin0"])
    get_peft_model(build(torch.float32), config)  # what is imported and started on first use is not counted
    print(json.dumps({case: measure(loading(folder, case), dtype_of(case)) for case in cases}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
