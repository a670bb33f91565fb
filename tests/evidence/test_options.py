"""Answers put after each other's prompts: their likelihoods are those of single rows, and what cannot be compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_composition import fit_mixing_weights, mixing_weights
from peft_composition.evidence.options import read_options
from peft_composition.evidence.passes import read_answers

from .. import tiny
from .test_choices import by_hand


PROMPTS = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(3)).tolist()
LENGTHS = [4, 9, 2, 6, 7, 3]
ANSWERS = [[11, 2], [12, 13, 14, 2], [15]]  # of unequal lengths
RIGHT = [0, 1, 0, 2, 1, 0]
BATCHES = [[0, 1, 2, 3], [4, 5]]


def told(number: int) -> tuple[list[int], list[int]]:
    return PROMPTS[number][: LENGTHS[number]], ANSWERS[RIGHT[number]]


def batch(name: str, numbers: list[int], side: str) -> dict[str, Tensor]:
    """Examples as a padded batch."""
    asked, answers = zip(*map(told, numbers))
    rows = list(asked) if name == "t5" else [[*own, *answer] for own, answer in zip(asked, answers)]
    labels = list(answers) if name == "t5" else [[*[-100] * len(own), *answer] for own, answer in zip(asked, answers)]

    def filled(lists: list[list[int]], value: int, side: str = side) -> Tensor:
        longest = max(map(len, lists))
        rests = [[value] * (longest - len(own)) for own in lists]
        return torch.tensor([[*own, *rest] if side == "right" else [*rest, *own] for own, rest in zip(lists, rests)])

    return {
        "input_ids": filled(rows, 0),
        "attention_mask": filled([[1] * len(own) for own in rows], 0),
        "labels": filled(labels, -100, "right" if name == "t5" else side),
    }


def batches(name: str, side: str = "right") -> list[dict[str, Tensor]]:
    return [batch(name, numbers, side) for numbers in BATCHES]


@torch.no_grad()
def alone(name: str, model: Any) -> list[list[float]]:
    """Negative log-likelihoods of every answer to every prompt, one by one, without padding."""
    found: list[list[float]] = []
    for number in range(len(PROMPTS)):
        asked, _ = told(number)
        found.append([])
        for answer in ANSWERS:
            if name == "t5":
                given = torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
                logits = model(input_ids=torch.tensor([asked]), decoder_input_ids=given).logits[0]
            else:
                logits = model(input_ids=torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
            found[-1].append(-sum(float(logits[i].log_softmax(-1)[token]) for i, token in enumerate(answer)))
    return found


# Positions of GPT-2 are learned, so that its left padding tells in any batch.
@pytest.mark.parametrize(
    ("name", "side"), [("llama", "right"), ("llama", "left"), ("gpt2", "right"), ("t5", "right"), ("t5", "left")]
)
def test_likelihoods_of_all_answers_are_those_of_single_rows(name: str, side: str) -> None:
    model = tiny.build(name).double().eval()
    options = read_options(model, batches(name, side))
    assert [list(own) for own in options.answers] == ANSWERS
    assert options.right.tolist() == RIGHT
    assert [len(own["labels"]) for own in options.batches] == [4, 4, 4, 2, 2, 2]
    with torch.no_grad():
        found = options.choices(read_answers(model, options.batches, "no"))
    torch.testing.assert_close(found.nll, torch.tensor(alone(name, model), dtype=torch.float64), rtol=1e-8, atol=1e-8)
    assert found.tokens.tolist() == [[2.0, 4.0, 1.0]] * 6


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_right_answer_costs_what_it_costs_in_its_own_batch(side: str) -> None:
    """Prompts stay at their places, so that this holds with left padding and learned positions, too."""
    model = tiny.build("gpt2").double().eval()
    options = read_options(model, batches("gpt2", side))
    with torch.no_grad():
        own = read_answers(model, batches("gpt2", side), "no").nll
        found = options.choices(read_answers(model, options.batches, "no"))
    torch.testing.assert_close(found.of_right, own, rtol=1e-9, atol=1e-9)


def test_without_a_mask_and_with_text_after_the_answer_it_is_the_same() -> None:
    model = tiny.build("llama").double().eval()
    more = batches("llama")
    for own in more:
        del own["attention_mask"]
        own["input_ids"] = torch.cat([own["input_ids"], torch.full((len(own["input_ids"]), 2), 7)], 1)
        own["labels"] = torch.cat([own["labels"], torch.full((len(own["labels"]), 2), -100)], 1)
    options = read_options(model, more)
    with torch.no_grad():
        found = options.choices(read_answers(model, options.batches, "no"))
    torch.testing.assert_close(
        found.nll, torch.tensor(alone("llama", model), dtype=torch.float64), rtol=1e-8, atol=1e-8
    )


def expected(name: str, folders: list[str]) -> tuple[list[float], list[bool], list[list[float]], list[float]]:
    """Weights, who stays, scores and accuracies, from models with one adapter each, in float64."""
    of_adapters = []
    for number in range(len(folders)):
        weights = [float(other == number) for other in range(len(folders))]
        of_adapters.append(alone(name, tiny.composed_by_hand(tiny.build(name), folders, weights).double().eval()))
    among = [
        [
            math.log(sum(math.exp(-value) for value in own[i])) + own[i][right] for own in of_adapters
        ]  # -log(exp(-nll) / sum)
        for i, right in enumerate(RIGHT)
    ]
    nll = [[own[i][right] for own in of_adapters] for i, right in enumerate(RIGHT)]
    weights, stayed = by_hand(nll, [float(len(ANSWERS[right])) for right in RIGHT], among)
    accuracies = [
        sum(own[i][right] == min(own[i]) for i, right in enumerate(RIGHT)) / len(RIGHT) for own in of_adapters
    ]
    return weights, stayed, among, accuracies


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three large random LoRAs for a tiny model, by its name."""

    def folders(name: str) -> list[str]:
        folder = tmp_path_factory.mktemp(name)
        base, targets = tiny.build(name), tiny.TINY[name].targets
        return [
            str(tiny.save_lora(folder / f"n{seed}", base, targets, seed=seed, lora_alpha=16)) for seed in (1, 2, 3)
        ]

    return folders


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_weights_by_hand_from_models_with_one_adapter_each(name: str, three: Any) -> None:
    folders = three(name)
    weights, stayed, among, accuracies = expected(name, folders)
    model = tiny.compose(name, folders, mixing="fixed", weights=[0.2, 0.3, 0.5]).double()
    report = fit_mixing_weights(model, batches(name), method="choices")
    assert report.method == "choices"
    assert list(report.weights.values()) == pytest.approx(weights, rel=1e-5)
    assert [own not in report.dropped for own in report.weights] == stayed
    for own in mixing_weights(model).values():
        assert list(own.values()) == pytest.approx(weights, rel=1e-4)
    assert report.scores is not None
    assert (report.scores.measure, report.scores.examples) == ("log-likelihood among the answers", 6)
    assert [row.name for row in report.scores] == [*report.weights, "uniform"]
    for number, row in enumerate(list(report.scores)[:3]):
        assert row.score == pytest.approx(-sum(own[number] for own in among) / 6, abs=1e-5)
        assert row.accuracy == pytest.approx(accuracies[number])
    assert "mixing weights by choices (3 different answers to 6 examples)" in str(report)
    assert "if it must be one of those given" in str(report)
    lines = str(report).splitlines()[1:4]
    assert sum("dropped out: it chooses worse among the answers" in line for line in lines) == 3 - sum(stayed)
    assert "(base)" not in str(report)


def test_some_drop_out_and_the_posterior_would_weigh_otherwise(three: Any) -> None:
    folders = three("llama")
    _, stayed, *_ = expected("llama", folders)
    assert not all(stayed)
    model = tiny.compose("llama", folders)
    own = fit_mixing_weights(model, batches("llama"), method="choices").weights
    default = fit_mixing_weights(model, batches("llama"))
    assert default.method == "posterior"
    assert default.dropped == ()
    assert list(own.values()) != pytest.approx(list(default.weights.values()), abs=1e-2)


def test_passes_run_in_mixed_precision(three: Any) -> None:
    model = tiny.compose("llama", three("llama"))
    wide, narrow = (
        fit_mixing_weights(model, batches("llama"), method="choices", mixed_precision=precision).scores
        for precision in ("no", "bf16")
    )
    assert wide is not None
    assert narrow is not None
    assert [row.score for row in narrow] != [row.score for row in wide]
    assert [row.score for row in narrow] == pytest.approx([row.score for row in wide], abs=0.05)


# What cannot be compared


def changed(**others: Any) -> list[dict[str, Any]]:
    (own,) = [batch("llama", [0, 1, 2, 3], "right")]
    return [{**own, **others}]


def with_labels(change: Any) -> list[dict[str, Any]]:
    (own,) = changed()
    change(own["labels"])
    return [own]


def each_its_own(count: int, copies: int) -> list[dict[str, Any]]:
    ids = torch.tensor([[5, 6, 7 + number] for number in range(count)] * copies)
    return [{"input_ids": ids, "labels": torch.where(torch.arange(3) < 2, -100, ids)}]


def same() -> list[dict[str, Any]]:
    return [batch("llama", [0, 2, 5], "right")]


def answered(*answers: list[int], prompts: list[list[int]] = PROMPTS, width: int | None = None) -> dict[str, Tensor]:
    """Answers after prompts as a batch with left padding."""
    rows = [[*own, *answer] for own, answer in zip(prompts, answers)]
    longest = width or max(map(len, rows))
    empty = [[0] * (longest - len(own)) for own in rows]
    return {
        "input_ids": torch.tensor([rest + own for rest, own in zip(empty, rows)]),
        "attention_mask": torch.tensor([rest + [1] * len(own) for rest, own in zip(empty, rows)]),
        "labels": torch.tensor([[-100] * (longest - len(own)) + own for own in answers]),
    }


def gap(labels: Tensor) -> None:
    labels[1, 10] = -100  # one token of four


def whole_row(labels: Tensor) -> None:
    labels[2] = changed()[0]["input_ids"][2]


def shifted(labels: Tensor) -> None:
    labels[0, 4] = 59


REFUSED: list[tuple[Any, str]] = [
    (same(), "all 3 examples have the same one: give examples of each answer"),
    (each_its_own(4, 1), 'each of the 4 examples has one of its own.*use method="posterior"'),
    (each_its_own(21, 2), 'at most 20 answers, but the 42 examples have 21 different ones.*method="posterior"'),
    (
        with_labels(gap),
        "example 1 has an answer in 3 tokens that do not follow each other, from place 9 to 12",
    ),
    (
        with_labels(whole_row),
        "labels of example 2 begin at its first token. Set those of the prompt to -100",
    ),
    (with_labels(shifted), "example 0 has label 59 at place 4, where input_ids has 11"),
    (with_labels(lambda labels: labels[3].fill_(-100)), "example 3 has no answer.*Was it cut off"),
    (
        changed(position_ids=torch.zeros(4, 13)),
        r"'position_ids' of shape \(4, 13\) cannot be made longer. Leave it out",
    ),
    (changed(token_type_ids=torch.zeros(4, 13)), r"'token_type_ids' of shape \(4, 13\) cannot be made longer"),
    (changed(position_ids=torch.arange(13)[None]), r"'position_ids' of shape \(1, 13\) cannot be made longer"),
    (changed(position_ids=torch.ones(3, 4, 13).long()), r"'position_ids' of shape \(3, 4, 13\) cannot be made longer"),
    (changed(cache_position=torch.arange(13)), r"'cache_position' of shape \(13,\) cannot be made longer"),
    (changed(attention_mask=torch.ones(4, 1, 13, 13)), r"'attention_mask' of shape \(4, 1, 13, 13\) cannot be made"),
    # Whole texts as labels, of which left padding is no prompt
    (
        [answered([5, 6, 11], [7, 8, 9, 12], [5, 6, 11], prompts=[[]] * 3, width=8)],
        "example 0 begin at its first token",
    ),
    (
        [answered([11], [12], [11]), answered([11], [12, 3], [12, 3], prompts=[[5, 6], [7], []])],
        "example 5 begin at its first token",
    ),
    # Some with the token that ends a text, some without; cut off; with labels for the padding
    (
        [answered([11, 2], [12, 2], [11]), answered([12, 2], [11, 2])],
        "example 2, 1 token, is the beginning of that of example 0, 2 tokens.*End all answers by the token",
    ),
    (
        [answered([11, 2, 0], [12, 2]), answered([12, 2, 0, 0], [11, 2, 0, 0])],
        "example 0, 3 tokens, is the beginning of that of example 3, 4 tokens.*labels of padding to -100",
    ),
    (changed(input_ids=None, inputs_embeds=torch.ones(4, 13, 16)), r"labels, \(4, 13\); there are none"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_cannot_be_compared_is_refused_before_anything_is_done(data: Any, message: str, pair: Any) -> None:
    model = tiny.compose("llama", pair("llama"), mixing="fixed", weights=[0.7, 0.3])
    calls: list[int] = []
    model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        fit_mixing_weights(model, data, method="choices")
    assert not calls
    for own in mixing_weights(model).values():
        assert own == {name: pytest.approx({"first": 0.7, "second": 0.3}[name]) for name in own}


def test_classes_have_no_answers_to_compare(pair: Any) -> None:
    model = tiny.compose("bert", pair("bert"))
    data = [{"input_ids": torch.ones(4, 3).long(), "labels": torch.tensor([0, 1, 0, 1])}]
    with pytest.raises(ValueError, match='method="choices" needs the tokens of answers as labels'):
        fit_mixing_weights(model, data, method="choices")
    with pytest.raises(ValueError, match='use "posterior", or "choices" where you compare a few given answers'):
        fit_mixing_weights(tiny.compose("llama", pair("llama")), batches("llama"), method="vote")


def test_of_a_decoder_only_inputs_that_come_from_the_labels_can_be_replaced(pair: Any) -> None:
    model = tiny.compose("t5", pair("t5"))
    base: Any = model.get_base_model()
    given = [  # as transformers' DataCollatorForSeq2Seq adds them, if it has the model
        {**own, "decoder_input_ids": base.prepare_decoder_input_ids_from_labels(labels=own["labels"])}
        for own in batches("t5")
    ]
    plain = fit_mixing_weights(model, batches("t5"), method="choices").weights
    assert fit_mixing_weights(model, given, method="choices").weights == plain
    given[1]["decoder_input_ids"] = given[1]["decoder_input_ids"] + 1
    with pytest.raises(ValueError, match="'decoder_input_ids' would not belong"):
        fit_mixing_weights(model, given, method="choices")
    masked = [{**own, "decoder_attention_mask": torch.ones_like(own["labels"])} for own in batches("t5")]
    with pytest.raises(ValueError, match="'decoder_attention_mask' would not belong"):
        fit_mixing_weights(model, masked, method="choices")


def test_of_an_encoder_decoder_model_labels_of_padding_make_no_further_answers(pair: Any) -> None:
    """A tokenizer pads labels with its own token, and so further in a wider batch; a collator with -100."""
    labels = [torch.tensor(rows) for rows in ([[11, 1], [12, 1]], [[11, 1, 0], [12, 1, 0]])]
    data = [{"input_ids": torch.tensor(PROMPTS[:2]), "labels": own} for own in labels]
    with pytest.raises(ValueError, match="example 0, 2 tokens, is the beginning of that of example 2, 3 tokens"):
        fit_mixing_weights(tiny.compose("t5", pair("t5")), data, method="choices")


@pytest.mark.parametrize("target", ["c_attn", "wpe"])
def test_rows_longer_than_learned_positions_are_refused(target: str, tmp_path: Any) -> None:
    """Left padding to the most that the model takes, and another answer that is longer."""
    folder = str(tiny.save_lora(tmp_path, tiny.build("gpt2"), [target]))
    model = tiny.compose("gpt2", [folder], mixing="fixed", weights=[1.0])
    answers = ([11], [12, 13, 2], [11])
    with pytest.raises(ValueError, match=r"is at place 34, but the model has 32 positions.*not to a fixed length"):
        fit_mixing_weights(model, [answered(*answers, width=32)], method="choices")
    report = fit_mixing_weights(model, [answered(*answers, width=30)], method="choices")
    assert report.weights == {next(iter(report.weights)): 1.0}


def test_positions_that_are_not_learned_go_on(pair: Any) -> None:
    limit = 2048
    model = tiny.compose("llama", pair("llama"))
    assert model.get_base_model().config.max_position_embeddings == limit
    answers = ([11], [12, 13, 2], [11])
    wide, narrow = (
        fit_mixing_weights(model, [answered(*answers, width=width)], method="choices").weights
        for width in (limit, None)
    )
    assert list(wide.values()) == pytest.approx(list(narrow.values()), abs=1e-4)


def test_inputs_of_other_kinds_stay_with_their_rows() -> None:
    """Images of a row, and a number for each row in a batch of as many rows as tokens."""
    (own,) = changed()
    given = {**own, "pixel_values": torch.rand(4, 3, 5, 5), "image_sizes": torch.full((4, 2), 5)}
    square = {
        **answered(*[[11], [12]] * 5, prompts=[own[:9] for own in PROMPTS + PROMPTS[:4]]),
        "kind": torch.arange(10),
    }
    for data in (given, square):
        for found in read_options(tiny.build("llama"), [data]).batches:
            for name in set(data) - {"input_ids", "attention_mask", "labels"}:
                assert torch.equal(found[name], data[name])
