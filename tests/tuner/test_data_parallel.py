"""Replicas of `nn.DataParallel`, to which the Trainer turns when one process sees several GPUs, on the CPU.

PyTorch replicates on GPUs alone; `replicas_of` does the same with copies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_composition.tuner.locating import composition_layers

from .. import tiny
from ..reference import TOLERANCE, relative_error


MIXINGS = {
    "learned": {"mixing": "learned"},
    "shared": {"mixing": "learned", "weight_sharing": "model"},
    "uniform": {"mixing": "uniform"},
    "fixed": {"mixing": "fixed", "weights": [0.75, 0.25]},
}
every_model = pytest.mark.parametrize("name", tiny.TINY)
every_mixing = pytest.mark.parametrize("fields", MIXINGS.values(), ids=list(MIXINGS))


def replicas_of(network: nn.Module, count: int) -> list[nn.Module]:
    """Copies as `torch.nn.parallel.replicate` makes them: parameters are plain attributes, no entries of a table.

    What belongs to the original cannot be used on another device. Here it is NaN from now on.
    """
    parameters, buffers = dict.fromkeys(network.parameters()), dict.fromkeys(network.buffers())
    copies = {
        tensor: [tensor.clone() if tensor.requires_grad else tensor.detach().clone() for _ in range(count)]
        for tensor in (*parameters, *buffers)
    }
    replicas = {module: [module._replicate_for_data_parallel() for _ in range(count)] for module in network.modules()}
    for module, own in replicas.items():
        for number, replica in enumerate(own):
            for key, child in module._modules.items():
                if child is None:
                    replica._modules[key] = None
                else:
                    setattr(replica, key, replicas[child][number])
            for key, parameter in module._parameters.items():
                if parameter is None:
                    replica._parameters[key] = None
                else:
                    setattr(replica, key, copies[parameter][number])
            for key, buffer in module._buffers.items():
                replica._buffers[key] = None if buffer is None else copies[buffer][number]
    for tensor in copies:
        if tensor.is_floating_point():
            tensor.data = torch.full_like(tensor, torch.nan)
    return replicas[network]


def dtype_of(name: str) -> torch.dtype:
    """float64, in which transformers' experts do not compute."""
    return torch.float32 if name in ("mixtral", "gpt_oss") else torch.float64


def inputs_of(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = tiny.TINY[name].inputs()
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in inputs.items()}


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    result = model(**inputs)
    return result if isinstance(result, Tensor) else result.logits


def replicated_logits(model: nn.Module, count: int, inputs: dict[str, Tensor]) -> Tensor:
    """As `nn.DataParallel` does: each replica takes its part of the batch."""
    parts = {key: tensor.chunk(count) for key, tensor in inputs.items()}
    replicas = replicas_of(model, count)
    outputs = [
        logits(replica, **{key: part[number] for key, part in parts.items()})
        for number, replica in enumerate(replicas)
    ]
    return torch.cat(outputs)


def composed(name: str, folders: list[str], dtype: torch.dtype, **fields: Any) -> PeftModel:
    """With weights away from their start."""
    model = tiny.compose(name, folders, tiny.build(name).to(dtype), **fields)
    with torch.no_grad():
        for number, (key, parameter) in enumerate(model.named_parameters()):
            if "composition_mixing" in key:
                parameter.copy_(torch.tensor([0.02, -0.01]) * (1 + number % 3))
    return model


@every_model
@every_mixing
def test_replicas_give_the_output_and_the_gradients_of_the_model(
    name: str, fields: dict[str, Any], pair: Callable[[str], list[str]]
) -> None:
    dtype = dtype_of(name)
    model = composed(name, pair(name), dtype, **fields)
    inputs, one = inputs_of(name, dtype), copy.deepcopy(model)
    expected = logits(one, **inputs)

    output = replicated_logits(model, 2, inputs)

    assert relative_error(output, expected) < TOLERANCE[dtype]
    assert output.requires_grad == expected.requires_grad == any(p.requires_grad for p in one.parameters())
    if not output.requires_grad:
        return
    output.square().sum().backward()
    expected.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    for key, parameter in one.named_parameters():
        if parameter.requires_grad:
            assert relative_error(gradients[key], parameter.grad) < 10 * TOLERANCE[dtype], key


@every_model
@every_mixing
def test_replicas_answer_without_gradient_and_leave_nothing_folded_behind(
    name: str, fields: dict[str, Any], pair: Callable[[str], list[str]]
) -> None:
    dtype = dtype_of(name)
    model = composed(name, pair(name), dtype, **fields).eval()
    inputs = inputs_of(name, dtype)
    with torch.no_grad():
        expected = logits(copy.deepcopy(model), **inputs)

        output = replicated_logits(model, 2, inputs)

    assert relative_error(output, expected) < TOLERANCE[dtype]
    for _, layer in composition_layers(model):
        assert not layer._folds._kept
        assert not layer.composition_mixing["default"].motion.is_on  # no step is due


def test_a_loaded_composition_is_replicated(pair: Callable[[str], list[str]], tmp_path: Any) -> None:
    model = composed("mlp", pair("mlp"), torch.float32)
    model.save_pretrained(tmp_path)
    inputs = inputs_of("mlp", torch.float32)
    expected = logits(model, **inputs)

    loaded = PeftModel.from_pretrained(tiny.build("mlp"), tmp_path)

    assert relative_error(replicated_logits(loaded, 2, inputs), expected.double()) < TOLERANCE[torch.float32]


def test_a_composition_whose_factors_never_came_is_refused_in_replicas_too(
    pair: Callable[[str], list[str]],
) -> None:
    config = composed("mlp", pair("mlp"), torch.float32).peft_config["default"]
    model = get_peft_model(tiny.build("mlp"), type(config).from_peft_type(**config.to_dict()))

    with pytest.raises(RuntimeError, match="its factors were never loaded"):
        replicated_logits(model, 2, inputs_of("mlp", torch.float32))


def test_peft_s_lora_survives_the_same_replication() -> None:
    """That `replicas_of` asks for no more than other methods can do."""
    model = get_peft_model(tiny.build("mlp"), LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    inputs = inputs_of("mlp", torch.float32)
    expected = logits(copy.deepcopy(model), **inputs)

    assert torch.equal(replicated_logits(model, 1, inputs), expected)
