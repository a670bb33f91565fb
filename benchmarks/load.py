"""The table `load`: adapters from folders into a model, saving it, loading that again; relative to this library.

All files are in the page cache: each was written, and read once, before the clock runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from .cells import in_order
from .measure import race
from .memory import give_back
from .models import load_into_peft
from .peers import COMPOSITION, MOST_FOR_PEFT, PEFT, TOO_MANY_FOR_PEFT, Peer, compose
from .results import Cell, Measurement
from .settings import Settings, Table


RAW = Peer("raw", "files alone", "the same files read into tensors, and nothing done with them")
WEIGHTS = "adapter_model.safetensors"

Calls = dict[Peer, Callable[[], object]]


def run(settings: Settings) -> Iterator[Cell]:
    """Measure every model and N."""
    for key in settings.models:
        for count in settings.adapters:
            with tempfile.TemporaryDirectory() as folder:
                yield _cell(settings, key, count, "load", _load(settings, key, count))
                yield _cell(settings, key, count, "save", _save(settings, key, count, Path(folder)))
                yield _cell(settings, key, count, "reload", _reload(settings, key, Path(folder)))


def _load(settings: Settings, key: str, count: int) -> Calls:
    """From N folders to a model: this library with all its checks, PEFT adapter after adapter."""
    bench = settings.workbench(key)
    references = bench.references(count)
    return {
        COMPOSITION: _on_fresh_bases(settings, key, lambda base: compose(bench, base, count)),
        PEFT: _on_fresh_bases(settings, key, lambda base: load_into_peft(base, references)),
        RAW: lambda: [load_file(Path(reference["path"], WEIGHTS)) for reference in references],
    }


def _save(settings: Settings, key: str, count: int, folder: Path) -> Calls:
    """`save_pretrained`: one composition that stands alone, or N adapters of PEFT."""
    bench = settings.workbench(key)
    composed = compose(bench, bench.shared_base(), count)
    calls: Calls = {COMPOSITION: lambda: composed.save_pretrained(str(folder / COMPOSITION.key))}
    if count <= MOST_FOR_PEFT:
        several = bench.peft_model(count)
        calls[PEFT] = lambda: several.save_pretrained(str(folder / PEFT.key))
    return calls


def _reload(settings: Settings, key: str, folder: Path) -> Calls:
    """`from_pretrained` of the saved composition; PEFT's N adapters load as they did before they were saved."""
    saved = folder / COMPOSITION.key
    return {
        COMPOSITION: _on_fresh_bases(settings, key, lambda base: PeftModel.from_pretrained(base, str(saved))),
        RAW: lambda: load_file(saved / WEIGHTS),
    }


def _on_fresh_bases(settings: Settings, key: str, action: Callable[[nn.Module], object]) -> Callable[[], object]:
    """Call by call another base model, all made before the clock runs."""
    bases = [settings.workbench(key).shared_base() for _ in range(settings.rounds[key] + 1)]
    return lambda: action(bases.pop())


def _cell(settings: Settings, key: str, count: int, case: str, calls: Calls) -> Cell:
    give_back()
    skipped = {}
    if count > MOST_FOR_PEFT:
        calls.pop(PEFT, None)
        skipped[PEFT.title] = Measurement(skipped=TOO_MANY_FOR_PEFT)
    chosen = {peer.title: call for peer, call in calls.items() if peer in settings.peers}
    label = f"{case} {key} N={count}"
    timed = race(chosen, COMPOSITION.title, settings.rounds[key], settings.device, label, settings.rare)
    return Cell(key, count, COMPOSITION.title, in_order(settings.peers, {**timed, **skipped}), case)


TABLE = Table(
    peers=(COMPOSITION, PEFT, RAW),
    models=("vit",),
    adapters=(1, 2, 5, 20, 64, 256),
    rounds={"vit": 5, "t5": 5, "llama": 5, "tiny-vit": 3, "tiny-llama": 3},
    describe=lambda model: model.name,
    run=run,
)
