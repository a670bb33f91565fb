"""What the tuner does to a model, over tiny architectures: training, merging, switching, narrowing, converting.

The checks are those that PEFT applies to its own methods. Expected outputs come from `tiny.composed_by_hand`, which
reads the files of the LoRAs and knows nothing of the library. Saving and loading is in `test_checkpoints.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_composition import CompositionConfig, CompositionLayer

from .. import tiny
from ..reference import read_lora
from ..upstream_faults import composed_by_transformers


MODELS = list(tiny.TINY)
LANGUAGE_MODELS = ["gpt2", "llama", "t5", "mixtral", "gpt_oss"]
WITH_HEAD = [name for name in MODELS if tiny.TINY[name].head]
# Sharing means nothing where nothing is learned.
MIXINGS = {
    "learned-module": {"mixing": "learned", "weight_sharing": "module"},
    "learned-block": {"mixing": "learned", "weight_sharing": "block"},
    "learned-model": {"mixing": "learned", "weight_sharing": "model"},
    "uniform": {"mixing": "uniform"},
    "fixed": {"mixing": "fixed", "weights": [0.75, 0.25]},
}
# Composed modules of every tiny model, and the transformer blocks they are in (modules outside a block count alone).
MODULES_AND_BLOCKS = {
    "mlp": (2, 2),
    "conv": (3, 3),
    "embedding": (2, 2),
    "bert": (6, 2),
    "gpt2": (4, 2),
    "llama": (4, 2),
    "t5": (12, 4),
    "vit": (6, 2),
    "attention": (3, 3),
    "mixtral": (6, 2),
    "gpt_oss": (6, 2),
}
GAIN = 20.0

every_model = pytest.mark.parametrize("name", MODELS)
every_mixing = pytest.mark.parametrize("fields", MIXINGS.values(), ids=list(MIXINGS))


@pytest.fixture(scope="session")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA on every linear layer of the tiny BERT but its classifier."""
    targets = r"bert\..*(query|key|value|dense)"
    return str(tiny.save_lora(tmp_path_factory.mktemp("lora") / "everywhere", tiny.build("bert"), targets))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal but for rounding, which is measured by the largest value: some tiny models give tiny logits."""
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=tolerance * scale)


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def differ(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() > 0.01 * one.abs().max()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, also of those that no state dict holds."""
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """All that an attempt which fails must leave as it was."""
    kinds = [(name, type(module), module.training) for name, module in model.named_modules()]
    grads = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    values = {name: tensor.float().flatten().tolist() for name, tensor in tensors(model).items()}
    return kinds, grads, values, sorted(getattr(model, "peft_config", {}))


def loss(model: nn.Module, name: str) -> Tensor:
    result = model(**tiny.TINY[name].inputs())
    logits = result if isinstance(result, Tensor) else result.logits
    return logits.float().square().mean()


def train(model: nn.Module, name: str, steps: int = 1) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, name).backward()
        optimizer.step()


def scramble(model: nn.Module) -> None:
    """Move all that trains away from where it started."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) / GAIN


def expected_weights(model: PeftModel, adapter_name: str = "default") -> dict[str, list[float]]:
    """w by module, from the trained parameters alone: softmax(gain * theta), in float64."""
    fixed = {"uniform": [0.5, 0.5], "fixed": [0.75, 0.25]}
    weights = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, CompositionLayer) and adapter_name in layer.composition_mixing:
            theta = layer.composition_mixing[adapter_name].weight
            mixing = model.peft_config[adapter_name].mixing
            weights[tiny.name_in_base(name)] = (
                fixed[mixing] if theta is None else (GAIN * theta.double()).softmax(0).tolist()
            )
    return weights


def by_hand(model: PeftModel, name: str, adapters: list[str], adapter_name: str = "default") -> nn.Module:
    """A plain model with the weights and the head that `model` should have."""
    expected = tiny.composed_by_hand(tiny.build(name), adapters, expected_weights(model, adapter_name))
    for head in tiny.TINY[name].head:
        wrapper = model.base_model.model.get_submodule(head)
        assert isinstance(wrapper, ModulesToSaveWrapper)
        expected.get_submodule(head).load_state_dict(wrapper.modules_to_save[adapter_name].state_dict())
    return expected


def trained(model: PeftModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class TestTraining:
    @every_model
    @every_mixing
    def test_a_step_changes_the_mixing_weights_and_the_head_and_nothing_else(self, name, fields, pair) -> None:
        model = tiny.compose(name, pair(name), **fields)
        before = tensors(model)
        meant = {key for key in before if ".modules_to_save.default." in key}
        if fields["mixing"] == "learned":
            meant |= {key for key in before if ".composition_mixing.default." in key}
        assert trained(model) <= meant  # shared weights have one name here and several there
        if meant:
            train(model, name)
        after = tensors(model)
        assert {key for key in before if not torch.equal(before[key], after[key])} == meant

    @every_model
    def test_without_a_head_uniform_and_fixed_train_nothing(self, name, pair) -> None:
        for fields in (MIXINGS["uniform"], MIXINGS["fixed"]):
            model = tiny.compose(name, pair(name), modules_to_save=None, task_type=None, **fields)
            assert trained(model) == set()

    @every_model
    @every_mixing
    def test_parameters_are_counted_as_in_the_paper(self, name, fields, pair, capsys) -> None:
        base = tiny.build(name)
        modules, blocks = MODULES_AND_BLOCKS[name]
        vectors = {"module": modules, "block": blocks, "model": 1}.get(fields.get("weight_sharing"), 0)
        head = sum(p.numel() for h in tiny.TINY[name].head for p in base.get_submodule(h).parameters())
        factors = sum(
            tensor.numel()
            for folder in pair(name)
            for tensor in peft.utils.load_peft_weights(folder, device="cpu").values()
        )
        trainable = 2 * vectors + head
        total = sum(p.numel() for p in base.parameters()) + factors + trainable

        model = tiny.compose(name, pair(name), **fields)

        assert model.get_nb_trainable_parameters() == (trainable, total)
        model.print_trainable_parameters()
        assert f"trainable params: {trainable:,d} || all params: {total:,d} " in capsys.readouterr().out

    def test_nothing_that_peft_does_makes_the_factors_trainable(self, pair) -> None:
        model = tiny.compose("mlp", pair("mlp"))
        model.add_adapter("second", CompositionConfig(adapters=pair("mlp")), low_cpu_mem_usage=True)
        model.set_requires_grad(["default", "second"], True)
        model.set_adapter("second")
        model.base_model.disable_adapter_layers()
        model.base_model.enable_adapter_layers()
        assert trained(model) == {f"base_model.model.lin{n}.composition_mixing.second.weight" for n in (0, 1)}

    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "mixtral", "gpt_oss"])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_gives_the_same_gradients(self, name, use_reentrant, pair) -> None:
        def gradients(model: PeftModel) -> tuple[dict[str, Tensor], int]:
            calls: list[int] = []
            layer = next(module for module in model.modules() if isinstance(module, CompositionLayer))
            layer.register_forward_hook(lambda *_: calls.append(1))
            torch.manual_seed(0)  # the same dropout
            loss(model.train(), name).backward()
            return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}, len(calls)

        def composed() -> PeftModel:
            base = tiny.build(name)
            # Inputs that need a gradient make layers compute in another form, and gradients of weights are small
            # differences of large numbers: float32 keeps few digits of them. Experts and images are float32.
            return tiny.compose(name, pair(name), base.double() if name in ("bert", "gpt2", "llama", "t5") else base)

        plain, calls = gradients(composed())
        model = composed()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        checkpointed, calls_with_recomputation = gradients(model)

        assert calls_with_recomputation == 2 * calls
        assert plain.keys() == checkpointed.keys()
        for key, gradient in plain.items():
            close(checkpointed[key], gradient)
            assert gradient.abs().max() > 0


class TestMerging:
    @every_model
    @every_mixing
    def test_the_merged_model_is_the_formula_in_a_plain_architecture(self, name, fields, pair) -> None:
        model = tiny.compose(name, pair(name), gain=GAIN, **fields)
        scramble(model)
        expected = by_hand(model, name, pair(name))
        unmerged = tiny.output(model, name)
        close(unmerged, tiny.output(expected, name))
        differ(unmerged, tiny.output(tiny.build(name), name))

        merged = model.merge_and_unload()

        close(tiny.output(merged, name), unmerged)
        plain = tiny.build(name)
        assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
        assert merged.state_dict().keys() == plain.state_dict().keys()
        assert not hasattr(merged, "peft_config")
        for key, tensor in expected.state_dict().items():
            close(merged.state_dict()[key], tensor)

    @every_model
    def test_a_safe_merge_gives_the_same(self, name, pair) -> None:
        merged, safely_merged = (
            tiny.compose(name, pair(name)).merge_and_unload(safe_merge=safe_merge) for safe_merge in (False, True)
        )
        for key, tensor in merged.state_dict().items():
            equal(safely_merged.state_dict()[key], tensor)

    @every_model
    def test_unmerging_restores_the_base(self, name, pair) -> None:
        model = tiny.compose(name, pair(name), gain=GAIN)
        scramble(model)
        unmerged, before = tiny.output(model, name), tensors(model)
        model.merge_adapter()
        close(tiny.output(model, name), unmerged)
        changed = {key for key, tensor in tensors(model).items() if not torch.equal(tensor, before[key])}
        assert changed == {f"base_model.model.{tiny.base_weight(m)}" for m in tiny.touched_modules(pair(name))}

        model.unmerge_adapter()

        after = tensors(model)
        for key in before:
            close(after[key], before[key], 1e-6)
        close(tiny.output(model, name), unmerged)

    def test_unmerging_takes_out_what_was_merged_though_the_weights_have_moved(self, pair) -> None:
        model = tiny.compose("mlp", pair("mlp"), gain=GAIN)
        before = tensors(model)["base_model.model.lin1.base_layer.weight"]
        model.merge_adapter()
        scramble(model)
        model.unmerge_adapter()
        close(model.base_model.model.lin1.base_layer.weight, before, 1e-6)

    def test_merging_twice_changes_nothing_more(self, pair) -> None:
        model = tiny.compose("mlp", pair("mlp"))
        model.merge_adapter()
        merged = tiny.output(model, "mlp")
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        equal(tiny.output(model, "mlp"), merged)

    @every_model
    def test_unloading_gives_the_base_bit_for_bit(self, name, pair) -> None:
        base = tiny.build(name)
        model = tiny.compose(name, pair(name), modules_to_save=None, task_type=None)
        scramble(model)
        differ(tiny.output(model, name), tiny.output(base, name))
        unloaded = model.unload()
        assert [(n, type(m)) for n, m in unloaded.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
        equal(tiny.output(unloaded, name), tiny.output(base, name))

    @every_model
    def test_disabling_restores_the_base_bit_for_bit(self, name, pair) -> None:
        model = tiny.compose(name, pair(name))
        scramble(model)
        composed, trainable = tiny.output(model, name), trained(model)
        with model.disable_adapter():
            equal(tiny.output(model, name), tiny.output(tiny.build(name), name))
            assert not any("composition_mixing" in key for key in trained(model))
        equal(tiny.output(model, name), composed)
        assert trained(model) == trainable

    @every_model
    def test_disabling_after_merging_restores_the_base(self, name, pair) -> None:
        model = tiny.compose(name, pair(name))
        scramble(model)
        composed = tiny.output(model, name)
        model.merge_adapter()
        with model.disable_adapter():
            close(tiny.output(model, name), tiny.output(tiny.build(name), name))
        close(tiny.output(model, name), composed)

    def test_a_composition_on_a_model_with_a_stock_lora_merged_into_it(self, pair, tmp_path) -> None:
        stock = tiny.save_lora(tmp_path / "stock", tiny.build("bert"), ["query", "dense"], seed=7)
        base = PeftModel.from_pretrained(tiny.build("bert"), str(stock)).merge_and_unload()
        expected = tiny.composed_by_hand(
            tiny.composed_by_hand(tiny.build("bert"), [str(stock)], [1.0]), pair("bert"), [0.5, 0.5]
        )
        close(
            tiny.output(tiny.compose("bert", pair("bert"), base=base), "bert"),
            tiny.output(expected, "bert"),
        )


class TestSeveralCompositions:
    @pytest.fixture(params=["mlp", "bert", "gpt2", "attention", "gpt_oss"])
    def name(self, request: pytest.FixtureRequest) -> str:
        return request.param

    @pytest.fixture
    def model(self, name: str, pair: Callable[[str], list[str]]) -> PeftModel:
        """A learned "default" and, beside it, a fixed "second" that has the second adapter's modules alone."""
        model = tiny.compose(name, pair(name))
        fields = {"task_type": tiny.TINY[name].task_type, "modules_to_save": tiny.TINY[name].head[:] or None}
        model.add_adapter(
            "second", CompositionConfig(adapters=pair(name)[1:], mixing="fixed", weights=[1.0], **fields)
        )
        return model

    def expected(self, name: str, folders: list[str], weights: list[float]) -> Tensor:
        return tiny.output(tiny.composed_by_hand(tiny.build(name), folders, weights), name)

    def test_the_added_one_is_neither_active_nor_trained(self, name, pair) -> None:
        model = tiny.compose(name, pair(name))
        before, trainable = tiny.output(model, name), trained(model)
        fields = {"task_type": tiny.TINY[name].task_type, "modules_to_save": tiny.TINY[name].head[:] or None}
        model.add_adapter("second", CompositionConfig(adapters=pair(name), weights=[0.25, 0.75], **fields))
        assert model.active_adapters == ["default"]
        assert trained(model) == trainable
        equal(tiny.output(model, name), before)

    @pytest.mark.parametrize("trainable", [True, False])
    def test_adding_one_leaves_the_trainability_of_the_other(self, name, trainable, pair) -> None:
        model = tiny.compose(name, pair(name))
        model.set_requires_grad("default", trainable)
        before = {key: p.requires_grad for key, p in model.named_parameters()}
        model.add_adapter("second", CompositionConfig(adapters=pair(name)))
        after = {key: p.requires_grad for key, p in model.named_parameters()}
        assert {key: after[key] for key in before} == before
        assert not any(after[key] for key in after if ".second." in key)

    def test_switching(self, name, model, pair) -> None:
        first = self.expected(name, pair(name), [0.5, 0.5])
        second = self.expected(name, pair(name)[1:], [1.0])
        differ(first, second)
        close(tiny.output(model, name), first)
        model.set_adapter("second")
        close(tiny.output(model, name), second)
        assert not any(".default." in key for key in trained(model))
        model.set_adapter("default")
        close(tiny.output(model, name), first)
        assert any(".composition_mixing.default." in key for key in trained(model))
        assert not any(".second." in key for key in trained(model))

    def test_active_together_they_add_up(self, name, pair) -> None:
        model = tiny.compose(name, pair(name), modules_to_save=None, task_type=None)
        model.add_adapter("second", CompositionConfig(adapters=pair(name)[1:], mixing="uniform"))
        model.base_model.set_adapter(["default", "second"])
        expected = self.expected(name, pair(name), [0.5, 1.5])
        close(tiny.output(model, name), expected)
        model.merge_adapter()
        close(tiny.output(model, name), expected)
        model.unmerge_adapter()
        close(tiny.output(model, name), expected)
        close(
            tiny.output(model.merge_and_unload(adapter_names=["second"]), name),
            self.expected(name, pair(name)[1:], [1]),
        )

    def test_merging_one_that_is_not_active(self, name, model, pair) -> None:
        """As in PEFT's LoRA: what is merged counts in its modules, what is active in the others."""
        model.merge_adapter(adapter_names=["second"])
        merged = tiny.touched_modules(pair(name)[1:])
        weights = {module: [0, 1] if module in merged else [0.5, 0.5] for module in tiny.touched_modules(pair(name))}
        expected = tiny.composed_by_hand(tiny.build(name), pair(name), weights)
        close(tiny.output(model, name), tiny.output(expected, name))

    def test_deleting_the_inactive_one(self, name, model, pair) -> None:
        before = tiny.output(model, name)
        model.delete_adapter("second")
        assert not any(".second." in key for key in model.state_dict())
        assert model.active_adapters == ["default"]
        equal(tiny.output(model, name), before)
        assert list(model.peft_config) == ["default"]

    def test_deleting_the_active_one_activates_the_other(self, name, model, pair) -> None:
        with pytest.warns(UserWarning, match="default was active which is now deleted"):
            model.delete_adapter("default")
        assert not any(".default." in key for key in model.state_dict())
        assert model.active_adapters == ["second"]
        touched = {
            tiny.name_in_base(path.removeprefix("model."))
            for path, layer in model.base_model.named_modules()
            if isinstance(layer, CompositionLayer)
        }
        assert touched == set(tiny.touched_modules(pair(name)))
        close(tiny.output(model, name), self.expected(name, pair(name)[1:], [1.0]))
        assert set(model.base_model.mixing_weights()) == set(tiny.touched_modules(pair(name)[1:]))

    def test_a_deleted_name_can_be_used_again(self, name, model, pair) -> None:
        model.delete_adapter("second")
        fields = {"task_type": tiny.TINY[name].task_type, "modules_to_save": tiny.TINY[name].head[:] or None}
        model.add_adapter("second", CompositionConfig(adapters=pair(name), weights=[0.25, 0.75], **fields))
        model.set_adapter("second")
        close(tiny.output(model, name), self.expected(name, pair(name), [0.25, 0.75]))

    def test_a_name_in_use_is_refused(self, name, model, pair) -> None:
        with pytest.raises(ValueError, match="'second' already exists"):
            model.add_adapter("second", CompositionConfig(adapters=pair(name)))

    def test_a_merged_one_is_not_deleted(self, name, model) -> None:
        model.merge_adapter()
        with pytest.raises(ValueError, match=re.escape("Cannot delete adapter(s) ['default'] while they are merged")):
            model.delete_adapter("default")

    def test_one_that_cannot_be_added_leaves_the_model_as_it_was(self, name, model, tmp_path) -> None:
        before = fingerprint(model)
        with pytest.raises(ValueError, match="there is no folder"):
            model.add_adapter("third", CompositionConfig(adapters=[str(tmp_path / "missing")]))
        assert fingerprint(model) == before
        assert list(model.peft_config) == ["default", "second"]


class TestNames:
    @pytest.mark.parametrize("name", ["mlp", "bert"])
    def test_a_base_that_holds_the_composition_already_is_told_so(self, name, pair, tmp_path) -> None:
        """`base` carries the composition after `get_peft_model(base, ...)`."""
        base = tiny.build(name)
        model = tiny.compose(name, pair(name), base=base)
        model.save_pretrained(str(tmp_path))
        before, config = fingerprint(model), model.peft_config["default"]
        other = CompositionConfig(adapters=pair(name)[:1], modules_to_save=tiny.TINY[name].head)
        again = [lambda: PeftModel.from_pretrained(base, str(tmp_path)), lambda: get_peft_model(base, other)]
        for attempt in again:
            with pytest.raises(
                ValueError, match=r"already holds a composition 'default'.* fresh .*\.unload\(\).*name="
            ):
                attempt()
            assert fingerprint(model) == before
            assert model.peft_config["default"] is config
        plain = model.unload()
        loaded = PeftModel.from_pretrained(plain, str(tmp_path))
        assert torch.equal(
            tiny.output(loaded.eval(), name),
            tiny.output(PeftModel.from_pretrained(tiny.build(name), str(tmp_path)).eval(), name),
        )

    @pytest.mark.parametrize("adapter_name", ["composition", "a.b", "mixing", ""])
    def test_names_that_clash_with_keys_are_refused(self, adapter_name, pair) -> None:
        base = tiny.build("mlp")
        before = fingerprint(base)
        with pytest.raises(ValueError, match=f"cannot be named '{adapter_name}'"):
            get_peft_model(base, CompositionConfig(adapters=pair("mlp")), adapter_name=adapter_name)
        assert fingerprint(base) == before

        model = tiny.compose("mlp", pair("mlp"))
        before = fingerprint(model)
        with pytest.raises(ValueError, match=f"cannot be named '{adapter_name}'"):
            model.add_adapter(adapter_name, CompositionConfig(adapters=pair("mlp")))
        assert fingerprint(model) == before

    @pytest.mark.parametrize("adapter_name", ["A", "B", "weight", "bias", "train", "keys", "base_layer", "lin1", "c"])
    def test_any_other_name_is_refused_too_or_costs_no_composition_its_tensors(self, adapter_name, pair) -> None:
        """PEFT picks the tensors of one adapter by leaving out the keys that hold another's name as a part."""
        model = tiny.compose("mlp", pair("mlp"), modules_to_save=None)
        alone = get_peft_model_state_dict(model)
        before = fingerprint(model)
        refusal = None
        try:
            model.add_adapter(adapter_name, CompositionConfig(adapters=pair("mlp")))
        except ValueError as error:
            refusal = str(error)
        if refusal is not None:
            assert repr(adapter_name) in refusal
            assert fingerprint(model) == before
        for key in model.peft_config:
            assert get_peft_model_state_dict(model, adapter_name=key).keys() == alone.keys()


class TestStatus:
    def test_of_every_layer(self, pair) -> None:
        model = tiny.compose("mlp", pair("mlp"), modules_to_save=None)
        model.add_adapter("second", CompositionConfig(adapters=pair("mlp")[1:]))
        status = {entry.name: entry for entry in model.get_layer_status()}
        assert set(status) == {"model.lin0", "model.lin1"}
        lin1 = status["model.lin1"]
        assert (lin1.module_type, lin1.enabled, lin1.active_adapters) == ("Linear", True, ["default"])
        assert lin1.available_adapters == ["default", "second"]
        assert lin1.requires_grad == {"default": True, "second": False}
        assert lin1.devices == {"default": ["cpu"], "second": ["cpu"]}
        assert lin1.merged_adapters == []
        assert status["model.lin0"].available_adapters == ["default"]

    @every_model
    def test_of_the_model(self, name, pair) -> None:
        model = tiny.compose(name, pair(name))
        status = model.get_model_status()
        modules, _ = MODULES_AND_BLOCKS[name]
        assert status.base_model_type == type(tiny.build(name)).__name__
        assert status.adapter_model_type == "CompositionModel"
        assert status.peft_types == {"default": "COMPOSITION"}
        assert status.num_adapter_layers == modules + len(tiny.TINY[name].head)
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
        assert (status.requires_grad, status.devices) == ({"default": True}, {"default": ["cpu"]})
        assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()

    def test_follows_what_is_done(self, pair) -> None:
        model = tiny.compose("bert", pair("bert"))
        model.merge_adapter()
        # PEFT's wrapper of the head is never merged.
        assert {s.name: s.merged_adapters for s in model.get_layer_status() if "classifier" not in s.name} == {
            f"model.{module}": ["default"] for module in tiny.touched_modules(pair("bert"))
        }
        model.unmerge_adapter()
        with model.disable_adapter():
            assert model.get_model_status().enabled is False
        assert model.get_model_status().enabled is True
        model.set_requires_grad("default", False)
        assert model.get_model_status().requires_grad == {"default": False}

    def test_of_a_model_that_learns_nothing(self, pair) -> None:
        model = tiny.compose("mlp", pair("mlp"), mixing="uniform", modules_to_save=None)
        status = model.get_model_status()
        assert (status.trainable_params, status.available_adapters) == (0, ["default"])
        assert True not in status.requires_grad.values()


class TestPrecision:
    @every_model
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    def test_factors_follow_the_base_and_mixing_weights_stay_float32(
        self, name, dtype, autocast_adapter_dtype, pair
    ) -> None:
        base = tiny.build(name).to(dtype)
        config = CompositionConfig(adapters=pair(name), modules_to_save=tiny.TINY[name].head[:] or None)
        model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
        model.add_adapter("second", copy.copy(config), autocast_adapter_dtype=autocast_adapter_dtype)
        kinds = {
            kind: {p.dtype for key, p in model.named_parameters() if f".{kind}." in key}
            for kind in ("composition_factors", "composition_mixing", "base_layer")
        }
        assert kinds == {
            "composition_factors": {dtype},
            "composition_mixing": {torch.float32},
            "base_layer": {dtype},
        }

        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.TINY[name].inputs().items()}
        result = model(**inputs)
        logits = result if isinstance(result, Tensor) else result.logits
        assert logits.dtype == dtype
        expected = tiny.output(tiny.composed_by_hand(tiny.build(name), pair(name), [0.5, 0.5]), name)
        scale = float(expected.abs().max())
        torch.testing.assert_close(logits.float(), expected, rtol=0, atol=scale / 15)
        logits.float().square().mean().backward()
        gradients = [p.grad for key, p in model.named_parameters() if ".composition_mixing.default." in key]
        assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients)
        assert any(gradient.abs().max() > 0 for gradient in gradients)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_casting_the_composed_model_keeps_the_mixing_weights_exact(self, dtype, pair) -> None:
        model = tiny.compose("mlp", pair("mlp"))
        scramble(model)
        before = {key: tensor for key, tensor in tensors(model).items() if "composition_mixing" in key}
        model.to(dtype)
        after = tensors(model)
        for key, tensor in before.items():
            equal(after[key], tensor)
        assert after["base_model.model.lin1.composition_factors.default.A"].dtype == dtype

    @pytest.mark.parametrize("name", ["mlp", "conv", "bert", "gpt2", "attention", "mixtral", "gpt_oss"])
    def test_autocast(self, name, pair) -> None:
        model = tiny.compose(name, pair(name))
        full = tiny.output(model, name)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, name)
            low = tiny.output(model, name)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), full, rtol=0, atol=float(full.abs().max()) / 15)
        value.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


class TestOtherWaysIn:
    @every_model
    @every_mixing
    def test_low_cpu_mem_usage_makes_no_difference(self, name, fields, pair) -> None:
        usual = tiny.compose(name, pair(name), **fields)
        config = CompositionConfig(
            adapters=pair(name),
            task_type=tiny.TINY[name].task_type,
            modules_to_save=tiny.TINY[name].head[:] or None,
            **fields,
        )
        model = get_peft_model(tiny.build(name), config, low_cpu_mem_usage=True)
        assert {tensor.device.type for tensor in tensors(model).values()} == {"cpu"}
        assert trained(model) == trained(usual)
        equal(tiny.output(model, name), tiny.output(usual, name))
        if trained(model):
            train(model, name, steps=2)
            train(usual, name, steps=2)
            equal(tiny.output(model, name), tiny.output(usual, name))

    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    def test_adding_with_low_cpu_mem_usage(self, low_cpu_mem_usage, pair) -> None:
        model = tiny.compose("bert", pair("bert"))
        config = CompositionConfig(adapters=pair("bert"), weights=[0.25, 0.75], task_type="SEQ_CLS")
        model.add_adapter("second", config, low_cpu_mem_usage=low_cpu_mem_usage)
        model.set_adapter("second")
        assert {tensor.device.type for tensor in tensors(model).values()} == {"cpu"}
        expected = tiny.composed_by_hand(tiny.build("bert"), pair("bert"), [0.25, 0.75])
        close(tiny.output(model, "bert"), tiny.output(expected, "bert"))

    @every_model
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    def test_inject_adapter_in_model(self, name, low_cpu_mem_usage, pair) -> None:
        config = CompositionConfig(adapters=pair(name), weights=[0.25, 0.75])
        model = inject_adapter_in_model(config, tiny.build(name), "mix", low_cpu_mem_usage=low_cpu_mem_usage)
        assert type(model) is type(tiny.build(name))
        expected = tiny.composed_by_hand(tiny.build(name), pair(name), [0.25, 0.75])
        close(tiny.output(model, name), tiny.output(expected, name))
        assert {key for key, p in model.named_parameters() if p.requires_grad} == {
            f"{tiny.path_of(module)}.composition_mixing.mix.weight" for module in tiny.touched_modules(pair(name))
        }

    @composed_by_transformers
    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "mixtral", "gpt_oss"])
    def test_add_adapter_of_transformers(self, name, pair) -> None:
        model = tiny.build(name)
        model.add_adapter(CompositionConfig(adapters=pair(name), weights=[0.25, 0.75]))
        expected = tiny.composed_by_hand(tiny.build(name), pair(name), [0.25, 0.75])
        close(tiny.output(model, name), tiny.output(expected, name))
        assert {key for key, p in model.named_parameters() if p.requires_grad} == {
            f"{tiny.path_of(module)}.composition_mixing.default.weight" for module in tiny.touched_modules(pair(name))
        }
        model.disable_adapters()
        equal(tiny.output(model, name), tiny.output(tiny.build(name), name))

    @composed_by_transformers
    def test_several_compositions_through_transformers(self, pair) -> None:
        model = tiny.build("bert")
        model.add_adapter(CompositionConfig(adapters=pair("bert")), adapter_name="first")
        model.add_adapter(CompositionConfig(adapters=pair("bert")[1:]), adapter_name="second")

        def expected(folders: list[str], weights: list[float]) -> Tensor:
            return tiny.output(tiny.composed_by_hand(tiny.build("bert"), folders, weights), "bert")

        close(tiny.output(model, "bert"), expected(pair("bert")[1:], [1.0]))
        model.set_adapter("first")
        close(tiny.output(model, "bert"), expected(pair("bert"), [0.5, 0.5]))
        model.set_adapter(["first", "second"])
        close(tiny.output(model, "bert"), expected(pair("bert"), [0.5, 1.5]))
        model.delete_adapter("second")
        close(tiny.output(model, "bert"), expected(pair("bert"), [0.5, 0.5]))

    @every_model
    @pytest.mark.parametrize("sharing", ["module", "model"])
    def test_state_dict_goes_into_a_composition_of_another_name(self, name, sharing, pair) -> None:
        model = tiny.compose(name, pair(name), weight_sharing=sharing)
        scramble(model)
        state = get_peft_model_state_dict(model)
        assert not any("default" in key for key in state)
        config = CompositionConfig(
            adapters=pair(name),
            weight_sharing=sharing,
            task_type=tiny.TINY[name].task_type,
            modules_to_save=tiny.TINY[name].head[:] or None,
        )
        other = get_peft_model(tiny.build(name), config, adapter_name="other")
        result = set_peft_model_state_dict(other, state, adapter_name="other")
        assert result.unexpected_keys == []
        equal(tiny.output(other, name), tiny.output(model, name))

    @pytest.mark.parametrize("sharing", ["module", "block", "model"])
    def test_deepcopy(self, sharing, pair) -> None:
        model = tiny.compose("bert", pair("bert"), weight_sharing=sharing)
        scramble(model)
        twin = copy.deepcopy(model)
        before = tiny.output(model, "bert")
        equal(tiny.output(twin, "bert"), before)
        assert twin.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
        train(twin, "bert")
        differ(tiny.output(twin, "bert"), before)
        equal(tiny.output(model, "bert"), before)

    def test_one_config_for_two_models(self, pair) -> None:
        config = CompositionConfig(adapters=pair("bert"), target_modules=["value"], task_type="SEQ_CLS")
        models = [get_peft_model(tiny.build("bert"), config) for _ in range(2)]
        for model in models:
            assert set(model.base_model.mixing_weights()) == {
                f"bert.encoder.layer.{layer}.attention.self.value" for layer in (0, 1)
            }
        train(models[0], "bert")
        differ(tiny.output(models[0], "bert"), tiny.output(models[1], "bert"))

    def test_one_config_after_the_model_has_grown(self, pair) -> None:
        """What an earlier model had is no limit to what a later one has."""
        config = CompositionConfig(adapters=pair("mlp"))
        small = nn.ModuleDict({"lin1": nn.Linear(20, 16)})
        with pytest.raises(ValueError, match="module 'lin0' does not exist"):
            get_peft_model(small, config)
        model = get_peft_model(tiny.build("mlp"), config)
        assert set(model.base_model.mixing_weights()) == {"lin0", "lin1"}


class TestMixedBatches:
    @pytest.mark.parametrize("name", ["mlp", "bert"])
    def test_are_refused(self, name, pair) -> None:
        model = tiny.compose(name, pair(name))
        with pytest.raises(ValueError, match=r"mixed batches .* set_adapter"):
            model(**tiny.TINY[name].inputs(), adapter_names=["default"] * 4)

    def test_are_refused_by_generate(self, pair) -> None:
        model = tiny.compose("gpt2", pair("gpt2"))
        with pytest.raises(ValueError, match=r"mixed batches .* set_adapter"):
            model.generate(**tiny.TINY["gpt2"].inputs(), adapter_names=["default"] * 4, max_new_tokens=1)


class TestGenerate:
    @pytest.mark.parametrize("name", LANGUAGE_MODELS)
    def test_composed_and_merged_write_the_same_tokens(self, name, pair) -> None:
        model = tiny.compose(name, pair(name))
        scramble(model)

        def write(model: nn.Module) -> list[list[int]]:
            tokens = tiny.TINY[name].inputs()["input_ids"]
            with torch.no_grad():
                return model.generate(
                    input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False
                ).tolist()

        composed = write(model)
        assert composed != write(tiny.build(name))
        assert write(model.merge_and_unload()) == composed


class TestMixingWeights:
    @every_model
    @every_mixing
    def test_are_plain_floats_by_module_and_adapter(self, name, fields, pair) -> None:
        model = tiny.compose(name, pair(name), gain=GAIN, **fields)
        scramble(model)
        weights = model.base_model.mixing_weights()
        assert sorted(weights) == tiny.touched_modules(pair(name))
        parameters = [parameter for parameter, _ in tiny.build(name).named_parameters()]
        names = dict.fromkeys(name for p in parameters for name in (p, p.rpartition(".")[0]) if name in weights)
        assert list(weights) == list(names)
        expected = expected_weights(model)
        touched = {Path(folder).name: read_lora(folder) for folder in pair(name)}
        for module, row in weights.items():
            assert list(row) == [adapter for adapter in ("first", "second") if module in touched[adapter]]
            assert all(type(weight) is float for weight in row.values())
            wanted = dict(zip(touched, expected[module], strict=True))
            assert sum(wanted.values()) == pytest.approx(1, abs=1e-6)
            assert row == pytest.approx({adapter: wanted[adapter] for adapter in row}, abs=1e-6)

    def test_of_each_composition(self, pair) -> None:
        model = tiny.compose("mlp", pair("mlp"))
        model.add_adapter("second", CompositionConfig(adapters=pair("mlp"), weights=[0.25, 0.75]))
        assert model.base_model.mixing_weights()["lin1"] == {"first": 0.5, "second": 0.5}
        assert model.base_model.mixing_weights("second")["lin1"] == pytest.approx({"first": 0.25, "second": 0.75})
        model.set_adapter("second")
        assert model.base_model.mixing_weights() == model.base_model.mixing_weights("second")

    def test_of_a_merged_or_disabled_model(self, pair) -> None:
        model = tiny.compose("mlp", pair("mlp"))
        expected = {"lin0": {"first": 0.5}, "lin1": {"first": 0.5, "second": 0.5}}
        model.merge_adapter()
        assert model.base_model.mixing_weights() == expected
        with model.disable_adapter():
            assert model.base_model.mixing_weights() == expected

    def test_of_an_unknown_composition(self, pair) -> None:
        model = tiny.compose("mlp", pair("mlp"))
        with pytest.raises(ValueError, match=re.escape("no composition 'other'; there are ['default']")):
            model.base_model.mixing_weights("other")


class TestSharing:
    @pytest.mark.parametrize("name", ["bert", "t5", "mlp"])
    @pytest.mark.parametrize("sharing", ["block", "model"])
    def test_the_gradient_of_a_shared_vector_is_the_sum_of_those_of_its_modules(self, name, sharing, pair) -> None:
        def gradients(sharing: str) -> dict[int, tuple[Tensor, list[str]]]:
            """Gradients by the object that holds them, with the modules it belongs to."""
            model = tiny.compose(name, pair(name), weight_sharing=sharing)
            loss(model, name).backward()
            found: dict[int, tuple[Tensor, list[str]]] = {}
            for module, layer in model.base_model.model.named_modules():
                if isinstance(layer, CompositionLayer):
                    mixing = layer.composition_mixing["default"]
                    found.setdefault(id(mixing), (mixing.weight.grad, []))[1].append(module)
            return found

        apart = {modules[0]: gradient for gradient, modules in gradients("module").values()}
        shared = gradients(sharing)
        modules, blocks = MODULES_AND_BLOCKS[name]
        assert len(apart) == modules
        assert len(shared) == {"block": blocks, "model": 1}[sharing]
        for gradient, members in shared.values():
            close(gradient, torch.stack([apart[module] for module in members]).sum(0))
            assert gradient.abs().max() > 0

    def groups(self, model: PeftModel) -> list[set[str]]:
        found: dict[int, set[str]] = {}
        for module, layer in model.base_model.model.named_modules():
            if isinstance(layer, CompositionLayer):
                found.setdefault(id(layer.composition_mixing["default"]), set()).add(module)
        return sorted(found.values(), key=sorted)

    def test_blocks_of_encoder_and_decoder_are_distinct(self, pair) -> None:
        attention = {"encoder": ["0.SelfAttention"], "decoder": ["0.SelfAttention", "1.EncDecAttention"]}
        assert self.groups(tiny.compose("t5", pair("t5"), weight_sharing="block")) == [
            {f"{stack}.block.{n}.layer.{layer}.{part}" for layer in attention[stack] for part in "qv"}
            for stack in ("decoder", "encoder")
            for n in (0, 1)
        ]

    def test_modules_outside_a_block_have_their_own_vector(self, tmp_path) -> None:
        targets = ["word_embeddings", "pooler.dense", "query", "value"]
        adapter = tiny.save_lora(tmp_path / "lora", tiny.build("bert"), targets)
        model = tiny.compose("bert", [str(adapter)], weight_sharing="block")
        attention = "bert.encoder.layer.{}.attention.self.{}"
        assert self.groups(model) == [
            {"bert.embeddings.word_embeddings"},
            *({attention.format(n, "query"), attention.format(n, "value")} for n in (0, 1)),
            {"bert.pooler.dense"},
        ]


class TestNarrowing:
    """What is composed is what PEFT's own LoRA with the same fields would match."""

    @pytest.mark.parametrize(
        "fields",
        [
            {"target_modules": ["query", "value"]},
            {"target_modules": {"query", "value"}},
            {"target_modules": ["output.dense"]},
            {"target_modules": ["bert.encoder.layer.1.attention.self.key", "pooler.dense"]},
            {"target_modules": r".*layer\.0\..*\.(query|dense)"},
            {"target_modules": "all-linear"},
            {"target_modules": "all-linear", "exclude_modules": ["query", "pooler.dense"]},
            {"target_modules": ["query", "dense"], "exclude_modules": r".*(layer\.1|pooler).*"},
            {"target_modules": ["query", "dense"], "layers_to_transform": 1},
            {"target_modules": ["query", "dense"], "layers_to_transform": [0, 1]},
            {"target_modules": ["query", "dense"], "layers_to_transform": [0], "layers_pattern": "layer"},
            {"target_modules": ["query", "dense"], "layers_to_transform": [0], "layers_pattern": ["h", "layer"]},
            {"target_modules": ["query", "dense"], "modules_to_save": ["pooler"]},
        ],
        ids=range(13),  # the text of a set differs from process to process
    )
    def test_composes_what_lora_would_match(self, fields, everywhere) -> None:
        lora = get_peft_model(tiny.build("bert"), LoraConfig(task_type="SEQ_CLS", **copy.deepcopy(fields)))
        wanted = set(lora.base_model.targeted_module_names)
        assert wanted
        model = tiny.compose("bert", [everywhere], **{"modules_to_save": None, **copy.deepcopy(fields)})
        assert set(model.base_model.mixing_weights()) == wanted
        assert set(model.base_model.targeted_module_names) == wanted

    @pytest.mark.parametrize(
        ("fields", "left"),
        [
            ({"exclude_modules": ["dense"]}, {0, 1}),
            ({"layers_to_transform": [1], "exclude_modules": ["dense"]}, {1}),
            ({"layers_to_transform": 0, "layers_pattern": "layer", "exclude_modules": ["dense"]}, {0}),
        ],
        ids=str,
    )
    def test_narrows_also_without_target_modules(self, fields, left, everywhere) -> None:
        model = tiny.compose("bert", [everywhere], **fields)
        assert set(model.base_model.mixing_weights()) == {
            f"bert.encoder.layer.{n}.attention.self.{part}" for n in left for part in ("query", "key", "value")
        }

    def test_takes_everything_that_an_adapter_touches_by_default(self, everywhere, pair) -> None:
        model = tiny.compose("bert", [everywhere, pair("bert")[0]])
        assert sorted(model.base_model.mixing_weights()) == tiny.touched_modules([everywhere])

    def test_nothing_left_is_an_error_that_leaves_the_model_as_it_was(self, everywhere) -> None:
        base = tiny.build("bert")
        before = fingerprint(base)
        with (
            pytest.warns(UserWarning, match="'everywhere' touches none of the composed modules"),
            pytest.raises(ValueError, match="nothing to compose"),
        ):
            tiny.compose("bert", [everywhere], base=base, target_modules=["c_attn"])
        assert fingerprint(base) == before


class TestHead:
    def test_a_classifier_is_trained_by_default(self, pair) -> None:
        config = CompositionConfig(adapters=pair("bert"), task_type="SEQ_CLS")
        model = get_peft_model(tiny.build("bert"), config)
        heads = {key for key in trained(model) if "composition_mixing" not in key}
        assert heads == {f"base_model.model.classifier.modules_to_save.default.{leaf}" for leaf in ("weight", "bias")}

    def test_factors_of_what_is_now_the_head_are_left_out(self, pair, tmp_path) -> None:
        adapter = tiny.save_lora(tmp_path / "headed", tiny.build("bert"), ["query", "classifier"], r=3)
        with pytest.warns(UserWarning, match=r"trained in full \(modules_to_save\).* 'headed': classifier\."):
            model = tiny.compose("bert", [str(adapter), pair("bert")[1]])
        assert "classifier" not in model.base_model.mixing_weights()
        assert not any("classifier" in key and "composition" in key for key in model.state_dict())
        composed = [
            module for module in tiny.touched_modules([str(adapter), pair("bert")[1]]) if module != "classifier"
        ]
        assert sorted(model.base_model.mixing_weights()) == composed
        expected = tiny.composed_by_hand(tiny.build("bert"), [str(adapter), pair("bert")[1]], [0.5, 0.5])
        expected.classifier.load_state_dict(tiny.build("bert").classifier.state_dict())
        close(tiny.output(model, "bert"), tiny.output(expected, "bert"))


def test_base_with_an_unmerged_lora_is_refused_untouched(pair) -> None:
    base = peft.get_peft_model(tiny.build("bert"), peft.LoraConfig(target_modules=["dense"])).base_model.model
    modules = [(key, type(module)) for key, module in base.named_modules()]
    with pytest.raises(ValueError, match=r"already has an adapter of another kind \(peft\.tuners\.lora"):
        get_peft_model(base, CompositionConfig(adapters=pair("bert")))
    assert [(key, type(module)) for key, module in base.named_modules()] == modules


class TestConversionToLora:
    @pytest.mark.parametrize("name", ["mlp", "bert", "gpt2", "llama", "t5", "vit"])
    def test_stock_peft_computes_the_same_from_the_converted_lora(self, name, pair, tmp_path) -> None:
        model = tiny.compose(name, pair(name))
        scramble(model)
        assert model.supports_lora_conversion()
        peft.save_as_lora(tmp_path, model, rank=5)  # 2 + 3
        converted = PeftModel.from_pretrained(tiny.build(name), str(tmp_path))
        assert converted.peft_config["default"].peft_type == "LORA"
        assert converted.peft_config["default"].r == 5
        close(tiny.output(converted, name), tiny.output(model, name), 1e-4)

    def test_of_a_narrowed_composition(self, pair, tmp_path) -> None:
        model = tiny.compose("bert", pair("bert"), target_modules=["query", "value"], layers_to_transform=[1])
        _, state = peft.convert_to_lora(model, rank=5)
        modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in state if ".lora_" in key}
        assert modules == {f"bert.encoder.layer.1.attention.self.{part}" for part in ("query", "value")}
        peft.save_as_lora(tmp_path, model, rank=5)
        converted = PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path))
        close(tiny.output(converted, "bert"), tiny.output(model, "bert"), 1e-4)

    @pytest.mark.parametrize("name", ["conv", "embedding", *tiny.WITH_PARAMETERS])
    def test_is_refused_for_convolutions_and_embeddings(self, name, pair) -> None:
        model = tiny.compose(name, pair(name))
        assert not model.supports_lora_conversion()
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            peft.convert_to_lora(model, rank=2)

    def test_is_refused_for_biases(self, tmp_path) -> None:
        adapter = tiny.save_lora(tmp_path / "biased", tiny.build("mlp"), ["lin0"], lora_bias=True)
        model = tiny.compose("mlp", [str(adapter)])
        assert not model.supports_lora_conversion()
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            peft.convert_to_lora(model, rank=4)
