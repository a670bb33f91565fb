"""Compares the outputs of models module by module with linear CKA; the formulas are in `cka.py`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..tuner.locating import base_of
from ..tuner.single import evaluating
from .cka import FEWEST_EXAMPLES, Features, MinibatchCKA
from .views import View, touched_modules


def layerwise_cka(
    target: nn.Module | View,
    others: Mapping[str, nn.Module | View],
    batches: Iterable[Mapping[str, Any]],
    *,
    modules: Sequence[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Linear CKA between the outputs of modules in one model and in other models, for the same inputs.

    An example is one row of a batch, represented by the mean of a module's output over its tokens; tokens that the
    attention mask leaves out are not counted. For convolutions the mean is over positions. The estimator is the
    unbiased minibatch one (see `MinibatchCKA`).

    In figures 7 and 8 of arXiv 2402.15414 the target is the model with a LoRA trained on all data of the downstream
    task, the others are the model with one upstream adapter each, the inputs come from the downstream task, and the
    modules are the query, key and value projections. The paper does not state which output is compared, how tokens are
    pooled, or how many examples are used. Here it is the output of the adapted projection, base weights included.

    All models run in eval mode and without gradients, each once per batch. Afterwards they are as before. Memory: the
    representations of one batch in two models.

    Args:
        target: a model as it is, or a view from `single_adapters`.
        others: the models or views to compare it with, by name.
        batches: the arguments of the models, for example from a `DataLoader`; iterated once. Labels are not passed on,
            unless an encoder-decoder needs them for its inputs. A batch with fewer than 4 examples is left out with a
            warning.
        modules: names of modules in the base model, with or without an adapter. Where a module returns a tuple, its
            first entry is compared. Default: all modules that an adapter among `others` touches.

    Returns:
        `{module: {name: similarity}}` in the model's order, the same form as `model.mixing_weights()`.

    Raises:
        ValueError: a module is missing, did not run, or puts out the same features for all examples; adapters are
            merged or disabled; values are not finite; masks do not fit; there are too few examples. The message names
            the module and the model.
    """
    views = {name: _as_view(other) for name, other in others.items()}
    goal = _as_view(target)
    compared = _compared_modules(goal, views, modules)
    tally = _Tally()
    with evaluating([goal.model, *(view.model for view in views.values())]):
        for batch in tqdm(batches, desc="Comparing representations", unit="batch"):
            if not tally.start(_represent(goal, batch, compared, "the target")):
                continue
            for name, view in views.items():
                tally.add(name, _represent(view, batch, compared, repr(name)))
    found = tally.values()
    return {module: {name: found[module, name] for name in views} for module in compared}


def _as_view(subject: nn.Module | View) -> View:
    if isinstance(subject, View):
        return subject
    return View(subject, nullcontext, touched_modules(base_of(subject), None))


def _compared_modules(target: View, others: Mapping[str, View], modules: Sequence[str] | None) -> list[str]:
    """The names of the modules to compare, checked before anything runs."""
    if not others:
        raise ValueError("there is nothing to compare the target with: others is empty")
    base = base_of(next(iter(others.values())).model)
    if modules is None:
        touched = {module for view in others.values() for module in view.modules}
        modules = [name for name, _ in base.named_modules() if name in touched]
    if not modules:
        raise ValueError("there are no modules to compare: the others have no adapters; pass modules=[...]")
    for name, view in {"the target": target, **{repr(name): view for name, view in others.items()}}.items():
        layers = dict(base_of(view.model).named_modules())
        missing = [module for module in modules if module not in layers]
        if missing:
            raise ValueError(f"{name} ({type(view.model).__name__}) has no module {missing[0]!r}")
        _require_switchable(name, view, layers)
    return list(modules)


def _require_switchable(name: str, view: View, layers: Mapping[str, nn.Module]) -> None:
    """Refuse merged and disabled layers: their output is the same whichever adapter is chosen."""
    if view.switch is nullcontext:
        return
    for module, layer in layers.items():
        if isinstance(layer, BaseTunerLayer) and (layer.merged or layer.disable_adapters):
            state = "merged into" if layer.merged else "disabled in"
            raise ValueError(f"{name} cannot be compared alone: adapters are {state} module {module!r}")


def _represent(view: View, batch: Mapping[str, Any], modules: Sequence[str], name: str) -> dict[str, _Rows]:
    """The outputs of modules for a batch as rows of examples, pooled immediately."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch must be a mapping of the model's arguments, got {type(batch).__name__}")
    base = base_of(view.model)
    padding = _Padding(batch, _makes_decoder_inputs(view.model))
    rows: dict[str, _Rows] = {}

    def keep(module: str, layer: nn.Module, _: object, output: Any) -> None:
        label = f"module {module!r} of {name}"
        if module in rows:
            raise ValueError(
                f"{label} ran more than once in a forward pass: its outputs cannot be assigned to examples"
            )
        output = _first(output, label)
        rows[module] = _Rows(padding.rows(_channels_last(layer, output), label), label)

    with ExitStack() as stack, torch.no_grad():
        for module in modules:
            layer = base.get_submodule(module)
            stack.callback(layer.register_forward_hook(partial(keep, module)).remove)
        stack.enter_context(view.switch())
        view.model(**_inputs(view.model, batch))
    for module in modules:
        if module not in rows:
            raise ValueError(f"module {module!r} of {name} did not run for these inputs")
    return rows


@dataclass(frozen=True)
class _Rows:
    """Representations of some examples, shape (n, p), and their name in errors."""

    values: Tensor
    label: str

    def features(self, device: torch.device | None = None) -> Features:
        return Features(self.values.to(device or self.values.device), self.label)


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch on the model's device, without labels: another task's head may have other classes."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with_labels = _makes_decoder_inputs(model)
    return {
        key: value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value
        for key, value in batch.items()
        if key != "labels" or with_labels
    }


def _makes_decoder_inputs(model: nn.Module) -> bool:
    """Whether a model derives missing inputs of its decoder from the labels."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _first(output: Any, label: str) -> Tensor:
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() < 2:
        kind = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise ValueError(f"the output of {label} must be features of examples, got {kind}")
    return output


def _channels_last(layer: nn.Module, output: Tensor) -> Tensor:
    inner = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return output.movedim(1, -1) if isinstance(inner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else output


class _Padding:
    """Which tokens of a batch are not padding, by its attention mask and that of a decoder with separate inputs."""

    def __init__(self, batch: Mapping[str, Any], has_decoder: bool) -> None:
        self._masks = [batch[key].bool() for key in ("attention_mask", "decoder_attention_mask") if key in batch]
        if has_decoder and "decoder_attention_mask" not in batch:
            if "decoder_input_ids" in batch:
                self._masks.append(torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool))
            elif "labels" in batch:
                self._masks.append(batch["labels"] != -100)
        self._is_padded = not all(bool(mask.all()) for mask in self._masks)

    def rows(self, output: Tensor, label: str) -> Tensor:
        """Rows of examples, shape (n, p), from an output of shape (batch, ..., p)."""
        mask = self._mask_for(output, label)
        if output.dim() == 2:
            return output
        positions = output.flatten(1, -2)  # (batch, tokens, p)
        positions = positions.to(torch.promote_types(output.dtype, torch.float32))
        if mask is None:
            return positions.mean(1)
        return positions.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)

    def _mask_for(self, output: Tensor, label: str) -> Tensor | None:
        """The mask that fits; None if there is no padding."""
        if not self._is_padded or (output.dim() == 2 and output.shape[0] == self._masks[0].shape[0]):
            return None
        fitting = [mask.to(output.device) for mask in self._masks if output.shape[:-1] == mask.shape]
        if not fitting or any(not torch.equal(fitting[0], other) for other in fitting[1:]):
            known = " and ".join(str(tuple(mask.shape)) for mask in self._masks)
            raise ValueError(
                f"{label}: it is unclear which tokens of its output of shape {tuple(output.shape)} are padding, with "
                f"masks of shape {known}. Leave the module out, or give batches without padding."
            )
        return fitting[0]


class _Tally:
    """`MinibatchCKA` for every module and model."""

    def __init__(self) -> None:
        self._ckas: dict[tuple[str, str], MinibatchCKA] = {}
        self._goal: dict[str, Features] = {}
        self._left_out = 0

    def start(self, goal: dict[str, _Rows]) -> bool:
        """Set the target's part of a batch; False if the batch is too small."""
        if min(len(rows.values) for rows in goal.values()) < FEWEST_EXAMPLES["unbiased"]:
            self._left_out += 1
            return False
        self._goal = {module: rows.features() for module, rows in goal.items()}
        return True

    def add(self, name: str, other: dict[str, _Rows]) -> None:
        for module, rows in other.items():
            goal = self._goal[module]
            self._ckas.setdefault((module, name), MinibatchCKA())._add(goal, rows.features(goal.centred.device))

    def values(self) -> dict[tuple[str, str], float]:
        few = f"{self._left_out} with fewer than {FEWEST_EXAMPLES['unbiased']} examples"
        if not self._ckas:
            raise ValueError(f"there was no batch to compare ({few})")
        if self._left_out:
            warnings.warn(f"Batches left out, because the unbiased estimator needs more: {few}.", stacklevel=3)
        return {pair: cka.value() for pair, cka in self._ckas.items()}
