"""Composed layers and models against the float64 formula of `reference.py`: outputs, gradients, merging, dtypes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from peft_composition import AdapterError, CompositionConfig, CompositionLayer
from peft_composition.tuner.factors import Factors
from peft_composition.tuner.mixing import Mixing

from .. import tiny
from ..reference import TOLERANCE, Reference, logits, mixing_weights, relative_error


DTYPES = [torch.float64, torch.float32]
HALVES = [torch.bfloat16, torch.float16]
GAIN = 8.0
# Roundings on the longest way through a composed layer in half precision: A, B with its scale, the hidden state, the
# mixing weight, their product, the output of the factors, an embedding's scale and the product with it, the output of
# the base layer, the sum. Each is at most eps / 2 of what is summed.
ROUNDINGS = 10
# Under autocast also the input and the base weight are rounded.
AUTOCAST_ROUNDINGS = ROUNDINGS + 2

# Three adapters of ranks 1, 3 and 16 with different scales: alpha / r, alpha / sqrt(r), and both by pattern.
UPSTREAM: list[dict[str, Any]] = [
    {"r": 1, "lora_alpha": 2},
    {"r": 3, "lora_alpha": 2, "use_rslora": True},
    {"r": 4, "lora_alpha": 9, "rank_pattern": {"layer": 16}, "alpha_pattern": {"layer": 12}},
]
START = [0.1, 0.3, 0.6]


# Single layers


class Host(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class Kind:
    """A kind of layer, the shape of an input (of tokens for an embedding), and its LoRA settings."""

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    lora: dict[str, Any] = field(default_factory=dict)

    def input(self, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if "vocabulary" in self.lora:
            return torch.randint(0, self.lora["vocabulary"], self.input_shape, generator=generator)
        return torch.randn(*self.input_shape, generator=generator, dtype=torch.float64).to(dtype)


VOCABULARY = {"vocabulary": 11}
BIAS = {"lora_bias": True}
KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(10, 7), (2, 3, 10), BIAS),
    "linear-no-bias": Kind(lambda: nn.Linear(10, 7, bias=False), (5, 10)),
    "Conv1D": Kind(lambda: Conv1D(7, 10), (2, 3, 10), {"fan_in_fan_out": True, **BIAS}),
    "conv1d": Kind(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 11), BIAS),
    "conv1d-same": Kind(lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 11)),
    "conv1d-circular": Kind(lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 11), BIAS),
    "conv1d-unbatched": Kind(lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 11), BIAS),
    "conv2d": Kind(
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False), (2, 4, 7, 6)
    ),
    "conv2d-1x1": Kind(lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5), BIAS),
    "conv2d-reflect": Kind(lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 5, 6), BIAS),
    "conv3d": Kind(lambda: nn.Conv3d(3, 5, (2, 3, 1), stride=(1, 2, 1), padding=1), (2, 3, 4, 5, 3), BIAS),
    "conv3d-replicate": Kind(
        lambda: nn.Conv3d(3, 5, 2, padding=1, dilation=2, padding_mode="replicate"), (2, 3, 4, 4, 4)
    ),
    "embedding": Kind(lambda: nn.Embedding(11, 7), (3, 5), VOCABULARY),
    "embedding-padding": Kind(lambda: nn.Embedding(11, 7, padding_idx=2), (3, 20), VOCABULARY),
    "embedding-scale-buffer": Kind(lambda: Gemma3TextScaledWordEmbedding(11, 7, 0, 2.5), (3, 5), VOCABULARY),
    "embedding-scale-float": Kind(lambda: BartScaledWordEmbedding(11, 7, 0, embed_scale=2.5), (3, 5), VOCABULARY),
}


@dataclass(frozen=True)
class Trained:
    """A base model in float64 and LoRAs that were saved for it."""

    base: nn.Module
    folders: list[str]

    def composed(self, dtype: torch.dtype = torch.float64, count: int = 3, **config: Any) -> PeftModel:
        """A composition of `count` adapters on a copy of the base model in `dtype`."""
        return compose(copy.deepcopy(self.base).to(dtype), self.adapters(count), **config)

    def reference(self, dtype: torch.dtype = torch.float64, count: int = 3) -> Reference:
        """The formula for a base model whose own weights were rounded to `dtype`."""
        return Reference(copy.deepcopy(self.base).to(dtype), self.adapters(count))

    def adapters(self, count: int) -> list[str]:
        """The folders in turn, until there are `count`."""
        return [self.folders[number % len(self.folders)] for number in range(count)]


def compose(base: nn.Module, folders: Sequence[str], **config: Any) -> PeftModel:
    config.setdefault("gain", GAIN)
    adapters = [{"path": folder, "name": f"adapter-{number}"} for number, folder in enumerate(folders)]
    return get_peft_model(base, CompositionConfig(adapters=adapters, **config))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Kind of layer -> it as a model, with the three adapters of `UPSTREAM`; one of them has a bias if it can."""
    made: dict[str, Trained] = {}

    def make(kind: str) -> Trained:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            base = Host(KINDS[kind].build()).double()
            extra = {key: value for key, value in KINDS[kind].lora.items() if key != "vocabulary"}
            made[kind] = Trained(base, [])
            for number, lora in enumerate(UPSTREAM):
                lora = lora | extra | {"lora_bias": number == 1 and "lora_bias" in extra}
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".*have invalid shape")  # PEFT takes the bias for a broken shard
                    path = tiny.save_lora(folder / f"lora-{number}", base, ["layer"], seed=number, **lora)
                made[kind].folders.append(str(path))
        return made[kind]

    return make


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Name in `tiny.TINY` -> the model with three adapters: for its first target, for its last one, and for all."""
    made: dict[str, Trained] = {}

    def make(name: str) -> Trained:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            base, targets = tiny.build(name).double(), tiny.TINY[name].targets
            for parameter in base.parameters():
                if parameter.dim() > 1:  # transformers' own start is so small that a LoRA hardly moves the logits
                    nn.init.normal_(parameter, std=0.3)
            made[name] = Trained(base, [])
            pattern = {"rank_pattern": {targets[0]: 16}, "alpha_pattern": {targets[-1]: 7}}
            for number, (modules, lora) in enumerate(
                [
                    (targets[:1], {"r": 1, "lora_alpha": 2}),
                    (targets[-1:], {"r": 3, "lora_alpha": 2, "use_rslora": True}),
                    (targets, {"r": 4, "lora_alpha": 5, "use_rslora": True, **pattern}),
                ]
            ):
                lora["fan_in_fan_out"] = name == "gpt2"
                path = tiny.save_lora(folder / f"lora-{number}", base, modules, seed=number, **lora)
                made[name].folders.append(str(path))
        return made[name]

    return make


def inputs_of(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The fixed input of a tiny model, in its dtype."""
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in tiny.TINY[name].inputs().items()}


def layer_of(model: nn.Module, name: str = "layer") -> CompositionLayer:
    return model.base_model.model.get_submodule(tiny.path_of(name))


def base_of(model: nn.Module, name: str = "layer") -> nn.Module:
    return layer_of(model, name).get_base_layer()


def theta_of(layer: CompositionLayer, adapter: str = "default") -> nn.Parameter:
    return layer.composition_mixing[adapter].weight


def move_theta(layer: CompositionLayer, adapter: str = "default", seed: int = 0) -> Tensor:
    """Put theta where the logits are some units apart; returns it as a float64 leaf for the formula."""
    theta = theta_of(layer, adapter)
    logit = torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        theta.copy_(logit / layer.composition_mixing[adapter].gain)
    return theta.detach().double().requires_grad_()


def exact(x: Tensor) -> Tensor:
    """An input as the formula takes it: float64, tokens as they are."""
    return x.detach().double() if x.is_floating_point() else x


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters as they are now."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def cotangent_of(output: Tensor) -> Tensor:
    """Fixed coefficients c of the loss <c, output>, exact in every dtype."""
    return torch.randint(-4, 5, output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype) / 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_of_a_layer_are_those_of_the_composed_weight(
    kind: str, dtype: torch.dtype, trained: Callable[[str], Trained]
) -> None:
    model = trained(kind).composed(dtype, weights=START)
    theta = move_theta(layer_of(model))
    x = KINDS[kind].input(dtype)
    exact_x = exact(x)
    if x.is_floating_point():
        x.requires_grad_()
        exact_x.requires_grad_()

    y = model(x)
    y.backward(cotangent_of(y))

    w = mixing_weights(START, theta, GAIN, "softmax")
    expected = trained(kind).reference(dtype)({"layer": w}, exact_x)
    expected.backward(cotangent_of(expected))
    assert y.dtype == dtype
    assert relative_error(y, expected) < TOLERANCE[dtype]
    assert relative_error(theta_of(layer_of(model)).grad, theta.grad) < TOLERANCE[dtype]
    if x.is_floating_point():
        assert relative_error(x.grad, exact_x.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_layer_holds_the_composed_weight_and_bias(
    kind: str, dtype: torch.dtype, trained: Callable[[str], Trained]
) -> None:
    model = trained(kind).composed(dtype, weights=START)
    layer, base_layer = layer_of(model), base_of(model)
    w = mixing_weights(START, move_theta(layer), GAIN, "softmax").detach()
    weight, x = base_layer.weight, KINDS[kind].input(dtype)
    reference = trained(kind).reference(dtype)

    delta = layer.get_delta_weight("default")
    layer.merge()

    assert relative_error(delta, reference.delta("layer", w)) < TOLERANCE[dtype]
    assert base_layer.weight is weight
    for name, expected in reference.parameters({"layer": w}).items():
        merged = base_layer.get_parameter(name.removeprefix("layer."))
        assert merged.dtype == dtype
        assert relative_error(merged, expected) < TOLERANCE[dtype]
    exact_x = exact(x)
    assert relative_error(model(x), reference({"layer": w}, exact_x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES])
@pytest.mark.parametrize("kind", KINDS)
def test_unmerge_restores_the_base_layer_to_the_last_place(
    kind: str, dtype: torch.dtype, trained: Callable[[str], Trained]
) -> None:
    model = trained(kind).composed(dtype, weights=START)
    layer, base_layer = layer_of(model), base_of(model)
    before = parameters_of(base_layer)

    layer.merge()
    merged = parameters_of(base_layer)
    layer.unmerge()

    assert not layer.merged
    assert relative_error(merged["weight"], before["weight"]) > 0.01
    for name, restored in parameters_of(base_layer).items():
        # One rounding to `dtype` of the merged sum, one of the restored difference.
        bound = torch.finfo(dtype).eps / 2 * (merged[name].abs() + before[name].abs())
        assert restored.dtype == dtype
        assert ((restored.double() - before[name]).abs() <= bound.double() * 1.01).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_leaves_a_plain_model_of_composed_weights(
    kind: str, dtype: torch.dtype, trained: Callable[[str], Trained]
) -> None:
    model = trained(kind).composed(dtype, weights=START)
    w = mixing_weights(START, move_theta(layer_of(model)), GAIN, "softmax").detach()

    plain = model.merge_and_unload()

    expected = trained(kind).reference(dtype)
    assert type(plain.layer) is type(trained(kind).base.layer)
    assert plain.state_dict().keys() == trained(kind).base.state_dict().keys()
    for name, value in expected.parameters({"layer": w}).items():
        assert relative_error(plain.get_parameter(name), value) < TOLERANCE[dtype]


def _weights_for(count: int, normalization: str) -> list[float]:
    """Unequal weights, exact in float32; as free ones some are negative and they do not sum to 1."""
    if normalization == "none":
        return [(-1.0) ** number * (number + 1) / 4 for number in range(count)]
    return [0.5**number for number in range(1, count)] + [0.5 ** (count - 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("normalization", ["softmax", "none"])
@pytest.mark.parametrize(
    ("mixing", "is_weighted", "gain"),
    [
        ("learned", False, 1.0),
        ("learned", False, 40.0),
        ("learned", True, 5.0),
        ("uniform", False, None),
        ("fixed", True, None),
    ],
)
def test_every_mixing_gives_its_weights(
    mixing: str,
    is_weighted: bool,
    gain: float | None,
    normalization: str,
    count: int,
    dtype: torch.dtype,
    trained: Callable[[str], Trained],
) -> None:
    weights = _weights_for(count, normalization) if is_weighted else None
    model = trained("linear").composed(
        dtype, count, mixing=mixing, weights=weights, normalization=normalization, gain=gain
    )
    layer, x = layer_of(model), KINDS["linear"].input(dtype)
    start = torch.tensor(weights or [1 / count] * count, dtype=torch.float64)
    w = mixing_weights(start, move_theta(layer), gain, normalization) if mixing == "learned" else start

    reference = trained("linear").reference(dtype, count)
    assert relative_error(layer.mixing_weights("default"), w) < TOLERANCE[dtype]
    assert relative_error(layer.get_delta_weight("default"), reference.delta("layer", w)) < TOLERANCE[dtype]
    assert relative_error(model(x), reference({"layer": w}, x.double())) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("normalization", ["softmax", "none"])
@pytest.mark.parametrize(("is_weighted", "gain"), [(False, 1.0), (False, 40.0), (True, 5.0)])
def test_gradient_of_theta_is_the_closed_form(
    is_weighted: bool,
    gain: float,
    normalization: str,
    count: int,
    dtype: torch.dtype,
    trained: Callable[[str], Trained],
) -> None:
    weights = _weights_for(count, normalization) if is_weighted else None
    model = trained("linear").composed(dtype, count, weights=weights, normalization=normalization, gain=gain)
    theta, x = move_theta(layer_of(model)), KINDS["linear"].input(dtype)

    y = model(x)
    y.backward(cotangent_of(y))

    reference = trained("linear").reference(dtype, count)
    w = mixing_weights(weights or [1 / count] * count, theta, gain, normalization).detach()
    c = cotangent_of(y).double()
    one = {"layer": torch.ones(1, dtype=torch.float64)}
    dw = torch.stack([(c * reference.alone(number)(one, x.double())).sum() for number in range(count)])
    expected = gain * (w * (dw - (w * dw).sum()) if normalization == "softmax" else dw)
    assert relative_error(theta_of(layer_of(model)).grad, expected) < TOLERANCE[dtype]


def test_a_single_adapter_under_softmax_has_weight_one_and_no_gradient(trained: Callable[[str], Trained]) -> None:
    model = trained("linear").composed(count=1)
    move_theta(layer_of(model))

    model(KINDS["linear"].input(torch.float64)).sum().backward()

    assert layer_of(model).mixing_weights("default").tolist() == [1.0]
    assert theta_of(layer_of(model)).grad.tolist() == [0.0]


# Whole models

REAL = ["bert", "gpt2", "llama", "t5", "vit", *tiny.WITH_PARAMETERS]
# These normalize in float32 whatever their dtype is.
IN_FLOAT64 = [name for name in tiny.TINY if name not in ("llama", "t5", "mixtral", "gpt_oss")]


def _sharing_key(sharing: str, module: str) -> str:
    """Which modules of a tiny BERT share, written by hand: `bert.encoder.layer.0.attention.self.query`."""
    return {"module": module, "block": ".".join(module.split(".")[:4]), "model": "all"}[sharing]


@pytest.mark.parametrize(
    ("name", "dtype", "sharing"),
    [
        *((name, torch.float64, "module") for name in IN_FLOAT64),
        *((name, torch.float32, "module") for name in tiny.TINY),
        ("bert", torch.float64, "block"),
        ("bert", torch.float64, "model"),
    ],
)
def test_logits_and_gradients_of_a_model_are_those_of_composed_weights(
    name: str, dtype: torch.dtype, sharing: str, architecture: Callable[[str], Trained]
) -> None:
    model = architecture(name).composed(dtype, weight_sharing=sharing)
    reference = architecture(name).reference(dtype)
    thetas: dict[str, Tensor] = {}
    keys = {module: _sharing_key(sharing, module) for module in reference.modules}
    for seed, (module, key) in enumerate(keys.items()):
        if key not in thetas:
            thetas[key] = move_theta(layer_of(model, module), seed=seed)

    result = logits(model(**inputs_of(name, dtype)))
    result.square().mean().backward()

    weights = {module: mixing_weights([1 / 3] * 3, thetas[key], GAIN, "softmax") for module, key in keys.items()}
    expected = reference(weights, **inputs_of(name, torch.float64))
    expected.square().mean().backward()
    assert relative_error(result, expected) < TOLERANCE[dtype]
    gradients = torch.stack([theta_of(layer_of(model, module)).grad for module in keys])
    assert relative_error(gradients, torch.stack([thetas[key].grad for key in keys.values()])) < TOLERANCE[dtype]


def test_an_adapter_that_does_not_touch_a_module_counts_among_n_and_adds_nothing(
    architecture: Callable[[str], Trained],
) -> None:
    model = architecture("mlp").composed(mixing="uniform")
    first, last, both = architecture("mlp").reference().adapters

    assert first.keys() == {"lin0"}
    assert last.keys() == {"lin1"}
    for module, alone in (("lin0", first), ("lin1", last)):
        expected = (alone[module].delta() + both[module].delta()) / 3
        assert relative_error(layer_of(model, module).get_delta_weight("default"), expected) < 1e-12


def test_disjoint_adapters_each_come_with_their_share(architecture: Callable[[str], Trained]) -> None:
    model = architecture("mlp").composed(count=2, mixing="fixed", weights=[0.25, 0.75])
    first, last = architecture("mlp").reference(count=2).adapters

    assert relative_error(layer_of(model, "lin0").get_delta_weight("default"), first["lin0"].delta() / 4) < 1e-12
    assert relative_error(layer_of(model, "lin1").get_delta_weight("default"), last["lin1"].delta() * 3 / 4) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.TINY)
def test_learned_model_starts_as_the_uniform_one_to_the_bit(
    name: str, dtype: torch.dtype, architecture: Callable[[str], Trained]
) -> None:
    learned, uniform = (architecture(name).composed(dtype, mixing=mixing).eval() for mixing in ("learned", "uniform"))

    with torch.no_grad():
        result = logits(learned(**inputs_of(name, dtype)))

        assert torch.equal(result, logits(uniform(**inputs_of(name, dtype))))
        with uniform.disable_adapter():
            assert not torch.equal(result, logits(uniform(**inputs_of(name, dtype))))


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("name", REAL)
def test_uniform_composition_of_one_adapter_is_that_adapter_in_peft(
    name: str, number: int, architecture: Callable[[str], Trained]
) -> None:
    base, folder = copy.deepcopy(architecture(name).base).float(), architecture(name).folders[number]
    untouched = tiny.output(base, name)
    alone = tiny.output(PeftModel.from_pretrained(copy.deepcopy(base), folder).eval(), name)

    composed = tiny.output(compose(base, [folder], mixing="uniform").eval(), name)

    assert (composed - alone).abs().max() < 1e-5
    assert (composed - untouched).abs().max() > 0.01


def test_unrelated_adapters_get_no_cross_terms(tmp_path: Path) -> None:
    base = Host(nn.Linear(64, 64))
    folders = [
        str(tiny.save_lora(tmp_path / f"lora-{number}", base, ["layer"], seed=number, r=4, lora_alpha=4 + number))
        for number in range(2)
    ]
    peft = PeftModel.from_pretrained(copy.deepcopy(base), folders[0], adapter_name="0")
    peft.load_adapter(folders[1], adapter_name="1")
    for combination in ("cat", "linear"):
        peft.add_weighted_adapter(["0", "1"], [0.5, 0.5], combination, combination_type=combination)
    with_cross_terms, without = (layer_of(peft).get_delta_weight(name).detach() for name in ("linear", "cat"))

    delta = layer_of(compose(base, folders, mixing="uniform")).get_delta_weight("default")

    assert relative_error(delta, without.double()) < 1e-5
    assert 0.8 < relative_error(with_cross_terms, delta.double()) < 1.2


# Several compositions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d-reflect", "embedding-scale-buffer"])
def test_active_compositions_add_up(kind: str, dtype: torch.dtype, trained: Callable[[str], Trained]) -> None:
    model, layer = two_active(trained(kind), dtype)
    thetas = [move_theta(layer, adapter, seed) for seed, adapter in enumerate(("default", "other"))]
    before, x = parameters_of(layer.get_base_layer()), KINDS[kind].input(dtype)
    reference = trained(kind).reference(dtype)
    first = mixing_weights([1 / 3] * 3, thetas[0], GAIN, "softmax")
    second = mixing_weights([0.9, -0.4], thetas[1], 3.0, "none")
    w = {"layer": first + torch.cat([second, torch.zeros(1)])}  # the second has the first two adapters

    y = model(x)
    y.backward(cotangent_of(y))

    expected = reference(w, exact(x))
    expected.backward(cotangent_of(expected))
    assert relative_error(y, expected) < TOLERANCE[dtype]
    for theta, adapter in zip(thetas, ("default", "other")):
        assert relative_error(theta_of(layer, adapter).grad, theta.grad) < TOLERANCE[dtype]

    layer.merge()
    assert layer.merged_adapters == ["default", "other"]
    for name, value in reference.parameters(w).items():
        assert (
            relative_error(layer.get_base_layer().get_parameter(name.removeprefix("layer.")), value)
            < (TOLERANCE[dtype])
        )
    assert relative_error(model(x), expected) < TOLERANCE[dtype]

    layer.unmerge()
    assert relative_error(layer.get_base_layer().weight, before["weight"]) < TOLERANCE[dtype]


def two_active(trained: Trained, dtype: torch.dtype) -> tuple[PeftModel, CompositionLayer]:
    """A learned composition of all adapters and a free one of the first two, both active."""
    model = trained.composed(dtype)
    other = CompositionConfig(adapters=trained.folders[:2], weights=[0.9, -0.4], normalization="none", gain=3.0)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    return model, layer_of(model)


@pytest.mark.parametrize("chosen", ["default", "other"])
def test_one_of_two_compositions_can_be_merged_alone(chosen: str, trained: Callable[[str], Trained]) -> None:
    _, layer = two_active(trained("linear"), torch.float64)
    reference = trained("linear").reference()
    w = {"default": [1 / 3, 1 / 3, 1 / 3], "other": [0.9, -0.4, 0.0]}[chosen]

    layer.merge(adapter_names=[chosen])

    expected = reference.parameters({"layer": torch.tensor(w, dtype=torch.float64)})
    assert relative_error(layer.get_base_layer().weight, expected["layer.weight"]) < 1e-12
    assert relative_error(layer.get_base_layer().bias, expected["layer.bias"]) < 1e-12


# Merging


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv1d", "embedding"])
def test_unmerge_takes_out_what_was_merged_though_the_weights_have_changed_since(
    kind: str, trained: Callable[[str], Trained]
) -> None:
    model, untouched = (trained(kind).composed(torch.float32) for _ in range(2))
    for composed in (model, untouched):
        layer_of(composed).merge()

    move_theta(layer_of(model))
    for composed in (model, untouched):
        layer_of(composed).unmerge()

    assert not torch.allclose(layer_of(model).mixing_weights("default"), torch.full((3,), 1 / 3), atol=0.1)
    for name, expected in parameters_of(base_of(untouched)).items():
        assert torch.equal(base_of(model).get_parameter(name), expected)


def _break_weights(layer: CompositionLayer) -> None:
    theta_of(layer).data.fill_(float("nan"))


def _break_bias(layer: CompositionLayer) -> None:
    layer.composition_factors["default"].bias.data[1, 0] = float("inf")


@pytest.mark.parametrize("breaks", [_break_weights, _break_bias])
def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(
    breaks: Callable[[CompositionLayer], None], trained: Callable[[str], Trained]
) -> None:
    layer = layer_of(trained("linear").composed(torch.float32))
    before = parameters_of(layer.get_base_layer())
    breaks(layer)

    with pytest.raises(ValueError, match=r"not finite.*'default'"):
        layer.merge(safe_merge=True)

    assert not layer.merged
    assert all(torch.equal(value, before[name]) for name, value in layer.get_base_layer().named_parameters())


def test_safe_merge_refuses_what_overflows_in_the_dtype_of_the_base(trained: Callable[[str], Trained]) -> None:
    model = trained("linear").composed(torch.float16, mixing="fixed", weights=[1e7, 0, 0], normalization="none")
    before = parameters_of(base_of(model))

    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)

    assert all(torch.equal(value, before[name]) for name, value in base_of(model).named_parameters())


def test_safe_merge_of_two_compositions_changes_nothing_if_the_second_is_broken(
    trained: Callable[[str], Trained],
) -> None:
    _, layer = two_active(trained("linear"), torch.float32)
    before = parameters_of(layer.get_base_layer())
    theta_of(layer, "other").data.fill_(float("nan"))

    with pytest.raises(ValueError, match=r"not finite.*'other'"):
        layer.merge(safe_merge=True)

    assert not layer.merged
    assert all(torch.equal(value, before[name]) for name, value in layer.get_base_layer().named_parameters())


def test_unmerge_follows_a_model_that_was_moved_while_merged(trained: Callable[[str], Trained]) -> None:
    model = trained("linear").composed(torch.float32)
    model.merge_adapter()

    model.to("meta")  # the one other device that every machine has
    model.unmerge_adapter()

    assert not layer_of(model).merged
    assert base_of(model).weight.is_meta


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv3d", "embedding"])
def test_safe_merge_of_finite_weights_is_merge(kind: str, trained: Callable[[str], Trained]) -> None:
    safe, plain = (layer_of(trained(kind).composed(torch.float32, weights=START)) for _ in range(2))

    safe.merge(safe_merge=True)
    plain.merge()

    for name, expected in plain.get_base_layer().named_parameters():
        assert torch.equal(safe.get_base_layer().get_parameter(name), expected)


def test_lora_bias_beside_a_layer_without_bias_works_but_is_not_merged(tmp_path: Path) -> None:
    base = Host(nn.Linear(10, 7, bias=False)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: merging will not be possible
        folder = tiny.save_lora(tmp_path, base, ["layer"], lora_bias=True)
    reference, x = Reference(base, [folder]), KINDS["linear"].input(torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    weight = base.layer.weight.detach() + reference.delta("layer", one)
    expected = x @ weight.t() + reference.delta_bias("layer", one)
    model = compose(base, [str(folder)])
    before = base_of(model).weight.detach().clone()

    assert relative_error(model(x), expected) < 1e-12
    with pytest.raises(ValueError, match="'default' has a LoRA bias"):
        layer_of(model).merge()
    assert torch.equal(base_of(model).weight, before)
    assert not layer_of(model).merged


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_disabled_layer_is_the_base_layer(kind: str, is_merged: bool, trained: Callable[[str], Trained]) -> None:
    model, x = trained(kind).composed(), KINDS[kind].input(torch.float64)
    if is_merged:
        model.merge_adapter()
    expected = trained(kind).base(x)

    assert relative_error(model(x), expected) > 0.01
    with model.disable_adapter():
        assert relative_error(model(x), expected) < 1e-12


# Half precision


def rounding_bounds(reference: Reference, w: Tensor, x: Tensor, roundings: int, eps: float) -> tuple[Tensor, float]:
    """How far `roundings` roundings may move every output, and the norm of the gradient of theta.

    An output: by eps / 2 each of the sizes that are summed. The gradient: dL/dw_n is a sum over many outputs, in which
    independent roundings grow as the sum itself does, so by eps / 2 each of the dL/dw_n; these are taken before the
    softmax, whose gradient is a difference of them.
    """
    unit = roundings * eps / 2
    size = reference.absolute()({"layer": w}, x.abs())
    one = {"layer": torch.ones(1, dtype=torch.float64)}
    dw = torch.stack([(cotangent_of(size) * reference.alone(n)(one, x)).sum() for n in range(len(w))])
    return unit * size, unit * GAIN * float((w * (dw.abs() + (w * dw).sum().abs())).norm())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_off_by_its_roundings_alone(
    kind: str, dtype: torch.dtype, trained: Callable[[str], Trained]
) -> None:
    model = trained(kind).composed(dtype, weights=START)
    theta, x = move_theta(layer_of(model)), KINDS[kind].input(dtype)
    exact_x = exact(x)

    y = model(x)
    y.backward(cotangent_of(y))

    w = mixing_weights(START, theta, GAIN, "softmax")
    reference = trained(kind).reference(dtype)
    expected = reference({"layer": w}, exact_x)
    expected.backward(cotangent_of(expected))
    output_bound, gradient_bound = rounding_bounds(reference, w.detach(), exact_x, ROUNDINGS, torch.finfo(dtype).eps)
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= output_bound).all()
    assert (theta_of(layer_of(model)).grad.double() - theta.grad).norm() <= gradient_bound < theta.grad.norm()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_merges_in_float32_and_rounds_once(
    kind: str, dtype: torch.dtype, trained: Callable[[str], Trained]
) -> None:
    model = trained(kind).composed(dtype, weights=START)
    layer = layer_of(model)
    w = mixing_weights(START, move_theta(layer), GAIN, "softmax").detach()
    reference = trained(kind).reference(dtype)

    delta = layer.get_delta_weight("default")
    layer.merge()

    # A and B with its scale are rounded when they are read; the merged sum is rounded once more.
    eps = torch.finfo(dtype).eps
    bound = 1.01 * eps * reference.absolute().delta("layer", w)
    expected = reference.parameters({"layer": w})["layer.weight"]
    assert delta.dtype == torch.float32
    assert ((delta - reference.delta("layer", w)).abs() <= bound).all()
    assert base_of(model).weight.dtype == dtype
    assert ((base_of(model).weight - expected).abs() <= bound + 1.01 * eps / 2 * expected.abs()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_off_by_the_roundings_of_bfloat16_alone(kind: str, trained: Callable[[str], Trained]) -> None:
    model = trained(kind).composed(torch.float32, weights=START)
    theta, x = move_theta(layer_of(model)), KINDS[kind].input(torch.float32)
    exact_x = exact(x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.backward(cotangent_of(y))

    w = mixing_weights(START, theta, GAIN, "softmax")
    reference = trained(kind).reference(torch.float32)
    expected = reference({"layer": w}, exact_x)
    expected.backward(cotangent_of(expected))
    eps = torch.finfo(torch.bfloat16).eps
    output_bound, gradient_bound = rounding_bounds(reference, w.detach(), exact_x, AUTOCAST_ROUNDINGS, eps)
    assert ((y.double() - expected).abs() <= output_bound).all()
    assert (theta_of(layer_of(model)).grad.double() - theta.grad).norm() <= gradient_bound < theta.grad.norm()


@pytest.mark.parametrize("step", ["merge", "unmerge"])
def test_autocast_does_not_round_what_is_merged(step: str, trained: Callable[[str], Trained]) -> None:
    model = trained("linear").composed(torch.float32, mixing="uniform")
    reference, w = trained("linear").reference(torch.float32), torch.full((3,), 1 / 3, dtype=torch.float64)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step == "merge"):
        layer_of(model).merge()
    expected = reference.parameters({"layer": w})
    if step == "unmerge":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer_of(model).unmerge()
        expected = {f"layer.{name}": value for name, value in parameters_of(trained("linear").base.layer).items()}

    for name, value in expected.items():
        assert relative_error(base_of(model).get_parameter(name.removeprefix("layer.")), value) < 1e-5


# Mixing weights as a parameter


@pytest.mark.parametrize("sharing", ["module", "model"])
@pytest.mark.parametrize("first", [None, nn.Module.half], ids=["float32", "halved before"])
@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.float16),
        lambda model: model.bfloat16().half(),
    ],
    ids=["half", "bfloat16", "to bfloat16", "to cpu float16", "twice"],
)
def test_theta_keeps_its_float32_value_when_the_model_is_cast_down(
    cast: Callable[[nn.Module], nn.Module],
    first: Callable[[nn.Module], nn.Module] | None,
    sharing: str,
    architecture: Callable[[str], Trained],
) -> None:
    base = copy.deepcopy(architecture("mlp").base).float()
    model = compose(base if first is None else first(base), architecture("mlp").folders, weight_sharing=sharing)
    layers = [layer_of(model, name) for name in ("lin0", "lin1")]
    for layer in layers:
        move_theta(layer)
    thetas = [theta_of(layer) for layer in layers]
    before = [theta.detach().clone() for theta in thetas]

    cast(model)

    for layer, theta, value in zip(layers, thetas, before):
        assert layer.get_base_layer().weight.dtype.itemsize == 2
        assert layer.composition_factors["default"].A.dtype == layer.get_base_layer().weight.dtype
        assert theta_of(layer) is theta  # an optimizer made before holds on to it
        assert theta.requires_grad
        assert theta.dtype == torch.float32
        assert torch.equal(theta, value)
        assert not torch.equal(value, value.bfloat16().float())
        assert layer.mixing_weights("default").dtype == torch.float32


def test_theta_follows_a_float64_model_and_never_goes_below_float32(architecture: Callable[[str], Trained]) -> None:
    model = architecture("mlp").composed(torch.float32)
    layer = layer_of(model, "lin1")
    value = move_theta(layer).detach()

    model.double()

    assert theta_of(layer).dtype == torch.float64
    assert torch.equal(theta_of(layer), value)
    assert layer.mixing_weights("default").dtype == torch.float64
    with torch.no_grad():
        theta_of(layer).add_(1e-12)
    model.half()
    assert theta_of(layer).dtype == torch.float32
    assert torch.equal(theta_of(layer), (value + 1e-12).float())


@pytest.mark.parametrize("normalization", ["softmax", "none"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 20, 64])
def test_learned_weights_start_as_the_uniform_ones_to_the_bit(count: int, normalization: str) -> None:
    adapters = [f"adapter-{number}" for number in range(count)]
    learned, uniform = (
        Mixing(CompositionConfig(adapters=adapters, mixing=mixing, normalization=normalization), torch.float32)()
        for mixing in ("learned", "uniform")
    )

    assert torch.equal(learned, uniform)
    assert learned.tolist() == torch.full((count,), 1 / count).tolist()


@pytest.mark.parametrize("weights", [[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]])
def test_a_starting_weight_of_zero_stays_zero_and_harms_nothing(
    weights: list[float], trained: Callable[[str], Trained]
) -> None:
    model = trained("linear").composed(torch.float32, weights=weights)
    layer, x = layer_of(model), KINDS["linear"].input(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    zeros = [number for number, weight in enumerate(weights) if weight == 0]
    without = [number for number, weight in enumerate(weights) if weight > 0]

    for _ in range(3):
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        assert y.isfinite().all()
        assert theta_of(layer).grad.isfinite().all()
        assert theta_of(layer).grad[zeros].tolist() == [0.0] * len(zeros)
        optimizer.step()
    with torch.no_grad():
        theta_of(layer)[zeros] = 5.0

    w = layer.mixing_weights("default").detach().double()
    assert w[zeros].tolist() == [0.0] * len(zeros)
    assert len(without) == 1 or not torch.allclose(w, torch.tensor(weights, dtype=torch.float64), atol=1e-3)
    kept = Reference(trained("linear").base, [trained("linear").folders[number] for number in without])
    assert relative_error(layer.get_delta_weight("default"), kept.delta("layer", w[without])) < 1e-5


def test_a_free_weight_that_starts_at_zero_can_be_learned(trained: Callable[[str], Trained]) -> None:
    model = trained("linear").composed(weights=[0.0, 1.0, -1.0], normalization="none")

    model(KINDS["linear"].input(torch.float64)).square().mean().backward()

    assert (theta_of(layer_of(model)).grad != 0).all()


# Frozen factors


def _train(model: PeftModel) -> None:
    model.train()


def _set_adapter(model: PeftModel) -> None:
    model.set_adapter("default")


def _set_requires_grad(model: PeftModel) -> None:
    model.set_requires_grad("default")


def _require_grad_of_the_parts(model: PeftModel) -> None:
    for part in model.modules():
        if isinstance(part, (Mixing, Factors)):
            part.requires_grad_(True)


def _disable_and_enable(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


def _disable_for_a_while(model: PeftModel) -> None:
    with model.disable_adapter():
        model(**tiny.TINY["mlp"].inputs())


def _merge_and_unmerge(model: PeftModel) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def _cast_down_and_up(model: PeftModel) -> None:
    model.bfloat16().float()


def _switch_to_another_and_back(model: PeftModel) -> None:
    model.add_adapter("other", CompositionConfig(adapters=model.peft_config["default"].adapters))
    model.set_adapter("other")
    model.set_adapter("default")
    model.delete_adapter("other")


@pytest.mark.parametrize(
    "act",
    [
        _train,
        _set_adapter,
        _set_requires_grad,
        _require_grad_of_the_parts,
        _disable_and_enable,
        _disable_for_a_while,
        _merge_and_unmerge,
        _cast_down_and_up,
        _switch_to_another_and_back,
    ],
)
def test_factors_stay_frozen_and_mixing_weights_trainable(
    act: Callable[[PeftModel], None], architecture: Callable[[str], Trained]
) -> None:
    model = architecture("mlp").composed(torch.float32)

    act(model)

    model(**tiny.TINY["mlp"].inputs()).sum().backward()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"base_model.model.lin{number}.composition_mixing.default.weight" for number in (0, 1)}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable


def test_factors_of_a_trainable_checkpoint_are_frozen(architecture: Callable[[str], Trained], tmp_path: Path) -> None:
    architecture("mlp").composed(torch.float32).save_pretrained(str(tmp_path))

    model = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path), is_trainable=True)

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"base_model.model.lin{number}.composition_mixing.default.weight" for number in (0, 1)}


def test_training_leaves_the_factors_alone_though_everything_was_made_trainable(
    architecture: Callable[[str], Trained],
) -> None:
    model = architecture("mlp").composed(torch.float32)
    before = parameters_of(model)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    model(**tiny.TINY["mlp"].inputs()).square().sum().backward()
    optimizer.step()

    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert "base_model.model.lin0.base_layer.weight" in changed
    assert not [name for name in changed if "composition_factors" in name]


# Ways of running and making a model


def test_training_after_inference_mode_has_the_gradient_of_the_formula(trained: Callable[[str], Trained]) -> None:
    model, x = trained("linear").composed(weights=START), KINDS["linear"].input(torch.float64)
    theta = move_theta(layer_of(model))
    with torch.inference_mode():
        model(x)

    y = model(x)
    y.backward(cotangent_of(y))

    expected = trained("linear").reference()({"layer": mixing_weights(START, theta, GAIN, "softmax")}, x)
    expected.backward(cotangent_of(expected))
    assert relative_error(theta_of(layer_of(model)).grad, theta.grad) < 1e-12


def test_a_composed_layer_compiles_to_one_graph_with_the_same_result(trained: Callable[[str], Trained]) -> None:
    model, x = trained("linear").composed(weights=START), KINDS["linear"].input(torch.float64)
    theta = move_theta(layer_of(model))

    y = torch.compile(layer_of(model), fullgraph=True, backend="aot_eager")(x)
    y.backward(cotangent_of(y))

    expected = trained("linear").reference()({"layer": mixing_weights(START, theta, GAIN, "softmax")}, x)
    expected.backward(cotangent_of(expected))
    assert relative_error(y, expected) < 1e-12
    assert relative_error(theta_of(layer_of(model)).grad, theta.grad) < 1e-12


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradient(
    name: str, use_reentrant: bool, architecture: Callable[[str], Trained]
) -> None:
    found = []
    for is_checkpointed in (True, False):
        base = copy.deepcopy(architecture(name).base).float()
        if is_checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model = compose(base, architecture(name).folders)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        calls: list[object] = []
        layers = [module for module in model.modules() if isinstance(module, CompositionLayer)]
        layers[0].register_forward_hook(lambda *_, calls=calls: calls.append(None))
        for seed, layer in enumerate(layers):
            move_theta(layer, seed=seed)

        logits(model.train()(**tiny.TINY[name].inputs())).square().mean().backward()

        assert len(calls) == (2 if is_checkpointed else 1)
        found.append(torch.stack([theta_of(layer).grad for layer in layers]))
    assert relative_error(found[0], found[1].double()) < 1e-5
    assert found[1].norm() > 0


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("mixing", ["learned", "uniform"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d-reflect", "embedding"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_layer_gives_the_same_and_is_independent(
    duplicate: Callable[[CompositionLayer], CompositionLayer],
    kind: str,
    mixing: str,
    has_run: bool,
    trained: Callable[[str], Trained],
) -> None:
    layer, x = layer_of(trained(kind).composed(mixing=mixing)), KINDS[kind].input(torch.float64)
    if mixing == "learned":
        move_theta(layer)
    if has_run:
        layer(x)

    other = duplicate(layer)

    expected = layer(x)
    assert torch.equal(other(x), expected)
    assert other.mixing_weights("default").requires_grad == (mixing == "learned")
    with torch.no_grad():
        other.composition_factors["default"].A.zero_()
    assert not torch.equal(other(x), expected)
    assert torch.equal(layer(x), expected)


def test_a_base_model_on_the_meta_device_gets_real_factors_and_weights(
    architecture: Callable[[str], Trained],
) -> None:
    with init_empty_weights():
        base = tiny.TINY["mlp"].build()

    model = compose(base, architecture("mlp").folders)

    reference = architecture("mlp").reference()
    for module in ("lin0", "lin1"):
        layer = layer_of(model, module)
        assert layer.get_base_layer().weight.is_meta
        assert theta_of(layer).tolist() == [0.0] * 3
        expected = reference.delta(module, torch.full((3,), 1 / 3, dtype=torch.float64))
        assert relative_error(layer.get_delta_weight("default"), expected) < 1e-5


@pytest.mark.parametrize("way", ["init_empty_weights", "low_cpu_mem_usage"])
@pytest.mark.parametrize("name", ["mlp", "conv", "embedding", "bert"])
def test_creation_on_the_meta_device_gives_the_same_model(
    name: str, way: str, architecture: Callable[[str], Trained]
) -> None:
    expected = architecture(name).composed(torch.float32)
    base = copy.deepcopy(architecture(name).base).float()
    config = CompositionConfig(adapters=architecture(name).folders, gain=GAIN)

    if way == "init_empty_weights":
        with init_empty_weights():
            model = get_peft_model(base, config)
    else:
        model = get_peft_model(base, config, low_cpu_mem_usage=True)

    assert not [key for key, parameter in model.named_parameters() if parameter.is_meta]
    found, wanted = (logits(each(**inputs_of(name, torch.float32))) for each in (model, expected))
    assert torch.equal(found, wanted)
    found.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_embedding_with_max_norm_is_refused(tmp_path: Path) -> None:
    """Its forward pass rescales rows, so that base output and delta do not add up to the merged weight."""
    base = tiny.EmbeddingNet()
    adapter = tiny.save_lora(tmp_path / "adapter", base, ["emb"])
    base.emb.max_norm = 1.0
    with pytest.raises(AdapterError, match=r"module 'emb' \(Embedding\) cannot be composed: it has max_norm=1\.0"):
        get_peft_model(base, CompositionConfig(adapters=[adapter]))
    assert type(base.emb) is nn.Embedding


def test_gradient_of_theta_follows_theta_through_casts(tmp_path: Path) -> None:
    base = tiny.build("mlp")
    model = get_peft_model(base, CompositionConfig(adapters=[tiny.save_lora(tmp_path / "adapter", base, ["lin0"])]))
    mixing = model.base_model.model.lin0.composition_mixing["default"]
    model(**tiny.TINY["mlp"].inputs()).sum().backward()
    model.half()
    assert mixing.weight.dtype == mixing.weight.grad.dtype == torch.float32
    torch.optim.AdamW([mixing.weight]).step()


@pytest.mark.parametrize("mixing", ["learned", "fixed"])
def test_layer_trains_after_inference_mode(mixing: str, tmp_path: Path) -> None:
    base = tiny.build("mlp")
    adapters = [tiny.save_lora(tmp_path / str(seed), base, ["lin0", "lin1"], seed=seed) for seed in (0, 1)]
    config = CompositionConfig(adapters=adapters, mixing=mixing, weights=[0.25, 0.75], modules_to_save=["head"])
    model = get_peft_model(base, config)
    with torch.inference_mode():
        model(**tiny.TINY["mlp"].inputs())
    x = tiny.TINY["mlp"].inputs()["x"].requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
