"""Measures peft-composition and its peers side by side, in the same process and in interleaved rounds.

  train     one training step: time, bytes saved for backward, peak memory; relative to LoRA
  forward   one forward pass without gradient; relative to the base model
  generate  greedy generation with a KV cache; relative to the base model
  linear    one linear layer on 1 to 512 tokens; relative to the base layer
  load      adapters into a model, saving it, loading that again; relative to this library
  export    a composition as one LoRA of rank 16; relative to this library
  all       every table, then report
  report    results -> Markdown and plots, and the block of docs/concepts/performance.md

Each table is written to <out>/<table>-<device>.json. A GPU is used where there is one, with bfloat16 and CUDA events,
and N = 256 is added there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from .report import around_block, write_report
from .results import UsageError


# Before torch is imported: its profiler reports on standard error that there is no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "concepts" / "performance.md"
TABLES = ("train", "forward", "generate", "linear", "load", "export")
MODELS = ("vit", "t5", "llama", "tiny-vit", "tiny-llama")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=[*TABLES, "all", "report"])
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: depends on the table")
    parser.add_argument("--adapters", nargs="+", type=_positive, metavar="N", help="default: depends on the table")
    parser.add_argument(
        "--peers", nargs="+", metavar="PEER", help="default: all of the table; its reference always runs"
    )
    parser.add_argument("--repeats", type=_positive, metavar="ROUNDS", help="default: 3 to 11, by table and model")
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="leave out peers whose training step would take more than this; default: 70%% of what is free",
    )
    parser.add_argument(
        "--add", action="store_true", help="keep what the table has from earlier runs on this machine, case by case"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="the file whose block is replaced; default: %(default)s"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main() -> int:
    """Run the chosen tables."""
    parser = _parser()
    options = parser.parse_args()
    try:
        if options.table in ("all", "report"):
            around_block(options.page)  # before half an hour of measuring, not after it
        if options.table != "report":
            from .run import run_tables  # imports torch, which a report does not need

            with tempfile.TemporaryDirectory() as folder:
                run_tables(TABLES if options.table == "all" else [options.table], options, Path(folder))
        if options.table in ("all", "report"):
            written = write_report(options.out, options.page)
            print("Wrote " + ", ".join(path.name for path in written))
    except UsageError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
