"""What the heads that adapters were saved with say of the examples: do they take them for different classes?

An adapter whose own training told such classes apart sends examples of different classes to different outputs of its
own head, even one example of each. No label of that head is used, and the head itself is not mixed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..references import AdapterReference, Provenance
from ..upstream.adapter import UpstreamAdapter, read_adapters
from ..upstream.errors import AdapterError
from ..upstream.files import locate_one
from .heads import HEADS


# Saved by PEFT, or by hand, with or without the name of the copy that PEFT trains.
_HEAD = re.compile(rf"(?:^|\.)(?P<name>{'|'.join(HEADS)})(?:\.modules_to_save(?:\.[^.]+)?)?\.(?P<leaf>weight|bias)$")


class OwnHead(NamedTuple):
    """A linear head that an adapter was saved with.

    Attributes:
        weight: shape (classes, width), at least two classes.
        bias: shape (classes,), or None.
    """

    weight: Tensor
    bias: Tensor | None


def own_head(reference: AdapterReference, provenance: Provenance | None = None) -> OwnHead | None:
    """The head in an adapter's files on this machine; nothing is downloaded.

    Args:
        reference: the adapter.
        provenance: what a composition recorded when it was read.

    Returns:
        None where the files are gone or have changed since, or where there is not exactly one linear head.
    """
    local = AdapterReference(**{**reference, "local_files_only": True})
    sha256 = None
    if provenance is not None:
        sha256 = provenance["sha256"]
        local["revision"] = provenance["commit"] or reference.get("revision")
    try:
        (adapter,) = read_adapters([locate_one(local, with_card=False)], [sha256], hashed=False)
        return _head_of(adapter)
    except AdapterError:
        return None


def _head_of(adapter: UpstreamAdapter) -> OwnHead | None:
    keys = {(found["name"], found["leaf"]): key for key in adapter.weights if (found := _HEAD.search(key)) is not None}
    weights = [key for (_, leaf), key in keys.items() if leaf == "weight"]
    others = [key for key in adapter.extras if any(part in HEADS for part in key.split("."))]
    if len(weights) != 1 or len(others) != len(keys):  # several layers, or several heads
        return None
    shape, read = adapter.weights.shape(weights[0]), adapter.weights.read
    if len(shape) != 2 or shape[0] < 2 or not adapter.weights.is_floating_point(weights[0]):
        return None
    biases = [key for (_, leaf), key in keys.items() if leaf == "bias"]
    if biases and adapter.weights.shape(biases[0]) != shape[:1]:
        return None
    head = OwnHead(read(weights[0]).clone(), read(biases[0]).clone() if biases else None)
    adapter.weights.unmap()
    return head if all(bool(own.isfinite().all()) for own in head if own is not None) else None


def information(features: Tensor, labels: Tensor, head: OwnHead) -> float | None:
    """How much an adapter's own head tells of the classes of the examples: their mutual information with its output.

    With p_c the mean of the head's probabilities over the examples of class c and p the mean of these over the
    classes, it is H(p) - mean_c H(p_c): 0 if the head sees no difference, at most the logarithm of the number of
    classes of the examples or of the head, whichever has fewer.

    Args:
        features: of the adapter alone, shape (n, width).
        labels: shape (n,).
        head: its own.

    Returns:
        In nats; None if the head is of another width.
    """
    if head.weight.shape[1] != features.shape[1]:
        return None
    wide = features.double().cpu() @ head.weight.double().cpu().T
    if head.bias is not None:
        wide = wide + head.bias.double().cpu()
    probabilities = wide.softmax(1)
    labels = labels.cpu()
    of_classes = torch.stack([probabilities[labels == label].mean(0) for label in labels.unique()])
    return max(0.0, float(_entropy(of_classes.mean(0)) - _entropy(of_classes).mean()))


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def are_known(informations: Sequence[float | None]) -> bool:
    """Whether the heads of at least two adapters could be asked: one alone cannot be compared."""
    return sum(own is not None for own in informations) >= 2
