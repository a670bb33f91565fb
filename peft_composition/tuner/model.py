"""`CompositionModel`, the PEFT tuner: injection into a base model, shared weights, what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import CompositionConfig
from ..names import without_outer_adapters
from . import packing
from .base_layer import device_of, hooks_of, real_device
from .base_model import BaseModel
from .configs import Configs
from .factors import Factors
from .fingerprint import add_fingerprint, await_fingerprint, checked_weights, forget_awaited
from .forms import form_of
from .layer import CompositionLayer
from .locating import PEFT_PREFIX, base_of, composition_layers, located_layers, renamed_state_dict
from .mixing import Mixing, sharing_key
from .mixing_weights import mixing_weights
from .parameters import ParameterWrapper, wrapper_for
from .preparation import Injection, prepare, require_usable_name
from .ties import computes_by_flag, find_ties, held_more_than_once, separate, warn_about_leaving


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
        if not isinstance(self.peft_config, Configs):
            self.peft_config = cast("dict[str, CompositionConfig]", Configs(self.peft_config))
        # The model's own: one config can serve for several models, and what is recorded differs between them.
        config = self.peft_config[adapter_name] = self.peft_config[adapter_name].copy()
        with config.building():
            base = BaseModel(model)
            require_usable_name(adapter_name, base.layers)
            injection = prepare(config, base)
            require_usable_name(adapter_name, injection.ranks.keys() - base.layers.keys())
            config.target_modules = list(injection.ranks)
            self._injection = injection
            if state_dict is not None:
                state_dict = {injection.key_at_the_module(key): tensor for key, tensor in state_dict.items()}
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
        modules = list(model.modules())
        if held_more_than_once(modules):
            find_ties(model, dict(composition_layers(model)))
        packing.watch(modules)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompositionModel:
        packing.unpack_all(self)  # bitsandbytes does not, or loses the order of the scales
        return super()._apply(fn, recurse)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a composition; if it was the only active one, another becomes active.

        Args:
            adapter_name: name of the composition.
        """
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
                for _, path, layer in located_layers(self.model):
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

    def _fill(self, injection: Injection, adapter_name: str) -> None:
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
        layout = config.lora_layout
        if layout is not None and (layout.get("attentions") or layout.get("parameters")):
            attentions = layout.get("attentions", ())
            wrapped = {*attentions, *layout.get("parameters", ())}
            if key in wrapped or key.rpartition(".")[0] in attentions:
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
                module = name.removeprefix(PEFT_PREFIX)
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


def _asks_for_ties(module: nn.Module) -> bool:
    """Whether a model's config has to go on asking for ties, because its forward pass goes by that."""
    if not isinstance(module, PreTrainedModel) or not computes_by_flag(module):
        return False
    return bool(getattr(module.config, "tie_word_embeddings", False))
