"""One run on a GPU: checks against float64, then timings and memory beside the peers; a table last, and JSON.

  python -m benchmarks.gpu_check --output gpu.json        # about 7 minutes on one 80 GB card, no network
  python -m benchmarks.gpu_check --smoke                  # tiny models, on a CPU as well

Needs torch, transformers, peft and accelerate alone, and runs from a checkout. A part that fails is reported and does not
stop the others; parts that the budget leaves no time for are reported as left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch  # noqa: E402  (the environment comes first)

from .gpu import checks, timings  # noqa: E402
from .gpu.timings import READ, SLOW, TRAINED, Row  # noqa: E402
from .machine import describe  # noqa: E402
from .models import Workbench  # noqa: E402
from .peers import COMPOSITION, LORA  # noqa: E402


STEP_GOAL, MEMORY_GOAL = 1.10, 1.05  # of LoRA's, with N = 20 in bf16


class Report:
    """What was found, in the order of the run."""

    def __init__(self, budget: float) -> None:
        self.begin = time.monotonic()
        self.budget = budget
        self.rows: list[Row] = []
        self.failures: list[Row] = []
        self.left_out: list[str] = []

    def part(self, name: str, seconds: float, run: Callable[[], Iterator[Row]]) -> None:
        """Run one part, if the budget leaves it the seconds that it needs."""
        spent = time.monotonic() - self.begin
        if spent + seconds > self.budget:
            self.left_out.append(name)
            return
        print(f"[{spent:.0f} s] {name}", flush=True)
        try:
            for row in run():
                self.rows.append({"part": name, **row})
        except Exception as error:  # a part that fails must not cost the others
            text = traceback.format_exc()
            print(text, flush=True)
            self.failures.append({"part": name, "error": f"{type(error).__name__}: {error}", "traceback": text})


def main() -> int:
    """Run everything; exit code 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models; also without a GPU")
    parser.add_argument("--budget", type=float, default=420, metavar="SECONDS", help="for everything; default: 420")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.smoke:
        parser.error("there is no GPU; --smoke runs tiny models on the CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = Report(options.budget)
    _check(report, device)
    with tempfile.TemporaryDirectory() as folder:
        _measure(report, device, Path(folder), options.smoke)
    document = {
        "machine": describe(device),
        "seconds": time.monotonic() - report.begin,
        "rows": report.rows,
        "failures": report.failures,
        "left_out": report.left_out,
    }
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    _print(document)
    return 1 if report.failures or any(not row.get("passed", True) for row in report.rows) else 0


def _check(report: Report, device: torch.device) -> None:
    for name, run in checks.run(device):

        def rows(run: Callable[[], list[checks.Check]] = run) -> Iterator[Row]:
            for check in run():
                yield {"check": check.name, "error": check.error, "bound": check.bound, "passed": check.passed}

        report.part(name, 5, rows)


def _measure(report: Report, device: torch.device, folder: Path, smoke: bool) -> None:
    dtype = torch.bfloat16
    rounds = 2 if smoke else 15
    counts = (1, 5) if smoke else (20, 5, 1, 64)
    benches: dict[str, Workbench] = {}

    def bench(key: str) -> Workbench:
        if key not in benches:
            benches.clear()  # one model at a time
            benches[key] = timings.workbench(
                timings.architectures(smoke)[key], folder / f"{key}-{len(report.rows)}", device, dtype
            )
        return benches[key]

    for key in ("vit", "llama"):
        for count in counts:
            report.part(
                f"{key}: train, N={count}", 10, lambda k=key, n=count: timings.train(bench(k), n, TRAINED, rounds)
            )
        for count in counts:
            report.part(
                f"{key}: forward, N={count}", 8, lambda k=key, n=count: timings.forward(bench(k), n, READ, rounds)
            )
        report.part(f"{key}: waits, N=20", 8, lambda k=key: timings.synchronisations(bench(k), counts[0]))
        if key == "llama":
            for count in counts:
                report.part(
                    f"{key}: token, N={count}", 8, lambda n=count: timings.decode(bench("llama"), n, READ, rounds)
                )
    benches.clear()
    report.part(
        "8B", 60 * (not smoke), lambda: timings.eight_billion(device, dtype, folder / "8b", smoke, 2 if smoke else 5)
    )
    for key, most in (("vit", 20), ("llama", 5)):
        for count in (5, 20):
            if count <= most and count in counts:
                report.part(
                    f"{key}: train of slow peers, N={count}",
                    25,
                    lambda k=key, n=count: timings.train(bench(k), n, SLOW, 2 if smoke else 5),
                )


def _print(document: dict[str, Any]) -> None:
    """The table, short enough to be all that comes back."""
    rows, line = document["rows"], "{:34} {:>3} {:22} {:>9} {:>6} {:>9} {:>9}".format
    failed = [row for row in rows if not row.get("passed", True)]
    total = [row for row in rows if "passed" in row]
    print(f"\nchecks: {len(total) - len(failed)} of {len(total)} passed")
    for row in failed:
        print(f"  FAILED {row['part']}: {row['check']}: {row['error']:.3g} > {row['bound']:.3g}")
    worst = {}
    for row in total:
        if row["bound"]:
            share = row["error"] / row["bound"]
            worst[row["check"]] = max(share, worst.get(row["check"], 0.0))
    print("largest error / bound: " + ", ".join(f"{name} {share:.2f}" for name, share in worst.items()))
    print(line("what", "N", "peer", "ms", "ratio", "saved MB", "peak MB"))
    for row in rows:
        if "peer" in row:
            numbers = [row.get(key) for key in ("ms", "ratio", "saved_mb", "peak_mb")]
            shown = ["" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}" for value in numbers]
            what = f"{row['part'].partition(':')[0]} {row['what']}"
            extra = {
                key: row[key] for key in ("waits_of_ours", "waits_of_others", "kernels", "operators") if key in row
            }
            print(line(what[:34], row["N"], row["peer"][:22], *shown), *(f"{k}={v}" for k, v in extra.items()))
    for row in document["failures"]:
        print(f"FAILED {row['part']}: {row['error'][:200]}")
    print("left out: " + (", ".join(document["left_out"]) or "nothing"))
    for text in _goals(rows):
        print(text)
    print(f"{document['machine'].get('device', '')} {document['seconds']:.0f} s")


def _goals(rows: list[Row]) -> Iterator[str]:
    for key in ("vit", "llama"):
        found = {row["peer"]: row for row in rows if row["part"] == f"{key}: train, N=20" and "ratio" in row}
        if {COMPOSITION.title, LORA.title} <= found.keys():
            step = found[COMPOSITION.title]["ratio"]
            memory = found[COMPOSITION.title]["peak_mb"] / found[LORA.title]["peak_mb"]
            for what, value, goal in (("step", step, STEP_GOAL), ("memory", memory, MEMORY_GOAL)):
                met = "met" if value <= goal else "NOT met"
                yield f"goal {key} N=20 {what}: {value:.3f} of LoRA's, at most {goal:.2f}: {met}"


if __name__ == "__main__":
    sys.exit(main())
