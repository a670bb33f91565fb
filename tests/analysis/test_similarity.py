"""Linear CKA against textbook formulas in numpy, and of adapters against models merged by hand."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_composition import CompositionConfig
from peft_composition.analysis.cka import MinibatchCKA, linear_cka, linear_hsic
from peft_composition.analysis.similarity import layerwise_cka
from peft_composition.analysis.views import single_adapters

from .. import tiny


# (examples, features of X, features of Y): through Gram matrices, through feature products, and where sides differ
SHAPES = [(7, 40, 30), (60, 5, 4), (20, 3, 200), (4, 2, 2)]
WRONG_SHAPES = [torch.zeros(5), torch.zeros(5, 2, 2), torch.zeros(5, 0), torch.zeros(0, 5)]


def matrices(n: int, p: int, q: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of the same examples that have something in common, and a mean that is not zero."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(n, min(p, q)))
    X = common @ random.normal(size=(min(p, q), p)) + 0.3 * random.normal(size=(n, p)) + 2
    Y = common @ random.normal(size=(min(p, q), q)) + 0.3 * random.normal(size=(n, q)) - 1
    return torch.from_numpy(X), torch.from_numpy(Y)


def gram(X: Tensor | np.ndarray) -> np.ndarray:
    wide = np.asarray(X, dtype=np.float64)
    return wide @ wide.T


def hsic_0(K: np.ndarray, L: np.ndarray) -> float:
    """tr(K H L H) / (n - 1)^2."""
    n = len(K)
    H = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(K @ H @ L @ H)) / (n - 1) ** 2


def hsic_1(K: np.ndarray, L: np.ndarray) -> float:
    """Song et al. 2012, equation 5."""
    n = len(K)
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    one = np.ones(n)
    inner = np.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return float(inner - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))


HSIC = {"biased": hsic_0, "unbiased": hsic_1}


def reference_cka(pairs: list[tuple[np.ndarray, np.ndarray]], estimator: str) -> float:
    """CKA of feature matrices; the HSIC are averaged over the pairs."""
    hsic = HSIC[estimator]
    grams = [(gram(X), gram(Y)) for X, Y in pairs]
    xy, xx, yy = (np.mean([hsic(*pick(K, L)) for K, L in grams]) for pick in (_both, _first, _second))
    return float(xy / np.sqrt(xx * yy))


def _both(K: np.ndarray, L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return K, L


def _first(K: np.ndarray, L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return K, K


def _second(K: np.ndarray, L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return L, L


# On feature matrices


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_estimators_are_the_textbooks(shape: tuple[int, int, int], estimator: Any) -> None:
    X, Y = matrices(*shape)
    assert linear_hsic(X, Y, estimator) == pytest.approx(HSIC[estimator](gram(X), gram(Y)), rel=1e-9)
    assert linear_cka(X, Y, estimator) == pytest.approx(
        reference_cka([(X.numpy(), Y.numpy())], estimator), rel=1e-9, abs=1e-12
    )


def test_the_biased_estimate_is_the_formula_of_the_paper() -> None:
    X, Y = matrices(30, 6, 4)
    X, Y = X - X.mean(0), Y - Y.mean(0)
    norm = torch.linalg.matrix_norm
    assert linear_cka(X, Y) == pytest.approx(float(norm(Y.T @ X) ** 2 / (norm(X.T @ X) * norm(Y.T @ Y))), rel=1e-12)


def test_the_unbiased_estimate_is_the_u_statistic_over_all_quadruples() -> None:
    X, Y = matrices(6, 3, 2)
    K, L = gram(X), gram(Y)
    terms = [K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q]) for i, j, q, r in itertools.permutations(range(6), 4)]
    assert linear_hsic(X, Y, "unbiased") == pytest.approx(np.mean(terms), rel=1e-10)


def test_unbiased_means_that_small_samples_are_right_on_the_average() -> None:
    random = np.random.default_rng(0)
    P, Q = random.normal(size=(3, 2)), random.normal(size=(3, 4))
    population = float(np.square(P.T @ Q).sum())  # the squared covariance of Z P and Z Q
    samples = [torch.from_numpy(random.normal(size=(5, 3))) for _ in range(1500)]
    found = {
        estimator: np.array(
            [linear_hsic(Z @ torch.from_numpy(P), Z @ torch.from_numpy(Q), estimator) for Z in samples]
        )
        for estimator in ("biased", "unbiased")
    }
    errors = {name: (own.mean() - population) / (own.std() / math.sqrt(len(own))) for name, own in found.items()}
    assert abs(errors["unbiased"]) < 3
    assert errors["biased"] > 5


def test_known_values() -> None:
    x, z = torch.tensor([1.0, -1, 1, -1]), torch.tensor([1.0, 1, -1, -1])
    assert linear_cka(x[:, None], z[:, None]) == 0
    assert linear_cka(x[:, None], torch.stack([x, z], 1)) == pytest.approx(1 / math.sqrt(2), rel=1e-14)
    a, b = matrices(50, 1, 1)
    assert linear_cka(a, b) == pytest.approx(np.corrcoef(a[:, 0], b[:, 0])[0, 1] ** 2, rel=1e-12)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("shape", [(9, 30, 30), (60, 5, 5)], ids=str)
def test_rotations_scales_and_shifts_do_not_matter_but_other_maps_do(
    shape: tuple[int, int, int], estimator: Any
) -> None:
    X, Y = matrices(*shape)
    rotation, _ = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64))
    cka = linear_cka(X, Y, estimator)
    assert linear_cka(X @ rotation, Y, estimator) == pytest.approx(cka, rel=1e-10)
    assert linear_cka(-7e-3 * X, 1e5 * Y, estimator) == pytest.approx(cka, rel=1e-10)
    assert linear_cka(X + 1e4, Y, estimator) == pytest.approx(cka, rel=1e-6)
    assert linear_cka(Y, X, estimator) == pytest.approx(cka, rel=1e-12)
    assert linear_cka(X, 2 * (X @ rotation) - 1, estimator) == pytest.approx(1, rel=1e-12)
    assert abs(linear_cka(X * torch.arange(1, shape[1] + 1), Y, estimator) - cka) > 1e-3


def test_unrelated_features_of_few_examples_look_alike_to_the_biased_estimator_alone() -> None:
    X, Y = torch.randn(2, 30, 3000, dtype=torch.float64)
    assert linear_cka(X, Y, "biased") > 0.9
    assert abs(linear_cka(X, Y, "unbiased")) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_other_dtypes_are_summed_in_float64(dtype: torch.dtype) -> None:
    X, Y = ((1000 + 10 * features).to(dtype) for features in matrices(80, 6, 5))
    wanted = reference_cka([(X.double().numpy(), Y.double().numpy())], "biased")
    assert linear_cka(X, Y) == pytest.approx(wanted, rel=1e-10)


def test_batches_are_averaged_and_not_kept() -> None:
    cka, pairs, kept = MinibatchCKA(), [], []
    for seed, shape in enumerate([(8, 20, 9), (30, 20, 9), (5, 20, 9)]):
        X, Y = matrices(*shape, seed=seed)
        pairs.append((X.numpy().copy(), Y.numpy().copy()))
        kept += [weakref.ref(X), weakref.ref(Y)]
        cka.update(X, Y)
    del X, Y
    gc.collect()
    assert cka.batches == 3
    assert cka.value() == pytest.approx(reference_cka(pairs, "unbiased"), rel=1e-10)
    assert not any(reference() is not None for reference in kept)


def test_small_batches_come_to_the_population_value() -> None:
    random = np.random.default_rng(1)
    P, Q = random.normal(size=(6, 5)), random.normal(size=(6, 8))
    squares = [np.square(a.T @ b).sum() for a, b in ((P, Q), (P, P), (Q, Q))]
    cka = MinibatchCKA()
    for _ in range(400):
        Z = random.normal(size=(16, 6))
        cka.update(torch.from_numpy(Z @ P), torch.from_numpy(Z @ Q))
    assert cka.value() == pytest.approx(squares[0] / math.sqrt(squares[1] * squares[2]), abs=0.01)


@pytest.mark.parametrize("X", WRONG_SHAPES, ids=lambda X: str(tuple(X.shape)))
def test_what_is_no_matrix_of_features_is_refused(X: Tensor) -> None:
    with pytest.raises(ValueError, match="Y must be real, of the shape"):
        linear_cka(torch.randn(5, 2), X)


def test_too_few_and_other_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="the biased estimator needs 3 examples, X has 2"):
        linear_cka(torch.randn(2, 5), torch.randn(2, 5))
    with pytest.raises(ValueError, match="the unbiased estimator needs 4 examples, X has 3"):
        MinibatchCKA().update(torch.randn(3, 5), torch.randn(3, 5))
    with pytest.raises(ValueError, match="X and Y must have rows of the same examples, got 6 and 5"):
        linear_cka(torch.randn(6, 5), torch.randn(5, 5))
    with pytest.raises(ValueError, match="there was no batch"):
        MinibatchCKA().value()
    with pytest.raises(ValueError, match="'biased' or 'unbiased', got 'best'"):
        linear_hsic(torch.randn(6, 5), torch.randn(6, 5), "best")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    X = torch.randn(6, 5)
    X[2, 3] = value
    with pytest.raises(ValueError, match=r"X has 1 values \(of 30\) that are NaN or infinite"):
        linear_cka(X, torch.randn(6, 5))


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_constant_features_are_refused_also_where_their_mean_is_rounded(estimator: Any) -> None:
    constant = torch.full((7, 3), 0.1, dtype=torch.float64) * torch.tensor([1.0, 3.0, 1e6])
    with pytest.raises(ValueError, match="Y has no variation to compare: all examples have the same features"):
        linear_cka(torch.randn(7, 4), constant, estimator)


def test_examples_that_are_all_equally_far_apart_say_nothing_to_the_unbiased_estimator() -> None:
    assert 0 < linear_cka(torch.eye(6), torch.randn(6, 4)) < 1
    for scale in torch.rand(20, dtype=torch.float64):  # rounding leaves a little above zero for some
        with pytest.raises(ValueError, match=r"X has no variation.*equally far"):
            linear_cka(scale * torch.eye(7), torch.randn(7, 4), "unbiased")


# On models

TARGETS = ["query", "value"]
Batch = dict[str, Tensor]
Pairs = list[tuple[np.ndarray, np.ndarray]]


def padded_batches(*sizes: int) -> Iterator[Batch]:
    """Sentences of 3 to 9 tokens; the labels fit no head here."""
    random = torch.Generator().manual_seed(0)
    for size in sizes:
        lengths = torch.randint(3, 10, (size, 1), generator=random)
        yield {
            "input_ids": torch.randint(1, 60, (size, 9), generator=random),
            "attention_mask": (torch.arange(9) < lengths).long(),
            "labels": torch.full((size,), 77),
        }


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three LoRAs for the tiny BERT by name; "partly" touches fewer modules."""
    base, folder = tiny.build("bert"), tmp_path_factory.mktemp("upstream")
    return {
        "near": str(tiny.save_lora(folder / "near", base, TARGETS, seed=1)),
        "partly": str(tiny.save_lora(folder / "partly", base, ["value"], seed=2, r=2, lora_alpha=6)),
        "far": str(tiny.save_lora(folder / "far", base, TARGETS, seed=3, r=3, use_rslora=True)),
    }


def lora_model(folders: Mapping[str, str]) -> PeftModel:
    (first, *others) = folders
    model = PeftModel.from_pretrained(tiny.build("bert"), folders[first], adapter_name=first)
    for name in others:
        model.load_adapter(folders[name], adapter_name=name)
    return model


def composed(folders: Mapping[str, str], **fields: Any) -> PeftModel:
    return tiny.compose("bert", list(folders.values()), **fields)


KINDS: dict[str, Callable[[Mapping[str, str]], PeftModel]] = {"lora": lora_model, "composition": composed}


def by_hand(folder: str, *sizes: int) -> dict[str, list[np.ndarray]]:
    """Per module and batch what a model with the merged adapter puts out, averaged over the tokens that are real."""
    base = tiny.build("bert").double()
    merged = tiny.composed_by_hand(base, [folder], [1.0])
    found: dict[str, list[np.ndarray]] = {}
    for name in tiny.touched_modules([folder]) + [f"bert.encoder.layer.{n}.attention.self.query" for n in (0, 1)]:
        if name in found:
            continue
        found[name] = []
        layer = merged.get_submodule(name)
        seen: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        for batch in padded_batches(*sizes):
            with torch.no_grad():
                merged(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            x = seen.pop()
            y = x @ layer.weight.T + layer.bias
            own = [row[mask.bool()].detach().numpy() for row, mask in zip(y, batch["attention_mask"])]
            found[name].append(np.stack([row.mean(0) for row in own]))
        hook.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_compared_as_models_merged_by_hand(upstream: dict[str, str], kind: str) -> None:
    sizes = 8, 6
    views = single_adapters(KINDS[kind](upstream))
    found = layerwise_cka(lora_model({"truth": upstream["near"]}), views, padded_batches(*sizes))
    assert list(found) == [f"bert.encoder.layer.{n}.attention.self.{m}" for n in (0, 1) for m in ("query", "value")]
    hand = {name: by_hand(folder, *sizes) for name, folder in upstream.items()}
    for module, row in found.items():
        assert list(row) == ["near", "partly", "far"]
        for name, value in row.items():
            wanted = reference_cka(list(zip(hand["near"][module], hand[name][module])), "unbiased")
            assert value == pytest.approx(wanted, abs=2e-5), (module, name)
        assert row["near"] == pytest.approx(1, abs=1e-6)
        assert max(value for name, value in row.items() if name != "near") < 0.99


def state(model: nn.Module) -> list[Any]:
    return [
        [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()],
        [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()],
        [getattr(module, "_active_adapter", None) for module in model.modules()],
        model.base_model.active_adapter,  # type: ignore[union-attr]
        model.active_adapter,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_as_before_also_after_an_error(upstream: dict[str, str], kind: str) -> None:
    model = KINDS[kind](upstream)
    model.train()
    model.get_base_model().bert.encoder.layer[0].eval()  # frozen by the user
    if kind == "lora":
        model.set_adapter("partly")  # trains it
        next(parameter for parameter in model.parameters() if parameter.requires_grad).requires_grad = False
    else:
        for name, parameter in model.named_parameters():
            if ".composition_mixing." in name:
                parameter.data.copy_(torch.tensor([0.01, 0.02, -0.03]))
        model.mixing_weights()
    before, tensors = state(model), copy.deepcopy(model.state_dict())
    views = single_adapters(model)
    layerwise_cka(views.pop("near"), views, padded_batches(5))
    assert state(model) == before
    with torch.no_grad():
        model.get_parameter(broken_parameter(model, kind)).fill_(math.nan)
    broken = "'far'" if kind == "lora" else "the target"  # 0 times NaN: in a composition it is in all
    with pytest.raises(ValueError, match=f"module 'bert.encoder.layer.0.attention.self.query' of {broken} has 80 val"):
        layerwise_cka(views["partly"], {"far": views["far"]}, padded_batches(5))
    assert state(model) == before
    tensors[broken_parameter(model, kind)].fill_(math.nan)
    torch.testing.assert_close(model.state_dict(), tensors, rtol=0, atol=0, equal_nan=True)


def broken_parameter(model: nn.Module, kind: str) -> str:
    end = "query.lora_B.far.weight" if kind == "lora" else "query.composition_factors.default.B"
    return next(name for name, _ in model.named_parameters() if name.endswith(end))


def test_a_composition_is_compared_with_its_own_parts(upstream: dict[str, str]) -> None:
    model = composed(upstream, mixing="fixed", weights=[0.0, 0.0, 1.0])
    found = layerwise_cka(model, single_adapters(model), padded_batches(8))
    assert [row["far"] for row in found.values()] == pytest.approx([1] * 4, abs=1e-6)
    assert all(row["near"] < 0.99 for row in found.values())


def test_another_composition_of_the_same_model_is_the_target(upstream: dict[str, str]) -> None:
    model = composed(upstream, task_type=None, modules_to_save=None)
    model.add_adapter("truth", CompositionConfig(adapters=[upstream["far"]], mixing="uniform"))
    (truth,) = single_adapters(model, "truth").values()
    found = layerwise_cka(truth, single_adapters(model), padded_batches(8))
    alone = layerwise_cka(lora_model({"far": upstream["far"]}), single_adapters(model), padded_batches(8))
    for module, row in found.items():
        assert row == pytest.approx(alone[module], abs=1e-5)
    assert model.active_adapter == "default"
    with pytest.raises(ValueError, match=r"no composition 'lie'; there are \['default', 'truth'\]"):
        single_adapters(model, "lie")
    model.base_model.set_adapter(["default", "truth"])
    with pytest.raises(ValueError, match="pass composition="):
        single_adapters(model)


def test_plain_models_are_compared_in_modules_that_are_named() -> None:
    models = {str(seed): tiny.build("bert", seed) for seed in (0, 1)}
    modules = ["bert.encoder.layer.1", "bert.pooler"]
    found = layerwise_cka(models["0"], models, padded_batches(8), modules=modules)
    seen: dict[str, list[np.ndarray]] = {}
    (batch,) = padded_batches(8)
    for name, model in models.items():
        with torch.no_grad():
            hidden = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        rows = [row[mask.bool()].mean(0) for row, mask in zip(hidden.last_hidden_state, batch["attention_mask"])]
        seen[name] = [torch.stack(rows).double().numpy(), hidden.pooler_output.double().numpy()]
    for number, module in enumerate(modules):
        wanted = reference_cka([(seen["0"][number], seen["1"][number])], "unbiased")
        assert found[module] == pytest.approx({"0": 1, "1": wanted}, abs=1e-5)


def test_what_stands_in_padded_places_does_not_matter(upstream: dict[str, str]) -> None:
    views = single_adapters(lora_model(upstream))
    (batch,) = padded_batches(8)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 3)}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    found = [layerwise_cka(views["near"], views, [given]) for given in (batch, other)]
    for module, row in found[0].items():
        assert row == pytest.approx(found[1][module], abs=1e-5)


def test_positions_of_convolutions_are_pooled(tmp_path: Path) -> None:
    folders = [str(tiny.save_lora(tmp_path / str(seed), tiny.build("conv"), ["conv2"], seed=seed)) for seed in (1, 2)]
    views, x = single_adapters(tiny.compose("conv", folders)), torch.randn(10, 4, 12)
    found = layerwise_cka(views["1"], {"two": views["2"]}, [{"x": x}])
    sides = []
    for folder in folders:
        seen: list[Tensor] = []
        merged = tiny.composed_by_hand(tiny.build("conv").double(), [folder], [1.0])
        merged.conv2.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output))
        merged(x.double())
        sides.append(seen[0].mean((2, 3)).detach().numpy())
    assert found == {"conv2": {"two": pytest.approx(reference_cka([(sides[0], sides[1])], "unbiased"), abs=1e-5)}}


def test_small_batches_are_left_out_with_a_warning(upstream: dict[str, str]) -> None:
    views = single_adapters(composed(upstream))
    with pytest.warns(UserWarning, match="2 with fewer than 4 examples"):
        found = layerwise_cka(views["near"], views, padded_batches(8, 3, 3))
    assert found == layerwise_cka(views["near"], views, padded_batches(8))
    with pytest.raises(ValueError, match=r"no batch to compare \(1 with fewer than 4 examples\)"):
        layerwise_cka(views["near"], views, padded_batches(3))
    with pytest.raises(ValueError, match="no batch to compare"):
        layerwise_cka(views["near"], views, [])


def test_adapters_that_cannot_be_told_apart_are_refused(upstream: dict[str, str]) -> None:
    model = lora_model(upstream)
    views = single_adapters(model)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"'near' cannot be compared alone.*disabled in"):
        layerwise_cka(tiny.build("bert"), views, padded_batches(5))
    model.merge_adapter(["far"])
    with pytest.raises(ValueError, match="the target cannot be compared alone: adapters are merged into module"):
        layerwise_cka(views["near"], views, padded_batches(5))


def test_modules_that_have_no_representation_are_refused(upstream: dict[str, str]) -> None:
    model = lora_model(upstream)
    views = single_adapters(model)
    model.get_base_model().unused = nn.Linear(2, 2)
    query = "bert.encoder.layer.0.attention.self.query"

    def refused(message: str, target: nn.Module = model, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            layerwise_cka(target, options.pop("others", views), options.pop("batches", padded_batches(5)), **options)

    refused(
        r"the target \(BertForSequenceClassification\) has no module 'unused'", tiny.build("bert"), modules=["unused"]
    )
    refused("module 'unused' of the target did not run", modules=["unused"])
    refused("there are no modules to compare", others={"plain": tiny.build("bert")})
    refused("nothing to compare", others={})
    refused("a batch must be a mapping.*got list", batches=[[1, 2]])
    refused(
        "module 'bert.embeddings.position_embeddings' of the target: it is unclear which tokens of its output",
        modules=[POSITIONS],
    )
    shared = lora_model(upstream)
    shared.get_base_model().bert.encoder.layer[1] = shared.get_base_model().bert.encoder.layer[0]
    refused(f"module '{query}' of the target ran more than once", shared, modules=[query])
    with pytest.raises(
        ValueError, match="must be a PEFT model whose layers have adapters, got BertForSequenceClassification"
    ):
        single_adapters(tiny.build("bert"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no composition 'default': LoraModel holds plain adapters"):
        single_adapters(model, "default")


POSITIONS = "bert.embeddings.position_embeddings"


def test_whose_padding_it_is_must_be_clear(tmp_path: Path) -> None:
    folders = [str(tiny.save_lora(tmp_path / str(seed), tiny.build("t5"), ["q", "v"], seed=seed)) for seed in (1, 2)]
    views = single_adapters(tiny.compose("t5", folders))
    tokens = torch.randint(1, 60, (6, 9))
    batch = {"input_ids": tokens, "attention_mask": (torch.arange(9) < 5).expand(6, 9)}
    for answers in ({"decoder_input_ids": tokens}, {"labels": tokens}):
        with pytest.raises(
            ValueError, match=r"module 'encoder\S+' of the target: .* masks of shape \(6, 9\) and \(6, 9\)"
        ):
            layerwise_cka(views["1"], views, [{**batch, **answers}])
        found = layerwise_cka(
            views["1"], views, [{**batch, **{key: own[:, :4].contiguous() for key, own in answers.items()}}]
        )
        assert [row["1"] for row in found.values()] == pytest.approx([1] * len(found), abs=1e-5)
