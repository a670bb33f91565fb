"""What a run measures: the choices of the command line, and the defaults of every table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from .models import Architecture, Workbench
from .peers import Peer
from .results import Cell


LIMIT = "arithmetic limit"  # the title of the computed row


@dataclass(frozen=True)
class Settings:
    """One run of one table.

    Attributes:
        models: keys of the models.
        adapters: the values of N.
        peers: the peers, the reference first.
        rounds: rounds by model.
        memory_limit: bytes that a training step may take; None: 70% of what is free.
        workbench: model key -> its base model and adapters, built on first use.
        new_workbench: (architecture, name) -> one for a model of the table's own.
        device: where everything runs.
    """

    models: tuple[str, ...]
    adapters: tuple[int, ...]
    peers: tuple[Peer, ...]
    rounds: Mapping[str, int]
    memory_limit: float | None
    workbench: Callable[[str], Workbench]
    new_workbench: Callable[[Architecture, str], Workbench]
    device: torch.device

    @property
    def rare(self) -> set[str]:
        """The titles of peers that need not run in every round."""
        return {peer.title for peer in self.peers if not peer.is_leading}


@dataclass(frozen=True)
class Table:
    """A table: what it measures, and what it measures by default.

    Attributes:
        peers: the peers, the reference first.
        models: keys of the default models.
        adapters: the default values of N.
        rounds: default rounds by model; a model that is not among them cannot be measured.
        describe: what is measured of a model, in words.
        run: measures cell by cell.
    """

    peers: tuple[Peer, ...]
    models: tuple[str, ...]
    adapters: tuple[int, ...]
    rounds: Mapping[str, int]
    describe: Callable[[Architecture], str]
    run: Callable[[Settings], Iterator[Cell]]
