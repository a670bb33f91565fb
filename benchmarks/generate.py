"""The table `generate`: greedy generation of one sequence with a KV cache, time per token relative to the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .cells import build_peers, in_order
from .measure import race
from .models import Workbench
from .peers import BASE, COMPOSITION, LORA, MERGED, PEFT, XLORA
from .results import Cell
from .settings import Settings, Table


PROMPT = 8
NEW_TOKENS = 12


def run(settings: Settings) -> Iterator[Cell]:
    """Measure every model and N."""
    for key in settings.models:
        for count in settings.adapters:
            yield _cell(settings, key, count)


def _cell(settings: Settings, key: str, count: int) -> Cell:
    bench = settings.workbench(key)
    models, measured = build_peers(settings.peers, bench, count)
    calls = {peer.title: _generation(model, bench) for peer, model in models.items()}
    reference = settings.peers[0].title
    label = f"generate {key} N={count}"
    measured.update(
        race(calls, reference, settings.rounds[key], settings.device, label, settings.rare, units=NEW_TOKENS)
    )
    return Cell(key, count, reference, in_order(settings.peers, measured))


def _generation(model: nn.Module, bench: Workbench) -> Callable[[], Tensor]:
    model.eval()
    prompt = bench.batch(1)["input_ids"][:, :PROMPT]

    def generate() -> Tensor:
        tokens = model.generate(  # type: ignore[operator]  # nn.Module does not say that it generates
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        if tokens.shape[1] < NEW_TOKENS:
            raise RuntimeError(f"{type(model).__name__} generated {tokens.shape[1]} tokens instead of {NEW_TOKENS}")
        return tokens

    return generate


TABLE = Table(
    peers=(BASE, COMPOSITION, MERGED, LORA, PEFT, XLORA),
    models=("llama", "t5"),
    adapters=(1, 5, 20, 64),
    rounds={"llama": 5, "t5": 5, "tiny-llama": 3},
    describe=lambda model: f"{model.name}, {NEW_TOKENS} tokens after {PROMPT}",
    run=run,
)
