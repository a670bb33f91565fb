"""Which way a composed layer takes to its output, that all ways agree, and what it keeps between calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_composition import CompositionConfig
from peft_composition.tuner import functional, merged
from peft_composition.tuner.layer import CompositionLayer

from .. import tiny
from ..reference import TOLERANCE, Reference, mixing_weights, relative_error


IN, OUT, GAIN = 24, 16, 10.0
# Of rank 4 and 20: factors of rank 9.6 are as large as the weight, which is kept merged from half of that on.
FEW, MANY = (1, 2, 1), (7, 1, 12)
SHORT, LONG = 6, 64  # tokens, below and above the 19.2 from which on merging costs less in training


class Host(nn.Module):
    """One layer, with something trainable before it when asked for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Doubled(nn.Linear):
    """A linear layer whose forward is its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


BASES: dict[str, Callable[[], nn.Module]] = {"linear": lambda: nn.Linear(IN, OUT), "Conv1D": lambda: Conv1D(OUT, IN)}


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[nn.Module, list[str]]]:
    """(kind of base layer, ranks) -> the base model in float64 and its LoRAs, the second with a bias if asked for."""
    made: dict[tuple[str, tuple[int, ...], bool], tuple[nn.Module, list[str]]] = {}

    def make(kind: str, ranks: tuple[int, ...], has_bias: bool = False) -> tuple[nn.Module, list[str]]:
        if (kind, ranks, has_bias) not in made:
            folder = tmp_path_factory.mktemp("upstream")
            torch.manual_seed(0)
            base = Host(BASES[kind]()).double()
            lora = {"fan_in_fan_out": kind == "Conv1D"}
            folders = [
                str(tiny.save_lora(folder / str(n), base, ["layer"], n, r, lora_bias=has_bias and n == 1, **lora))
                for n, r in enumerate(ranks)
            ]
            made[kind, ranks, has_bias] = base, folders
        return made[kind, ranks, has_bias]

    return make


def compose(base: nn.Module, folders: list[str], dtype: torch.dtype = torch.float64, **config: object) -> PeftModel:
    adapters = [{"path": folder, "name": f"adapter-{number}"} for number, folder in enumerate(folders)]
    config = {"gain": GAIN, **config}
    return get_peft_model(copy.deepcopy(base).to(dtype), CompositionConfig(adapters=adapters, **config))


def layer_of(model: nn.Module) -> CompositionLayer:
    return model.base_model.model.layer


def theta_of(model: nn.Module) -> nn.Parameter:
    return layer_of(model).composition_mixing["default"].weight


def move_theta(model: nn.Module, seed: int = 0) -> None:
    theta = theta_of(model)
    with torch.no_grad():
        theta.copy_(torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed)) / GAIN)


def tokens(count: int, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> Tensor:
    x = torch.randn(2, count // 2, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.to(dtype).requires_grad_(requires_grad)


def expected_output(base: nn.Module, folders: list[str], model: nn.Module, x: Tensor) -> Tensor:
    """By the formula, with the weights that theta has now."""
    w = mixing_weights([1 / len(folders)] * len(folders), theta_of(model).detach().double(), GAIN, "softmax")
    return Reference(base, folders)({"layer": w}, x.detach().double())


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The forms in which merged weights are used, in the order of the calls."""
    seen: list[str] = []
    real = merged.merged_linear

    def recorded(*args: object) -> Tensor:
        seen.append(str(args[6]) if len(args) > 6 else "tokens")
        return real(*args)

    monkeypatch.setattr("peft_composition.tuner.forms.merged_linear", recorded)
    return seen


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every time that mixing weights are computed."""
    seen: list[str] = []
    real = functional.spread

    def recorded(*args: Tensor) -> Tensor:
        seen.append("fold")
        return real(*args)

    monkeypatch.setattr(functional, "spread", recorded)
    return seen


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("trains_input", [False, True])
@pytest.mark.parametrize(
    ("ranks", "count", "used"), [(FEW, SHORT, []), (FEW, LONG, ["tokens"]), (MANY, LONG, ["weight"])]
)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_form_gives_the_output_and_gradients_of_the_composed_weight(
    dtype: torch.dtype,
    kind: str,
    ranks: tuple[int, ...],
    count: int,
    used: list[str],
    trains_input: bool,
    has_bias: bool,
    upstream: Callable[..., tuple[nn.Module, list[str]]],
    forms: list[str],
) -> None:
    base, folders = upstream(kind, ranks, has_bias)
    model = compose(base, folders, dtype)
    move_theta(model)
    x = tokens(count, dtype, trains_input)
    theta, exact_x = theta_of(model).detach().double().requires_grad_(), x.detach().double().requires_grad_()

    y = model(x)
    c = torch.randn_like(y)
    y.backward(c)

    w = mixing_weights([1 / 3] * 3, theta, GAIN, "softmax")
    expected = Reference(copy.deepcopy(base).to(dtype), folders)({"layer": w}, exact_x)
    expected.backward(c.double())
    assert forms == used
    assert relative_error(y, expected) < TOLERANCE[dtype]
    assert relative_error(theta_of(model).grad, theta.grad) < TOLERANCE[dtype]
    if trains_input:
        assert relative_error(x.grad, exact_x.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("ranks", [FEW, MANY])
@pytest.mark.parametrize("count", [2, SHORT, LONG])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen"])
def test_every_form_of_inference_gives_the_output_of_the_composed_weight(
    mode: str, kind: str, count: int, ranks: tuple[int, ...], upstream: Callable[..., tuple[nn.Module, list[str]]]
) -> None:
    base, folders = upstream(kind, ranks, has_bias=True)
    model = compose(base, folders)
    move_theta(model)
    if mode == "frozen":
        theta_of(model).requires_grad_(False)
    x = tokens(count, requires_grad=mode == "frozen")

    with {"no_grad": torch.no_grad(), "inference_mode": torch.inference_mode(), "frozen": nullcontext()}[mode]:
        first, second = model(x), model(x)

    assert relative_error(first, expected_output(base, folders, model, x)) < 1e-12
    assert torch.equal(first, second)
    if mode == "frozen":
        first.sum().backward()
        w = mixing_weights([1 / 3] * 3, theta_of(model).detach(), GAIN, "softmax")
        W = Reference(base, folders).parameters({"layer": w})["layer.weight"]
        W = W.T if kind == "Conv1D" else W
        assert relative_error(x.grad, W.sum(0).expand_as(x)) < 1e-12


def _add_forward_hook(layer: nn.Module) -> list[object]:
    calls: list[object] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    return calls


def _add_forward_pre_hook(layer: nn.Module) -> list[object]:
    calls: list[object] = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def _add_backward_hook(layer: nn.Module) -> list[object]:
    calls: list[object] = []
    layer.register_full_backward_hook(lambda *_: calls.append(1))
    return calls


def _add_accelerate_hook(layer: nn.Module) -> list[object]:
    calls: list[object] = []

    class Hook(ModelHook):
        def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> tuple[object, object]:
            calls.append(1)
            return args, kwargs

    add_hook_to_module(layer, Hook())
    return calls


@pytest.mark.parametrize("ranks", [FEW, MANY])
@pytest.mark.parametrize("hook", [_add_forward_hook, _add_forward_pre_hook, _add_backward_hook, _add_accelerate_hook])
def test_a_hook_on_the_base_layer_is_always_called(
    hook: Callable[[nn.Module], list[object]],
    ranks: tuple[int, ...],
    upstream: Callable[..., tuple[nn.Module, list[str]]],
) -> None:
    base, folders = upstream("linear", ranks)
    model = compose(base, folders)
    move_theta(model)
    calls = hook(layer_of(model).get_base_layer())
    x = tokens(LONG, requires_grad=True)

    for _ in range(2):
        y = model(x)
        y.sum().backward()

    assert len(calls) == 2
    assert relative_error(y, expected_output(base, folders, model, x)) < 1e-12
    if hook is not _add_backward_hook:
        with torch.no_grad():
            model(x)
        assert len(calls) == 3


def test_a_global_hook_sees_the_base_layer(upstream: Callable[..., tuple[nn.Module, list[str]]]) -> None:
    base, folders = upstream("linear", MANY)
    model = compose(base, folders)
    seen: list[nn.Module] = []

    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        model(tokens(LONG))

    assert layer_of(model).get_base_layer() in seen


@pytest.mark.parametrize("ranks", [FEW, MANY])
def test_a_subclass_with_a_forward_of_its_own_keeps_it(
    ranks: tuple[int, ...], upstream: Callable[..., tuple[nn.Module, list[str]]]
) -> None:
    base, folders = upstream("linear", ranks)
    special = Host(Doubled(IN, OUT)).double()
    special.load_state_dict(base.state_dict())
    x = tokens(LONG)

    with torch.no_grad():
        composed = compose(special, folders)(x)

    model = compose(base, folders)
    assert relative_error(composed, expected_output(base, folders, model, x) + base(x)) < 1e-12


@pytest.mark.parametrize("ranks", [FEW, MANY])
def test_a_base_weight_that_trains_gets_its_gradient(
    ranks: tuple[int, ...], upstream: Callable[..., tuple[nn.Module, list[str]]]
) -> None:
    base, folders = upstream("linear", ranks)
    model = compose(base, folders)
    base_layer = layer_of(model).get_base_layer().requires_grad_(True)
    x = tokens(LONG)

    model(x).sum().backward()

    assert relative_error(base_layer.weight.grad, x.sum((0, 1)).expand(OUT, IN)) < 1e-12
    assert torch.equal(base_layer.bias.grad, torch.full((OUT,), float(LONG), dtype=torch.float64))


def test_a_bias_that_trains_gets_its_gradient_in_a_merged_form(
    upstream: Callable[..., tuple[nn.Module, list[str]]], forms: list[str]
) -> None:
    model = compose(*upstream("linear", FEW, has_bias=True))
    bias = layer_of(model).get_base_layer().bias.requires_grad_(True)

    model(tokens(LONG)).sum().backward()

    assert forms == ["tokens"]
    assert torch.equal(bias.grad, torch.full((OUT,), float(LONG), dtype=torch.float64))


@pytest.mark.parametrize("ranks", [FEW, MANY])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
def test_sixteen_bits_do_not_swallow_an_update_much_smaller_than_the_base_weight(
    precision: str, ranks: tuple[int, ...], tmp_path: Path, forms: list[str]
) -> None:
    """A merged W0 = 1 plus an update of 1/1000 is 1 in 8 bits; the update must reach the output all the same."""
    base = Host(nn.Linear(IN, OUT, bias=False))
    nn.init.ones_(base.layer.weight)
    folders = [str(tiny.save_lora(tmp_path / str(n), base, ["layer"], n, r)) for n, r in enumerate(ranks)]
    model = compose(base, folders, torch.float32)
    with torch.no_grad():
        model.base_model.model.layer.composition_factors["default"].B.mul_(2e-3)
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    model = model.to(dtype)
    x = tokens(LONG, dtype)
    x = x - x.mean(-1, keepdim=True)  # the base layer's own output is nearly zero, the rest is the update's

    for context in (torch.no_grad(), nullcontext()):
        with context, torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            y, without = model(x), base.to(dtype)(x)

    assert forms == []
    w = mixing_weights([1 / 3] * 3, theta_of(model).detach().double(), GAIN, "softmax")
    update = 2e-3 * x.double() @ Reference(base, folders).delta("layer", w).T
    assert relative_error(y.double() - without.double(), update) < 0.2


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("ranks", [FEW, MANY])
def test_checkpointing_a_merged_form_gives_the_same_gradients(
    ranks: tuple[int, ...],
    use_reentrant: bool,
    upstream: Callable[..., tuple[nn.Module, list[str]]],
    forms: list[str],
) -> None:
    model, x = compose(*upstream("linear", ranks)), tokens(LONG, requires_grad=True)
    move_theta(model)
    found = []

    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        found.append((theta_of(model).grad.clone(), x.grad.clone()))

    assert len(forms) == 3
    assert forms[0] == forms[-1]  # without gradient, a reentrant checkpoint's first pass has no choice of form
    for plain, checkpointed in zip(*found):
        assert relative_error(plain, checkpointed) < 1e-12


@pytest.mark.parametrize("ranks", [FEW, MANY])
@pytest.mark.parametrize("count", [SHORT, LONG])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_layer_compiles_to_one_graph_in_every_form(
    mode: str, count: int, ranks: tuple[int, ...], upstream: Callable[..., tuple[nn.Module, list[str]]]
) -> None:
    torch.compiler.reset()  # it counts how often it had to compile the same function
    base, folders = upstream("linear", ranks, has_bias=True)
    model = compose(base, folders)
    move_theta(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = tokens(count)

    with torch.set_grad_enabled(mode == "training"):
        for seed in (0, 1):  # the second time with other weights, in the same graph
            move_theta(model, seed)
            with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
                y = compiled(x)
            assert relative_error(y, expected_output(base, folders, model, x)) < 1e-12
    if mode == "training":
        y.square().sum().backward()
        gradient = theta_of(model).grad.clone()
        model.zero_grad()
        model(x).square().sum().backward()
        assert relative_error(theta_of(model).grad, gradient) < 1e-12


def test_what_training_saves_for_backward_does_not_grow_with_the_adapters(
    upstream: Callable[..., tuple[nn.Module, list[str]]],
) -> None:
    saved: dict[int, int] = {}
    for times in (1, 4):
        base, folders = upstream("linear", FEW)
        model = compose(base, folders * times, torch.float32)
        mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def count(tensor: Tensor, mine: set[int] = mine, sizes: dict[int, int] = sizes) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in mine:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = tokens(10_000, torch.float32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(x)
        saved[times] = sum(sizes.values())
    assert saved[1] < 1.01 * 10_000 * IN * 4  # the input
    assert saved[4] - saved[1] < 2 * IN * OUT * 4  # a dense weight, and nothing for each token


# What is kept


@pytest.mark.parametrize("ranks", [FEW, MANY])
@pytest.mark.parametrize("count", [2, LONG])
@pytest.mark.parametrize("mixing", ["learned", "uniform"])
def test_weights_are_folded_once_for_all_calls(
    mixing: str,
    count: int,
    ranks: tuple[int, ...],
    upstream: Callable[..., tuple[nn.Module, list[str]]],
    folds: list[str],
) -> None:
    model = compose(*upstream("linear", ranks), mixing=mixing).eval()

    with torch.no_grad():
        for _ in range(5):
            model(tokens(count))

    assert folds == ["fold"]


@pytest.mark.parametrize("ranks", [FEW, MANY])
def test_active_compositions_are_each_folded_once(
    ranks: tuple[int, ...], upstream: Callable[..., tuple[nn.Module, list[str]]], folds: list[str]
) -> None:
    model = compose(*upstream("linear", ranks)).eval()
    model.add_adapter("other", CompositionConfig(adapters=model.peft_config["default"].adapters, mixing="uniform"))
    model.base_model.set_adapter(["default", "other"])

    with torch.no_grad():
        for count in (2, LONG, 2):
            model(tokens(count))

    assert folds == ["fold", "fold"]


def test_a_prompt_and_its_single_tokens_share_what_is_kept(
    upstream: Callable[..., tuple[nn.Module, list[str]]], folds: list[str], forms: list[str]
) -> None:
    model = compose(*upstream("linear", FEW)).eval()

    with torch.no_grad():
        for count in (LONG, 2, 2, LONG, 2):
            model(tokens(count))

    assert folds == ["fold"]
    assert forms == ["tokens"] * 2


def test_a_uniform_composition_does_not_fold_in_training_either(
    upstream: Callable[..., tuple[nn.Module, list[str]]], folds: list[str]
) -> None:
    model = compose(*upstream("linear", FEW), mixing="uniform").train()

    for count in (SHORT, LONG, SHORT):
        x = tokens(count, requires_grad=True)
        model(x).sum().backward()

    assert folds == ["fold"]


def _copy_into_theta(model: PeftModel) -> None:
    move_theta(model, seed=7)


def _write_through_data(model: PeftModel) -> None:
    theta_of(model).data.copy_(torch.tensor([0.3, -0.2, 0.1]))


def _replace_data(model: PeftModel) -> None:
    theta_of(model).data = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


def _replace_parameter(model: PeftModel) -> None:
    layer_of(model).composition_mixing["default"].weight = nn.Parameter(
        torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    )


def _load_a_state_dict(model: PeftModel) -> None:
    state = {key: tensor + 0.1 * ("mixing" in key) * torch.arange(3) for key, tensor in _mixing_state(model).items()}
    model.load_state_dict(state, strict=False)


def _mixing_state(model: PeftModel) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in model.state_dict().items() if "composition_mixing" in key}


def _take_a_step(optimizer: Callable[..., torch.optim.Optimizer], **options: object) -> Callable[[PeftModel], None]:
    def act(model: PeftModel) -> None:
        steps = optimizer([theta_of(model)], **options)
        model(tokens(LONG)).square().sum().backward()
        steps.step()

    return act


CHANGES: dict[str, Callable[[PeftModel], None]] = {
    "copy": _copy_into_theta,
    "data": _write_through_data,
    "new data": _replace_data,
    "new parameter": _replace_parameter,
    "state dict": _load_a_state_dict,
    "SGD": _take_a_step(torch.optim.SGD, lr=1e-5),
    "AdamW foreach": _take_a_step(torch.optim.AdamW, lr=0.1, foreach=True),
    "AdamW fused": _take_a_step(torch.optim.AdamW, lr=0.1, fused=True),
}


@pytest.mark.parametrize("ranks", [FEW, MANY])
@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_are_noticed_at_once(
    change: str, ranks: tuple[int, ...], upstream: Callable[..., tuple[nn.Module, list[str]]]
) -> None:
    base, folders = upstream("linear", ranks)
    model, x = compose(base, folders), tokens(2)
    with torch.no_grad():
        before = model(x)

    CHANGES[change](model)

    with torch.no_grad():
        after = model(x)
    assert relative_error(after, expected_output(base, folders, model, x)) < 1e-12
    assert relative_error(after, before) > 1e-3


def _scale_A(model: PeftModel) -> None:
    with torch.no_grad():
        layer_of(model).composition_factors["default"].A.mul_(2)


def _scale_B(model: PeftModel) -> None:
    with torch.no_grad():
        layer_of(model).composition_factors["default"].B.mul_(2)


def _scale_B_behind_autograd(model: PeftModel) -> None:
    layer_of(model).composition_factors["default"].B.data.mul_(2)
    model.eval()


@pytest.mark.parametrize("ranks", [FEW, MANY])
@pytest.mark.parametrize("change", [_scale_A, _scale_B, _scale_B_behind_autograd])
def test_new_factors_are_noticed(
    change: Callable[[PeftModel], None],
    ranks: tuple[int, ...],
    upstream: Callable[..., tuple[nn.Module, list[str]]],
) -> None:
    base, folders = upstream("linear", ranks)
    model, x = compose(base, folders), tokens(2)
    with torch.no_grad():
        before = model(x)
        change(model)
        after = model(x)

    assert relative_error(after - base(x), 2 * (before - base(x))) < 1e-12


def test_a_new_base_weight_is_noticed(upstream: Callable[..., tuple[nn.Module, list[str]]]) -> None:
    base, folders = upstream("linear", MANY)
    model, x = compose(base, folders), tokens(2)
    weight = layer_of(model).get_base_layer().weight
    with torch.no_grad():
        before = model(x)
        weight.add_(1)
        changed = model(x)
        weight.data = weight.data - 1
        restored = model(x)

    assert relative_error(changed - before, x.sum(-1, keepdim=True).expand_as(before)) < 1e-12
    assert relative_error(restored, before) < 1e-12


@pytest.mark.parametrize("ranks", [FEW, MANY])
def test_what_is_kept_follows_merging_switching_and_casting(
    ranks: tuple[int, ...], upstream: Callable[..., tuple[nn.Module, list[str]]]
) -> None:
    base, folders = upstream("linear", ranks)
    model, x = compose(base, folders), tokens(2)
    move_theta(model)
    expected = expected_output(base, folders, model, x)
    adapters = model.peft_config["default"].adapters
    model.add_adapter("other", CompositionConfig(adapters=adapters, mixing="fixed", weights=[1.0, 0.0, 0.0]))

    with torch.no_grad():
        assert relative_error(model(x), expected) < 1e-12
        model.merge_adapter()
        assert relative_error(model(x), expected) < 1e-12
        model.unmerge_adapter()
        assert relative_error(model(x), expected) < 1e-12
        model.set_adapter("other")
        first = Reference(base, folders)({"layer": torch.tensor([1.0, 0.0, 0.0]).double()}, x)
        assert relative_error(model(x), first) < 1e-12
        model.set_adapter("default")
        with model.disable_adapter():
            assert relative_error(model(x), base(x)) < 1e-12
        assert relative_error(model(x), expected) < 1e-12
        model.float()
        assert relative_error(model(x.float()), expected) < 1e-5


@pytest.mark.parametrize("ranks", [FEW, MANY])
def test_what_inference_mode_leaves_behind_can_be_trained_through(
    ranks: tuple[int, ...], upstream: Callable[..., tuple[nn.Module, list[str]]]
) -> None:
    model = compose(*upstream("linear", ranks), mixing="uniform")
    for count in (2, LONG):
        with torch.inference_mode():
            expected = model(tokens(count))
        x = tokens(count, requires_grad=True)

        y = model(x)
        y.sum().backward()

        assert torch.equal(y, expected)
        assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("ranks", [FEW, MANY])
def test_populations_of_weights_under_vmap_get_their_own_outputs(
    ranks: tuple[int, ...], upstream: Callable[..., tuple[nn.Module, list[str]]]
) -> None:
    base, folders = upstream("linear", ranks)
    model, x = compose(base, folders), tokens(2)
    name = next(name for name, _ in model.named_parameters() if "composition_mixing" in name)
    population = torch.randn(4, 3).double() / GAIN
    with torch.no_grad():
        model(x)  # something is kept

        outputs = torch.func.vmap(lambda theta: torch.func.functional_call(model, {name: theta}, (x,)))(population)

    for theta, output in zip(population, outputs):
        w = mixing_weights([1 / 3] * 3, theta, GAIN, "softmax")
        assert relative_error(output, Reference(base, folders)({"layer": w}, x)) < 1e-12


def test_forward_mode_derivatives_in_the_weights_are_right(
    upstream: Callable[..., tuple[nn.Module, list[str]]],
) -> None:
    base, folders = upstream("linear", MANY)
    model, x, direction = compose(base, folders), tokens(2), torch.tensor([0.3, -0.1, 0.2]).double()
    name = next(name for name, _ in model.named_parameters() if "composition_mixing" in name)
    reference, zero = Reference(base, folders), torch.zeros(3).double()

    def by_formula(theta: Tensor) -> Tensor:
        return reference({"layer": mixing_weights([1 / 3] * 3, theta, GAIN, "softmax")}, x)

    def composed(theta: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: theta}, (x,))

    with torch.no_grad():
        model(x)
        _, tangent = torch.func.jvp(composed, (zero,), (direction,))
        _, expected = torch.func.jvp(by_formula, (zero,), (direction,))
    assert relative_error(tangent, expected) < 1e-12
