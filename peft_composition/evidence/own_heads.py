"""What the heads that adapters were saved with say of the examples: do they take them for different classes?

An adapter whose own training told such classes apart sends examples of different classes to different outputs of its
own head, even one example of each. No label of that head is used, and the head itself is not mixed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..references import AdapterReference, Provenance
from ..upstream.adapter import UpstreamAdapter, read_adapters
from ..upstream.errors import AdapterError
from ..upstream.files import locate_one
from .heads import HEADS


OwnHead = Mapping[str, Tensor]
"""The tensors of a head by their names within it: `weight` (classes, width) and `bias`, or those of several layers."""

# Saved by PEFT, or by hand, with or without the name of the copy that PEFT trains.
_HEAD = re.compile(
    rf"(?:^|\.)(?P<head>{'|'.join(HEADS)})(?:\.modules_to_save(?:\.default)?)?\.(?P<name>(?:\w+\.)*(?:weight|bias))$"
)


def own_head(reference: AdapterReference, provenance: Provenance | None = None) -> OwnHead | None:
    """The head in an adapter's files on this machine; nothing is downloaded.

    Args:
        reference: the adapter.
        provenance: what a composition recorded when it was read.

    Returns:
        None where the files are gone or have changed since, or where there is not exactly one head.
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
    weights = adapter.weights
    matches = {key: found for key in weights if ".lora_" not in key and (found := _HEAD.search(key)) is not None}
    keys = {match["name"]: key for key, match in matches.items()}
    is_one = len({match["head"] for match in matches.values()}) == 1 and len(keys) == len(matches)
    if not is_one or not all(weights.is_floating_point(key) for key in keys.values()):
        return None
    head = {name: weights.read(key).clone() for name, key in keys.items()}
    weights.unmap()
    return head if all(bool(own.isfinite().all()) for own in head.values()) else None


def information(features: Tensor, labels: Tensor, head: OwnHead, module: nn.Module | None = None) -> float | None:
    """How much an adapter's own head tells of the classes of the examples: their mutual information with its output.

    With p_c the mean of the head's probabilities over the examples of class c and p the mean of these over the
    classes, it is H(p) - mean_c H(p_c): 0 if the head sees no difference, at most the logarithm of the number of
    classes of the examples or of the head, whichever has fewer.

    Args:
        features: of the adapter alone, shape (n, width).
        labels: shape (n,).
        head: its own.
        module: the model's head, which says what a head of several layers computes between them.

    Returns:
        In nats; None if the head does not fit the features or the module, or has less than two outputs.
    """
    logits = _logits(features.detach().cpu(), head, module)
    if logits is None or not bool(logits.isfinite().all()):
        return None
    probabilities = logits.double().softmax(1)
    labels = labels.cpu()
    of_classes = torch.stack([probabilities[labels == label].mean(0) for label in labels.unique()])
    return max(0.0, float(_entropy(of_classes.mean(0)) - _entropy(of_classes).mean()))


def _logits(features: Tensor, head: OwnHead, module: nn.Module | None) -> Tensor | None:
    """Shape (n, classes), float64."""
    wide = {name: own.double() for name, own in head.items()}
    x = features.double()
    try:
        if wide.keys() <= {"weight", "bias"}:
            logits = nn.functional.linear(x, wide["weight"], wide.get("bias"))
        elif module is not None and wide.keys() == dict(module.named_parameters()).keys():
            # What such heads are given is all tokens, and they take the first one.
            logits = functional_call(module, wide, (x[:, None],))
        else:
            return None
    except (RuntimeError, IndexError, KeyError, TypeError):
        return None
    return logits if logits.dim() == 2 and len(logits) == len(x) and logits.shape[1] > 1 else None


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def are_known(informations: Sequence[float | None]) -> bool:
    """Whether the heads of at least two adapters could be asked: one alone cannot be compared."""
    return sum(own is not None for own in informations) >= 2
