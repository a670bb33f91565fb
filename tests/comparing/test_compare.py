"""`compare_methods` on tiny models: against trainings in the model itself, what it leaves, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from peft_composition import compare_methods, score_adapters
from peft_composition.choosing import read_data
from peft_composition.comparing.bodies import composed, random_factors
from peft_composition.comparing.compare import _left_out
from peft_composition.comparing.heads import Budget, batches
from peft_composition.comparing.rows import Rows
from peft_composition.comparing.verdict import LEVEL
from peft_composition.evidence.batches import read_batches

from .. import tiny


QUICK: dict[str, Any] = {"steps": 5, "batch_size": 4, "lora_rank": 2}


def points(count: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    x = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))
    return [{"x": row, "labels": torch.tensor(number % 3)} for number, row in enumerate(x)]


def questions(count: int = 8) -> list[dict[str, Tensor]]:
    tokens = torch.randint(3, 60, (count, 7), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": torch.cat([torch.full((4,), -100), row[4:]])} for row in tokens]


def trained_in_the_model(base: nn.Module, body: nn.Module, rows: Rows, budget: Budget) -> list[float]:
    """Cross-fitted answers of a model with a frozen body, whose head is trained in it by a plain loop."""
    right = [0.0] * len(rows)
    assert rows.labels is not None
    for split in _left_out(rows, 5, 1, seed=0):
        model = copy.deepcopy(body)
        head = next(module for name, module in model.named_modules() if name.endswith("head"))
        assert isinstance(head, nn.Linear)
        start = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)) * 0.02
        head.weight.data, head.bias.data = start.T.clone(), torch.zeros(3)
        optimizer = torch.optim.AdamW(head.parameters(), lr=budget.learning_rate, weight_decay=0.0)
        for step, chosen in enumerate(batches([split.train], budget, seed=0)[:, 0]):
            for group in optimizer.param_groups:
                group["lr"] = budget.learning_rate * (1 - step / budget.steps)
            batch = read_batches([points()[row] for row in chosen.tolist()], None, 100)[0]
            optimizer.zero_grad()
            F.cross_entropy(model(batch["x"]), batch["labels"]).backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
        for row in split.test.tolist():
            right[row] = float(model(points()[row]["x"][None]).argmax() == points()[row]["labels"])
    return right


def test_frozen_methods_are_what_training_in_the_model_gives(pair) -> None:
    base, folders = tiny.build("mlp"), pair("mlp")
    budget = Budget(40, 4, 0.1)
    result = compare_methods(
        base,
        folders,
        points(),
        methods=("base", "uniform"),
        judged="uniform",
        steps=40,
        batch_size=4,
        learning_rate=0.1,
    )
    rows = Rows(points(), None)
    for name, body in (("head only", base), ("uniform", tiny.composed_by_hand(base, folders, [0.5, 0.5]))):
        expected = trained_in_the_model(base, body, rows, budget)
        assert result[name].score == pytest.approx(np.mean(expected)), name
    assert 0.3 < result["uniform"].score <= 1


def test_all_methods_and_what_they_cost(pair) -> None:
    base = tiny.build("mlp")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    modes = [module.training for module in base.modules()]
    result = compare_methods(base, pair("mlp"), points(), **QUICK)
    names = ["head only", "fresh LoRA x 0.5", "fresh LoRA", "best single", "uniform", "evidence"]
    assert sorted(row.name for row in result) == sorted([*names, "evidence, learned", "random LoRAs"])
    head, modules = 16 * 3 + 3, 2  # lin0 and lin1
    assert result["head only"].trainable == result["evidence"].trainable == head
    assert result["evidence, learned"].trainable == head + 2 * modules
    assert result["fresh LoRA"].trainable == head + 2 * (10 + 20) + 2 * (20 + 16)
    assert all(row.seconds > 0 and 0 <= row.low <= row.score <= row.high <= 1 for row in result)
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [module.training for module in base.modules()] == modes
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_the_same_call_gives_the_same(pair) -> None:
    first, second = (compare_methods(tiny.build("mlp"), pair("mlp"), points(), **QUICK) for _ in range(2))
    for mine, other in zip(first, second):
        assert (mine.name, mine.score, mine.loss) == (other.name, other.score, other.loss)
    assert first.verdict == second.verdict


def test_json_for_other_programs(pair) -> None:
    found = compare_methods(tiny.build("mlp"), pair("mlp"), points(), **QUICK).as_json()
    assert {"verdict", "best", "against", "difference", "low", "high", "methods"} <= found.keys()
    assert found["verdict"] in ("helps", "equivalent", "harms", "cannot tell")
    sure = found["probabilities"]
    assert max(sure, key=sure.get) == found["verdict"] or max(sure.values()) < LEVEL  # what is stated is what decides
    for row in found["methods"]:
        assert {"name", "score", "low", "high", "trainable", "seconds"} <= row.keys()
    by_name = {row["name"]: row["score"] for row in found["methods"]}
    assert found["difference"] == pytest.approx(by_name[found["best"]] - by_name[found["against"]])


def test_draws_are_judged_by_the_examples_that_none_has(pair) -> None:
    result = compare_methods(tiny.build("mlp"), pair("mlp"), points(60), k=3, seeds=2, **QUICK)
    assert result.setting.startswith("2 draws of 9 examples, judged by ")
    assert 60 - 18 <= int(result.setting.split()[-2]) <= 60 - 9
    with_test = compare_methods(tiny.build("mlp"), pair("mlp"), points(), test=points(40, seed=5), **QUICK)
    assert with_test.setting == "1 draw of 24 examples, judged by 40 others"


def test_one_example_of_each_class_is_judged_by_others_alone(pair) -> None:
    base, folders = tiny.build("mlp"), pair("mlp")
    with pytest.raises(ValueError, match=r"2 examples of every class.*give more examples, or test"):
        compare_methods(base, folders, points(3), **QUICK)
    result = compare_methods(base, folders, points(3), test=points(30, seed=1), **QUICK)
    assert result.setting == "1 draw of 3 examples, judged by 30 others"
    assert result["evidence"].score == result["uniform"].score  # nothing can be left out to weigh by
    assert {"fresh LoRA", "evidence, learned", "random LoRAs"} <= {row.name for row in result}


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_models_that_answer_in_tokens(name: str, pair) -> None:
    rows = questions()
    if name == "t5":
        rows = [{"input_ids": row["input_ids"], "labels": row["labels"][4:]} for row in rows]
    result = compare_methods(tiny.build(name), pair(name), rows, folds=2, **QUICK)
    assert result.measure == "exact match"
    assert result["zero-shot"].trainable == 0
    assert {"fresh LoRA", "evidence", "evidence, learned"} <= {row.name for row in result}
    # Its loss is that of the model itself on all answers, as each is left out once.
    base = tiny.build(name).eval()
    with torch.no_grad():
        losses = [base(**{key: value[None] for key, value in row.items()}).loss.item() for row in rows]
    assert result["zero-shot"].loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_random_factors_keep_the_norms_of_products(pair) -> None:
    base = tiny.build("mlp")
    x = points()[0]["x"][None]
    with composed(base, pair("mlp")) as composition:
        before = composition.model(x)
        layer = next(iter(composition.layers.values()))
        factors: Any = layer.composition_factors["default"]

        def norms() -> list[float]:
            parts = zip(factors.A.split(factors.ranks, 0), factors.B.split(factors.ranks, 1))
            return [float(torch.linalg.matrix_norm(B.double() @ A.double())) for A, B in parts]

        expected = norms()
        with random_factors(composition, 0):
            assert norms() == pytest.approx(expected, rel=1e-4)
            assert not torch.allclose(composition.model(x), before)
        assert torch.equal(composition.model(x), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("base", "magic")}, "unknown method 'magic'; there are 'base'"),
        ({"judged": "head only"}, "judged must be one of 'best single'"),
        ({"methods": ("uniform", "evidence")}, "nothing to judge adapters against: add 'base'"),
        ({"seeds": 3}, "seeds=3 draws of all examples would be the same: give k"),
        ({"k": 8}, "leave 0 of 24 examples to judge by, too few: lower k"),
        ({"k": 0}, "k must be at least 1, got 0; leave it out"),
        ({"k": -5}, "k must be at least 1, got -5"),
        ({"k": 9}, "k=9, but class 0 has only 8 examples"),
        ({"steps": 0}, "steps must be more than 0, got 0"),
        ({"scales": ()}, "scales more than 0"),
        ({"rope": -0.1}, "rope must be in 0..1"),
        ({"lora_learning_rate": 1e30, "methods": ("fresh LoRA", "uniform"), "judged": "uniform"}, "training loss is"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str, pair) -> None:
    base = tiny.build("mlp")
    test = {"test": points()} if "seeds" in change else {}
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        compare_methods(base, pair("mlp"), points(), **{**QUICK, **test, **change})
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_random_numbers_go_on_as_before(pair) -> None:
    base = tiny.build("mlp")
    before = torch.get_rng_state()
    compare_methods(base, pair("mlp"), points(), **QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_examples_that_do_not_fit(pair) -> None:
    base = tiny.build("mlp")
    with pytest.raises(ValueError, match=r"labels are 0 to 7, but the head of MLP has 3 classes"):
        compare_methods(base, pair("mlp"), [{**row, "labels": torch.tensor(n % 8)} for n, row in enumerate(points())])
    with pytest.raises(ValueError, match="all 24 examples are of class 0"):
        compare_methods(base, pair("mlp"), [{**row, "labels": torch.tensor(0)} for row in points()])
    for own in ("reviews.csv", read_data([{"text": "a", "label": 0}, {"text": "b", "label": 1}])):
        with pytest.raises(
            ValueError, match=r"data must be batches or rows as the model takes them, got .*EncodedRows"
        ):
            compare_methods(tiny.build("mlp"), pair("mlp"), own, **QUICK)
    with pytest.raises(ValueError, match=r"adapters must be a list, got a single adapter: 'me/lora'"):
        compare_methods(tiny.build("mlp"), "me/lora", points(), **QUICK)
    with pytest.raises(ValueError, match=r"adapters must be a list, got a single adapter: 'me/lora'"):
        score_adapters(tiny.build("mlp"), [{"x": torch.zeros(10), "labels": 0}], adapters="me/lora")
    with pytest.raises(ValueError, match="data must be rows that can be split"):
        compare_methods(base, pair("mlp"), iter(points()))
    with pytest.raises(ValueError, match="already has adapters"):
        compare_methods(tiny.compose("mlp", pair("mlp")), pair("mlp"), points())


def test_rows_come_from_loaders_and_from_batches(pair) -> None:
    whole = read_batches(points(), None, 24)
    assert torch.equal(Rows(whole, None).labels, whole[0]["labels"])
    loader = DataLoader(points(), batch_size=5)  # type: ignore[arg-type]
    assert torch.equal(Rows(loader, None).batch([3, 1])["x"], whole[0]["x"][[3, 1]])


def test_a_head_of_several_layers_and_a_head_on_tokens(tmp_path: Path) -> None:
    """RoBERTa's head selects the first token itself; Llama's is followed by pooling."""
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "num_labels": 3, "pad_token_id": 1}
    tokens = torch.randint(3, 60, (12, 7), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": torch.tensor(number % 3)} for number, row in enumerate(tokens)]
    roberta = RobertaForSequenceClassification(RobertaConfig(**sizes, max_position_embeddings=32))
    llama = LlamaForSequenceClassification(LlamaConfig(**sizes))
    for base, targets in ((roberta, ["query", "value"]), (llama, ["q_proj", "v_proj"])):
        folder = tmp_path / type(base).__name__
        tiny.save_lora(folder, base, targets, seed=0, r=2, task_type="SEQ_CLS")
        before = {name: value.clone() for name, value in base.state_dict().items()}
        result = compare_methods(base, [str(folder)], rows, **QUICK)
        names = [row.name for row in result]  # one adapter alone is no mix
        assert (len(names), "best single" in names, "uniform" in names) == (7, True, False)
        assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
