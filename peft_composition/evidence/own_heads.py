"""What the heads that adapters were saved with say of the examples: do they take them for different classes?

An adapter whose own training told such classes apart sends examples of different classes to different outputs of its
own head, even one example of each. No label of that head is used, and the head itself is not mixed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..references import AdapterReference, Provenance
from ..upstream.adapter import UpstreamAdapter, read_adapters
from ..upstream.errors import AdapterError
from ..upstream.files import locate_one
from .weights import Information


OwnHead = Mapping[str, Tensor]
"""The tensors of a head by their names within it: `weight` (classes, width) and `bias`, or those of several layers."""

# Saved by PEFT, or by hand, with or without the name of the copy that PEFT trains.
_COPY = r"(?:\.modules_to_save(?:\.default)?)?"


def own_head(name: str, reference: AdapterReference, provenance: Provenance | None = None) -> OwnHead | None:
    """The head in an adapter's files on this machine; nothing is downloaded.

    Args:
        name: what the model calls its head; another module of the adapter is none.
        reference: the adapter.
        provenance: what a composition recorded when it was read.

    Returns:
        None where the files are gone or have changed since, where they have no head of this name, or where they have
        other trained modules, too, without which its features are not those that its head knows.
    """
    local = AdapterReference(**{**reference, "local_files_only": True})
    sha256 = None
    if provenance is not None:
        sha256 = provenance["sha256"]
        local["revision"] = provenance["commit"] or reference.get("revision")
    try:
        (adapter,) = read_adapters([locate_one(local, with_card=False)], [sha256], hashed=False)
        return _head_of(adapter, name)
    except AdapterError:
        return None


def _head_of(adapter: UpstreamAdapter, name: str) -> OwnHead | None:
    pattern = re.compile(rf"(?P<place>^|.*\.){re.escape(name)}{_COPY}\.(?P<name>[\w.]+)$")
    weights = adapter.weights
    matches = {key: found for key in weights if ".lora_" not in key and (found := pattern.match(key)) is not None}
    keys = {match["name"]: key for key, match in matches.items()}
    is_one = len({match["place"] for match in matches.values()}) == 1 and len(keys) == len(matches)
    if not is_one or len(adapter.extras) > len(keys) or not all(map(weights.is_floating_point, keys.values())):
        return None
    head = {inner: weights.read(key).to(torch.float64) for inner, key in keys.items()}
    weights.unmap()
    return head if all(bool(own.isfinite().all()) for own in head.values()) else None


def information(
    features: Tensor, labels: Tensor, head: OwnHead, module: nn.Module | None = None
) -> Information | None:
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
        In nats, of all classes and of all but each one; None if the head does not fit the features or the module, or
        has less than two outputs.
    """
    logits = _logits(features.detach().cpu(), head, module)
    if logits is None or not bool(logits.isfinite().all()):
        return None
    probabilities = logits.double().softmax(1)
    labels = labels.cpu()
    of_classes = torch.stack([probabilities[labels == label].mean(0) for label in labels.unique()])
    without = [_told(torch.cat([of_classes[:own], of_classes[own + 1 :]])) for own in range(len(of_classes))]
    return Information(_told(of_classes), tuple(without))


def _logits(features: Tensor, head: OwnHead, module: nn.Module | None) -> Tensor | None:
    """Shape (n, classes), float64."""
    wide = {name: own.double() for name, own in head.items()}
    x = features.double()
    if wide.keys() <= {"weight", "bias"} and (module is None or isinstance(module, nn.Linear)):
        weight, bias = wide.get("weight"), wide.get("bias")
        fits = weight is not None and weight.dim() == 2 and weight.shape[1] == x.shape[1]
        if weight is None or not fits or (bias is not None and bias.shape != weight.shape[:1]):
            return None
        logits = nn.functional.linear(x, weight, bias)
    elif module is not None and wide.keys() == dict(module.named_parameters()).keys():
        found = _run(module, wide, x)
        if found is None:
            return None
        logits = found
    else:
        return None
    return logits if logits.dim() == 2 and len(logits) == len(x) and logits.shape[1] > 1 else None


def _run(module: nn.Module, tensors: OwnHead, x: Tensor) -> Tensor | None:
    """What a head of several layers makes of pooled features; None where it cannot be run outside of its model."""
    try:
        bare = copy.deepcopy(module).eval()
        for own in bare.modules():  # no hooks, and no forward of accelerate's
            own._forward_hooks.clear()
            own._forward_pre_hooks.clear()
            own.__dict__.pop("forward", None)
    except Exception:  # a sharded one refuses to be copied, each kind in a way of its own
        return None
    for given in (x, x[:, None]):  # some heads are given all tokens, and take the first one
        try:
            with torch.no_grad():
                found = functional_call(bare, dict(tensors), (given,))
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
            continue
        if isinstance(found, Tensor) and found.dim() == 2 and len(found) == len(x):
            return found
    return None


def head_name(model: nn.Module, head: nn.Module | None) -> str | None:
    """What a model calls its head: the last part of its name."""
    return next((name.rpartition(".")[2] for name, module in model.named_modules() if module is head), None)


def _told(of_classes: Tensor) -> float:
    """Mutual information of class and output, from the mean output of each class, shape (classes, outputs)."""
    if len(of_classes) < 2:
        return 0.0
    return max(0.0, float(_entropy(of_classes.mean(0)) - _entropy(of_classes).mean()))


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)
