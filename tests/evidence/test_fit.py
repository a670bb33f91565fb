"""From examples to mixing weights on tiny models: by hand, in place, saved and loaded, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_composition import CompositionConfig, fit_mixing_weights, mixing_weights, score_adapters
from peft_composition.choosing import read_data

from .. import tiny


TOKENS = torch.randint(1, 60, (12, 9), generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 1] * 6)
POINTS = torch.randn(12, 10, generator=torch.Generator().manual_seed(2))


def points() -> list[dict[str, Tensor]]:
    """Two batches for the MLP."""
    return [{"x": POINTS[:8], "labels": CLASSES[:8]}, {"x": POINTS[8:], "labels": CLASSES[8:]}]


def questions(name: str) -> list[dict[str, Tensor]]:
    """Two batches for a language model, with answers of one to three tokens."""
    if name == "t5":
        labels = torch.full((6, 3), -100)
        for row in range(6):
            labels[row, : 1 + row % 3] = TOKENS[6 + row, : 1 + row % 3]
        whole = {"input_ids": TOKENS[:6], "labels": labels}
    else:
        labels = TOKENS[:6].clone()
        for row in range(6):
            labels[row, : 6 + row % 3] = -100
        whole = {"input_ids": TOKENS[:6], "labels": labels}
    return [{key: value[:4] for key, value in whole.items()}, {key: value[4:] for key, value in whole.items()}]


def alone(name: str, folders: list[str], number: int) -> nn.Module:
    """The tiny model with one adapter, composed by hand from its file."""
    return tiny.composed_by_hand(tiny.build(name), folders, [float(other == number) for other in range(len(folders))])


def weights_in(model: Any) -> dict[str, float]:
    """The one weight of each adapter, the same in all modules."""
    found: dict[str, float] = {}
    for row in mixing_weights(model).values():
        for name, weight in row.items():
            assert found.setdefault(name, weight) == pytest.approx(weight, abs=1e-7)
    return found


def margins_by_loop(features: Tensor, labels: Tensor) -> list[float]:
    found = []
    for i in range(len(labels)):
        others = torch.arange(len(labels)) != i
        to_mean = [
            float((features[i] - features[others & (labels == label)].mean(0)).square().sum())
            for label in labels.unique()
        ]
        own = to_mean.pop(labels.unique().tolist().index(int(labels[i])))
        found.append((min(to_mean) - own) / (min(to_mean) + own))
    return found


# Scores


def test_scores_of_a_classifier_are_those_of_its_features(pair) -> None:
    model = tiny.compose("mlp", pair("mlp"))
    scores = score_adapters(model, points())
    assert [(row.name, row.kind) for row in scores] == [
        ("first", "adapter"),
        ("second", "adapter"),
        ("uniform", "uniform"),
        ("base", "base"),
    ]
    assert (scores.measure, scores.examples, scores.unused) == ("margin", 12, 0)
    for row, mix in zip(scores, ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.0])):
        by_hand = tiny.composed_by_hand(tiny.build("mlp"), pair("mlp"), mix).double()
        features = by_hand.lin1(by_hand.relu(by_hand.lin0(POINTS.double())))
        margins = margins_by_loop(features.detach(), CLASSES)
        assert row.score == pytest.approx(sum(margins) / 12, abs=1e-6)
        assert row.accuracy == pytest.approx(sum(margin > 0 for margin in margins) / 12)
        assert row.low < row.score < row.high
    text = str(scores)
    assert "2 adapters on 12 examples" in text
    assert "(uniform)" in text
    assert f"{scores['second'].score:+.3f}" in text
    assert scores.best is max(scores[:2], key=lambda row: row.score)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_scores_of_a_language_model_are_those_of_its_answers(name, pair) -> None:
    model = tiny.compose(name, pair(name))
    scores = score_adapters(model, questions(name))
    assert (scores.measure, scores.examples) == ("log-likelihood", 6)
    for row, mix in zip(scores, ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.0])):
        by_hand = tiny.composed_by_hand(tiny.build(name), pair(name), mix).eval()
        # transformers' own loss of one example at a time is the mean over the tokens of its answer
        losses = [
            by_hand(input_ids=batch["input_ids"][i : i + 1], labels=batch["labels"][i : i + 1]).loss.item()
            for batch in questions(name)
            for i in range(len(batch["labels"]))
        ]
        assert row.score == pytest.approx(-sum(losses) / 6, abs=1e-5)


def test_the_model_is_as_before(pair) -> None:
    model = tiny.compose("mlp", pair("mlp")).train()
    model.base_model.model.lin1.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    score_adapters(model, points())
    assert [module.training for module in model.modules()] == modes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Forms of data


def test_every_form_of_data_gives_the_same(pair) -> None:
    model = tiny.compose("mlp", pair("mlp"))
    rows = [{"x": point, "labels": int(label)} for point, label in zip(POINTS, CLASSES)]
    expected = [row.score for row in score_adapters(model, points())]
    tensors = [{"x": point, "label": label} for point, label in zip(POINTS, CLASSES)]
    forms = [
        iter(points()),
        rows,
        tensors,
        DataLoader(rows, batch_size=5),
        DataLoader(rows, batch_size=5, shuffle=True),
    ]
    for data in forms:
        assert [row.score for row in score_adapters(model, data)] == pytest.approx(expected, abs=1e-6)
    collated = score_adapters(model, [(*row.values(),) for row in rows], collate=as_batch, batch_size=7)
    assert [row.score for row in collated] == pytest.approx(expected, abs=1e-6)


def as_batch(rows: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    return {"x": torch.stack([row[0] for row in rows]), "labels": torch.tensor([row[1] for row in rows])}


def test_padding_does_not_count(pair) -> None:
    model = tiny.compose("bert", pair("bert"))
    short = [{"input_ids": TOKENS[i : i + 1, : 4 + i % 5], "labels": CLASSES[i : i + 1]} for i in range(12)]
    padded = torch.zeros(12, 9, dtype=torch.int64)
    mask = torch.zeros(12, 9, dtype=torch.int64)
    for i, row in enumerate(short):
        length = row["input_ids"].shape[1]
        padded[i, :length], mask[i, :length] = row["input_ids"][0], 1
    expected = score_adapters(model, short)
    found = score_adapters(model, [{"input_ids": padded, "attention_mask": mask, "labels": CLASSES}])
    for row, other in zip(found, expected):
        assert row.score == pytest.approx(other.score, abs=1e-4)


def test_rows_may_have_texts_and_labels_must_be_numbers(pair) -> None:
    model = tiny.compose("mlp", pair("mlp"))
    rows = [{"text": f"point {n}", "x": POINTS[n], "labels": int(CLASSES[n])} for n in range(12)]

    def numbers(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}  # fails on texts

    found = [row.score for row in score_adapters(model, rows, collate=numbers)]
    assert found == pytest.approx([row.score for row in score_adapters(model, points())], abs=1e-6)
    with pytest.raises(ValueError, match="whole numbers from 0, one for each class, got 'good'"):
        score_adapters(model, [{**row, "labels": "good"} for row in rows])


# Weights


def test_every_method_prefers_the_adapter_that_tells_classes_apart(pair, tmp_path) -> None:
    """One adapter moves the features of the two classes apart, the other is noise."""
    base = tiny.build("mlp")
    folders = []
    for number, size in enumerate((0.0, 0.1)):
        folder = tiny.save_lora(tmp_path / str(number), base, ["lin1"], seed=number, r=1)
        direct_towards_classes(base, folder, size)
        folders.append(str(folder))
    for method in ("likelihood-vote", "vote", "stacking"):
        model = tiny.compose("mlp", folders, mixing="fixed", weights=[0.5, 0.5])
        report = fit_mixing_weights(model, labelled_by_a_neuron(base), method)
        assert report.method == method
        assert report.weights["1"] > 2 * report.weights["0"]  # what the uniform mix won goes to both
        assert report.scores["1"].score > report.scores["0"].score + 0.1
        assert weights_in(model) == pytest.approx(report.weights, abs=1e-6)


def test_where_every_adapter_harms_the_base_model_gets_a_share(tmp_path) -> None:
    """Both adapters drown what tells classes apart in noise: their weights sum to little, in place and when saved."""
    base = tiny.build("mlp")
    data = labelled_by_a_neuron(base)
    with torch.no_grad():
        base.lin1.weight[:] = 0.0
        base.lin1.weight[:, 0] = 1.0
    folders = [
        str(tiny.save_lora(tmp_path / str(number), base, ["lin1"], seed=number, lora_alpha=400)) for number in (0, 1)
    ]
    for mixing in ("fixed", "learned"):
        weights = [0.5, 0.5] if mixing == "fixed" else None
        model = tiny.compose("mlp", folders, base=copy.deepcopy(base), mixing=mixing, weights=weights)
        report = fit_mixing_weights(model, data)
        assert sum(report.weights.values()) < 0.3
        assert report.scores["base"].score > report.scores["uniform"].score
        assert f"(base)  {1 - sum(report.weights.values()):.4f}" in str(report)
        assert weights_in(model) == pytest.approx(report.weights, abs=1e-6)
        by_hand = tiny.composed_by_hand(base, folders, list(report.weights.values()))
        torch.testing.assert_close(tiny.output(model, "mlp"), tiny.output(by_hand, "mlp"), rtol=1e-4, atol=1e-5)


def labelled_by_a_neuron(base: nn.Module) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        hidden = base.relu(base.lin0(POINTS))[:, 0]
    return [{"x": POINTS, "labels": (hidden > hidden.median()).long()}]


def direct_towards_classes(base: nn.Module, folder: Path, size: float) -> None:
    """Let a LoRA of `lin1` add `size` times the first hidden neuron to every feature."""
    factors = load_file(folder / "adapter_model.safetensors")
    for key, tensor in factors.items():
        if "lora_A" in key:
            tensor.zero_()[0, 0] = 1.0
        else:
            tensor.fill_(size)
    save_file(factors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_posterior_from_the_losses_of_models_with_one_adapter(name, pair) -> None:
    model = tiny.compose(name, pair(name))
    report = fit_mixing_weights(model, questions(name))
    assert report.method == "posterior"
    totals = []
    for number in range(2):
        by_hand = alone(name, pair(name), number).eval()
        totals.append(
            sum(
                by_hand(input_ids=batch["input_ids"][i : i + 1], labels=batch["labels"][i : i + 1]).loss.item()
                * min(2, int((batch["labels"][i, 0 if name == "t5" else 1 :] != -100).sum()))
                for batch in questions(name)
                for i in range(len(batch["labels"]))
            )
        )
    odds = [math.exp(min(totals) - total) for total in totals]
    assert list(report.weights.values()) == pytest.approx([value / sum(odds) for value in odds], rel=1e-3)
    assert weights_in(model) == pytest.approx(report.weights, abs=1e-6)


@pytest.mark.parametrize("fields", [{}, {"weights": [0.9, 0.1]}, {"normalization": "none"}, {"gain": 3.0}])
def test_a_learned_composition_starts_from_the_weights(fields, pair) -> None:
    model = tiny.compose("mlp", pair("mlp"), **fields)
    thetas = [parameter for name, parameter in model.named_parameters() if "mixing" in name]
    with torch.no_grad():
        for theta in thetas:
            theta.add_(torch.tensor([0.3, -0.2]))
    report = fit_mixing_weights(model, points())
    assert weights_in(model) == pytest.approx(report.weights, abs=1e-6)
    assert len(set(report.weights.values())) == 2  # they are not uniform
    after = [parameter for name, parameter in model.named_parameters() if "mixing" in name]
    assert all(theta is own and not theta.any() for theta, own in zip(thetas, after))  # an optimizer has them already

    model(x=POINTS).square().sum().backward()
    assert all(theta.grad is not None and theta.grad.any() for theta in after)


@pytest.mark.parametrize("mixing", ["fixed", "learned"])
@pytest.mark.parametrize("sharing", ["module", "model"])
def test_a_checkpoint_has_the_weights(mixing, sharing, pair, tmp_path) -> None:
    given = {"weights": [0.5, 0.5]} if mixing == "fixed" else {}
    model = tiny.compose("mlp", pair("mlp"), mixing=mixing, weight_sharing=sharing, **given).eval()
    before = tiny.output(model, "mlp")
    report = fit_mixing_weights(model, points())
    expected = tiny.output(model, "mlp")
    by_hand = tiny.composed_by_hand(tiny.build("mlp"), pair("mlp"), list(report.weights.values()))
    torch.testing.assert_close(expected, tiny.output(by_hand, "mlp"), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, before, rtol=1e-3)

    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path)).eval()
    assert torch.equal(tiny.output(loaded, "mlp"), expected)
    assert weights_in(loaded) == pytest.approx(report.weights, abs=1e-6)
    again = fit_mixing_weights(loaded, points(), seed=1)  # of one that was loaded
    loaded.save_pretrained(str(tmp_path / "again"))
    twice = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path / "again"))
    assert weights_in(twice) == pytest.approx(again.weights, abs=1e-6)


def test_the_same_seed_gives_the_same_weights(pair) -> None:
    found = [fit_mixing_weights(tiny.compose("mlp", pair("mlp")), points(), seed=seed).weights for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_with_one_example_of_each_class_weights_are_uniform_and_the_report_says_why(pair) -> None:
    model = tiny.compose("mlp", pair("mlp"), mixing="fixed", weights=[0.9, 0.1])
    one_each = [{"x": POINTS[:2], "labels": CLASSES[:2]}]
    report = fit_mixing_weights(model, one_each)
    assert (report.method, report.scores) == ("uniform", None)
    assert "one example of each class" in report.reason
    assert weights_in(model) == {"first": 0.5, "second": 0.5}
    with pytest.raises(ValueError, match="one example of each of 2 classes"):
        score_adapters(model, one_each)


def test_several_compositions(pair) -> None:
    model = tiny.compose("mlp", pair("mlp"), mixing="fixed", weights=[0.9, 0.1])
    model.add_adapter("other", CompositionConfig(adapters=pair("mlp"), modules_to_save=["head"]))
    model.set_adapter("other")
    report = fit_mixing_weights(model, points())
    assert weights_in(model) == pytest.approx(report.weights, abs=1e-6)
    model.set_adapter("default")
    assert weights_in(model) == pytest.approx({"first": 0.9, "second": 0.1})
    with pytest.raises(ValueError, match="'other' is not active"):
        fit_mixing_weights(model, points(), adapter_name="other")
    with pytest.raises(ValueError, match="no composition 'third'"):
        fit_mixing_weights(model, points(), adapter_name="third")


def test_mixed_precision_runs_under_autocast(pair) -> None:
    model = tiny.compose("mlp", pair("mlp"))
    seen: list[torch.dtype] = []
    handle = model.base_model.model.lin1.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    narrow = score_adapters(model, points(), mixed_precision="bf16")
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    for row, wide in zip(narrow, score_adapters(model, points())):
        assert row.score == pytest.approx(wide.score, abs=0.02)


# Refusals: nothing is changed


def refused(model: Any, data: Any, message: str, **options: Any) -> None:
    before = weights_in(model) if options.pop("is_readable", True) else None
    with pytest.raises(ValueError, match=message):
        fit_mixing_weights(model, data, **options)
    if before is not None:
        assert weights_in(model) == before


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "no examples"),
        ({"x": POINTS, "labels": CLASSES}, {}, "a single mapping"),
        (pd.DataFrame({"x": [1.0, 2.0], "labels": [0, 1]}), {}, "got a DataFrame. read_data of"),
        ("reviews.csv", {}, "as the model takes them, got 'reviews.csv'. Use read_data and EncodedRows"),
        (Path("reviews.csv"), {}, "Use read_data and EncodedRows"),
        (read_data([{"text": "a", "label": 0}, {"text": "b", "label": 1}]), {}, "got a LabelledData. Use read_data"),
        ([{"x": POINTS}], {"collate": lambda rows: rows[0]}, "tensor of labels under 'labels'.*it has .*x"),
        ([{"x": POINTS, "labels": CLASSES.float()}], {}, "whole numbers.*float32"),
        ([{"x": POINTS, "labels": torch.zeros(12, dtype=torch.int64)}], {}, "All 12 examples are of class 0"),
        ([{"x": POINTS * math.nan, "labels": CLASSES}], {}, "adapter 'first' alone: .*NaN"),
        (iter([(POINTS, CLASSES)]), {}, "a batch must be a mapping .*tuple"),
        (points(), {"method": "posterior"}, "needs the tokens of answers"),
        (points(), {"method": "best"}, "'auto', 'heads-and-vote', 'likelihood-vote', .*, got 'best'"),
        (points(), {"head": "nothing"}, "called 'nothing': there is none.*head=..."),
        (points(), {"head": nn.Linear(2, 2)}, "is not a module of the model"),
    ],
)
def test_data_that_cannot_be_scored(data, options, message, pair) -> None:
    refused(tiny.compose("mlp", pair("mlp"), mixing="fixed", weights=[0.7, 0.3]), data, message, **options)


def test_tokens_need_the_posterior(pair) -> None:
    model = tiny.compose("llama", pair("llama"))
    refused(model, questions("llama"), "these labels are tokens", method="vote")


def test_compositions_whose_weights_cannot_be_set(pair) -> None:
    refused(tiny.compose("mlp", pair("mlp"), mixing="uniform"), points(), 'mixing="uniform".*mixing="fixed"')
    merged = tiny.compose("mlp", pair("mlp"))
    merged.merge_adapter()
    refused(merged, points(), "merged into module 'lin")
    disabled = tiny.compose("mlp", pair("mlp"))
    disabled.base_model.disable_adapter_layers()
    refused(disabled, points(), "disabled in module 'lin")
    refused(tiny.build("mlp"), points(), "holds no composition", is_readable=False)
