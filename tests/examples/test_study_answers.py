"""Weights of language models by evidence in the study: likelihoods of options by hand, ways to weights, commands."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from few_shot_transfer import answers, sources
from few_shot_transfer import scenario as scenarios
from few_shot_transfer.__main__ import app
from few_shot_transfer.answer_tables import answer_gains, answer_overview
from few_shot_transfer.far_better import far_better, far_better_table
from few_shot_transfer.language_model import LanguageModel
from few_shot_transfer.options import option_scores
from few_shot_transfer.records import read
from few_shot_transfer.scenario import ModelSpec
from peft import PeftModel
from scipy import stats
from typer.testing import CliRunner

from peft_composition import fit_mixing_weights
from peft_composition.evidence.fit import put_weights

from ..evidence.test_choices import by_hand as choosing_by_hand
from .words import save


DRAWS = Path(__file__).parents[2] / "docs" / "study" / "evidence" / "language"
KINDS = [("completion", "causal", "v_proj, o_proj"), ("text-to-text", "text-to-text", "v")]
QUESTIONS = Dataset.from_dict(
    {
        "input": ["what is next after 3 ?", "it was said 5 : what is next ?", "7 ?"],
        "options": [["4", "4 5 6"], ["6 7", "5"], ["7 7 7 7", "8 9"]],
    }
)


# Options


@pytest.mark.parametrize(("kind", "shape", "target"), KINDS)
def test_likelihoods_of_options_are_those_of_single_rows(tmp_path: Path, kind: Any, shape: str, target: str) -> None:
    language = LanguageModel(ModelSpec(kind, (target,), str(save(tmp_path, shape))))
    model = language.build(0, 0).double().eval().requires_grad_(False)
    nll, tokens, said = option_scores(model, language, QUESTIONS)
    for row, (question, options) in enumerate(zip(QUESTIONS["input"][:], QUESTIONS["options"][:])):
        asked = language.tokenizer(question, add_special_tokens=shape != "causal")["input_ids"]
        for place, option in enumerate(options):
            told = [*language.tokenizer(option, add_special_tokens=False)["input_ids"], 1]
            if shape == "causal":
                ids = torch.tensor([asked + told])
                logits = model(input_ids=ids).logits[0, len(asked) - 1 : -1]
            else:
                given = torch.tensor([[0, *told[:-1]]])
                logits = model(input_ids=torch.tensor([asked]), decoder_input_ids=given).logits[0]
            expected = -sum(float(logits[i].log_softmax(-1)[token]) for i, token in enumerate(told))
            assert float(nll[row, place]) == pytest.approx(expected, rel=1e-9)
            assert int(tokens[row, place]) == len(told)
            assert bool(said[row, place]) == (logits.argmax(-1).tolist() == told)


# From what adapters make of options to weights


def seen() -> answers.Seen:
    generator = torch.Generator().manual_seed(0)
    options = 3 * torch.rand(5, 3, 2, dtype=torch.float64, generator=generator)
    tokens = torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [4.0, 1.0], [1.0, 6.0]]).double()
    mixed = 3 * torch.rand(5, 2, dtype=torch.float64, generator=generator)
    return answers.Seen(options, tokens, torch.tensor([0, 1, 1, 0, 1]), mixed)


def by_hand(scores: list[float]) -> list[float]:
    odds = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(odds) for value in odds]


@pytest.mark.parametrize(
    ("way", "factor", "odds"),  # of the uniform mix to one adapter, before the answers are seen
    [
        ("posterior", lambda length: min(1, 2 / length), 0),
        ("posterior, uniform mix as one more", lambda length: min(1, 2 / length), 1),
        ("posterior, uniform mix at one half", lambda length: min(1, 2 / length), 3),
        ("posterior, an answer counts as one token", lambda length: 1 / length, 0),
        ("posterior, every token counts", lambda length: 1, 0),
    ],
)
def test_posteriors_by_a_loop(way: str, factor: Any, odds: int) -> None:
    found = seen()
    scores = [0.0, 0.0, 0.0, 0.0]
    for i, label in enumerate(found.labels.tolist()):
        for n in range(4):
            nll = found.options[i, n, label] if n < 3 else found.mixed[i, label]
            scores[n] -= factor(float(found.tokens[i, label])) * float(nll)
    chances = [math.exp(score) for score in scores]
    chances[3] *= odds
    expected = [(chances[n] + chances[3] / 3) / sum(chances) for n in range(3)]
    assert answers.WAYS[way](found, 0).tolist() == pytest.approx(expected, rel=1e-9)


def test_other_ways_by_a_loop() -> None:
    found = seen()
    scores, right, among = [0.0] * 3, [0] * 3, [[0.0] * 3 for _ in found.labels]
    for i, label in enumerate(found.labels.tolist()):
        for n in range(3):
            among[i][n] = -math.log(by_hand([-value for value in found.options[i, n].tolist()])[label])
            scores[n] -= among[i][n]
            right[n] += float(found.options[i, n, label]) < float(found.options[i, n, 1 - label])
    assert answers.WAYS["posterior over the options"](found, 0).tolist() == pytest.approx(by_hand(scores), rel=1e-9)
    likeliest = [float(score == max(scores)) for score in scores]
    assert answers.WAYS["best among the options"](found, 0).tolist() == likeliest
    weights, _ = choosing_by_hand(found.nll.tolist(), found.length.tolist(), among)
    assert answers.WAYS["choices"](found, 0).tolist() == pytest.approx(weights, rel=1e-9)
    best = [n for n in range(3) if right[n] == max(right)]
    picks = {tuple(answers.WAYS["most right answers"](found, seed).tolist()) for seed in range(20)}
    assert picks == {tuple(float(other == n) for other in range(3)) for n in best}


def test_rounded_weights_sum_to_one() -> None:
    assert answers.in_parts([0.999, 0.0004, 0.0003, 0.0003], 20) == [1.0, 0.0, 0.0, 0.0]
    assert answers.in_parts([1 / 3] * 3, 20) == [0.35, 0.35, 0.3]
    assert answers.in_parts([0.52, 0.44, 0.04], 20) == [0.5, 0.45, 0.05]
    assert answers.in_parts([0.25] * 4) == [0.25] * 4
    assert answers.in_parts([0.9, 0.05, 0.05, 0.0]) == [1.0, 0.0, 0.0, 0.0]


# Tables


def test_gains_on_uniform_by_hand() -> None:
    facts = {"scenario": "s", "target": "t", "adapter": None}
    still = {"uniform": 60.0, "base": 50.0}
    records: list[Any] = [
        {
            **facts,
            "k": None,
            "seed": None,
            "method": name,
            "accuracy": value,
            "exact": 5.0,
            "nll": 0.5,
            "nll_token": 2.0,
        }
        for name, value in still.items()
    ]
    for name, value in (("a", 72.0), ("b", 55.0)):
        other = {"method": "single", "adapter": name, "accuracy": value, "nll": value / 100}
        records.append({**records[0], **other})
    for seed, value in enumerate((70.0, 71.0, 66.0)):
        records.append(
            {**facts, "k": 2, "seed": seed, "method": "posterior", "accuracy": value, "nll": 0.4 - seed / 100}
        )
    lines = answer_gains(records, "accuracy").splitlines()
    assert lines[0] == "| accuracy | K = 2 |"
    low, high = stats.t.interval(0.95, 2, 9.0, stats.sem([10.0, 11.0, 6.0]))
    assert lines[2:] == [
        "| **t**: uniform, % | 60.0 |",
        "| base | -10.0 |",
        "| best single (by test) | +12.0 |",
        f"| posterior | +9.0 [{low:+.1f}, {high:+.1f}] |",
    ]
    low, high = stats.t.interval(0.95, 2, -0.11, stats.sem([0.4, 0.39, 0.38]))
    assert "| best single (by test) | +0.05 |" in answer_gains(records, "nll")
    assert f"| posterior | -0.11 [{low:+.2f}, {high:+.2f}] |" in answer_gains(records, "nll")


def test_a_mean_over_tasks_by_hand() -> None:
    facts = {"scenario": "s", "adapter": None}
    records: list[Any] = []
    for target, gained in (("first", [10.0, 11.0, 6.0]), ("second", [-1.0, 0.0, 4.0])):
        for name in ("uniform", "base", "single"):
            records.append({**facts, "target": target, "k": None, "seed": None, "method": name, "accuracy": 60.0})
        for seed, gain in enumerate(gained):
            one = {**facts, "target": target, "k": 2, "seed": seed, "method": "posterior", "accuracy": 60 + gain}
            records.append(one)
            if target == "first":
                records.append({**one, "method": "learned"})
    lines = answer_gains(records, "accuracy").splitlines()
    between = [stats.t.ppf(0.975, 2) * stats.sem(own) for own in ([10.0, 11.0, 6.0], [-1.0, 0.0, 4.0])]
    margin = math.hypot(*between) / 2
    assert lines[-3:] == [
        "| **mean of 2 tasks** |  |",
        f"| posterior | +5.0 [{5 - margin:+.1f}, {5 + margin:+.1f}] |",
        "| learned | - |",  # of one task alone
    ]
    assert "mean of" not in answer_gains([own for own in records if own["target"] == "first"], "accuracy")


def test_an_overview_by_hand() -> None:
    records: list[Any] = []
    for target, gains in (
        ("first", {2: [1.0, 3.0], 5: [4.0, 5.0]}),
        ("second", {2: [-1.0, 0.0], 5: [1.0, 1.0]}),
        ("new", {}),
    ):
        facts = {"scenario": "s", "target": target, "adapter": None}
        rest = {"exact": 10.0, "nll": 0.5, "nll_token": 2.0}
        for name, accuracy in (("uniform", 60.0), ("single", 68.0), ("single", 55.0)):
            records.append({**facts, "k": None, "seed": None, "method": name, "accuracy": accuracy, **rest})
        for k, of_seeds in gains.items():
            for seed, gain in enumerate(of_seeds):
                own = {"accuracy": 60 + gain, **rest, "nll": 0.5 - gain / 100}
                records.append({**facts, "k": k, "seed": seed, "method": "posterior", **own})
    lines = answer_overview(records).splitlines()
    assert lines[2:] == [
        "| first | 60.0: +8.0 / +2.0 / +4.5 | 10.0: +0.0 / +0.0 / +0.0 | 0.50: +0.00 / -0.02 / -0.04 | "
        "2.00: +0.00 / +0.00 / +0.00 |",
        "| second | 60.0: +8.0 / -0.5 / +1.0 | 10.0: +0.0 / +0.0 / +0.0 | 0.50: +0.00 / +0.01 / -0.01 | "
        "2.00: +0.00 / +0.00 / +0.00 |",
        "| new | 60.0: +8.0 | 10.0: +0.0 | 0.50: +0.00 | 2.00: +0.00 |",  # no draw yet
        "| **mean of 2 tasks** | +8.0 / +0.8 / +2.8 | +0.0 / +0.0 / +0.0 | +0.00 / -0.01 / -0.03 | "
        "+0.00 / +0.00 / +0.00 |",
    ]


def _told(target: str, singles: Any, gains: Any, pool: tuple[float, float] = (60.0, 60.0)) -> list[Any]:
    facts = {"scenario": "s", "target": target, "adapter": None, "k": None, "seed": None}
    records: list[Any] = [{**facts, "method": "uniform", "accuracy": 60.0, "nll": 0.5, "pool": pool[0]}]
    for name, (accuracy, nll) in singles.items():
        own = {"adapter": name, "accuracy": accuracy, "nll": nll, "pool": pool[1]}
        records.append({**facts, "method": "single", **own})
    for k, of_seeds in gains.items():
        for seed, gain in enumerate(of_seeds):
            own = {"accuracy": 60 + gain, "nll": 0.5 - gain / 100}
            records.append({**facts, "k": k, "seed": seed, "method": "posterior", **own})
    return records


def test_tasks_with_an_adapter_that_is_far_better_by_hand() -> None:
    gains = {2: [10.0, 11.0, 6.0], 5: [8.0, 8.0]}
    first = _told("first", {"a": (70.0, 0.45), "b": (70.0, 0.4), "c": (68.0, 0.1)}, gains, (50.0, 58.0))
    second = _told("second", {"a": (68.0, 0.6), "b": (40.0, 0.2)}, {2: [-1.0, 0.0, 4.0], 5: [1.0, 3.0]}, (50.0, 57.0))
    third = _told("third", {"a": (67.9, 0.3)}, {}, (50.0, 70.0))
    records = [*first, *second, *third]
    assert far_better(records, 8) == [("s", "first"), ("s", "second")]
    assert far_better(records, 8, "pool") == [("s", "first"), ("s", "third")]
    *_, one, two, mean = far_better_table(records, 8).splitlines()
    of_first, of_second = ([10.0, 11.0, 6.0], [8.0, 8.0]), ([-1.0, 0.0, 4.0], [1.0, 3.0])

    def between(own: list[float], digits: int, sign: int = 1) -> str:
        middle = sign * sum(own) / len(own)
        margin = stats.t.ppf(0.975, len(own) - 1) * stats.sem(own)
        ends = f" [{middle - margin:+.{digits}f}, {middle + margin:+.{digits}f}]" if margin else ""
        return f"{middle:+.{digits}f}{ends}"

    def cells(gained: Any) -> list[str]:
        return [between(own, 1) for own in gained] + [between([x / 100 for x in own], 2, -1) for own in gained]

    a, b, c, d = cells(of_first)
    assert one == f"| first* | b | 60.0 | +10.0 | {a} | {b} | -0.10 | {c} | {d} |"  # of two alike the surer one
    a, b, c, d = cells(of_second)
    assert two == f"| second | a | 60.0 | +8.0 | {a} | {b} | +0.10 | {c} | {d} |"
    margin = math.hypot(*(stats.t.ppf(0.975, 2) * stats.sem(own) for own, _ in (of_first, of_second))) / 2
    assert mean.startswith(
        f"| **mean of 2 tasks** |  |  | +9.0 | +5.0 [{5 - margin:+.1f}, {5 + margin:+.1f}] | +5.0 ["
    )
    assert "mean of" not in far_better_table(first, 8)
    first[0].pop("pool")  # the pool was run by some of the mixes alone
    assert far_better_table(first, 8).splitlines()[2].startswith("| first | b |")
    with pytest.raises(ValueError, match="'third' has fewer than two draws of 'posterior' at K = 2 or 5"):
        far_better_table(third, 7)


def test_where_one_is_far_better_any_way_is_shown() -> None:
    command = ["answer-table", str(DRAWS / "one-fits.jsonl"), "--far-better", "8", "--way"]
    shown = {
        way: CliRunner().invoke(app, [*command, way], catch_exceptions=False).stdout
        for way in ("posterior", "choices")
    }
    records = read(DRAWS / "one-fits.jsonl", key="method")
    for way, text in shown.items():
        assert text.strip() == far_better_table(records, 8, way)
    assert shown["posterior"] != shown["choices"]


# From end to end


class Counting:
    """A source in place of real data: numbers that follow each other, or that come before."""

    @staticmethod
    def load(step: int) -> sources.Splits:
        numbers = list(range(2, 10)) * 8
        pairs = [(f"{'after' if step > 0 else 'before'} {number}", index % 2) for index, number in enumerate(numbers)]
        features = Features({"input": Value("string"), "label": ClassLabel(names=["even", "odd"])})
        columns = {"input": [text for text, _ in pairs], "label": [label for _, label in pairs]}
        return {"train": Dataset.from_dict(columns, features=features)}


YAML = """
title: Numbers
scale: offline
shift: task
model: {{kind: {kind}, path: "{path}", target_modules: [{target}], max_length: 16, max_new_tokens: 3}}
data:
  one: {{source: prompted, of: counting, step: 1, prompt: "what is {{input}} ?", answers: {{even: "4 6", odd: "5"}}}}
  two: {{source: prompted, of: counting, step: -1, prompt: "{{input}} next ?", answers: {{even: "7", odd: "8"}}}}
  new: {{source: prompted, of: counting, step: 1, prompt: "it was {{input}} ?", answers: {{odd: "5", even: "4 6"}}}}
rounds: [{{target: new, upstream: [one, two]}}]
upstream: {{max_steps: 40, batch_size: 8, learning_rate: 0.02}}
downstream: {{shots: [2, 4], seeds: 3, epochs: 1, max_steps: 2, batch_size: 4, test_size: 12, grid: {{mixing: 0.01}}}}
"""


@pytest.mark.parametrize(("kind", "shape", "target"), KINDS)
def test_a_task_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, shape: str, target: str
) -> None:
    monkeypatch.setitem(sys.modules, "few_shot_transfer.sources.counting", Counting)  # type: ignore[arg-type]
    path = tmp_path / "numbers.yaml"
    path.write_text(YAML.format(kind=kind, path=save(tmp_path / "model", shape), target=target), encoding="utf-8")
    command = ["answers", str(path), "--output", str(tmp_path / "out"), "--to", str(tmp_path), "--trained", "1"]
    shown = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    records = read(tmp_path / "numbers.jsonl", key="method")
    assert len(records) == 2 + 2 + 2 * (3 * len(answers.WAYS) + len(answers.TRAINED))
    assert "**new**: uniform, %" in shown
    again = CliRunner().invoke(app, command, catch_exceptions=False).stdout  # nothing is done again
    assert again == shown[shown.index("| accuracy") :]

    # What is said to be generated is what generate gives.
    (bench,) = answers.open_answer_benches(scenarios.load(str(path)), tmp_path / "out", None, progress=False)
    by_peft = PeftModel.from_pretrained(bench.model.build(0, 0), str(bench.adapters[0].folder))
    generated = bench.model.correct(by_peft, bench.rows["test"])
    assert 100 * sum(generated) / 12 == pytest.approx(bench.judged(0)["exact"], abs=1e-3)

    # Right answers of the pool, from which support sets are drawn.
    nll, *_ = option_scores(by_peft, bench.model, bench.rows["pool"])
    right = [int(own.argmin()) == label for own, label in zip(nll, bench.rows["pool"]["label"][:])]
    (alone,) = (own for own in records if own["adapter"] == bench.names[0])
    assert alone["pool"] == pytest.approx(100 * sum(right) / len(right), abs=1e-3)

    # One of the adapters has seen the answers, and is found by them.
    uniform = next(own["nll_token"] for own in records if own["method"] == "uniform")
    by_evidence = [own for own in records if own["method"] == "posterior" and own["k"] == 4]
    assert all(own["weights"]["one"] > 0.9 for own in by_evidence)
    assert all(own["nll_token"] < uniform - 0.15 for own in by_evidence)
    # What is cached is what the library finds on the model, and an adapter alone is what PEFT makes of it.
    composition = bench._composition
    rows = bench.rows["pool"].select(bench.support((4, 1)))
    report = fit_mixing_weights(composition.model, bench.model.encode(rows), collate=bench.model.collate)
    expected = answers.WAYS["posterior"](bench.seen((4, 1)), 1).tolist()
    assert list(report.weights.values()) == pytest.approx(expected, abs=1e-4)
    report = fit_mixing_weights(composition.model, bench.model.encode(rows), "choices", collate=bench.model.collate)
    expected = answers.WAYS["choices"](bench.seen((4, 1)), 1).tolist()
    assert list(report.weights.values()) == pytest.approx(expected, abs=1e-4)
    by_peft = PeftModel.from_pretrained(bench.model.build(0, 0), str(bench.adapters[1].folder))
    nll, *_ = option_scores(by_peft, bench.model, bench.rows["test"])
    torch.testing.assert_close(bench._scores(1, "test")[0], nll, rtol=1e-4, atol=1e-5)
    put_weights(composition, [0.25, 0.75])
    nll, *_ = option_scores(composition.model, bench.model, bench.rows["test"])
    torch.testing.assert_close(bench._scores([0.25, 0.75], "test")[0], nll, rtol=1e-4, atol=1e-5)


def test_a_prompt_goes_around_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "few_shot_transfer.sources.counting", Counting)  # type: ignore[arg-type]
    options = {"of": "counting", "step": 1, "characters": 5, "prompt": "so {input} ?", "answers": {"odd": "yes it is"}}
    (row, *_) = rows = sources.load("prompted", options)["train"]
    assert row == {"input": "so after ?", "answer": "yes it is", "options": ["yes it is"], "label": 0}
    assert len(rows) == 32
    assert rows.features["label"].names == ["odd"]
    with pytest.raises(ValueError, match="once, where the text goes"):
        sources.load("prompted", {**options, "prompt": "so"})
    with pytest.raises(ValueError, match="no class 'prime' to answer: there are even, odd"):
        sources.load("prompted", {**options, "answers": {"prime": "no"}})


def test_of_the_prompts_one_is_known_to_adapters() -> None:
    spec = scenarios.load("language/prompts")
    (known,) = {spec.data[name].options["prompt"] for name in ("tweets", "amazon")}
    assert {spec.data[name].options["prompt"] for name in ("groups", "reuters")} == {"{input}\nTopic:"}
    for setting in spec.settings():
        *of_sentiment, first, second = setting.upstream
        assert set(of_sentiment) <= {"tweets", "amazon"}
        assert (first, second) == ("groups", "reuters")
        assert len(of_sentiment) == 2 or setting.target.endswith(f"-{of_sentiment[0]}")
        own = spec.data[spec.tasks[setting.target].data].options
        assert (own["prompt"] == known) == (setting.target == "movies")
        assert setting.target == "movies" or not set(own["answers"].values()) & {" negative", " positive"}


def test_other_scenarios_are_refused() -> None:
    result = CliRunner().invoke(app, ["answers", "distractors"])
    assert result.exit_code == 2
    assert "no language model" in result.output


@pytest.mark.parametrize("path", sorted(DRAWS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_committed_draws_are_whole(path: Path) -> None:
    records = read(path, key="method")
    wanted = {"posterior", "most right answers"}
    if path.stem != "choosing":
        wanted.add("posterior, an answer counts as one token")
    if path.stem != "long-answers":  # answers that are not repeated
        wanted.add("choices")
    for target in {own["target"] for own in records}:
        of_target = [own for own in records if own["target"] == target]
        assert sum(own["method"] == "uniform" for own in of_target) == 1
        for k in {own["k"] for own in of_target} - {None}:
            methods = {own["method"] for own in of_target if own["k"] == k}
            assert wanted <= methods
            for method in methods - set(answers.TRAINED):
                seeds = sorted(own["seed"] for own in of_target if (own["k"], own["method"]) == (k, method))
                assert seeds == list(range(20)), (target, k, method)
