"""What runs in every process of `test_processes.py`; by hand:

    torchrun --nproc_per_node 2 -m tests.evidence.worker <folder>

Each process leaves what came out in `<folder>/rank<rank>.pt`.
"""

from __future__ import annotations

import faulthandler
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from peft_composition import fit_mixing_weights, mixing_weights, score_adapters
from peft_composition.sharding import shard

from .. import tiny


SECONDS = 200
TOKENS = torch.randint(1, 60, (12, 9), generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 1] * 6)


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": int(label)} for ids, label in zip(TOKENS, CLASSES)]


def model_of(folder: Path) -> Any:
    return tiny.compose("bert", [str(folder / "first"), str(folder / "second")])


def table(model: nn.Module, data: Any) -> list[tuple[str, float, float, float, float]]:
    return [
        (row.name, row.score, row.low, row.high, row.accuracy) for row in score_adapters(model, data, batch_size=5)
    ]


def weights(model: nn.Module, data: Any) -> dict[str, Any]:
    report = fit_mixing_weights(model, data, batch_size=5)
    return {"report": report.weights, "model": mixing_weights(getattr(model, "module", model))}


def chosen(folder: Path) -> dict[str, Any]:
    """Weights by who chooses best among two answers, and the table."""
    own = folder / "answers"
    model = tiny.compose("llama", [str(own / "first"), str(own / "second")])
    ends = torch.tensor([[7], [8]])[CLASSES]  # (examples, 1)
    data = [
        {"input_ids": ids, "labels": torch.where(torch.arange(10) < 9, -100, ids)}
        for ids in torch.cat([TOKENS, ends], 1).split(5)
    ]
    report = fit_mixing_weights(model, data, method="choices")
    rows = [(row.name, row.score, row.low, row.high, row.accuracy) for row in report.scores or ()]
    return {"report": report.weights, "dropped": report.dropped, "model": mixing_weights(model), "table": rows}


def shuffled(rank: int) -> DataLoader:
    """A loader with another order in every process."""
    return DataLoader(rows(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(rank))


def counted(folder: Path) -> int:
    """How many batches of three the model is called with."""
    model, calls = model_of(folder), []
    model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))
    table(model, rows())
    return len(calls)


def broken(folder: Path) -> list[tuple[str, float, float, float, float]]:
    """The second adapter, which the second process scores, has a value that is not finite."""
    model = model_of(folder)
    for name, parameter in model.named_parameters():
        if name.endswith("value.composition_factors.default.B"):
            parameter.data[:, -1] = torch.nan
    return table(model, rows())


def sharded(folder: Path) -> dict[str, Any]:
    model = shard(model_of(folder), ["BertLayer"])
    before = table(model, rows())
    report = fit_mixing_weights(model, rows(), batch_size=5)
    return {"table": before, "report": report.weights}


def without_files(folder: Path, rank: int) -> dict[str, Any]:
    """A sharded model, of whose adapters the second process has no files any more; one example of each class."""
    own = folder / f"node-{rank}"
    for name in ("first", "second"):
        shutil.copytree(folder / name, own / name)
        file = own / name / "adapter_model.safetensors"
        head = torch.randn(2, 16, generator=torch.Generator().manual_seed(len(name)))
        save_file({**load_file(file), "base_model.model.classifier.weight": head}, file)
    model = shard(model_of(own), ["BertLayer"])
    if rank == 1:
        shutil.rmtree(own)
    report = fit_mixing_weights(model, rows()[:2])
    return {"method": report.method, "weights": report.weights, "told": report.informations}


def checks(folder: Path, rank: int) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        "table": lambda: table(model_of(folder), rows()),
        "weights": lambda: weights(model_of(folder), rows()),
        "chosen": lambda: chosen(folder),
        "shuffled": lambda: table(model_of(folder), shuffled(rank)),
        "wrapped": lambda: weights(nn.parallel.DistributedDataParallel(model_of(folder)), rows()),
        "prepared": lambda: table(model_of(folder), Accelerator(cpu=True).prepare(DataLoader(rows(), batch_size=5))),
        "no labels": lambda: table(model_of(folder), [{"input_ids": TOKENS}] if rank == 0 else rows()),
        "broken": lambda: broken(folder),
        "sharded": lambda: sharded(folder),
        "without files": lambda: without_files(folder, rank),
        "counted": lambda: counted(folder),
    }
    return found


def attempt(check: Callable[[], Any]) -> Any:
    try:
        return check()
    except ValueError as error:
        return {"error": str(error)}


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # where it hangs, before it is killed
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        results = {name: attempt(check) for name, check in checks(folder, dist.get_rank()).items()}
        torch.save({**results, "world": dist.get_world_size()}, folder / f"rank{dist.get_rank()}.pt")
    finally:
        dist.destroy_process_group()


def one_process(folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """The table and the weights without a process group."""
    return table(model_of(folder), rows()), weights(model_of(folder), rows())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
