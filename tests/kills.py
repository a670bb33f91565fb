"""Saves that are killed, at random moments and before every change that they make to files, and what is left.

`python -m tests.kills 100` runs as many random moments of every kind of save and prints what was left.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_composition.checkpoint.export import LoraExport, to_lora
from peft_composition.checkpoint.exported import HEAD_NAME
from peft_composition.checkpoint.push import add_to_checkpoint

from . import tiny, warm


NAME = "mlp"
# How Python announces what changes a folder.
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_DRAFTS = (".adapter_config-", ".card-", ".lora-")


class Save:
    """A kind of save over an older state.

    Args:
        start: makes the old state in a folder.
        save: puts the new one over it.
        read: what a user gets from the folder; raises where it cannot be had.
    """

    def __init__(
        self, start: Callable[[Path], object], save: Callable[[Path], object], read: Callable[[Path], list[Tensor]]
    ) -> None:
        self.start, self.save, self.read = start, save, read
        with tempfile.TemporaryDirectory() as scratch:
            self.start(Path(scratch, "old"))
            self.old = self.read(Path(scratch, "old"))
            shutil.copytree(Path(scratch, "old"), Path(scratch, "new"))
            begin = time.monotonic()
            self.save(Path(scratch, "new"))
            self.seconds = time.monotonic() - begin
            self.new = self.read(Path(scratch, "new"))
        assert not _equal(self.old, self.new)

    def outcome(self, folder: Path) -> str:
        """`old`, `new`, the kind of error, or `mixture`."""
        try:
            found = self.read(folder)
        except (ValueError, OSError, EOFError, RuntimeError) as error:  # the latter of pickles that are cut short
            return f"error: {str(error).partition(':')[0][:70]}"
        return "old" if _equal(found, self.old) else "new" if _equal(found, self.new) else "mixture"


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _scrambled(model: nn.Module, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) / 10
    return model.eval()


def _composed(folder: Path, seed: int, **fields: Any) -> PeftModel:
    """A composition of two LoRAs of the same names and shapes, but of values that the seed gives."""
    base, targets = tiny.build(NAME), tiny.TINY[NAME].targets
    paths = [folder / str(seed) / name for name in ("first", "second")]
    for number, path in enumerate(paths):
        if not path.exists():
            tiny.save_lora(path, base, targets, seed=10 * seed + number, r=2)
    return _scrambled(tiny.compose(NAME, list(map(str, paths)), **fields), seed)


def _composition_in(folder: Path) -> list[Tensor]:
    return [tiny.output(PeftModel.from_pretrained(tiny.build(NAME), str(folder)), NAME)]


def _lora_in(folder: Path) -> list[Tensor]:
    """Factors and, where there is one, the head in the file beside them."""
    model = PeftModel.from_pretrained(tiny.build(NAME), str(folder))
    head = load_file(folder / HEAD_NAME) if (folder / HEAD_NAME).exists() else {}
    model.get_base_model().load_state_dict(head, strict=False)
    ranks = [module.r["default"] for module in model.modules() if hasattr(module, "lora_A")]
    return [tiny.output(model, NAME), *map(torch.tensor, ranks), *head.values()]


def _export_over(before: LoraExport, now: LoraExport) -> Save:
    return Save(before.save_pretrained, now.save_pretrained, _lora_in)


def _add_to_checkpoint(scratch: Path, head: bool | str) -> Save:
    old, new = _composed(scratch, 1), _composed(scratch, 2)

    def start(folder: Path) -> None:
        new.save_pretrained(str(folder))
        to_lora(old, include_head=head, rank=1).save_pretrained(folder / "lora")

    def read(folder: Path) -> list[Tensor]:
        assert torch.equal(_composition_in(folder)[0], tiny.output(new, NAME))
        return _lora_in(folder / "lora")

    return Save(start, lambda folder: add_to_checkpoint(folder, include_head=head), read)


def _save_over(before: PeftModel, now: PeftModel, **how: Any) -> Save:
    return Save(
        lambda folder: before.save_pretrained(str(folder), **how),
        lambda folder: now.save_pretrained(str(folder), **how),
        _composition_in,
    )


def _save_beside_an_export(scratch: Path) -> Save:
    """What the card says of the export must be true, whenever the save is killed."""
    old, new = _composed(scratch, 1), _composed(scratch, 2)

    def start(folder: Path) -> None:
        old.save_pretrained(str(folder))
        add_to_checkpoint(folder)

    def read(folder: Path) -> list[Tensor]:
        found = _composition_in(folder)
        card = (folder / "README.md").read_text()
        assert "holds the same" not in card
        if hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest() in card:
            assert torch.allclose(_lora_in(folder / "lora")[0], found[0], atol=1e-5)
        return found

    return Save(start, lambda folder: new.save_pretrained(str(folder)), read)


SAVES: dict[str, Callable[[Path], Save]] = {
    "save_pretrained over another composition": lambda scratch: _save_over(
        _composed(scratch, 1), _composed(scratch, 2)
    ),
    "save_pretrained over other settings": lambda scratch: _save_over(
        _composed(scratch, 1, weight_sharing="model"), _composed(scratch, 1, mixing="fixed", weights=[0.7, 0.3])
    ),
    "save_pretrained without the adapters": lambda scratch: _save_over(
        _composed(scratch, 1, save_adapters=False), _composed(scratch, 2, save_adapters=False)
    ),
    "save_pretrained after more training": lambda scratch: _save_over(
        _composed(scratch, 1), _scrambled(_composed(scratch, 1), 5)
    ),
    "save_pretrained beside an export": _save_beside_an_export,
    "save_pretrained as a pickle": lambda scratch: _save_over(
        _composed(scratch, 1), _composed(scratch, 2), safe_serialization=False
    ),
    "export with a separate head": lambda scratch: _export_over(
        to_lora(_composed(scratch, 1), include_head="separate"),
        to_lora(_composed(scratch, 2), include_head="separate"),
    ),
    "export of another rank": lambda scratch: _export_over(
        to_lora(_composed(scratch, 1), rank=1), to_lora(_composed(scratch, 2))
    ),
    "export with a head after one without": lambda scratch: _export_over(
        to_lora(_composed(scratch, 1), include_head=False), to_lora(_composed(scratch, 2), include_head="separate")
    ),
    "export without a head after one with": lambda scratch: _export_over(
        to_lora(_composed(scratch, 1), include_head="separate"), to_lora(_composed(scratch, 2), include_head=False)
    ),
    "add_to_checkpoint": lambda scratch: _add_to_checkpoint(scratch, True),
    "add_to_checkpoint with a separate head": lambda scratch: _add_to_checkpoint(scratch, "separate"),
}


def _killed(save: Save, folder: Path, delay: float | None, event: int | None) -> bool:
    """Save in a child that is killed after a delay, or before its nth change; whether it was killed before the end."""
    child = os.fork()
    if child == 0:
        if event is not None:
            _kill_before(event)
        save.save(folder)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the save failed by itself"
    return os.WIFSIGNALED(status)


def _kill_before(event: int) -> None:
    count = 0

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        is_writing = name == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if is_writing or name in _CHANGES:
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)


def _all_kills(kind: str, moments: int, events: bool, seed: int) -> tuple[Counter[str], list[str]]:
    """What is left after kills at random moments, or before every change, and the drafts that a next save leaves."""
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    leftovers: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        save = SAVES[kind](scratch)
        save.start(scratch / "start")
        number = 0
        while events or number < moments:
            folder = scratch / f"folder{number}"
            shutil.copytree(scratch / "start", folder)
            delay = None if events else chance.uniform(0, 1.2 * save.seconds)
            was_killed = _killed(save, folder, delay, number if events else None)
            outcomes[save.outcome(folder)] += 1
            save.save(folder)
            leftovers += [path.name for path in folder.rglob(".*") if path.name.startswith(_DRAFTS)]
            shutil.rmtree(folder)
            number += 1
            if events and not was_killed:
                break
    return outcomes, leftovers


def _work(kind: str, moments: int, events: bool, seed: int, results: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        results.send(_all_kills(kind, moments, events, seed))
    except BaseException as error:
        results.send(error)
        raise


def kill(kind: str, moments: int = 0, events: bool = False, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Kill saves of a kind and see what is left.

    Args:
        kind: of `SAVES`.
        moments: how often to kill at a random moment.
        events: instead, kill once before every change that Python makes to files and folders.
        seed: of the moments.

    Returns:
        How often a user found the old state, the new one, an error or a mixture; and the drafts left by a later save.
    """
    context = warm.context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(kind, moments, events, seed, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    if isinstance(result, BaseException):
        raise result
    return result


if __name__ == "__main__":
    for kind in SAVES:
        begin = time.monotonic()
        random_ones, _ = kill(kind, moments=int(sys.argv[1]))
        all_events, _ = kill(kind, events=True)
        print(f"{kind}: {dict(random_ones)}; before every change: {dict(all_events)} {time.monotonic() - begin:.0f} s")
