"""A composition as one of its adapters alone: the same as a composition of that adapter, with factors of its rank."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from peft_composition.tuner.layer import CompositionLayer
from peft_composition.tuner.locating import composition_layers
from peft_composition.tuner.single import mixed_by, one_adapter

from .. import tiny


RELATIVE, ABSOLUTE = 1e-4, 2e-6  # the same numbers in float32, added in another order


def layers_of(model) -> list[CompositionLayer]:
    return [layer for _, layer in composition_layers(model)]


def output_within(model, name: str, context: AbstractContextManager[None]) -> Tensor:
    with context:
        return tiny.output(model, name)


@pytest.mark.parametrize("name", tiny.TINY)
def test_one_adapter_alone(name, pair) -> None:
    model = tiny.compose(name, pair(name), mixing="fixed", weights=[0.25, 0.75]).eval()
    before = tiny.output(model, name)
    for number in range(2):
        alone = tiny.composed_by_hand(tiny.build(name), pair(name), [float(number == 0), float(number == 1)])
        found = output_within(model, name, one_adapter(layers_of(model), "default", number))
        expected = tiny.output(alone, name)
        torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=ABSOLUTE)
        assert not torch.allclose(found, before, rtol=5 * RELATIVE, atol=5 * ABSOLUTE)
    assert torch.equal(tiny.output(model, name), before)


@pytest.mark.parametrize("name", tiny.TINY)
def test_other_weights_for_a_while(name, pair) -> None:
    model = tiny.compose(name, pair(name)).eval()
    before = tiny.output(model, name)
    found = output_within(model, name, mixed_by(layers_of(model), "default", [0.9, 0.1]))
    by_hand = tiny.composed_by_hand(tiny.build(name), pair(name), [0.9, 0.1])
    torch.testing.assert_close(found, tiny.output(by_hand, name), rtol=RELATIVE, atol=ABSOLUTE)
    bare = output_within(model, name, mixed_by(layers_of(model), "default", [0.0, 0.0]))
    assert torch.equal(bare, tiny.output(tiny.build(name), name))
    assert torch.equal(tiny.output(model, name), before)


def test_only_the_rows_of_the_adapter_take_part(pair) -> None:
    """Ranks 2 and 3; the second touches `lin1` alone."""
    model = tiny.compose("mlp", pair("mlp")).eval()
    layers = dict(composition_layers(model.get_base_model()))
    whole = {name: layer.composition_factors["default"] for name, layer in layers.items()}
    with one_adapter(layers.values(), "default", 0):
        for name, layer in layers.items():
            part = layer.composition_factors["default"]
            assert part.rank == 2 < 1 + whole["lin1"].rank
            assert part.A.data_ptr() == whole[name].A.data_ptr()  # a view: nothing is copied
    with one_adapter(layers.values(), "default", 1):
        assert "default" not in layers["lin0"].composition_factors
        part = layers["lin1"].composition_factors["default"]
        assert (part.rank, whole["lin1"].rank) == (3, 5)
        assert torch.equal(part.A, whole["lin1"].A[2:])
        assert torch.equal(part.B, whole["lin1"].B[:, 2:])
    assert {name: layer.composition_factors["default"] for name, layer in layers.items()} == whole


def test_everything_is_put_back_after_an_error(pair) -> None:
    model = tiny.compose("mlp", pair("mlp"))
    model.add_adapter("other", model.peft_config["default"].__class__(adapters=pair("mlp"), mixing="uniform"))
    keys = list(model.state_dict())
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for context in (one_adapter(layers_of(model), "default", 1), mixed_by(layers_of(model), "default", [0.0, 0.0])):
        with pytest.raises(RuntimeError, match="within"), context:
            raise RuntimeError("within")
        assert list(model.state_dict()) == keys  # in their order
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trains


def test_what_was_folded_before_is_not_used_within(pair) -> None:
    model = tiny.compose("mlp", pair("mlp"), mixing="uniform").eval()
    tiny.output(model, "mlp")  # folds
    alone = output_within(model, "mlp", one_adapter(layers_of(model), "default", 0))
    by_hand = tiny.output(tiny.composed_by_hand(tiny.build("mlp"), pair("mlp"), [1.0, 0.0]), "mlp")
    torch.testing.assert_close(alone, by_hand, rtol=RELATIVE, atol=ABSOLUTE)
    by_hand = tiny.output(tiny.composed_by_hand(tiny.build("mlp"), pair("mlp"), [0.5, 0.5]), "mlp")
    torch.testing.assert_close(tiny.output(model, "mlp"), by_hand, rtol=RELATIVE, atol=ABSOLUTE)


def test_an_adapter_with_a_bias(tmp_path) -> None:
    base = tiny.build("mlp")
    folders = []
    for number in range(2):
        torch.manual_seed(number)
        lora = get_peft_model(tiny.build("mlp"), LoraConfig(r=2, target_modules=["lin0"], lora_bias=True, bias="none"))
        for key, parameter in lora.named_parameters():
            if ".lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        lora.save_pretrained(str(tmp_path / str(number)))
        folders.append((str(tmp_path / str(number)), tiny.output(lora.eval(), "mlp")))
    model = tiny.compose("mlp", [folder for folder, _ in folders], base=base).eval()
    for number, (_, expected) in enumerate(folders):
        found = output_within(model, "mlp", one_adapter(layers_of(model), "default", number))
        torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=ABSOLUTE)
