"""What adapters' own heads tell: the formula by a loop, where heads are found, and what weights follow."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from peft_composition import CompositionConfig, compare_methods, fit_mixing_weights, mixing_weights
from peft_composition.evidence import passes
from peft_composition.evidence.own_heads import information, own_head
from peft_composition.evidence.weights import (
    ALIKE,
    ERRORS,
    LEAST_NATS,
    STEEPNESS,
    Information,
    errors_of_ahead,
    informed,
)
from peft_composition.references import AdapterReference

from .. import tiny


WIDTH = 16
POINTS = torch.randn(12, 10, generator=torch.Generator().manual_seed(2))
CLASSES = torch.tensor([0, 1, 2] * 4)
ONE_EACH = [{"x": POINTS[:3], "labels": CLASSES[:3]}]
FOUR_EACH = [{"x": POINTS, "labels": CLASSES}]


def reference(folder: Path) -> AdapterReference:
    return AdapterReference(name=folder.name, path=str(folder))


def with_head(folder: Path, entries: dict[str, Tensor]) -> Path:
    """The adapter with these tensors beside its factors, in place of its head."""
    weights = load_file(folder / "adapter_model.safetensors")
    factors = {key: value for key, value in weights.items() if ".lora_" in key}
    save_file({**factors, **entries}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two adapters of the tiny MLP: the head of the first sends points anywhere, that of the second hardly differs."""
    made = []
    for seed, scale in enumerate((3.0, 0.01)):
        folder = tmp_path / ("first", "second")[seed]
        tiny.save_lora(folder, tiny.build("mlp"), ["lin0", "lin1"], seed=seed)
        head = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed((7, 1)[seed])) * scale
        made.append(
            with_head(folder, {"base_model.model.head.weight": head, "base_model.model.head.bias": torch.zeros(4)})
        )
    return made


def features_alone(folder: Path, points: Tensor) -> Tensor:
    """What the head would get with one adapter, composed by hand."""
    model = tiny.composed_by_hand(tiny.build("mlp"), [str(folder)], [1.0])
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(points)
    return seen[0]


def by_loop(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The mutual information of class and output, each class as likely, by a sum over the joint table."""
    classes = sorted(set(labels.tolist()))
    table = []
    for label in classes:
        rows = []
        for place in range(len(labels)):
            if int(labels[place]) == label:
                logits = [
                    sum(float(a) * float(b) for a, b in zip(features[place].double(), row.double()))
                    + (0.0 if bias is None else float(bias[number]))
                    for number, row in enumerate(weight)
                ]
                most = max(logits)
                powers = [math.exp(value - most) for value in logits]
                rows.append([power / sum(powers) for power in powers])
        table.append([sum(column) / len(rows) / len(classes) for column in zip(*rows)])
    marginal = [sum(column) for column in zip(*table)]
    return sum(
        joint * math.log(joint * len(classes) / marginal[number])
        for row in table
        for number, joint in enumerate(row)
        if joint > 0
    )


def told_by_loop(folder: Path, points: Tensor, labels: Tensor) -> Information:
    """What the head of an adapter tells of some points, and without each of their classes."""
    weights = load_file(folder / "adapter_model.safetensors")
    weight, bias = (weights[f"base_model.model.head.{leaf}"] for leaf in ("weight", "bias"))
    features = features_alone(folder, points)
    parts = [labels == labels, *(labels != label for label in sorted({*labels.tolist()}))]
    nats, *without = [by_loop(features[rows], labels[rows], weight, bias) for rows in parts]
    return Information(nats, tuple(without))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("labels", [torch.arange(5), torch.tensor([0, 0, 3, 3, 3]), torch.tensor([7, 2, 2, 7, 5])])
def test_information_is_that_of_the_joint_table(labels, has_bias) -> None:
    generator = torch.Generator().manual_seed(5)
    features, weight = torch.randn(5, 6, generator=generator), torch.randn(3, 6, generator=generator)
    bias = torch.randn(3, generator=generator) if has_bias else None
    found = information(features, labels, {"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    assert found is not None
    assert found.nats == pytest.approx(by_loop(features, labels, weight, bias), abs=1e-10)
    without = [
        by_loop(features[labels != label], labels[labels != label], weight, bias)
        for label in sorted({*labels.tolist()})
    ]
    assert list(found.without) == pytest.approx(without, abs=1e-10)


def test_information_lies_between_nothing_and_the_logarithm_of_the_classes() -> None:
    labels = torch.arange(3)
    certain = {"weight": 100 * torch.eye(3)}
    assert nats(information(torch.eye(3), labels, certain)) == pytest.approx(math.log(3), abs=1e-12)
    assert nats(information(torch.ones(3, 3), labels, certain)) == pytest.approx(0, abs=1e-12)
    constant = {"weight": torch.zeros(2, 3), "bias": torch.tensor([0.0, 5.0])}
    assert nats(information(torch.eye(3), labels, constant)) == 0
    assert information(torch.eye(3), torch.zeros(3), certain) == Information(0.0, (0.0,)), "one class"
    for misfit in (torch.zeros(2, 4), torch.ones(1, 3), torch.ones(1, 2, 3)):
        assert information(torch.eye(3), labels, {"weight": misfit}) is None, "another width, a regression, no matrix"


def nats(told: Information | None) -> float:
    assert told is not None
    return told.nats


def alike(*told: float | None) -> list[Information | None]:
    """Heads that tell the same of all classes but one, whichever that is."""
    return [None if own is None else Information(own, (own,) * 4) for own in told]


def apart(told: Sequence[float | None], least: float = LEAST_NATS) -> list[float]:
    """From the mean of the logarithms."""
    logs = [math.log(max(own, least)) for own in told if own is not None]
    return [0.0 if own is None else math.log(max(own, least)) - sum(logs) / len(logs) for own in told]


def errors(told: Sequence[Information | None], least: float = LEAST_NATS) -> list[float]:
    """Of `apart`, by a jackknife."""
    (count,) = {len(own.without) for own in told if own is not None}
    left = [apart([None if own is None else own.without[place] for own in told], least) for place in range(count)]
    found = []
    for of_head in zip(*left):
        mean = sum(of_head) / count
        found.append(math.sqrt((count - 1) / count * sum((own - mean) ** 2 for own in of_head)))
    return found


def factors(told: Sequence[Information | None], per_class: int, classes: int = 4) -> list[float]:
    """By which weights are multiplied, one by one."""
    found = []
    least = 0.03 * math.log(classes) if per_class == 1 else LEAST_NATS
    for own, error in zip(apart([own and own.nats for own in told], least), errors(told, least)):
        beyond = max(abs(own) - max(ALIKE, ERRORS * error), 0.0)
        found.append(math.exp(math.copysign(beyond, own) * STEEPNESS / math.sqrt(per_class)))
    return found


def test_weights_are_multiplied_and_their_sum_stays() -> None:
    weights, told = [0.5, 0.2, 0.1, 0.1], alike(0.4, 0.05, None, 0.1)
    for labels, per_class in ((torch.arange(4), 1), (torch.arange(4).repeat(4), 4)):
        products = [weight * factor for weight, factor in zip(weights, factors(told, per_class))]
        expected = [0.9 * own / sum(products) for own in products]
        assert informed(torch.tensor(weights), told, labels).tolist() == pytest.approx(expected, abs=1e-7)
    assert factors(told, 1)[2] == 1.0
    assert factors(told, 1)[0] > 5 > 1 > factors(told, 1)[1]


def test_heads_that_tell_about_as_much_count_alike() -> None:
    weights = torch.tensor([0.5, 0.2, 0.1])
    near = informed(weights, alike(0.3, 0.2, 0.15), torch.arange(4))  # within a factor of 1.65 of their geometric mean
    assert near.tolist() == pytest.approx(weights.tolist(), abs=1e-7)
    assert informed(weights, alike(0.3, 0.2, 0.05), torch.arange(4))[2] < 0.1


def test_what_a_head_tells_of_one_class_alone_counts_for_little() -> None:
    """The first tells four times as much as the second, but not without the last class."""
    told: list[Information | None] = [
        Information(0.4, (0.42, 0.38, 0.4, 0.09)),
        Information(0.1, (0.1, 0.11, 0.1, 0.1)),
        None,
    ]
    assert errors_of_ahead(told) == pytest.approx(errors(told), abs=1e-12)
    assert errors(told)[0] > 0.4
    weights = torch.tensor([0.5, 0.2, 0.1])
    assert informed(weights, told, torch.arange(4)).tolist() == pytest.approx(weights.tolist(), abs=1e-7)
    assert informed(weights, alike(0.4, 0.1, None), torch.arange(4))[0] > 0.6, "of all classes alike"
    steady: list[Information | None] = [Information(0.4, (0.4, 0.4, 0.4, 0.3)), *alike(0.02, None)]
    shares = [own * factor for own, factor in zip(weights.tolist(), factors(steady, 1))]
    expected = [own / sum(shares) * 0.8 for own in shares]
    assert informed(weights, steady, torch.arange(4)).tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("classes", [2, 5])
def test_heads_that_tell_next_to_nothing_count_alike_where_they_decide_alone(classes: int) -> None:
    """Below 3% of the logarithm of the number of classes; with two examples of each class the vote is there, too."""
    least, even = 0.03 * math.log(classes), torch.tensor([0.5, 0.5])
    told: list[Information | None] = [Information(own, (own,) * classes) for own in (0.95 * least, 0.1 * least)]
    assert informed(even, told, torch.arange(classes)).tolist() == pytest.approx([0.5, 0.5], abs=1e-12)
    assert informed(even, told, torch.arange(classes).repeat(2))[0] > 0.8
    more: list[Information | None] = [Information(own, (own,) * classes) for own in (5 * least, 0.1 * least)]
    beyond = math.log(5) / 2 - ALIKE  # the mean of the logarithms is halfway to what counts as `least`
    expected = 1 / (1 + math.exp(-2 * STEEPNESS * beyond))
    assert float(informed(even, more, torch.arange(classes))[0]) == pytest.approx(expected, abs=1e-9)


def test_two_classes_have_no_error_to_go_by() -> None:
    told: list[Information | None] = [Information(0.4, (0.1, 0.3)), Information(0.01, (0.2, 0.002))]
    assert errors_of_ahead(told) == [0.0, 0.0]
    assert informed(torch.tensor([0.5, 0.5]), told, torch.arange(2))[0] > 0.9


def test_nothing_to_compare_changes_nothing() -> None:
    weights = torch.tensor([0.5, 0.2, 0.1])
    assert informed(weights, alike(0.4, None, None), torch.arange(4)).tolist() == weights.double().tolist(), (
        "no comparison"
    )
    nothing = informed(weights, alike(0.0, LEAST_NATS / 3, LEAST_NATS), torch.arange(4))
    assert nothing.tolist() == pytest.approx(weights.tolist(), abs=1e-7), "noise of heads that tell nothing"


def test_with_one_example_of_each_class_the_heads_decide(folders) -> None:
    model = tiny.compose("mlp", list(map(str, folders)), mixing="fixed", weights=[0.5, 0.5])
    report = fit_mixing_weights(model, ONE_EACH)
    assert (report.method, report.scores) == ("own-heads", None)
    told = [told_by_loop(folder, POINTS[:3], CLASSES[:3]) for folder in folders]
    assert list((report.informations or {}).values()) == pytest.approx([own.nats for own in told], abs=1e-5)
    shares = factors(told, 1, classes=3)
    expected = [max(own / sum(shares), 1e-4) for own in shares]
    assert list(report.weights.values()) == pytest.approx([own / sum(expected) for own in expected], abs=1e-4)
    assert report.weights["first"] > 0.9
    assert "first   0.9" in str(report)
    assert "nats of the classes" in str(report)
    for row in mixing_weights(model).values():
        assert row == pytest.approx(report.weights, abs=1e-6)


def test_a_head_that_tells_of_one_class_alone_does_not_decide(folders, monkeypatch) -> None:
    """It sets one of three classes apart, and says the same of the two others."""
    seen = features_alone(folders[0], POINTS[:3])
    apart = seen[2] - seen[:2].mean(0)
    apart -= (apart @ (seen[0] - seen[1])) / (seen[0] - seen[1]).square().sum() * (seen[0] - seen[1])
    head = torch.zeros(4, WIDTH)
    head[0] = 40 * apart / (apart @ (seen[2] - seen[0]))
    bias = torch.zeros(4)
    bias[0] = -(seen[[0, 2]] @ head[0]).mean()
    with_head(folders[0], {"base_model.model.head.weight": head, "base_model.model.head.bias": bias})
    model = tiny.compose("mlp", list(map(str, folders)), mixing="fixed", weights=[0.5, 0.5])
    report = fit_mixing_weights(model, ONE_EACH)
    first, second = (report.informations or {}).values()
    assert first > 0.5 > 10 * second
    assert report.weights == pytest.approx({"first": 0.5, "second": 0.5}, abs=1e-9)
    monkeypatch.setattr("peft_composition.evidence.weights.ERRORS", 0.0)
    assert fit_mixing_weights(model, ONE_EACH).weights["first"] > 0.9, "by its nats alone it would"


def test_with_more_the_vote_is_multiplied(folders) -> None:
    model = tiny.compose("mlp", list(map(str, folders)), mixing="fixed", weights=[0.5, 0.5])
    vote = fit_mixing_weights(model, FOUR_EACH, "likelihood-vote")
    assert vote.informations is None
    report = fit_mixing_weights(model, FOUR_EACH)
    assert (report.method, report.scores is not None) == ("heads-and-vote", True)
    assert fit_mixing_weights(model, FOUR_EACH, "heads-and-vote").weights == report.weights
    told = [told_by_loop(folder, POINTS, CLASSES) for folder in folders]
    expected = informed(torch.tensor([*vote.weights.values()], dtype=torch.float64), told, CLASSES)
    assert list(report.weights.values()) == pytest.approx(expected.tolist(), abs=1e-4)
    assert report.weights["first"] > vote.weights["first"]
    assert sum(report.weights.values()) == pytest.approx(sum(vote.weights.values()), abs=1e-9), (
        "the base keeps its share"
    )


def test_a_checkpoint_asks_the_files_that_it_was_made_of_and_does_without_them(folders, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # a checkpoint names local folders without what lies above them
    model = tiny.compose("mlp", list(map(str, folders)), mixing="fixed", weights=[0.5, 0.5])
    at_once = fit_mixing_weights(model, ONE_EACH)
    model.save_pretrained(str(tmp_path / "saved"))

    def loaded() -> Any:
        return fit_mixing_weights(PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path / "saved")), ONE_EACH)

    assert loaded().weights == pytest.approx(at_once.weights, abs=1e-6)
    changed = load_file(folders[0] / "adapter_model.safetensors")
    save_file({key: 2 * value for key, value in changed.items()}, folders[0] / "adapter_model.safetensors")
    assert loaded().method == "uniform", "another adapter lies there now, and one head alone cannot be compared"
    shutil.rmtree(folders[0])
    report = loaded()
    assert (report.method, report.weights) == ("uniform", {"first": 0.5, "second": 0.5})
    assert "no two adapters have files here" in report.reason


HEAD = torch.randn(4, WIDTH)


def entries(**tensors: Tensor) -> dict[str, Tensor]:
    return {f"base_model.model.{key.replace('__', '.')}": value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("name", "saved", "names"),
    [
        ("head", entries(head__weight=HEAD), {"weight"}),
        ("classifier", entries(classifier__weight=HEAD, classifier__bias=HEAD[:, 0].clone()), {"weight", "bias"}),
        ("score", entries(score__modules_to_save__default__weight=HEAD), {"weight"}),
        ("classifier", entries(classifier__modules_to_save__weight=HEAD.half()), {"weight"}),
        ("classifier", entries(classifier__weight=HEAD.to(torch.float8_e4m3fn)), {"weight"}),
        ("classifier", entries(classifier__weight=HEAD, classifier__scale=HEAD[0].clone()), {"weight", "scale"}),
        (
            "classifier",
            entries(classifier__dense__weight=HEAD, classifier__out_proj__weight=HEAD + 1),
            {"dense.weight", "out_proj.weight"},
        ),
        ("head", {}, None),
        ("head", entries(head__weight=HEAD.int()), None),
        ("head", entries(head__weight=HEAD * math.nan), None),
        ("head", entries(fc__weight=HEAD), None),  # a module of the body
        ("head", entries(head__weight=HEAD, pooler__weight=HEAD + 1), None),  # features that its head knows need it
        ("head", entries(a__head__weight=HEAD, b__head__weight=HEAD + 1), None),  # which one?
    ],
)
def test_which_heads_are_found(name, saved, names, folders) -> None:
    found = own_head(name, reference(with_head(folders[0], saved)))
    assert (None if found is None else {*found}) == names
    assert all(own.dtype == torch.float64 for own in (found or {}).values())


class Cosine(nn.Module):
    """A head with a parameter more than a linear one has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, WIDTH))
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.normalize(x, dim=1) @ nn.functional.normalize(self.weight, dim=1).T


@pytest.mark.parametrize(
    "module",
    [
        Cosine(),
        nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)),
        nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)),
    ],
    ids=["cosine", "two layers", "normed"],
)
def test_other_heads_than_linear_ones_are_run_as_they_are(module) -> None:
    features, labels = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)), torch.arange(5)
    tensors = {key: own.detach().double().clone() for key, own in module.named_parameters()}
    with torch.no_grad():
        probabilities = copy.deepcopy(module).eval().double()(features.double()).softmax(1)
    mean = probabilities.mean(0)
    expected = float((probabilities * probabilities.log()).sum(1).mean() - (mean * mean.log()).sum())
    module.train()  # dropout, and a hook as accelerate and FSDP have them
    handle = module.register_forward_hook(lambda *given: given[2] * math.nan)
    assert nats(information(features, labels, tensors, module)) == pytest.approx(expected, abs=1e-10)
    handle.remove()
    assert information(features, labels, {"weight": torch.eye(WIDTH)}, module) is None, "another kind of head"


def test_a_head_of_several_layers_is_run_as_the_model_does(tmp_path) -> None:
    config = RobertaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=4
    )
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(3, 60, (3, 7)), "labels": torch.arange(3)}
    told = []
    for number in range(2):
        torch.manual_seed(number + 1)
        lora = get_peft_model(
            copy.deepcopy(base), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
        ).eval()
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    parameter.normal_(std=0.4)
            probabilities = lora(batch["input_ids"]).logits.double().softmax(1)
        lora.save_pretrained(str(tmp_path / f"lora-{number}"))
        one, mean = probabilities, probabilities.mean(0)
        told.append(float((one * one.log()).sum(1).mean() - (mean * mean.log()).sum()))
    model = get_peft_model(
        base,
        CompositionConfig(
            adapters=[str(tmp_path / f"lora-{number}") for number in range(2)], mixing="fixed", task_type="SEQ_CLS"
        ),
    )
    report = fit_mixing_weights(model, [batch])
    assert report.method == "own-heads"
    assert list((report.informations or {}).values()) == pytest.approx(told, abs=1e-5)


def test_a_pickled_adapter_has_a_head_and_a_missing_one_none(folders) -> None:
    weights = load_file(folders[0] / "adapter_model.safetensors")
    torch.save(weights, folders[0] / "adapter_model.bin")
    (folders[0] / "adapter_model.safetensors").unlink()
    found = own_head("head", reference(folders[0]))
    assert found is not None
    assert torch.equal(found["weight"], weights["base_model.model.head.weight"])
    assert own_head("head", AdapterReference(name="gone", path="somebody/gone")) is None


def test_an_adapter_without_a_head_counts_as_the_mean_of_the_others(folders, tmp_path) -> None:
    third = tmp_path / "third"
    shutil.copytree(folders[1], third)
    with_head(third, {})
    model = tiny.compose("mlp", [*map(str, folders), str(third)], mixing="fixed", weights=[0.3, 0.3, 0.4])
    report = fit_mixing_weights(model, ONE_EACH)
    assert (report.informations or {})["third"] is None
    told = [told_by_loop(folder, POINTS[:3], CLASSES[:3]) for folder in folders]
    first, second, third_one = factors([*told, None], 1, classes=3)
    assert first > third_one == 1.0 > second
    shares = [max(own / (first + second + third_one), 1e-4) for own in (first, second, third_one)]
    assert list(report.weights.values()) == pytest.approx([own / sum(shares) for own in shares], abs=1e-4)
    assert "its own head is not known" in str(report)


def test_compare_asks_them_with_one_example_of_each_class(folders) -> None:
    rows = [{"x": point, "labels": label} for point, label in zip(POINTS, CLASSES)]
    base = tiny.build("mlp")
    nn.init.zeros_(base.head.weight)

    def scored(weights: list[Path]) -> dict[str, float]:
        adapters = list(map(str, weights))
        found = compare_methods(
            base, adapters, rows[:3], test=rows[3:], methods=("base", "evidence", "uniform"), steps=20
        )
        return {row.name: row.loss for row in found}

    asked = scored(folders)
    for folder in folders:
        with_head(folder, {})
    unasked = scored(folders)
    assert unasked["evidence"] == unasked["uniform"] == asked["uniform"]
    assert asked["evidence"] != asked["uniform"]


def test_the_best_single_adapter_is_not_the_one_that_happens_to_have_a_head(folders, tmp_path) -> None:
    rows = [{"x": point, "labels": label} for point, label in zip(POINTS, CLASSES)]

    def best(adapters: list[Path]) -> float:
        asked = {"methods": ("base", "best single", "evidence"), "steps": 20}
        found = compare_methods(tiny.build("mlp"), list(map(str, adapters)), rows[:3], test=rows[3:], **asked)
        return {row.name: row.loss for row in found}["best single"]

    both = best(folders)
    with_head(folders[0], {})
    assert best(folders) == both, "one head alone cannot be compared: the first one"


@pytest.mark.parametrize("name", ["gpt2"])
def test_answers_ask_no_head(name, pair, monkeypatch) -> None:
    def fail(*given: Any) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(passes, "own_head", fail)
    tokens = torch.randint(1, 60, (4, 6), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    asked = {"methods": ("base", "evidence"), "steps": 2}
    compare_methods(tiny.build(name), pair(name), rows[:2], test=rows[2:], **asked)


def test_the_config_of_the_composition_is_as_it_was(folders) -> None:
    model = tiny.compose("mlp", list(map(str, folders)), mixing="fixed", weights=[0.5, 0.5])
    config = model.peft_config["default"]
    assert isinstance(config, CompositionConfig)
    before = [dict(own) for own in config.references]
    fit_mixing_weights(model, ONE_EACH)
    assert [dict(own) for own in config.references] == before
