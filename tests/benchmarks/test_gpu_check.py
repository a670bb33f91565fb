"""The script that is run on a GPU, in its smoke mode: it must not rot between two runs there."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.gpu.checks import Check

from .. import warm


ROOT = Path(__file__).resolve().parents[2]


def test_smoke_run_passes_its_checks_and_measures_every_part(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = warm.run("-m", "benchmarks.gpu_check", "--smoke", "--output", output)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    document = json.loads(output.read_text())
    assert document["failures"] == document["left_out"] == []
    checked = {row["part"].removeprefix("check: ") for row in document["rows"] if "passed" in row}
    forms = {f"forms {dtype} N={count}" for dtype in ("float32", "bfloat16", "float16") for count in (1, 5, 64)}
    others = {"no stale folds", "torch.compile", "DataParallel", "Trainer", "gradient bit for bit", "two compositions"}
    assert forms | others <= checked
    timed = {(row["what"], row["peer"]) for row in document["rows"] if "ms" in row}
    for what in ("training step", "forward pass", "token with KV cache", "training step, checkpointed"):
        assert {(what, "composition"), (what, "LoRA")} <= timed
    assert {("training step", "PEFT, N active"), ("training step", "plain loop")} <= timed
    assert {("training step", "frozen base"), ("token, CUDA graph", "composition")} <= timed
    assert "left out: nothing" in done.stdout


def test_check_fails_on_what_is_no_number() -> None:
    assert Check("", 1e-7, 1e-6).passed
    assert not Check("", 2e-6, 1e-6).passed
    assert not Check("", float("nan"), 1e-6).passed


def test_formula_sees_a_wrong_weight(tmp_path: Path) -> None:
    """The reference is no copy of what it checks: another mix is another output."""
    from benchmarks.gpu.checks import Bench, error_of, thetas

    bench = Bench(tmp_path, torch.device("cpu"))
    model = bench.compose(3).eval()
    expected, _, _ = bench.formula(model, 3)
    with torch.no_grad():
        assert error_of(bench.output(model), expected) < 1e-6
        next(iter(thetas(model).values()))[0] += 0.01
        assert error_of(bench.output(model), expected) > 1e-4
