"""`CompositionModel`, the PEFT tuner: injection into a base model, shared mixing weights, content of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import CompositionConfig
from ..names import without_outer_adapters
from . import packing
from .base_layer import device_of, hooks_of, real_device
from .base_model import BaseModel
from .class_names import NamedClasses, record_names, stated_names
from .configs import Configs
from .factors import Factors
from .fingerprint import add_fingerprint, await_fingerprint, checked_weights, forget_awaited
from .forms import form_of
from .layer import CompositionLayer
from .locating import PEFT_PREFIX, base_of, composition_layers, located_layers, renamed_state_dict
from .mixing import Mixing, sharing_key
from .mixing_weights import mixing_weights
from .parameters import ParameterWrapper, wrapper_for
from .preparation import Injection, prepare, require_new, require_usable_name
from .ties import computes_by_flag, find_ties, held_more_than_once, separate, warn_about_leaving


class CompositionModel(NamedClasses):
    """Mixes trained LoRA adapters into one adapter (arXiv 2402.15414).

    Created by `get_peft_model(model, CompositionConfig(adapters=[...]))`. The upstream adapters are read and checked
    before the model is changed.

    Args:
        model: the base model that the adapters were trained on.
        peft_config: a `CompositionConfig`, or a dict of them by name.
        adapter_name: name of the composition.
        low_cpu_mem_usage: whether to create layers of a saved composition on the meta device, where loading its
            checkpoint fills them. Default: False.
        state_dict: if given, its keys select the modules.

    Raises:
        AdapterError: an upstream adapter cannot be composed; the model is unchanged.
        ValueError: the config does not fit the model; the model is unchanged.
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
        if adapter_name in (getattr(model, "peft_config", None) or ()):  # PEFT would replace this config first
            require_new(adapter_name, (layer for _, layer in composition_layers(model)))
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
        """Add a composition to the model: read its upstream adapters, or build it from a checkpoint's record.

        Upstream adapters are read here and not in `_pre_injection_hook`, which PEFT's `add_adapter` does not call.
        """
        if not isinstance(self.peft_config, Configs):
            self.peft_config = cast("dict[str, CompositionConfig]", Configs(self.peft_config))
        # The model's own: one config can serve for several models, and what is recorded differs between them.
        config = self.peft_config[adapter_name] = self.peft_config[adapter_name].copy()
        with config.building():
            base = BaseModel(model)
            require_new(adapter_name, base.composed)
            require_usable_name(adapter_name, base.layers)
            injection = prepare(config, base)
            require_usable_name(adapter_name, injection.ranks.keys() - base.layers.keys())
            # Not a list: PEFT would spend time on shortening it, but modules are matched by the record.
            config.target_modules = cast("list[str]", tuple(injection.ranks))
            self._injection = injection
            config.names_in_model = stated_names(model)
            if not config.is_restored:
                config.class_names = config.names_in_model
            if state_dict is not None:
                state_dict = {injection.key_at_the_module(key): tensor for key, tensor in state_dict.items()}
            try:
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            finally:
                del self._injection
            config.target_modules = list(injection.ranks)
            if injection.awaits_fingerprint is not None:
                carrying = injection.layers[injection.awaits_fingerprint]
                await_fingerprint(carrying, adapter_name, config, injection.mixings)
            if injection.stacked is not None:
                self._fill(injection, adapter_name)
        if held_more_than_once(base.modules):
            find_ties(model, dict(composition_layers(model)))
        if any(packing.packable(base.modules)):
            packing.watch(model)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompositionModel:
        packing.unpack_all(self)  # bitsandbytes does not do it, or loses the order of the scales
        return super()._apply(fn, recurse)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a composition; if it was the only active one, another becomes active.

        Args:
            adapter_name: name of the composition.
        """
        super().delete_adapter(adapter_name)
        # PEFT asks the first layer what is active now, but that layer may have held only the deleted composition.
        if not self.active_adapters and self.peft_config:
            self.set_adapter(next(iter(self.peft_config)))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge as in every PEFT method; layers that cannot be merged are found before anything is changed.

        Args:
            adapter_names: the compositions. Default: the active ones.
            safe_merge: whether to check that each merged layer is finite before it is changed. Default: False.

        Raises:
            TypeError: a base layer is quantized in a way that does not support merging.
            ValueError: an adapter has a bias, but the base layer has none; or `safe_merge` found values that are not
                finite.
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
                # PEFT asks only the outermost adapter of a module, and removes all of them.
                for _, path, layer in located_layers(self.model):
                    if path.endswith(".base_layer"):
                        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unloaded: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        separate(unloaded, [layer.tie for layer in layers.values() if layer.tie is not None and layer.tie.has_left])
        return unloaded

    @contextmanager
    def _leaving_ties(self, adapter_names: list[str] | None, is_for_good: bool = False) -> Iterator[None]:
        """A context for a merge, in which only composed modules change their weights.

        Args:
            adapter_names: the compositions that are merged. Default: the active ones.
            is_for_good: whether the layers are removed afterwards.
        """
        layers = dict(composition_layers(self.model))
        ties = find_ties(self.model, layers)
        self._require_mergeable(adapter_names)
        before = {name for name, tie in ties.items() if tie.has_left}
        asking = [module.config for module in self.model.modules() if _asks_for_ties(module)] if is_for_good else []
        try:
            for config in asking:  # PEFT would change the config permanently, and with it the model's output
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
        """Nothing to warn about: merging undoes ties."""

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Nothing to warn about: compositions of tied layers are separate, and merging undoes the tie."""

    def _require_mergeable(self, adapter_names: list[str] | None) -> None:
        for name, layer in composition_layers(self.model):
            try:
                layer.require_mergeable(adapter_names)
            except (RuntimeError, TypeError, ValueError) as error:
                raise type(error)(f"Module {name!r}: {error}") from error

    def _fill(self, injection: Injection, adapter_name: str) -> None:
        """Pass the factors to their layers; done last, because PEFT may create modules on the meta device."""
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
        layout = config.lora_layout
        if layout is not None and (layout.get("attentions") or layout.get("parameters")):
            attentions = layout.get("attentions", ())
            wrapped = {*attentions, *layout.get("parameters", ())}
            if key in wrapped or key.rpartition(".")[0] in attentions:
                return key in wrapped
        # Excluded modules are not in the record; a checkpoint's own expressions are never matched.
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
        """Wrap a module, and add compositions of its parameters to the wrapper."""
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
        """The mixing weights of a composed module, possibly shared, and empty factors."""
        injection = self._injection
        dtype, device = injection.dtypes[name], real_device(device)
        block = sharing_key(config, name)
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
        """Does nothing: mixing weights are always float32, and factors always have the base layer's compute dtype."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "Compositions do not support mixed batches (adapter_names=...). Call the model once per composition, "
                "with set_adapter in between."
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
        # PEFT goes by module names, which FSDP1 changes, so it would find none of them.
        infixes = f".composition_mixing.{adapter_name}.", f".composition_factors.{adapter_name}."
        selected.update((key, state_dict[key]) for key in state_dict if any(infix in key for infix in infixes))
        copied = set(cast(CompositionConfig, config).composed_modules or ())
        for name, layer in composition_layers(model):
            if adapter_name in layer.composition_factors:
                layer._ready_factors(adapter_name)
            # PEFT copies both embeddings of the base if the bare name of one of them is a target.
            is_copied = (
                not copied.isdisjoint(EMBEDDING_LAYER_NAMES) and name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
            )
            if layer.merged and is_copied:
                module = name.removeprefix(PEFT_PREFIX)
                raise ValueError(
                    f"A composition is merged into {module!r}, and PEFT would save a copy of it as the base model's: "
                    "loading that would add the update twice. Call unmerge_adapter() before saving."
                )
        selected = {key: _onloaded(model, key) if t.is_meta else t for key, t in selected.items()}
        if not cast(CompositionConfig, config).save_adapters:
            selected = {key: tensor for key, tensor in selected.items() if ".composition_factors." not in key}
        record_names(cast(CompositionConfig, config), base_of(model))  # they may be set after the model was built
        add_fingerprint(cast(CompositionConfig, config), adapter_name, state_dict, selected)
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As in every PEFT method; other adapters around a composition do not appear in its checkpoint."""
        key = super()._remove_adapter_name_from_key(key, adapter_name)
        while key.startswith(2 * PEFT_PREFIX):
            key = key.removeprefix(PEFT_PREFIX)
        path, found, rest = key.partition(".composition_")
        return f"{without_outer_adapters(path)}{found}{rest}" if found else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        base_model = base_of(model)
        located = list(located_layers(base_model))
        paths = {name: path for name, path, _ in located}
        state_dict = renamed_state_dict(base_model, paths, cast(CompositionConfig, config), state_dict)
        state_dict = checked_weights(cast(CompositionConfig, config), state_dict)
        forget_awaited([layer for _, _, layer in located], adapter_name)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if not cast(CompositionConfig, config).save_adapters:
            # The factors were read when the layers were built; they are not missing in the checkpoint.
            infix = f".composition_factors.{adapter_name}."
            remapped.update({key: tensor for key, tensor in model.state_dict().items() if infix in key})
        return remapped


def _onloaded(model: nn.Module, key: str) -> Tensor:
    """The values of a parameter that accelerate has offloaded."""
    owner, _, name = key.rpartition(".")
    for hook in hooks_of(model.get_submodule(owner)):
        if getattr(hook, "weights_map", None) is not None:
            return hook.weights_map[name]
    raise ValueError(f"{key!r} is on the meta device and has no values to save. Load the model first.")


def _asks_for_ties(module: nn.Module) -> bool:
    """Whether a model's config must keep its flag for ties, because the forward pass uses the flag."""
    if not isinstance(module, PreTrainedModel) or not computes_by_flag(module):
        return False
    return bool(getattr(module.config, "tie_word_embeddings", False))
