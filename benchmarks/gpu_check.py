"""One run on a GPU: checks against float64, then timings and memory beside the peers; a table last, and JSON.

  python -m benchmarks.gpu_check --output gpu.json        # about 7 minutes on one 80 GB card, no network
  python -m benchmarks.gpu_check --smoke                  # tiny models, on a CPU as well

Needs torch, transformers, peft and accelerate alone, and runs from a checkout. A part that fails, or
is not done when the time is up, is reported and does not stop the others; so is a part that there is no time for.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars would fill what comes back from the machine

import torch
import transformers

from .gpu import checks, timings
from .gpu.launches import launches
from .gpu.table import table
from .gpu.timings import READ, SLOW, TRAINED, Row
from .machine import describe
from .models import Workbench
from .peers import COMPOSITION, LORA


Measure = Callable[..., Iterator[Row]]  # (workbench, N, ...) -> rows
OVERTIME = 20  # seconds after the budget at which a call that does not come back ends the run


class Report:
    """What was found, in the order of the run.

    Args:
        budget: seconds for everything.
        device: where it runs.
        output: where the JSON goes, anew after every part.
        only: if given, the beginning of the names of the parts that are run.
    """

    def __init__(self, budget: float, device: torch.device, output: Path | None, only: str = "") -> None:
        self.begin = time.monotonic()
        self.budget, self.output, self.only = budget, output, only
        self.machine = describe(device)
        self.current = ""
        self.rows: list[Row] = []
        self.failures: list[Row] = []
        self.left_out: list[str] = []

    @property
    def spent(self) -> float:
        return time.monotonic() - self.begin

    def part(self, name: str, seconds: float, run: Callable[[], Iterator[Row]]) -> None:
        """Run one part, if the budget leaves it the seconds that it needs; interrupt it when there are no more.

        Args:
            name: the model and what is done with it, as `model: what`.
            seconds: what it is expected to take.
            run: gives its rows.
        """
        if not name.startswith(self.only):
            return
        if self.spent + seconds > self.budget:
            self.left_out.append(name)
            return
        print(f"[{self.spent:.0f} s] {name}", flush=True)
        self.current = name
        signal.signal(signal.SIGALRM, _time_is_up)
        signal.setitimer(signal.ITIMER_REAL, max(1.0, self.budget - self.spent))
        try:
            for row in run():
                self.rows.append({"part": name, "model": name.partition(":")[0], **row})
        except Exception as error:  # a part that fails must not cost the others
            self.fail(name, error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.write()

    def fail(self, name: str, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error))
        print(text, flush=True)
        self.failures.append({"part": name, "error": f"{type(error).__name__}: {error}", "traceback": text})

    @property
    def document(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "seconds": self.spent,
            "rows": self.rows,
            "failures": self.failures,
            "left_out": self.left_out,
        }

    @property
    def passed(self) -> bool:
        return not self.failures and all(row.get("passed", True) for row in self.rows)

    def write(self) -> None:
        if self.output:
            self.output.write_text(json.dumps(self.document, indent=1) + "\n")

    def end(self) -> None:
        """Write the JSON and print the table."""
        self.write()
        print("\n".join(table(self.document)), flush=True)

    def end_anyway(self) -> None:
        """The end of a run whose current part hangs within a call that no signal interrupts."""
        self.fail(self.current, TimeoutError("hangs; the run was ended"))
        self.end()
        os._exit(1)


def _time_is_up(*_: object) -> None:
    raise TimeoutError("not done when the time was up")


def main() -> int:
    """Run everything; exit code 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models; also without a GPU")
    parser.add_argument("--budget", type=float, default=440, metavar="SECONDS", help="for everything; default: 440")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--only", default="", metavar="NAME", help="the parts whose names begin so; default: all")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.smoke:
        parser.error("there is no GPU; --smoke runs tiny models on the CPU")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = Report(options.budget, device, options.output, options.only)
    watchdog = threading.Timer(options.budget + OVERTIME, report.end_anyway)
    watchdog.daemon = True
    watchdog.start()
    _check(report, device)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        _measure(report, device, Path(folder), options.smoke)
    watchdog.cancel()
    report.end()
    return 0 if report.passed else 1


def _check(report: Report, device: torch.device) -> None:
    for name, run in checks.run(device):

        def rows(run: Callable[[], list[checks.Check]] = run) -> Iterator[Row]:
            for check in run():
                yield {"check": check.name, "error": check.error, "bound": check.bound, "passed": check.passed}

        report.part(f"check: {name}", 3, rows)


def _measure(report: Report, device: torch.device, folder: Path, smoke: bool) -> None:
    dtype = torch.bfloat16
    rounds, few = (2, 2) if smoke else (15, 4)
    most, *others = (5,) if smoke else (20, 5, 1, 64)
    counts = (most, *others)
    benches: dict[str, Workbench] = {}

    def bench(key: str) -> Workbench:
        if key not in benches:
            architecture = timings.architectures(smoke)[key]
            benches[key] = timings.workbench(architecture, folder / key, device, dtype)
        return benches[key]

    def add(key: str, what: str, seconds: float, run: Measure, count: int, *more: Any) -> None:
        report.part(f"{key}: {what}, N={count}", seconds, lambda: run(bench(key), count, *more))

    train, forward, decode = timings.train, timings.forward, timings.decode
    # What the goals are about comes first, in case the time runs out.
    for key in ("vit", "llama", "llama-all"):
        add(key, "train", 12, train, most, TRAINED, rounds)
        add(key, "launches", 8, launches, most)
    few_tokens = "llama-all, 64 tokens"
    report.part(
        f"{few_tokens}: train, N={most}", 12, lambda: train(timings.short(bench("llama-all")), most, TRAINED, rounds)
    )
    for key in ("llama", "llama-all"):
        add(key, "token", 8, decode, most, READ, rounds)
    for key in ("vit", "llama"):
        for count in others:
            add(key, "train", 10, train, count, TRAINED, rounds)
        for count in counts:
            add(key, "forward", 8, forward, count, READ, rounds)
    for count in others:
        add("llama", "token", 8, decode, count, READ, rounds)
    seconds = 0 if smoke else 50
    report.part("llama-8b: train", seconds, lambda: timings.eight_billion(device, dtype, folder / "8b", smoke, few))
    for count in counts:
        for key in ("llama",) if smoke else ("vit", "llama"):
            add(key, "train of peers", 1 + count, train, count, SLOW, few)  # PEFT loads adapter after adapter
            add(key, "forward of peers", 5, forward, count, SLOW, few)
        add("llama", "token of peers", 5, decode, count, SLOW, few)
    add("llama", "graphed token", 8, timings.graphed, most, (COMPOSITION, LORA), rounds)


if __name__ == "__main__":
    sys.exit(main())
