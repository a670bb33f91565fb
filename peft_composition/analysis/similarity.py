"""Linear CKA: how alike two representations of the same examples are, of feature matrices or of adapters in a model.

The first half are pure functions on matrices; the second runs models and compares them module by module.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from huggingface_hub.utils import tqdm
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..tuner.locating import base_of
from ..tuner.single import evaluating
from .cka import FEWEST_EXAMPLES, Estimator, Features, MinibatchCKA, alignment, hsic
from .views import View, touched_modules


ModelEstimator = Literal["minibatch", "biased", "unbiased"]
Part = Literal["output", "update"]
Tokens = Literal["mean", "all"]


def layerwise_cka(
    target: nn.Module | View,
    others: Mapping[str, nn.Module | View],
    batches: Iterable[Mapping[str, Any]],
    *,
    modules: Sequence[str] | None = None,
    part: Part = "output",
    tokens: Tokens = "mean",
    estimator: ModelEstimator = "minibatch",
) -> dict[str, dict[str, float]]:
    """Linear CKA between what modules put out in one model, and in others, for the same inputs.

    In figures 7 and 8 of arXiv 2402.15414 the target is the model with a LoRA trained on the downstream task with all
    its data, the others are the model with one upstream adapter each, the inputs are the downstream task's, and the
    modules are the query, key and value projections. The paper states neither the point that is compared nor how
    tokens are pooled nor the number of examples; the defaults take the output of the adapted projection, base weights
    included, averaged over the tokens.

    All models run in eval mode and without gradients, once each per batch; they are as before afterwards. Memory: the
    representations of one batch in two models, unless `estimator` asks for more.

    Args:
        target: a model as it is, or a view of `single_adapters`.
        others: what it is compared with, by name.
        batches: gone through once; each holds the arguments of the models, such as a `DataLoader` makes. Labels are
            not passed on, unless an encoder-decoder needs them for its inputs.
        modules: names of modules in the base model, adapted or not, all of the same examples; of a tuple put out, the
            first entry counts. Default: all that an adapter among `others` touches.
        part: `"output"` (default) of the module; or `"update"`, what adapters add to the output of their base layer,
            where both touch it. The update is a difference of outputs: use models in float32.
        tokens: `"mean"` (default), an example is a row of a batch with the mean over its tokens; or `"all"`, every
            token is an example. Tokens that the attention mask leaves out do not count in either. Of convolutions
            positions take the place of tokens.
        estimator: `"minibatch"` (default), see `MinibatchCKA`; a batch with fewer than 4 examples is left out with a
            warning. Or `"biased"` or `"unbiased"`, see `linear_cka`, over all examples at once: keeps the
            representations of all batches and models on the CPU.

    Returns:
        `{module: {name: similarity}}`, in the model's order, as `model.mixing_weights()` has the weights.

    Raises:
        ValueError: a module that is missing, did not run or has no variation; adapters that are merged or disabled;
            values that are not finite; masks that do not fit; too few examples. The message names module and model.
    """
    _require_choices(part, tokens, estimator)
    views = {name: _as_view(other) for name, other in others.items()}
    goal = _as_view(target)
    compared = _compared_modules(goal, views, modules, part)
    tally: _Batchwise | _AtOnce = _Batchwise() if estimator == "minibatch" else _AtOnce(estimator)
    with evaluating([goal.model, *(view.model for view in views.values())]):
        for batch in tqdm(batches, desc="Comparing representations", unit="batch"):
            if not tally.start(_represent(goal, batch, list(compared), part, tokens, "the target")):
                continue
            for name, view in views.items():
                own = [module for module, names in compared.items() if name in names]
                tally.add(name, _represent(view, batch, own, part, tokens, repr(name)))
    found = tally.values()
    return {module: {name: found[module, name] for name in names} for module, names in compared.items()}


def _require_choices(part: str, tokens: str, estimator: str) -> None:
    choices = {
        "part": (part, ("output", "update")),
        "tokens": (tokens, ("mean", "all")),
        "estimator": (estimator, ("minibatch", "biased", "unbiased")),
    }
    for field, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{field} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _as_view(subject: nn.Module | View) -> View:
    if isinstance(subject, View):
        return subject
    return View(subject, nullcontext, touched_modules(base_of(subject), None))


def _compared_modules(
    target: View, others: Mapping[str, View], modules: Sequence[str] | None, part: Part
) -> dict[str, list[str]]:
    """The modules, and by name those that are compared there; all that can be wrong with them is found here."""
    if not others:
        raise ValueError("there is nothing to compare the target with")
    base = base_of(next(iter(others.values())).model)
    if modules is None:
        touched = {module for view in others.values() for module in view.modules}
        modules = [name for name, _ in base.named_modules() if name in touched]
    if not modules:
        raise ValueError("there are no modules to compare: none is named, and the others have no adapters")
    for name, view in {"the target": target, **{repr(name): view for name, view in others.items()}}.items():
        layers = dict(base_of(view.model).named_modules())
        missing = [module for module in modules if module not in layers]
        if missing:
            raise ValueError(f"{name} ({type(view.model).__name__}) has no module {missing[0]!r}")
        _require_switchable(name, view, part, layers)
    if part == "output":
        return {module: list(others) for module in modules}
    common = {name: set(modules).intersection(view.modules, target.modules) for name, view in others.items()}
    for name, own in common.items():
        if not own:
            raise ValueError(f"there is no update to compare: no module is touched by the target and {name!r} alike")
    compared = {module: [name for name in others if module in common[name]] for module in modules}
    return {module: names for module, names in compared.items() if names}


def _require_switchable(name: str, view: View, part: Part, layers: Mapping[str, nn.Module]) -> None:
    """A merged or disabled layer gives the same output whichever adapter is chosen."""
    if view.switch is nullcontext and part == "output":
        return
    for module, layer in layers.items():
        if isinstance(layer, BaseTunerLayer) and (layer.merged or layer.disable_adapters):
            state = "merged into" if layer.merged else "disabled in"
            raise ValueError(f"{name} cannot be looked at alone: adapters are {state} module {module!r}")


def _represent(
    view: View, batch: Mapping[str, Any], modules: Sequence[str], part: Part, tokens: Tokens, name: str
) -> dict[str, _Rows]:
    """What modules put out for a batch, as rows of examples; pooled as soon as it is there."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch must be a mapping of the model's arguments, got {type(batch).__name__}")
    base = base_of(view.model)
    padding = _Padding(batch, _makes_decoder_inputs(view.model))
    rows: dict[str, _Rows] = {}
    bases: dict[str, Tensor] = {}

    def keep(module: str, layer: nn.Module, _: object, output: Any) -> None:
        label = f"module {module!r} of {name}"
        if module in rows:
            raise ValueError(f"{label} ran more than once in a forward pass: its examples cannot be told apart")
        output = _first(output, label)
        if part == "update":
            output = output - bases.pop(module)
        rows[module] = _Rows(padding.rows(_channels_last(layer, output), tokens, label), label)

    def keep_base(module: str, _layer: nn.Module, _: object, output: Any) -> None:
        bases[module] = _first(output, f"module {module!r} of {name}")

    with ExitStack() as stack, torch.no_grad():
        for module in modules:
            layer = base.get_submodule(module)
            stack.callback(layer.register_forward_hook(partial(keep, module)).remove)
            if part == "update":
                inner = cast(BaseTunerLayer, layer).get_base_layer()
                stack.callback(inner.register_forward_hook(partial(keep_base, module)).remove)
        stack.enter_context(view.switch())
        view.model(**_inputs(view.model, batch))
    for module in modules:
        if module not in rows:
            raise ValueError(f"module {module!r} of {name} did not run for these inputs")
    return rows


@dataclass(frozen=True)
class _Rows:
    """Representations of some examples, shape (n, p), and what errors call them."""

    values: Tensor
    label: str

    def features(self, device: torch.device | None = None) -> Features:
        return Features(self.values.to(device or self.values.device), self.label)


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch on the model's device. Labels are left out: another task's head may have other classes."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with_labels = _makes_decoder_inputs(model)
    return {
        key: value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value
        for key, value in batch.items()
        if key != "labels" or with_labels
    }


def _makes_decoder_inputs(model: nn.Module) -> bool:
    """Whether a model makes the inputs of its decoder from the labels, where they are not given."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _first(output: Any, label: str) -> Tensor:
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() < 2:
        kind = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise ValueError(f"{label} puts out no features of examples, but something of {kind}")
    return output


def _channels_last(layer: nn.Module, output: Tensor) -> Tensor:
    inner = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return output.movedim(1, -1) if isinstance(inner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else output


class _Padding:
    """Which tokens of a batch are real: its attention mask and, for a decoder with inputs of its own, that one's."""

    def __init__(self, batch: Mapping[str, Any], has_decoder: bool) -> None:
        self._masks = [batch[key].bool() for key in ("attention_mask", "decoder_attention_mask") if key in batch]
        if has_decoder and "decoder_attention_mask" not in batch:
            if "decoder_input_ids" in batch:
                self._masks.append(torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool))
            elif "labels" in batch:
                self._masks.append(batch["labels"] != -100)
        self._is_padded = not all(bool(mask.all()) for mask in self._masks)

    def rows(self, output: Tensor, tokens: Tokens, label: str) -> Tensor:
        """Rows of examples, shape (n, p), from an output of shape (batch, ..., p)."""
        mask = self._mask_for(output, label)
        if output.dim() == 2:
            return output
        positions = output.flatten(1, -2)  # (batch, tokens, p)
        if tokens == "all":
            return positions.flatten(0, 1) if mask is None else positions[mask]
        positions = positions.to(torch.promote_types(output.dtype, torch.float32))
        if mask is None:
            return positions.mean(1)
        return positions.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)

    def _mask_for(self, output: Tensor, label: str) -> Tensor | None:
        """The mask that fits, None where there is nothing to leave out."""
        if not self._is_padded or (output.dim() == 2 and output.shape[0] == self._masks[0].shape[0]):
            return None
        fitting = [mask.to(output.device) for mask in self._masks if output.shape[:-1] == mask.shape]
        if not fitting or any(not torch.equal(fitting[0], other) for other in fitting[1:]):
            known = " and ".join(str(tuple(mask.shape)) for mask in self._masks)
            raise ValueError(
                f"{label}: its output of shape {tuple(output.shape)} does not tell which tokens are padding by masks "
                f"of shape {known}. Leave the module out, or give batches without padding."
            )
        return fitting[0]


class _Batchwise:
    """`MinibatchCKA` for every module and model."""

    def __init__(self) -> None:
        self._ckas: dict[tuple[str, str], MinibatchCKA] = {}
        self._goal: dict[str, Features] = {}
        self._left_out = 0

    def start(self, goal: dict[str, _Rows]) -> bool:
        """Take in the target's part of a batch; False if it is too small."""
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


class _AtOnce:
    """`linear_cka` for every module and model, over the examples of all batches."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator
        self._kept: dict[tuple[str, str | None], list[_Rows]] = {}

    def start(self, goal: dict[str, _Rows]) -> bool:
        """Take in the target's part of a batch."""
        self._keep(None, goal)
        return True

    def add(self, name: str, other: dict[str, _Rows]) -> None:
        self._keep(name, other)

    def values(self) -> dict[tuple[str, str], float]:
        if not self._kept:
            raise ValueError("there was no batch to compare")
        found = {}
        for module in [module for module, name in self._kept if name is None]:
            x = self._features(module, None)
            for name in [name for own, name in self._kept if own == module and name is not None]:
                y = self._features(module, name)
                own_terms = x.own_hsic(self._estimator), y.own_hsic(self._estimator)
                found[module, name] = alignment(hsic(x, y, self._estimator), *own_terms, (x.name, y.name))
        return found

    def _keep(self, name: str | None, representations: dict[str, _Rows]) -> None:
        for module, rows in representations.items():
            self._kept.setdefault((module, name), []).append(replace(rows, values=rows.values.cpu()))

    def _features(self, module: str, name: str | None) -> Features:
        batches = self._kept.pop((module, name))
        return Features(torch.cat([rows.values for rows in batches]), batches[0].label)
