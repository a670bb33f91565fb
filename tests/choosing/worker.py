"""A selection in a process of a group, which can be killed:

torchrun --nproc_per_node 2 -m tests.choosing.worker <pool> <log> <out> [<dies after>]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from peft_composition.choosing import adapters_in, select_adapters
from peft_composition.choosing.journal import Journal

from . import candidates


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


def main(pool: str, log: str, out: str, dies_after: int = 0) -> None:
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank() if dist.is_initialized() else 0
    if dies_after and rank == 0:
        write, count = Journal.add, [0]

        def add(self: Journal, *line: object) -> None:
            write(self, *line)  # type: ignore[arg-type]
            count[0] += 1
            if count[0] == dies_after:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.add = add  # type: ignore[method-assign]
    if dies_after < 0 and rank == 1:  # as if its disk was full
        Journal.add = refuse  # type: ignore[method-assign]
    try:
        found = select_adapters(
            candidates.base(), adapters_in(pool), candidates.rows(40), log=log or None, progress=False
        )
    except Exception as error:
        Path(f"{out}.{rank}").write_text(f"{type(error).__name__}: {error}")
        if dist.is_initialized():
            dist.barrier()  # it did not leave the others waiting
        return
    if rank == 0:
        Path(out).write_text(json.dumps(found.as_json()))
        Path(f"{out}.passed").write_text(str(found.passed))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
