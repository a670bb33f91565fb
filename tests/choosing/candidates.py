"""Many small LoRAs for a tiny BERT, a few of which separate two kinds of sentences, and others broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import tiny


BROKEN = ("dora", "no-weights", "other-shape", "not-finite")


def base() -> nn.Module:
    return tiny.build("bert").eval()


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences of two classes, which share most of their words."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(1, 60, (9,), generator=generator)
        ids[3] = 7 if number % 2 else 11
        found.append({"input_ids": ids, "labels": number % 2})
    return found


def save_pool(folder: Path, good: int, broken: bool = True) -> list[str]:
    """Adapters named 000, 001, ... and those that are broken; returns their folders."""
    model = base()
    for number in range(good):
        tiny.save_lora(
            folder / f"{number:03}", model, ["query", "value"], seed=number + 1, r=2, lora_alpha=2 + number % 7
        )
    if broken:
        for name in BROKEN:
            tiny.save_lora(folder / name, model, ["query", "value"], seed=99, r=2)
        config = json.loads((folder / "dora" / "adapter_config.json").read_text())
        (folder / "dora" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
        (folder / "no-weights" / "adapter_model.safetensors").unlink()
        shutil.rmtree(folder / "other-shape")
        tiny.save_lora(folder / "other-shape", tiny.build("llama"), ["q_proj"], seed=1, r=2)
        from safetensors.torch import load_file, save_file

        file = folder / "not-finite" / "adapter_model.safetensors"
        save_file({key: value * torch.nan for key, value in load_file(file).items()}, file)
    return sorted(str(path) for path in folder.iterdir() if path.is_dir())
