"""The fingerprint of a composition: the part of its config that describes the weights, saved as a tensor beside them.

Config and weights are two files, and an interrupted save can leave files that do not belong together. Every way of
loading compares the fingerprint with the config. It is not a parameter of the model: it is added when a state dict is
created and removed when one is loaded.
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import CompositionConfig
from ..names import name_in_checkpoint
from ..record import summary
from ..text import one_line, plural, quoted
from ..upstream.weights import Entry, opened


# In a checkpoint, it follows the path of the module that carries it. transformers, like PyTorch, passes a key with
# this suffix to `set_extra_state`.
FINGERPRINT = "composition_fingerprint._extra_state"
_ATTRIBUTE = "composition_fingerprint"
_PREFIX, _INFIX = "base_model.model.", ".composition_"
_LARGEST = 2**26  # bytes of text: millions of modules
_FILE = "adapter_config.json"
_RANKS_AT = {"factors.A": 0, "factors.B": 1, "factors.bias": 0}  # the dimension that counts ranks, or adapters


def carrier(config: CompositionConfig) -> str:
    """The composed module with whose keys the fingerprint is saved, independent of the order in a file."""
    assert config.composed_modules
    return min(config.composed_modules)


def encode(config: CompositionConfig) -> Tensor:
    """The fingerprint as a uint8 tensor."""
    text = json.dumps(summary(config), sort_keys=True, separators=(",", ":"))
    return torch.frombuffer(bytearray(zlib.compress(text.encode())), dtype=torch.uint8)


def decode(fingerprint: Tensor) -> dict[str, Any]:
    """The content of a fingerprint.

    Raises:
        ValueError: the tensor is not a fingerprint, or is damaged.
    """
    try:
        unpacking = zlib.decompressobj()
        values = fingerprint.detach().cpu()
        if values.is_floating_point():  # a mean of checkpoints, as in federated averaging, has rounding errors
            values = values.round()
        text = unpacking.decompress(values.to(torch.uint8).numpy().tobytes(), _LARGEST)
        said = json.loads(text) if unpacking.eof else None
    except (zlib.error, ValueError):
        said = None
    if not isinstance(said, dict):
        raise ValueError("The fingerprint in the weights file of the saved composition is damaged. Save it again.")
    return said


def is_fingerprint(key: str) -> bool:
    """Whether a key of a checkpoint belongs to a fingerprint."""
    return key.endswith(f".{FINGERPRINT}")


def add_fingerprint(
    config: CompositionConfig, adapter_name: str, found: Mapping[str, Tensor], selected: dict[str, Tensor]
) -> None:
    """Add the fingerprint to the tensors that are saved for a composition, replacing an earlier one.

    Args:
        config: the composition's config.
        adapter_name: its name.
        found: the state dict of the model, or this process's part of it.
        selected: the tensors that are saved, by the same keys.
    """
    for key in [key for key in selected if f".{_ATTRIBUTE}." in key]:
        del selected[key]
    config.undo_edits()
    if not config.composed_modules:
        return
    infixes = f"{_INFIX}factors.{adapter_name}.", f"{_INFIX}mixing.{adapter_name}."
    paths = {key.partition(infix)[0]: None for key in found for infix in infixes if infix in key}
    for path in paths:
        inner = path
        while inner.startswith(_PREFIX):  # again for every PeftModel around the composition's
            inner = inner.removeprefix(_PREFIX)
        if name_in_checkpoint(inner, config.composed_modules) == carrier(config):
            selected[f"{path}.{_ATTRIBUTE}.{adapter_name}._extra_state"] = encode(config)
            return


def require_same(config: CompositionConfig, fingerprint: Tensor, are_names_optional: bool = False) -> None:
    """Refuse weights that were saved with another config.

    Args:
        config: the config.
        fingerprint: saved with the weights.
        are_names_optional: whether names of classes count only where both have them: a model that weights are loaded
            into may get its names later, or may have got them since.

    Raises:
        ValueError: the configs differ; the message names the first difference.
    """
    said = decode(fingerprint)
    here = summary(config)
    # As it was read: module names from older transformers are updated later.
    known = [here, config.summary_as_read or here]
    if said in known:
        return
    if are_names_optional:
        known = [_with_names_of(said, one) for one in known]
    if said in known or said == json.loads(json.dumps(known[0])):  # where tuples are lists
        return
    raise ValueError(
        f"The weights of the saved composition and its {_FILE} do not belong together: {_difference(here, said)}. "
        "Probably a save was interrupted, or two processes saved into the same folder. Save the composition again, or "
        "use two files from the same save."
    )


def _with_names_of(said: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """What is here, with the names of classes that are said, unless both have some."""
    if "class_names" in said and "class_names" in here:
        return dict(here)
    names = {"class_names": said["class_names"]} if "class_names" in said else {}
    return {**{field: value for field, value in here.items() if field != "class_names"}, **names}


def _difference(config: Mapping[str, Any], weights: Mapping[str, Any]) -> str:
    """The first difference between config and weights, with both values."""
    if config["adapters"] != weights.get("adapters"):
        return _both("the adapters are", config["adapters"], weights.get("adapters"))
    for name, one, other in zip(config["adapters"], config["sha256"], weights.get("sha256") or ()):
        if one != other:
            return _both(f"adapter {quoted(name)} has the sha256", one, other)
    there = weights.get("composed_modules")
    there = there if isinstance(there, dict) else {}
    for module in [*config["composed_modules"], *there]:
        ranks = [modules.get(module) for modules in (config["composed_modules"], there)]
        if ranks[0] != ranks[1]:
            one, other = ("not composed" if r is None else f"composed with ranks {_shown(r)}" for r in ranks)
            return f"module {quoted(module)} is {one} in the config, {other} beside the weights"
    for field in sorted({*config, *weights}):
        if config.get(field) != weights.get(field):
            return _both(f"{quoted(field)} is", config.get(field), weights.get(field))
    return "they differ in a field that this version does not know"


def _both(what: str, config: object, weights: object) -> str:
    return f"{what} {_shown(config)} in the config, {_shown(weights)} beside the weights"


def _shown(value: object) -> str:
    return quoted(value) if isinstance(value, str) else one_line(json.dumps(value))


class AwaitedFingerprint(nn.Module):
    """Waits in a model that is built from a saved config for the fingerprint in the weights.

    For transformers' own `load_adapter`, which sets parameters one by one without calling PEFT.

    Args:
        config: the config that the fingerprint must match.
        mixings: the mixing weights of the composition, by sharing key; may be filled later.
    """

    def __init__(self, config: CompositionConfig, mixings: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._config = config
        self._mixings = mixings
        self._is_new = False

    def get_extra_state(self) -> Tensor:
        """The fingerprint, for a state dict."""
        return encode(self._config)

    def set_extra_state(self, state: Tensor) -> None:
        """Compare with the fingerprint of a state dict that is loaded."""
        require_same(self._config, state, are_names_optional=True)
        self._is_new = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Like PyTorch's, but the model's own state dict, without a fingerprint, counts as complete."""
        if f"{prefix}_extra_state" in state_dict:
            self.set_extra_state(state_dict[f"{prefix}_extra_state"])

    def train(self, mode: bool = True) -> AwaitedFingerprint:
        """All ways of loading weights end with this call, when the mixing weights are loaded, too."""
        if self._is_new:
            self._is_new = False
            for name, mixing in self._mixings.items():
                theta = mixing.weight
                if isinstance(theta, Tensor) and not theta.is_meta:
                    require_finite(name or "all", theta)
        return super().train(mode)


def require_finite(module: str, theta: Tensor) -> None:
    """Refuse mixing weights that are not finite."""
    values = (theta.to_local() if isinstance(theta, DTensor) else theta).detach().tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError(
            f"module {quoted(module)}: the saved mixing weights are not finite: {values}. Either the training "
            "diverged, or the file is damaged"
        )


def await_fingerprint(
    layer: nn.Module, adapter_name: str, config: CompositionConfig, mixings: Mapping[str, nn.Module]
) -> None:
    """Let the layer that carries the fingerprint of a composition wait for it."""
    if _ATTRIBUTE not in layer._modules:
        layer.register_module(_ATTRIBUTE, nn.ModuleDict())
    cast(nn.ModuleDict, layer._modules[_ATTRIBUTE])[adapter_name] = AwaitedFingerprint(config, mixings)


def forget_awaited(layers: Iterable[nn.Module], adapter_name: str) -> None:
    """Stop composed layers waiting for the fingerprint of a composition after it was compared."""
    for layer in layers:
        awaited = layer._modules.get(_ATTRIBUTE)
        if isinstance(awaited, nn.ModuleDict) and adapter_name in awaited:
            del awaited[adapter_name]
            if not awaited:
                delattr(layer, _ATTRIBUTE)


def require_weights_in(folder: Path, config: CompositionConfig) -> None:
    """Compare a config with the weights beside it, before a model is built from it.

    Only its header and the fingerprint are read. Unreadable files are not reported here but when they are loaded; the
    same holds for pickles, which must be read as a whole.

    Raises:
        ValueError: as in `checked_weights`.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        entries, fingerprints = opened(path, is_fingerprint)
    except (SafetensorError, OSError, MemoryError, TypeError):
        return
    weights = {key: entry for key, entry in entries.items() if key not in fingerprints}
    for fingerprint in fingerprints.values():
        require_same(config, fingerprint)
    _require_fitting_weights(config, weights)


def checked_weights(config: CompositionConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compare the weights of a saved composition with its config, before any of them is used.

    Args:
        config: the composition's config.
        state_dict: its weights by the keys of a checkpoint.

    Returns:
        The weights without the fingerprint.

    Raises:
        ValueError: they do not belong together, or are damaged; the message names the module and both values.
    """
    fingerprints = {key: tensor for key, tensor in state_dict.items() if is_fingerprint(key)}
    weights = {key: tensor for key, tensor in state_dict.items() if key not in fingerprints}
    for fingerprint in fingerprints.values():
        require_same(config, fingerprint, are_names_optional=True)
    _require_fitting_weights(config, weights)
    if not fingerprints and any(_INFIX in key for key in weights):
        warnings.warn(
            "The saved composition has no fingerprint, so it is unknown whether its weights and its "
            f"{_FILE} come from the same save. An older version of peft-composition saved it; save it again.",
            stacklevel=2,
        )
    return weights


def _require_fitting_weights(config: CompositionConfig, weights: Mapping[str, Tensor] | Mapping[str, Entry]) -> None:
    composed = config.composed_modules or {}
    parameters = {} if config.lora_layout is None else config.lora_layout.get("parameters", {})
    for key, tensor in weights.items():
        path, found, part = key.removeprefix(_PREFIX).partition(_INFIX)
        if not found:
            continue
        module = name_in_checkpoint(path, composed)
        if module not in composed:
            raise ValueError(
                f"The saved composition has weights for module {quoted(module)}, which is not in its {_FILE}: the two "
                "files do not belong together. Use two files from the same save."
            )
        owner, _, name = module.rpartition(".")
        _require_fitting_tensor(module, composed[module], part, tensor, name in parameters.get(owner, ()))


def _require_fitting_tensor(
    module: str, ranks: list[int], part: str, tensor: Tensor | Entry, is_parameter: bool
) -> None:
    if not (tensor.is_floating_point() if isinstance(tensor, Tensor) else tensor.is_floating_point):
        raise ValueError(
            f"module {quoted(module)}: {quoted(part)} of the saved composition has dtype {tensor.dtype}, but must "
            "have a floating-point dtype"
        )
    shape = tuple(tensor.shape)
    if part.startswith("mixing."):
        if shape != (len(ranks),):
            raise ValueError(
                f"module {quoted(module)}: the saved mixing weights have shape {shape}, but the config has "
                f"{plural(len(ranks), 'adapter')}"
            )
        if isinstance(tensor, Tensor):
            require_finite(module, tensor)
        return
    place = _RANKS_AT.get(part)
    if place is None:
        return
    if is_parameter and len(shape) == 3 and part != "factors.bias":
        place += 1
    expected = len(ranks) if part == "factors.bias" else sum(ranks)
    if len(shape) <= place or shape[place] != expected:
        raise ValueError(
            f"module {quoted(module)}: the config has ranks {ranks}, but {part.partition('.')[2]} of the saved "
            f"composition has shape {shape}"
        )
