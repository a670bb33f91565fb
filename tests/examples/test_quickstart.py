"""The demo runs from end to end in a process of its own, offline."""

from __future__ import annotations

import json
from pathlib import Path

from .. import warm


SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_demo_prints_its_table_and_reloads_bit_for_bit(tmp_path: Path) -> None:
    done = warm.run(SCRIPT, "--smoke", "--output", tmp_path, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "weights by evidence" in done.stdout
    assert "5 adapters on 10 examples" in done.stdout  # the table of scores
    assert "bit for bit the same (largest difference 0)" in done.stdout
    results = json.loads((tmp_path / "r.json").read_text())
    assert {"head only", "fresh LoRA", "uniform composition", "learned composition", "weights by evidence"} <= set(
        results["accuracies"]
    )
    assert [set(weights) for weights in results["mixing_weights"]] == [
        {"amazon", "length", "origin", "oneself", "comma"}
    ] * 2
    saved = json.loads((tmp_path / "composed" / "adapter_config.json").read_text())
    assert saved["weights"] == list(results["mixing_weights"][0].values())
    assert (tmp_path / "composed" / "adapter_model.safetensors").is_file()
