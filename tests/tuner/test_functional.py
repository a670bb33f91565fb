"""The pure functions against loops over adapters in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_composition.checkpoint import lowrank
from peft_composition.tuner import functional, merged

from ..reference import TOLERANCE, relative_error


RANKS = [(1, 3, 16), (4,), (0, 2), (3, 0, 0, 5), (2, 2)]
DTYPES = [torch.float64, torch.float32]


def _factors(
    ranks: tuple[int, ...], in_shape: tuple[int, ...], out: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Random A_n, B_n and mixing weights that are no softmax, all exact in `dtype`."""
    ones = (1,) * (len(in_shape) - 1)
    return (
        [torch.randn(rank, *in_shape, dtype=dtype) for rank in ranks],
        [torch.randn(out, rank, *ones, dtype=dtype) for rank in ranks],
        torch.randn(len(ranks), dtype=dtype),
    )


def _spread(weights: Tensor, ranks: tuple[int, ...]) -> Tensor:
    widest, places = functional.places_of_ranks(ranks)
    return functional.spread(weights, widest, None if places is None else torch.tensor(places))


def _composed(weights: Tensor, A: list[Tensor], B: list[Tensor]) -> Tensor:
    """sum_n w_n B_n A_n in float64, one adapter after the other."""
    total = torch.zeros(B[0].shape[0], *A[0].shape[1:], dtype=torch.float64)
    for weight, A_n, B_n in zip(weights, A, B):
        total = total + weight.double() * torch.einsum("or,r...->o...", B_n.double().flatten(1), A_n.double())
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_delta_weight_is_the_weighted_sum_of_the_products(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    A, B, weights = _factors(ranks, (10,), 7, dtype)

    delta = functional.delta_weight(torch.cat(A), torch.cat(B, 1), _spread(weights, ranks))

    assert delta.dtype == dtype
    assert relative_error(delta, _composed(weights, A, B)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_delta_weight_of_half_precision_factors_is_computed_in_float32(dtype: torch.dtype) -> None:
    ranks = (1, 3, 16)
    A, B, _ = _factors(ranks, (10,), 7, dtype)
    weights = torch.randn(3)

    delta = functional.delta_weight(torch.cat(A), torch.cat(B, 1), _spread(weights, ranks))

    assert delta.dtype == torch.float32
    assert relative_error(delta, _composed(weights, A, B)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("ranks", RANKS)
def test_linear_delta_output_is_that_of_the_summed_products(
    ranks: tuple[int, ...], leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    A, B, weights = _factors(ranks, (10,), 7, dtype)
    x = torch.randn(*leading, 10, dtype=dtype)

    y = functional.linear_delta_output(x, torch.cat(A), torch.cat(B, 1), _spread(weights, ranks))

    expected = x.double() @ _composed(weights, A, B).t()
    assert y.shape == expected.shape
    assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_conv_delta_output_is_that_of_the_summed_kernels(
    dimensions: int, ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    A, B, weights = _factors(ranks, (4, *(3, 2, 2)[:dimensions]), 5, dtype)
    x = torch.randn(2, 4, *(9, 6, 5)[:dimensions], dtype=dtype)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]

    def convolve(x: Tensor, kernel: Tensor) -> Tensor:
        return convolution(x, kernel, stride=2, padding=1, dilation=2)

    u = _spread(weights, ranks)
    y = functional.conv_delta_output(x, torch.cat(A), torch.cat(B, 1), u, convolve)

    assert relative_error(y, convolve(x.double(), _composed(weights, A, B))) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
@pytest.mark.parametrize("ranks", RANKS)
def test_embedding_delta_output_picks_rows_of_the_summed_products(
    ranks: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    A, B, weights = _factors(ranks, (11,), 7, dtype)
    tokens = torch.randint(0, 11, shape)

    y = functional.embedding_delta_output(tokens, torch.cat(A), torch.cat(B, 1), _spread(weights, ranks))

    assert relative_error(y, _composed(weights, A, B).t()[tokens]) < TOLERANCE[dtype]


def test_gradient_of_the_mixing_logits_is_the_closed_form() -> None:
    ranks = (1, 3, 16)
    A, B, _ = _factors(ranks, (10,), 7, torch.float64)
    x, cotangent = torch.randn(5, 10, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    v = torch.randn(3, dtype=torch.float64, requires_grad=True)

    u = _spread(functional.normalize(v, "softmax"), ranks)
    functional.linear_delta_output(x, torch.cat(A), torch.cat(B, 1), u).backward(cotangent)

    # dL/dw_n = <c, x (B_n A_n)^T>, and dL/dv_n = w_n (dL/dw_n - sum_m w_m dL/dw_m)
    odds = [math.exp(value) for value in v.tolist()]
    w = torch.tensor([odd / sum(odds) for odd in odds], dtype=torch.float64)
    dw = torch.stack([(cotangent * (x @ (B_n @ A_n).t())).sum() for A_n, B_n in zip(A, B)])
    assert relative_error(v.grad, w * (dw - (w * dw).sum())) < TOLERANCE[torch.float64]


def test_spread_repeats_each_weight_over_the_rank_of_its_adapter() -> None:
    weights = torch.tensor([0.5, 0.2, 0.3])

    assert _spread(weights, (2, 0, 3)).tolist() == weights[[0, 0, 2, 2, 2]].tolist()
    assert _spread(weights, (2, 2, 2)).tolist() == weights[[0, 0, 1, 1, 2, 2]].tolist()


class RepeatedIndices(TorchDispatchMode):
    """Notes what adds to an entry more than once by index: on a GPU in an order that differs from run to run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        adds = any(word in func.name() for word in ("index_add", "index_put", "scatter", "_backward"))
        for index in (arg for arg in args if isinstance(arg, Tensor) and arg.dtype == torch.int64 and adds):
            if index.unique().numel() < index.numel():
                self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranks", [*RANKS, (2, 2, 2), (5, 1, 1, 1)])
def test_gradient_of_the_weights_is_a_sum_in_a_fixed_order(ranks: tuple[int, ...]) -> None:
    weights = torch.rand(len(ranks), dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(sum(ranks), dtype=torch.float64)

    with RepeatedIndices() as repeated:
        (gradient,) = torch.autograd.grad(_spread(weights, ranks), weights, cotangent)

    assert relative_error(gradient, torch.stack([part.sum() for part in cotangent.split(ranks)])) < 1e-15
    assert repeated.found == []
    with RepeatedIndices() as repeated:  # that the test sees what it looks for
        weights.index_select(0, torch.tensor([0, 0])).sum().backward()
    assert repeated.found


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [0.0, 0.25, 0.75], [1.0, 0.0]])
def test_softmax_of_the_starting_logits_gives_the_starting_weights(weights: list[float]) -> None:
    logits = torch.tensor(functional.starting_logits(weights, "softmax"), dtype=torch.float64)

    normalized = functional.normalize(logits, "softmax")

    expected = torch.tensor(weights, dtype=torch.float64)
    assert relative_error(normalized, expected) < TOLERANCE[torch.float64]
    assert ((normalized == 0) == (expected == 0)).all()


def test_free_weights_are_their_own_logits() -> None:
    weights = [1.5, -0.5, 0.0]

    logits = torch.tensor(functional.starting_logits(weights, "none"))

    assert functional.normalize(logits, "none").tolist() == weights


@pytest.mark.parametrize("normalization", ["softmax", "none"])
@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_weights_are_normalized_in_float32_or_wider(
    given: torch.dtype, returned: torch.dtype, normalization: str
) -> None:
    logits = torch.tensor([0.3, -1.7, 2.1]).to(given)

    weights = functional.normalize(logits, normalization)

    odds = [math.exp(logit) for logit in logits.tolist()]
    softmax = [odd / sum(odds) for odd in odds]
    expected = torch.tensor(softmax if normalization == "softmax" else logits.tolist(), dtype=torch.float64)
    assert weights.dtype == returned
    assert relative_error(weights, expected) < torch.finfo(returned).eps * 4


def test_softmax_of_far_apart_logits_stays_finite() -> None:
    logits = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)

    weights = functional.normalize(logits, "softmax")
    weights[0].backward()

    assert weights.tolist() == [1.0, 0.0, 0.0]
    assert logits.grad.isfinite().all()


def test_delta_bias_is_the_weighted_sum_of_the_biases() -> None:
    bias, weights = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    delta = functional.delta_bias(bias, weights)

    expected = sum(weight * row for weight, row in zip(weights.tolist(), bias))
    assert relative_error(delta, expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_add_delta_rounds_the_sum_once_to_the_dtype_of_the_base(dtype: torch.dtype, sign: int) -> None:
    base, delta = torch.randn(50, 40).to(dtype), 1e-2 * torch.randn(50, 40)

    total = functional.add_delta(base, delta, sign)

    exact = base.double() + sign * delta.double()
    # Half a unit in the last place, of a subnormal too, and the rounding of the float32 sum before it.
    unit = torch.finfo(dtype).eps / 2 + (torch.finfo(torch.float32).eps if dtype.itemsize == 2 else 0)
    assert total.dtype == dtype
    assert ((total.double() - exact).abs() <= unit * exact.abs().clamp(min=torch.finfo(dtype).tiny)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(10,), (6, 7, 1)])
def test_fold_multiplies_each_column_by_the_weight_of_its_adapter(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    A = torch.randn(9, *shape, dtype=dtype)
    B, u = torch.randn(7, 9, *(1,) * (len(shape) - 1), dtype=dtype), torch.randn(9, dtype=torch.float64)

    rows, folded = functional.fold(A, B, u)

    assert rows is A
    assert folded.dtype == dtype
    expected = torch.einsum("or...,r->or...", B.double(), u)
    assert relative_error(folded, expected) < TOLERANCE[dtype]


def test_fold_of_bfloat16_factors_rounds_once() -> None:
    A, B, u = torch.randn(9, 5).bfloat16(), torch.randn(50, 9).bfloat16(), torch.rand(9)

    rows, folded = functional.fold(A, B, u)

    assert rows is A
    assert torch.equal(folded, (B.double() * u.double()).float().bfloat16())


def _many_small_adapters(count: int, in_shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """A and B of rank 2 each as training leaves them, in float16, and the weights of a uniform mix."""
    A = torch.randn(2 * count, *in_shape) / math.sqrt(math.prod(in_shape))
    B = 1e-3 * torch.randn(48, 2 * count, *(1,) * (len(in_shape) - 1))
    return A.half(), B.half(), torch.full((2 * count,), 1 / count)


@pytest.mark.parametrize("in_shape", [(64,), (8, 3, 3)])
def test_fold_in_float16_keeps_its_digits_among_many_adapters(in_shape: tuple[int, ...]) -> None:
    """B is rounded once, by at most half of eps; the weights alone would press its entries into the subnormals."""
    A, B, u = _many_small_adapters(256, in_shape)
    expected = _product(A.double(), B.double() * u.reshape(-1, *(1,) * (B.dim() - 2)))

    rows, columns = functional.fold(A, B, u)

    assert rows.dtype == columns.dtype == torch.float16
    assert rows.shape == A.shape
    assert columns.shape == B.shape
    assert relative_error(_product(rows.double(), columns.double()), expected) < torch.finfo(torch.float16).eps / 2


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e-9, 0.0])
def test_a_resolved_update_keeps_its_digits_in_float16_and_overflows_no_sooner_than_a_weight(size: float) -> None:
    delta = size * torch.randn(48, 64)

    rounded, scale = functional.resolved(delta, torch.float16)

    assert rounded.dtype == scale.dtype == torch.float16
    assert rounded.abs().max() <= max(2**-4, delta.half().abs().max())
    restored = rounded.double() * scale.double()
    half_unit = torch.finfo(torch.float16).eps / 2
    assert torch.linalg.norm(restored - delta.double()) <= half_unit * torch.linalg.norm(delta.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_update_in_a_dtype_of_wide_range_is_rounded_as_it_is(dtype: torch.dtype) -> None:
    delta = 1e-9 * torch.randn(48, 64, dtype=torch.float64)

    rounded, scale = functional.resolved(delta, dtype)

    assert scale is None
    assert torch.equal(rounded, delta.to(dtype))


def test_bias_in_float16_keeps_its_digits_among_many_adapters() -> None:
    bias, weights = (1e-2 * torch.rand(256, 48)).half(), torch.full((256,), 1 / 256)

    mixed = functional.delta_bias(bias, weights)

    assert mixed.dtype == torch.float16
    half_unit = torch.finfo(torch.float16).eps / 2
    assert relative_error(mixed, bias.double().mean(0)) < 1.01 * half_unit


# The layer has in = 24, out = 16, so that a dense weight is as large as factors of rank 9.6.
IN, OUT = 24, 16


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("ranks", [(1, 3), (9, 11)], ids=["dense weight made anew", "dense weight kept"])
@pytest.mark.parametrize("form", ["tokens", "weight"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_linear_and_its_gradients_are_those_of_the_composed_weight(
    dtype: torch.dtype, form: merged.Form, ranks: tuple[int, ...], leading: tuple[int, ...], has_bias: bool
) -> None:
    A, B, weights = _factors(ranks, (IN,), OUT, dtype)
    W, x = torch.randn(OUT, IN, dtype=dtype), torch.randn(*leading, IN, dtype=dtype, requires_grad=True)
    bias = torch.randn(OUT, dtype=dtype, requires_grad=True) if has_bias else None
    weights.requires_grad_()
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, bias, weights)]

    u = _spread(weights, ranks)
    y = merged.merged_linear(x, W, bias, torch.cat(A), torch.cat(B, 1), u, form)

    exact_x, exact_bias, exact_weights = exact
    expected = F.linear(exact_x, W.double() + _composed(exact_weights, A, B), exact_bias)
    c = torch.randn_like(y)
    y.backward(c)
    expected.backward(c.double())
    assert y.dtype == dtype
    for actual, wanted in [(y, expected), (x.grad, exact_x.grad), (weights.grad, exact_weights.grad)]:
        if y.numel():
            assert relative_error(actual, wanted) < TOLERANCE[dtype]
        else:
            assert torch.equal(actual.double(), wanted)
    if has_bias and y.numel():
        assert relative_error(bias.grad, exact_bias.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("needs", ["x", "u", "neither"])
def test_merged_linear_saves_no_more_than_a_gradient_needs(needs: str) -> None:
    x, u = torch.randn(50, IN, requires_grad=needs == "x"), torch.rand(4, requires_grad=needs == "u")
    W, A, B = torch.randn(OUT, IN), torch.randn(4, IN), torch.randn(OUT, 4)
    given = {t.untyped_storage().data_ptr() for t in (W, A, B, u)}
    saved = []

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = merged.merged_linear(x, W, None, A, B, u)

    assert y.requires_grad == (needs != "neither")
    new = [t for t in saved if t.untyped_storage().data_ptr() not in given]
    assert [t.shape for t in new] == ([x.shape] if needs == "u" else [])


@pytest.mark.parametrize("ranks", [(1, 3), (9, 11)], ids=["dense weight made anew", "dense weight kept"])
@pytest.mark.parametrize("form", ["tokens", "weight"])
def test_merged_linear_has_right_second_derivatives(form: merged.Form, ranks: tuple[int, ...]) -> None:
    A, B, _ = _factors(ranks, (6,), 5, torch.float64)
    W = torch.randn(5, 6, dtype=torch.float64)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 6), (5,), (sum(ranks),))]

    def output(x: Tensor, bias: Tensor, u: Tensor) -> Tensor:
        return merged.merged_linear(x, W, bias, torch.cat(A), torch.cat(B, 1), u, form)

    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)


@pytest.mark.parametrize("form", ["tokens", "weight"])
def test_merged_linear_works_under_function_transforms(form: merged.Form) -> None:
    A, B, _ = _factors((2, 3), (IN,), OUT, torch.float64)
    W, x, many = torch.randn(OUT, IN).double(), torch.randn(4, IN).double(), torch.randn(6, 5).double()

    def loss(u: Tensor) -> Tensor:
        return merged.merged_linear(x, W, None, torch.cat(A), torch.cat(B, 1), u, form).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(many)

    for u, gradient in zip(many, gradients):
        leaf = u.clone().requires_grad_()
        delta = torch.cat(B, 1) @ torch.diag(leaf) @ torch.cat(A)
        (x @ (W + delta).T).square().sum().backward()
        assert relative_error(gradient, leaf.grad) < 1e-12


@pytest.mark.parametrize("form", ["tokens", "weight"])
def test_merged_linear_compiles_without_a_graph_break(form: merged.Form) -> None:
    torch.compiler.reset()
    A, B, W = torch.randn(5, IN), torch.randn(OUT, 5), torch.randn(OUT, IN)

    def output(x: Tensor, u: Tensor) -> Tensor:
        return merged.merged_linear(x, W, None, A, B, u, form)

    results = []
    for run in (output, torch.compile(output, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        x, u = torch.randn(7, IN, requires_grad=True), torch.randn(5, requires_grad=True)
        y = run(x, u)
        y.square().sum().backward()
        results.append((y, x.grad, u.grad))
    for actual, wanted in zip(*results):
        assert relative_error(actual, wanted.double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("tokens", "rank", "trains_input", "trains_weights", "form"),
    [
        # stacked 2 T R 40; tokens 2 R 384 + T R 40, less from T = 19.2 on
        (19, 9, True, True, "stacked"),
        (20, 9, True, True, "tokens"),
        # weight 3 R 384 + T 384: less than tokens where R 384 + T 384 < T R 40
        (40, 12, True, True, "tokens"),
        (60, 12, True, True, "weight"),
        # without a gradient of x: stacked T R 56, tokens R 384 + T R 40, weight 2 R 384 + T 384
        (24, 9, False, True, "stacked"),
        (25, 9, False, True, "tokens"),
        (100, 20, False, True, "weight"),
        # constant weights: stacked T R 40 a pass, merged R 384
        (9, 5, True, False, "stacked"),
        (10, 5, True, False, "tokens"),
        (9, 500, False, False, "stacked"),
        (10, 500, False, False, "tokens"),
        (0, 5, True, True, "stacked"),
        (0, 5, False, False, "stacked"),
    ],
)
def test_cheapest_form_needs_the_fewest_multiplications(
    tokens: int, rank: int, trains_input: bool, trains_weights: bool, form: str
) -> None:
    assert (
        merged.cheapest_form(tokens, rank, IN, OUT, trains_input=trains_input, trains_weights=trains_weights) == form
    )


def test_dense_is_smaller_from_the_rank_on_where_factors_hold_as_many_numbers() -> None:
    assert [merged.dense_is_smaller(rank, IN, OUT) for rank in (1, 9, 10, 100)] == [False, False, True, True]


# For an export: factors without weights, and of lower rank


SHAPES = [((10,), 7), ((30,), 40), ((3, 2, 2), 5)]  # less, more and about as many rows and columns as ranks


def _stacked(
    ranks: tuple[int, ...], in_shape: tuple[int, ...], out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B and u, and the update that they stand for."""
    A, B, weights = _factors(ranks, in_shape, out, dtype)
    u = _spread(weights, ranks)
    return torch.cat(A), torch.cat(B, 1), u, _composed(weights, A, B)


def _product(A: Tensor, B: Tensor) -> Tensor:
    return torch.einsum("or,r...->o...", B.flatten(1), A)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("in_shape", "out"), SHAPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_fold_evenly_keeps_the_update_and_the_shapes(ranks, in_shape, out, dtype) -> None:
    A, B, u, delta = _stacked(ranks, in_shape, out, dtype)
    rows, columns = functional.fold_evenly(A, B, u)
    assert (rows.shape, columns.shape) == (A.shape, B.shape)
    assert rows.dtype == columns.dtype == torch.float64
    assert relative_error(_product(rows, columns), delta) < 1e-12


def test_fold_evenly_rounds_no_digit_of_A() -> None:
    A, B, u = torch.randn(3, 10), 1e-3 * torch.randn(6, 3), torch.tensor([0.3, -1e-4, 0.0])
    rows, columns = functional.fold_evenly(A, B, u)
    assert torch.equal(torch.frexp(rows).mantissa, torch.frexp(A.double()).mantissa)
    ratio = rows[:2].abs().amax(1) / columns[:, :2].abs().amax(0)
    assert ((ratio >= 0.5) & (ratio <= 2)).all()
    assert torch.equal(rows[2], A[2].double())
    assert not columns[:, 2].any()


def test_evenly_folded_small_weights_survive_in_float16() -> None:
    """The weight would press B below what float16 resolves, were it all put there."""
    A, B, u = torch.randn(4, 64).half(), (1e-3 * torch.randn(48, 4)).half(), torch.full((4,), 1e-4)
    expected = (B.double() * u.double()) @ A.double()
    rows, columns = (factor.half().double() for factor in functional.fold_evenly(A, B, u))
    assert relative_error(columns @ rows, expected) < 1e-3
    assert relative_error((B.double() * u).half().double() @ A.double(), expected) > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("in_shape", "out"), SHAPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_truncate_is_the_nearest_update_of_its_rank(ranks, in_shape, out, dtype) -> None:
    A, B, u, delta = _stacked(ranks, in_shape, out, dtype)
    U, S, Vh = np.linalg.svd(delta.flatten(1).numpy(), full_matrices=False)
    S = S[: sum(ranks)]
    torch.testing.assert_close(lowrank.singular_values(A, B, u), torch.from_numpy(S), rtol=1e-10, atol=1e-12)
    assert lowrank.norm_of_delta(A, B, u) == pytest.approx(float(delta.norm()), rel=1e-12)
    for rank in range(1, len(S) + 1):
        rows, columns, values = lowrank.truncate(A, B, u, rank)
        assert rows.shape == (rank, *A.shape[1:])
        assert columns.shape == (out, rank, *B.shape[2:])
        nearest = torch.from_numpy(U[:, :rank] * S[:rank] @ Vh[:rank])
        assert relative_error(_product(rows, columns).flatten(1), nearest) < 1e-11
        torch.testing.assert_close(values, torch.from_numpy(S), rtol=1e-10, atol=1e-12)


def test_the_update_itself_is_never_formed() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    A, B, u = torch.randn(6, 3000), torch.randn(2000, 6), torch.rand(6)
    with Largest() as largest:
        functional.fold_evenly(A, B, u)
        lowrank.truncate(A, B, u, 3)
        lowrank.singular_values(A, B, u)
        lowrank.norm_of_delta(A, B, u)
    assert largest.numel == A.numel()


@pytest.mark.parametrize(("energy", "rank"), [(0.1, 1), (0.64, 1), (0.65, 2), (0.9999, 2), (1.0, 2)])
def test_rank_for_energy_is_the_least(energy: float, rank: int) -> None:
    """The squares are 64, 36 and 0 of 100: a share that is just reached needs no more."""
    assert lowrank.rank_for_energy(torch.tensor([8.0, 6.0, 0.0]), energy) == rank


def test_rank_for_energy_of_nothing_is_one() -> None:
    assert lowrank.rank_for_energy(torch.zeros(3), 0.5) == 1


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("experts", "sizes"), [((), (4, 6)), ((3,), (4, 6)), ((2,), (7, 3))], ids=str)
def test_composed_parameter_has_right_first_and_second_derivatives(
    experts: tuple[int, ...], sizes: tuple[int, int], is_transposed: bool
) -> None:
    rows, columns = sizes
    weight = torch.randn(*experts, *(sizes[::-1] if is_transposed else sizes), dtype=torch.float64)
    A, B = torch.randn(*experts, 5, columns).double(), torch.randn(*experts, rows, 5).double()
    u = torch.randn(5, dtype=torch.float64)
    product = torch.einsum("...or,r,...ri->...oi", B, u, A)

    composed = merged.composed_parameter(weight, A, B, u, is_transposed)

    assert relative_error(composed, weight + (product.mT if is_transposed else product)) < 1e-13
    assert relative_error(functional.parameter_delta(A, B, u), product) < 1e-13

    def squared(weight: Tensor, u: Tensor) -> Tensor:
        return merged.composed_parameter(weight, A, B, u, is_transposed).square()

    inputs = weight.requires_grad_(), u.requires_grad_()
    assert torch.autograd.gradcheck(squared, inputs)
    assert torch.autograd.gradgradcheck(squared, inputs)


def test_composed_parameter_is_not_rounded_by_autocast() -> None:
    weight, A, B, u = torch.randn(3, 6, 5), torch.randn(3, 2, 5), torch.randn(3, 6, 2), torch.randn(2)
    u.requires_grad_()
    exact = torch.einsum("eor,r,eri->eoi", B.double(), u.detach().double(), A.double()) + weight
    with torch.autocast("cpu", torch.bfloat16):
        composed = merged.composed_parameter(weight, A, B, u)
        (gradient,) = torch.autograd.grad(composed.sum(), u)
    assert composed.dtype == torch.float32
    assert relative_error(composed, exact) < 1e-6
    assert relative_error(gradient, torch.einsum("eor,eri->r", B.double(), A.double())) < 1e-6
