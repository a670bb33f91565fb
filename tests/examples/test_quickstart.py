"""The demo runs from end to end in a process of its own, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_demo_prints_its_table_and_reloads_bit_for_bit(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--smoke", "--output", str(tmp_path), "--json", str(tmp_path / "r.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "learned composition" in done.stdout
    assert "bit for bit the same (largest difference 0)" in done.stdout
    results = json.loads((tmp_path / "r.json").read_text())
    assert {"head only", "fresh LoRA", "uniform composition", "learned composition"} <= set(results["accuracies"])
    assert (tmp_path / "composed" / "adapter_model.safetensors").is_file()
