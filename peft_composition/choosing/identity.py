"""What the numbers of a selection depend on, as text to compare: base, examples, head, precision, adapters' files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from torch.nn.functional import pad

from ..evidence.passes import Precision
from ..references import AdapterReference, is_local
from ..upstream.errors import AdapterError
from ..upstream.files import commit_of, download_files, locate_one
from ..version import __version__
from .ladder import Ladder


CHUNK = 1 << 24  # bytes of weights that are copied at once
_COMMIT = re.compile("[0-9a-f]{40}")


def key_of(
    base: nn.Module, references: Sequence[AdapterReference], steps: Ladder, mixed_precision: Precision, seed: int
) -> str:
    """A digest of a selection, without the files of its adapters.

    The weights of a classifier's head are left out: scores are of what it gets, and it may be new in every run.
    """
    head = steps.rungs[-1].head
    config = getattr(base, "config", None)
    facts = [
        __version__,
        type(base).__name__,
        config.to_dict() if config is not None and hasattr(config, "to_dict") else None,
        digest_of_weights(base, head),
        next((name for name, module in base.named_modules() if module is head), None),
        [{**own} for own in references],
        steps.digest,
        steps.sizes,
        mixed_precision,
        seed,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_weights(model: nn.Module, left_out: nn.Module | None) -> str:
    """A digest of all parameters and buffers but those of one module: another value anywhere makes it another."""
    ignored = set() if left_out is None else {id(own) for own in chain(left_out.parameters(), left_out.buffers())}
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if id(tensor) not in ignored:
            for part in _parts(tensor.detach()):
                digest.update(f"{name} {part.dtype} {tuple(part.shape)} {_sums(part)}".encode())
    return digest.hexdigest()


def files_of(reference: AdapterReference) -> str | None:
    """Which files an adapter has: the commit on the Hub, sizes and times in a folder; None where that is not known."""
    try:
        if is_local(reference["path"]):
            found = locate_one(reference, with_card=False)
            states = [os.stat(file) for file in (found.config, found.weights)]
            return " ".join(f"{own.st_size}:{own.st_mtime_ns}" for own in states)
        revision = reference.get("revision")
        if revision and _COMMIT.fullmatch(revision):
            return revision
        config = download_files(reference, CONFIG_NAME, revision)
        return None if config is None else commit_of(config)
    except (AdapterError, OSError):
        return None  # whoever reads it says why


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a quantized or sharded one consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names: Any = tensor.__tensor_flatten__()[0]
        for name in names:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor if tensor.layout == torch.strided else tensor.to_dense()


def _sums(tensor: Tensor) -> list[int]:
    """Sums of 8 bytes each, by odd factors, modulo 2^64: exact, in any order, and where the tensor is."""
    if tensor.is_meta or not tensor.numel():
        return []
    found = []
    for chunk in tensor.contiguous().reshape(-1).view(torch.uint8).split(CHUNK):
        words = pad(chunk, (0, -len(chunk) % 8)).view(torch.int64)
        found.append(int((words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum()))
    return found
