"""`CompositionModel`, the PEFT tuner: injection into a base model, shared weights, what a checkpoint holds."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import compat, packing
from .base_copies import warn_about_other_bases
from .config import CompositionConfig
from .configs import Configs
from .fingerprint import add_fingerprint, await_fingerprint, carrier, checked_weights, forget_awaited
from .layer import (
    CompositionLayer,
    Factors,
    Mixing,
    compute_dtype,
    device_of,
    form_of,
    hooks_of,
    layer_shape,
    real_device,
)
from .names import CONTAINER, block_of, name_in_base, name_in_checkpoint, without_outer_adapters
from .parameters import ParameterWrapper, wrapper_for
from .record import require_fitting_record, sizes_of
from .references import AdapterReference, LoraLayout
from .text import LONG, one_line
from .ties import computes_by_flag, find_ties, separate, warn_about_leaving
from .upstream import processes
from .upstream.adapter import UpstreamAdapter, read_adapters
from .upstream.matching import CompositionPlan, match, require_same_base, warn_about_extras, warn_about_other_names
from .upstream.shapes import LayerShape
from .upstream.stacking import StackedFactors, stack
from .wrapping import TargetParameter, find_parameter, needs_unwrapping, parameter_shape, unwrap


# What a `PeftModel` puts before the names of its base model; once more around another `PeftModel`.
_PEFT_PREFIX = "base_model.model."
# What FSDP1 and PyTorch's activation checkpointing insert into names.
_WRAPPERS = re.compile(r"\b_(fsdp|checkpoint)_wrapped_module\.")


@dataclass
class _Injection:
    """What `inject_adapter` prepared for one composition, until its layers are in place.

    `parameters` are those that are composed by themselves, by the module they belong to and their composed name;
    `layers` are the layers so far; `awaits_fingerprint` is the module whose keys bring it, where a saved composition
    is built.
    """

    ranks: dict[str, list[int]]
    parameters: dict[str, dict[str, TargetParameter]]
    biased: set[str]
    shapes: dict[str, LayerShape]
    dtypes: dict[str, torch.dtype]
    mixings: dict[str, Mixing]
    layers: dict[str, CompositionLayer]
    stacked: dict[str, StackedFactors] | None
    awaits_fingerprint: str | None
    quantization_kwargs: dict[str, Any]


class CompositionModel(BaseTuner):
    """Mixes trained LoRA adapters into one adapter (arXiv 2402.15414).

    Made by `get_peft_model(model, CompositionConfig(adapters=[...]))`. The upstream adapters are read and checked
    before the model is changed.

    Args:
        model: the base model that the adapters were trained on.
        peft_config: a `CompositionConfig`, or a dict of them by name.
        adapter_name: name of the composition.
        low_cpu_mem_usage: create layers of a saved composition on the meta device, to be filled by its checkpoint.
        state_dict: where given, its keys choose the modules.

    Raises:
        AdapterError: an upstream adapter cannot be composed; the model is as it was.
        ValueError: the configuration does not fit the model; the model is as it was.
    """

    prefix = "composition_"
    tuner_layer_cls = CompositionLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (declared so by PEFT)
    peft_config: dict[str, CompositionConfig]  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # Before PEFT, which puts the new config in the place of the old one.
        if any(adapter_name in layer.composition_factors for _, layer in composition_layers(model)):
            raise ValueError(
                f"This model already holds a composition {adapter_name!r}. Compose or load into a fresh base model, "
                'call `.unload()` of the PeftModel around it first, or pass another name: adapter_name="...".'
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def mixing_weights(self, adapter_name: str | None = None) -> dict[str, dict[str, float]]:
        """The normalised weight of every upstream adapter in every composed module that it touches.

        Args:
            adapter_name: name of the composition. Default: the active one.

        Returns:
            `{module name: {upstream adapter name: weight}}`, in the model's order.

        Raises:
            ValueError: there is no composition of that name.
        """
        from .mixing import mixing_weights  # it builds on this module

        if adapter_name is None:
            adapter_name = next(iter(self.active_adapters), None)

        return mixing_weights(self, adapter_name)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put a composition into the model: read its upstream adapters, or build it from a checkpoint's record.

        Upstream adapters are read here and not in `_pre_injection_hook`, which PEFT's `add_adapter` does not call.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(self.peft_config, Configs):
            self.peft_config = cast("dict[str, CompositionConfig]", Configs(self.peft_config))
        with config.building():
            targets = _target_layers(model)
            _require_usable_name(adapter_name, targets)
            injection = _prepare(config, model, targets)
            _require_usable_name(adapter_name, injection.ranks)
            config.target_modules = list(injection.ranks)
            self._injection = injection
            if state_dict is not None:
                state_dict = {_at_the_module(key, injection): tensor for key, tensor in state_dict.items()}
            try:
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            finally:
                del self._injection
            # PEFT may have shortened the list to suffixes that would match more.
            config.target_modules = list(injection.ranks)
            if injection.awaits_fingerprint is not None:
                carrying = injection.layers[injection.awaits_fingerprint]
                await_fingerprint(carrying, adapter_name, config, injection.mixings)
            if injection.stacked is not None:
                self._fill(injection, adapter_name)
        find_ties(model, dict(composition_layers(model)))
        packing.watch(model)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompositionModel:
        packing.unpack_all(self)  # bitsandbytes does not, or loses the order of the scales
        return super()._apply(fn, recurse)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a composition; if it was the only active one, another becomes active."""
        super().delete_adapter(adapter_name)
        # PEFT asks the first layer what is active now, and that layer may have held only the deleted one.
        if not self.active_adapters and self.peft_config:
            self.set_adapter(next(iter(self.peft_config)))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge as in every PEFT method; what cannot be merged is found before the first layer is changed.

        Args:
            adapter_names: the compositions; default: the active ones.
            safe_merge: check that each merged layer is finite before it is changed.

        Raises:
            TypeError: a base layer is quantized in a way that cannot be merged into.
            ValueError: an adapter has a bias, the base layer none; or `safe_merge` found values that are not finite.
        """
        with self._leaving_ties(adapter_names):
            super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        layers = dict(composition_layers(self.model))
        if merge:
            with self._leaving_ties(adapter_names, is_for_good=True):
                # PEFT asks only the outermost adapter of a module, and takes all of them off.
                for _, path, layer in _located_layers(self.model):
                    if path.endswith(".base_layer"):
                        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unloaded: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        separate(unloaded, [layer.tie for layer in layers.values() if layer.tie is not None and layer.tie.has_left])
        return unloaded

    @contextmanager
    def _leaving_ties(self, adapter_names: list[str] | None, is_for_good: bool = False) -> Iterator[None]:
        """Around a merge: no module but the composed ones changes its weights.

        Args:
            adapter_names: the compositions that are merged; default: the active ones.
            is_for_good: the layers are taken off afterwards.
        """
        layers = dict(composition_layers(self.model))
        ties = find_ties(self.model, layers)
        self._require_mergeable(adapter_names)
        before = {name for name, tie in ties.items() if tie.has_left}
        asking = [module.config for module in self.model.modules() if _asks_for_ties(module)] if is_for_good else []
        try:
            for config in asking:  # PEFT would take it from the config for good, and with it what the model computes
                config.tie_word_embeddings = False
            yield
        finally:
            for config in asking:
                config.tie_word_embeddings = True
        left = [tie for tie in ties.values() if tie.has_left]
        more = sum(tie.nbytes for name, tie in ties.items() if tie.has_left and name not in before)
        if is_for_good and left:
            more += separate(self.model, left)
        warn_about_leaving(before, ties, more)

    def _check_merge_allowed(self) -> None:
        """Nothing to warn of: merging leaves ties."""

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Nothing to warn of: compositions of tied layers are apart, and merging leaves the tie."""

    def _require_mergeable(self, adapter_names: list[str] | None) -> None:
        for name, layer in composition_layers(self.model):
            try:
                layer.require_mergeable(adapter_names)
            except (RuntimeError, TypeError, ValueError) as error:
                raise type(error)(f"Module {name!r}: {error}") from error

    def _fill(self, injection: _Injection, adapter_name: str) -> None:
        """Hand the read factors to their layers; done last, because PEFT may create modules on the meta device."""
        assert injection.stacked is not None
        for name, layer in injection.layers.items():
            device = real_device(device_of(layer.get_base_layer()))
            cast(Factors, layer.composition_factors[adapter_name]).fill(injection.stacked.pop(name), device)
            mixing = cast(Mixing, layer.composition_mixing[adapter_name])
            if mixing.weight is not None and mixing.weight.is_meta:
                mixing.reset(device)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config  # inject_adapter has set target_modules

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        config = cast(CompositionConfig, peft_config)
        if config.lora_layout is not None:
            wrapped = {*config.lora_layout.get("attentions", ()), *config.lora_layout.get("parameters", ())}
            if key in wrapped or key.rpartition(".")[0] in config.lora_layout.get("attentions", ()):
                return key in wrapped
        # What was excluded is not in the record; a checkpoint's own expressions are never matched.
        return key in (config.composed_modules or {})

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(CompositionConfig, peft_config)
        injection = self._injection
        if current_key in injection.parameters:
            self._compose_parameters(config, adapter_name, target, target_name, parent, current_key)
            return
        if current_key not in injection.ranks:
            raise ValueError(f"The composition {adapter_name!r} has no factors for module {current_key!r}.")
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        mixing, factors = self._new_parts(config, current_key, device_of(base_layer))
        layer = target
        if not isinstance(layer, CompositionLayer):
            layer = form_of(base_layer)(target, **injection.quantization_kwargs)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, mixing, factors, config.inference_mode)
        injection.layers[current_key] = layer

    def _compose_parameters(
        self,
        config: CompositionConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        owner: str,
    ) -> None:
        """Put a wrapper around a module, and compositions of its parameters into it."""
        injection = self._injection
        wrapper = target
        if not isinstance(wrapper, ParameterWrapper):
            wrapper = wrapper_for(target)
            self._replace_module(parent, target_name, wrapper, target)
        for name, parameter in injection.parameters[owner].items():
            layer = wrapper.composition_of(parameter, injection.shapes[name].is_transposed)
            mixing, factors = self._new_parts(config, name, cast(Tensor, parameter.parameter).device)
            layer.update_layer(adapter_name, mixing, factors, config.inference_mode)
            injection.layers[name] = layer

    def _new_parts(self, config: CompositionConfig, name: str, device: torch.device) -> tuple[Mixing, Factors]:
        """The mixing weights of a composed module, shared where they are to be, and room for its factors."""
        injection = self._injection
        dtype, device = injection.dtypes[name], real_device(device)
        block = _sharing_key(config, name)
        if block not in injection.mixings:
            injection.mixings[block] = Mixing(config, torch.promote_types(dtype, torch.float32), device)
        factors = Factors(
            injection.ranks[name],
            injection.shapes[name],
            name in injection.biased,
            dtype,
            torch.device("meta") if injection.stacked is not None else device,
        )
        return injection.mixings[block], factors

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Devices and dtypes are chosen in _create_and_replace; PEFT's own version would move 8-bit layers.
        setattr(parent.base_layer if isinstance(parent, ParameterWrapper) else parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing to do: mixing weights are float32 always, factors have the base layer's compute dtype always."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "Mixed batches (adapter_names=...) are not supported by compositions; call the model once per "
                "composition, with set_adapter in between."
            )
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # PEFT goes by the names of modules, which FSDP1 lengthens within the model: it would find none of them.
        infixes = f".composition_mixing.{adapter_name}.", f".composition_factors.{adapter_name}."
        selected.update((key, state_dict[key]) for key in state_dict if any(infix in key for infix in infixes))
        copied = set(cast(CompositionConfig, config).composed_modules or ())
        for name, layer in composition_layers(model):
            if adapter_name in layer.composition_factors:
                layer._ready_factors(adapter_name)
            # PEFT copies both embeddings of the base where one of them is a target under its bare name.
            is_copied = (
                not copied.isdisjoint(EMBEDDING_LAYER_NAMES) and name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
            )
            if layer.merged and is_copied:
                module = name.removeprefix(_PEFT_PREFIX)
                raise ValueError(
                    f"A composition is merged into {module!r}, of which PEFT saves a copy as that of the base model: "
                    "loading it would add the update twice. Call unmerge_adapter() before saving."
                )
        selected = {key: _onloaded(model, key) if t.is_meta else t for key, t in selected.items()}
        if not cast(CompositionConfig, config).save_adapters:
            selected = {key: tensor for key, tensor in selected.items() if ".composition_factors." not in key}
        add_fingerprint(cast(CompositionConfig, config), adapter_name, state_dict, selected)
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As in every PEFT method; adapters of others around a composition leave no trace in its checkpoint."""
        key = super()._remove_adapter_name_from_key(key, adapter_name)
        while key.startswith(2 * _PEFT_PREFIX):
            key = key.removeprefix(_PEFT_PREFIX)
        path, found, rest = key.partition(".composition_")
        return f"{without_outer_adapters(path)}{found}{rest}" if found else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = _renamed_state_dict(model, cast(CompositionConfig, config), state_dict)
        state_dict = checked_weights(cast(CompositionConfig, config), state_dict)
        forget_awaited(model, adapter_name)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if not cast(CompositionConfig, config).save_adapters:
            # The factors were fetched when the layers were built; they are not missing from the checkpoint.
            infix = f".composition_factors.{adapter_name}."
            remapped.update({key: tensor for key, tensor in model.state_dict().items() if infix in key})
        return remapped


def _onloaded(model: nn.Module, key: str) -> Tensor:
    """The values of a parameter that accelerate keeps on disk or in another memory."""
    owner, _, name = key.rpartition(".")
    for hook in hooks_of(model.get_submodule(owner)):
        if getattr(hook, "weights_map", None) is not None:
            return hook.weights_map[name]
    raise ValueError(f"{key!r} is on the meta device: it has no values that could be saved.")


def composition_layers(model: nn.Module) -> Iterator[tuple[str, CompositionLayer]]:
    """All composed modules and parameters of a model, with their names in the base model without any wrappers."""
    for name, _, layer in _located_layers(model):
        yield name, layer


def _located_layers(model: nn.Module) -> Iterator[tuple[str, str, CompositionLayer]]:
    """The same with their paths in this model, where a wrapper may lie between."""
    wrappers: list[str] = []
    for inner_path, module in model.named_modules():
        path = _WRAPPERS.sub("", inner_path)
        if isinstance(module, CompositionLayer):
            yield name_in_base(f"{path}.", wrappers).rstrip("."), path, module
        elif isinstance(module, (ParameterWrapper, BaseTunerLayer)):
            wrappers.append(path)


def _asks_for_ties(module: nn.Module) -> bool:
    """Whether a model's config has to go on asking for ties, because its forward pass goes by that."""
    if not isinstance(module, PreTrainedModel) or not computes_by_flag(module):
        return False
    return bool(getattr(module.config, "tie_word_embeddings", False))


def _at_the_module(key: str, injection: _Injection) -> str:
    """A key of a checkpoint as PEFT looks for it: at the module, also where a parameter of it is composed."""
    path, found, rest = key.partition(".composition_")
    if not found:
        return key
    name = name_in_checkpoint(path, injection.ranks)
    owner = next((owner for owner, parameters in injection.parameters.items() if name in parameters), name)
    return f"{owner}{found}{rest}"


def _require_usable_name(adapter_name: str, module_names: Iterable[str]) -> None:
    """Refuse names that would clash with another part of the keys of the state dict, or with `nn.ModuleDict`.

    PEFT picks the tensors of one adapter by leaving out all keys that have another adapter's name as a part.
    """
    taken = {"base_model", "model", "base_layer", "original_module", "modules_to_save", "A", "B", "weight", "bias"}
    taken |= {"composition", "mixing", "factors", "composition_mixing", "composition_factors", CONTAINER}
    taken = taken.union(*(module.split(".") for module in module_names))
    if not adapter_name or "." in adapter_name or adapter_name in taken or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"A composition cannot be named {adapter_name!r}: the name becomes part of the keys of its weights. "
            "Choose one without a dot that is not the name of a module or a parameter."
        )


def _sharing_key(config: CompositionConfig, module: str) -> str:
    """Modules with the same key share one weight vector; a module outside any block has its own."""
    if config.weight_sharing == "model":
        return ""
    if config.weight_sharing == "module":
        return module
    return block_of(module, config.layers_pattern) or module


def _prepare(config: CompositionConfig, model: nn.Module, targets: dict[str, nn.Module]) -> _Injection:
    quantization_kwargs = get_quantization_kwargs(model)
    model_dtype = _model_dtype(model)
    current_name = _module_renamer(model, targets)
    shape_of = _shape_reader(targets, quantization_kwargs)
    stacked = None
    sealed = None
    if config.is_restored:
        sealed = current_name(carrier(config))
        _rename_recorded_modules(config, current_name)
        _require_recorded_modules(config, shape_of)
    if not config.is_restored or not config.save_adapters:
        plan = _read(config, model, targets, shape_of, current_name)
        stacked = stack(plan, {name: _dtype_of(name, targets, model_dtype) for name in plan.factors})
        config.record(
            {module: plan.ranks(module) for module in plan.factors},
            [module for module in plan.factors if plan.is_biased(module)],
            (config.provenance if config.is_restored else None) or [adapter.provenance for adapter in plan.adapters],
        )
    config.num_labels = _num_labels(model)
    if isinstance(model, PreTrainedModel):  # PEFT says so only of models without a task type, which may mislead
        config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    assert config.composed_modules is not None
    config.lora_layout = _lora_layout(config.composed_modules, targets)
    shapes = {module: cast(LayerShape, shape_of(module)) for module in config.composed_modules}
    config.layer_sizes = {module: sizes_of(shape) for module, shape in shapes.items()}
    return _Injection(
        ranks=config.composed_modules,
        parameters=_composed_parameters(config.composed_modules, targets),
        biased=set(config.biased_modules or ()),
        shapes=shapes,
        dtypes={module: _dtype_of(module, targets, model_dtype) for module in config.composed_modules},
        mixings={},
        layers={},
        stacked=stacked,
        awaits_fingerprint=sealed,
        quantization_kwargs=quantization_kwargs,
    )


def require_composable(config: CompositionConfig, model: nn.Module, adapters: list[UpstreamAdapter]) -> None:
    """Check of adapters that are read already what building a composition checks; the model stays as it is.

    Args:
        config: the composition that they would be part of; tells the modules that are left out.
        model: the base model; may be on the meta device.
        adapters: the adapters.

    Raises:
        AdapterError: one of them cannot be composed.
        ValueError: nothing is left to compose.
    """
    targets = _target_layers(model)
    shape_of = _shape_reader(targets, get_quantization_kwargs(model))
    current_name = _module_renamer(model, targets)
    if config.check_base_model:
        require_same_base(adapters, getattr(model, "name_or_path", None))
        warn_about_other_names(adapters, getattr(model, "name_or_path", None))
    plan = _match(config, model, targets, adapters, shape_of, current_name)
    model_dtype = _model_dtype(model)
    stack(plan, {name: _dtype_of(name, targets, model_dtype) for name in plan.factors})


def _shape_reader(
    targets: Mapping[str, nn.Module], quantization_kwargs: dict[str, Any]
) -> Callable[[str], LayerShape | None]:
    """What factors must look like, by the name of a module or parameter; None where the model has no such."""

    @cache
    def shape_of(name: str) -> LayerShape | None:
        parameter = find_parameter(targets, name)
        if parameter is not None:
            return parameter_shape(targets, parameter)
        return layer_shape(targets[name], **quantization_kwargs) if name in targets else None

    return shape_of


def _dtype_of(name: str, targets: Mapping[str, nn.Module], model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the factors of a module or parameter: that in which it computes."""
    parameter = find_parameter(targets, name)
    return compute_dtype(targets[name], model_dtype) if parameter is None else cast(Tensor, parameter.parameter).dtype


def _composed_parameters(
    composed: Iterable[str], targets: Mapping[str, nn.Module]
) -> dict[str, dict[str, TargetParameter]]:
    """The composed parameters among the composed names, by the module they belong to."""
    found: dict[str, dict[str, TargetParameter]] = {}
    for name in composed:
        parameter = find_parameter(targets, name)
        if parameter is not None:
            found.setdefault(parameter.owner, {})[name] = parameter
    return found


def _match(
    config: CompositionConfig,
    model: nn.Module,
    targets: dict[str, nn.Module],
    adapters: list[UpstreamAdapter],
    shape_of: Callable[[str], LayerShape | None],
    current_name: Callable[[str], str],
) -> CompositionPlan:
    """Find what in the model the factors of adapters belong to."""
    names: Iterable[str] = targets
    if needs_unwrapping(adapters, targets):
        adapters = [unwrap(adapter, targets, current_name) for adapter in adapters]
        names = _names_in_order(adapters, targets, current_name)
    is_wanted = _module_filter(config, model, targets, adapters, current_name)
    plan = match(adapters, shape_of, names, current_name, is_wanted)
    owners = _composed_parameters(plan.factors, targets)
    for owner, parameters in owners.items():
        if owner in plan.factors:
            raise ValueError(
                f"Some adapters touch the module {owner!r} and others its parameter {', '.join(parameters)} by itself "
                "(target_parameters); compose without one of them (exclude_modules)"
            )
    return plan


def _names_in_order(
    adapters: list[UpstreamAdapter], targets: dict[str, nn.Module], current_name: Callable[[str], str]
) -> list[str]:
    """The modules in the model's order, each followed by those of its parameters that adapters touch."""
    touched = {current_name(name) for adapter in adapters for name in adapter.modules}
    parameters = _composed_parameters(touched, targets)
    names = []
    for module, layer in targets.items():
        names.append(module)
        keys = {parameter.key: name for name, parameter in parameters.get(module, {}).items()}
        names += [keys[key] for key in layer._parameters if key in keys]
    return names


def _lora_layout(composed: Collection[str], layers: Mapping[str, nn.Module]) -> LoraLayout:
    """What a plain LoRA on these modules says of the model; a regex where no list of name ends selects just them."""
    owners = _composed_parameters(composed, layers)
    attentions = [owner for owner in owners if isinstance(layers[owner], nn.MultiheadAttention)]
    parameters = {
        owner: [key for key in layers[owner]._parameters if f"{owner}.{key}" in names]
        for owner, names in owners.items()
        if owner not in attentions
    }
    wrapped = {name for names in owners.values() for name in names}
    modules = [*(name for name in composed if name not in wrapped), *attentions]
    ends = _name_ends(modules, layers)
    layout = LoraLayout(
        target_modules="|".join(map(re.escape, modules)) if ends is None else ends,
        embeddings=[name for name in modules if isinstance(layers[name], nn.Embedding)],
        fan_in_fan_out=any(isinstance(layers[name], Conv1D) for name in modules),
    )
    if attentions:
        layout["attentions"] = attentions
    if parameters:
        names = [f"{owner}.{key}" for owner, keys in parameters.items() for key in keys]
        everything = [f"{name}.{key}" for name, layer in layers.items() for key in layer._parameters]
        layout["target_parameters"] = _name_ends(names, everything) or names
        layout["parameters"] = parameters
    return layout


def _name_ends(wanted: Collection[str], names: Iterable[str]) -> list[str] | None:
    """The fewest name ends that select these names and no others; None where there are none."""
    if not wanted:
        return []
    ends = compat.find_minimal_target_modules(set(wanted), set(names) - set(wanted))
    selected = {name for name in names if any(name == end or name.endswith(f".{end}") for end in ends)}
    return sorted(ends) if selected == set(wanted) else None


def _num_labels(model: nn.Module) -> int | None:
    """How many classes a classifier of transformers has; who loads the composition must build the same head."""
    if not isinstance(model, PreTrainedModel) or "Classification" not in type(model).__name__:
        return None
    return model.config.num_labels


def _target_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Base layers by name; inside a layer that a composition already wraps only the wrapped one counts.

    Wrappers around parameters are looked through.

    A composition beside layers of another PEFT method would save and train them with its own: it is refused.
    """
    targets: dict[str, nn.Module] = {}
    wrappers: list[str] = []
    wrapped: str | None = None
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, CompositionLayer):
            raise ValueError(
                f"Module {name!r} already carries an adapter of another kind ({type(module).__module__}). Compose, or "
                "load the composition, first, and put the other adapter on afterwards; or merge that one "
                "(merge_and_unload) or take it off (unload) before."
            )
        if wrapped is not None and name.startswith(wrapped):  # what is inside comes right after it
            continue
        if isinstance(module, ParameterWrapper):
            wrappers.append(name)
            continue
        if isinstance(module, CompositionLayer):
            wrapped = f"{name}."
            module = module.get_base_layer()
        elif any(name == f"{wrapper}.{CONTAINER}" for wrapper in wrappers):
            wrapped = f"{name}."
            continue
        if name:
            targets[name_in_base(f"{name}.", wrappers).rstrip(".")] = module
    return targets


def _read(
    config: CompositionConfig,
    model: nn.Module,
    targets: dict[str, nn.Module],
    shape_of: Callable[[str], LayerShape | None],
    current_name: Callable[[str], str],
) -> CompositionPlan:
    """Read the upstream adapters, at the recorded commits and hashes where the config describes a checkpoint."""
    references = config.references
    hashes: list[str | None] = [None] * len(references)
    if config.is_restored:
        assert config.provenance is not None
        hashes = [entry["sha256"] for entry in config.provenance]
        references = [
            cast(AdapterReference, {**reference, "revision": entry["commit"] or reference.get("revision")})
            for reference, entry in zip(references, config.provenance)
        ]
    located = processes.locate(references, with_cards=not config.is_restored)
    adapters = read_adapters(located, hashes)
    if config.check_base_model:
        require_same_base(adapters, getattr(model, "name_or_path", None))
    plan = _match(config, model, targets, adapters, shape_of, current_name)
    if config.is_restored:
        _require_recorded_ranks(config, plan)
    else:
        _warn_about_what_is_not_mixed(config, adapters, current_name)
        if config.check_base_model:
            warn_about_other_names(adapters, getattr(model, "name_or_path", None))
        warn_about_other_bases(adapters, targets, current_name)
    return plan


def _warn_about_what_is_not_mixed(
    config: CompositionConfig, adapters: list[UpstreamAdapter], current_name: Callable[[str], str]
) -> None:
    is_saved = cache(lambda module: _is_saved(config, current_name(module)))
    trained = {f"{a.name!r}: {module}" for a in adapters for module in a.modules if is_saved(module)}
    if trained:
        warnings.warn(
            "These modules are trained in full (modules_to_save); the LoRA factors that upstream adapters have "
            f"for them are not mixed: {one_line(', '.join(sorted(trained)), LONG)}.",
            stacklevel=2,
        )
    warn_about_extras(adapters, is_saved)


def _is_saved(config: CompositionConfig, module: str) -> bool:
    """Whether a module is one of `modules_to_save`, or inside one, and so trained in full instead of composed."""
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in config.modules_to_save or ())


def _rename_recorded_modules(config: CompositionConfig, current_name: Callable[[str], str]) -> None:
    """Bring the module names of a checkpoint from an older transformers up to date."""
    composed = config.composed_modules or {}
    config.composed_modules = {current_name(module): ranks for module, ranks in composed.items()}
    config.biased_modules = [current_name(module) for module in config.biased_modules or ()]
    if config.layer_sizes is not None:
        config.layer_sizes = {current_name(module): sizes for module, sizes in config.layer_sizes.items()}


def _renamed_state_dict(
    model: nn.Module, config: CompositionConfig, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The same renaming for the keys of its weights."""
    composed = config.composed_modules or {}
    prefix, separator = _PEFT_PREFIX, ".composition_"
    base_model = model
    while isinstance(base_model, PeftModel):
        base_model = base_model.get_base_model()
    paths = {name: without_outer_adapters(path) for name, path, _ in _located_layers(base_model)}
    found = dict.fromkeys(key.removeprefix(prefix).partition(separator)[0] for key in state_dict if separator in key)
    if found.keys() <= set(paths.values()):
        return state_dict
    names = {path: name_in_checkpoint(path, composed) for path in found}
    if not set(names.values()) <= set(composed):
        current_name = _module_renamer(base_model, _target_layers(base_model))
        names = {path: current_name(name) for path, name in names.items()}
    renamed = {}
    for key, tensor in state_dict.items():
        start = prefix if key.startswith(prefix) else ""
        path, is_ours, rest = key.removeprefix(prefix).partition(separator)
        if is_ours:
            key = f"{start}{paths.get(names[path], names[path])}{is_ours}{rest}"
        renamed[key] = tensor
    return renamed


def _require_recorded_modules(config: CompositionConfig, shape_of: Callable[[str], LayerShape | None]) -> None:
    """A checkpoint fits only a model that has all its modules."""
    for module in config.composed_modules or {}:
        shape = shape_of(module)
        if shape is None:
            raise ValueError(
                f"The saved composition has module {module!r}, which does not exist in the model. It was made for "
                f"{config.base_model_name_or_path!r}."
            )
        if shape.refusal is not None:
            raise ValueError(f"Module {module!r} ({shape.kind}) cannot hold the saved composition: {shape.refusal}.")
        require_fitting_record(config, module, shape)


def _require_recorded_ranks(config: CompositionConfig, plan: CompositionPlan) -> None:
    found = {module: plan.ranks(module) for module in plan.factors}
    for module, ranks in (config.composed_modules or {}).items():
        if found.get(module) != ranks:
            raise ValueError(
                f"The fetched adapters do not match the saved composition: module {module!r} has ranks "
                f"{found.get(module)}, recorded are {ranks}."
            )


def _model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first float parameter of at least 16 bits."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize >= 2:
            return parameter.dtype
    return torch.get_default_dtype()


def _module_filter(
    config: CompositionConfig,
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    adapters: list[UpstreamAdapter],
    current_name: Callable[[str], str],
) -> Callable[[str], bool]:
    """PEFT's own rules for `target_modules`, `exclude_modules`, `layers_to_transform` and `modules_to_save`.

    In a checkpoint they have been applied. What holds for a module holds for its parameters.
    """
    if config.is_restored:
        return (config.composed_modules or {}).__contains__

    def names_of(name: str) -> list[str]:
        parameter = find_parameter(targets, name)
        if parameter is None:
            return [name]
        # As in PEFT, an attention is composed as a whole or not at all.
        is_attention = isinstance(parameter.module, nn.MultiheadAttention)
        return [parameter.owner] if is_attention else [name, parameter.owner]

    target_modules = config.requested_target_modules
    if target_modules is None:
        # As a list of last name parts, because PEFT applies layers_to_transform to such lists alone.
        spelled = {module for adapter in adapters for module in adapter.modules}
        names = {name for module in spelled for name in (module, *names_of(current_name(module)))}
        target_modules = {name.rpartition(".")[2] for name in names}
    rules = SimpleNamespace(
        target_modules=target_modules,
        target_parameters=None,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        task_type=config.task_type,
    )
    compat.maybe_include_all_linear_layers(cast(PeftConfig, rules), model)

    def is_wanted(name: str) -> bool:
        found = [check_target_module_exists(rules, candidate) for candidate in names_of(name)]
        return any(found) and not any(isinstance(result, compat.ExcludedModule) for result in found)

    return is_wanted


def _module_renamer(model: nn.Module, targets: dict[str, nn.Module]) -> Callable[[str], str]:
    """From module names of older transformers, or of the model with or without its head, to those in `targets`."""
    if not isinstance(model, PreTrainedModel):
        return lambda module: module
    renamed_key = compat.key_renamer(model, dict.fromkeys((f"{name}.weight" for name in targets), True))

    @cache  # adapters have most names in common
    def current_name(module: str) -> str:
        if module in targets or find_parameter(targets, module) is not None:
            return module
        renamed = renamed_key(f"{module}.weight").removesuffix(".weight")
        return renamed if renamed in targets else module

    return current_name
