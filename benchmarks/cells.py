"""What the tables that run whole models have in common: building the peers of a cell, and calling them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .arithmetic import LinearCall
from .models import Workbench
from .peers import Peer, UnavailableError, target_names
from .results import Measurement


# Relative to the norm of the output, in float32.
TOLERANCE = 1e-3


def build_peers(
    peers: Iterable[Peer], bench: Workbench, count: int
) -> tuple[dict[Peer, nn.Module], dict[str, Measurement]]:
    """The models of all peers that can be had, and by title the reasons why the others cannot."""
    models: dict[Peer, nn.Module] = {}
    skipped = {}
    for peer in peers:
        assert peer.build is not None
        try:
            models[peer] = peer.build(bench, count)
        except UnavailableError as reason:
            skipped[peer.title] = Measurement(skipped=str(reason))
    return models, skipped


def target_calls(bench: Workbench) -> list[LinearCall]:
    """Shapes of the target modules and the tokens that each works on in one forward pass of the usual batch."""
    calls: list[LinearCall] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        tokens = inputs[0].numel() // module.in_features * bench.architecture.batch_size
        calls.append(LinearCall(module.in_features, module.out_features, tokens))

    hooks = [bench.base.get_submodule(name).register_forward_pre_hook(note) for name in target_names(bench)]
    with torch.no_grad():
        bench.base(**bench.batch(1))
    for hook in hooks:
        hook.remove()
    return calls


def in_order(peers: Iterable[Peer], measured: dict[str, Measurement]) -> dict[str, Measurement]:
    """Measurements in the order of the peers, and what belongs to no peer after them."""
    titles = [peer.title for peer in peers if peer.title in measured]
    return {title: measured[title] for title in (*titles, *(title for title in measured if title not in titles))}


def require_same(outputs: Mapping[str, Tensor]) -> None:
    """Refuse to compare peers that do not compute the same.

    Args:
        outputs: by title, what peers that must agree have computed.

    Raises:
        RuntimeError: two of them differ by more than rounding.
    """
    titles = list(outputs)
    for title in titles[1:]:
        first, other = outputs[titles[0]], outputs[title]
        difference = float((first - other).norm() / first.norm())
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{titles[0]} and {title} do not compute the same: they differ by {difference:.1e}")
