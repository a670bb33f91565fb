"""The made language with long answers: dictionaries, questions, and the posterior of an encoder-decoder model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from few_shot_transfer import answers, long_answers
from few_shot_transfer.__main__ import app
from few_shot_transfer.long_answers import FIRST, KINDS, PLACE, SECOND, THING, THINGS, agreeing, dictionary, questions
from few_shot_transfer.records import read
from typer.testing import CliRunner

from peft_composition import fit_mixing_weights


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_dictionaries_agree_as_far_as_they_should() -> None:
    own = [dictionary(generator(seed)) for seed in range(4)]
    found = agreeing(own, [4, 2, 0, 0], generator(9))
    shares = [float((found == words).all(-1).double().mean()) for words in own]
    assert 4 / 8 <= shares[0] < 5 / 8  # new words agree by chance, one pair in 256
    assert 2 / 8 <= shares[1] < 3 / 8
    assert max(shares[2:]) < 1 / 8


def test_questions_are_answered_thing_by_thing() -> None:
    words = dictionary(generator())
    rows = questions(words, 3, 20, generator(1))
    for asked, (right, wrong) in zip(rows.asked.tolist(), rows.told.tolist()):
        end = asked.index(1)
        assert asked[0] == 2 + 3
        expected = []
        for token in asked[1:end]:
            thing, kind = divmod(token - THING, KINDS)
            expected += [PLACE + thing, *words[thing, kind].tolist()]
        assert [token for token in right if token != -100] == [*expected, 1]
        assert len(expected) == 3 * (end - 1)
        assert 3 <= end - 1 <= THINGS
        told = [token for token in wrong if token != -100]
        assert len(told) == len(expected) + 1
        assert told != [*expected, 1]
        assert all(FIRST <= first < SECOND <= second for first, second in zip(told[1:-1:3], told[2::3]))


def test_long_answers_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_answers, "TEST", 20)
    benches = list(long_answers.open_made_benches(tmp_path, (20, 10)))
    assert [bench.facts["target"] for bench in benches] == list(long_answers.TASKS)
    bench = benches[0]
    found = answers.WAYS["posterior"](bench.seen((5, 1)), 1).tolist()
    rows = bench.pool[bench.support((5, 1))]
    data = [{name: value[row] for name, value in rows.given.items()} for row in range(5)]
    report = fit_mixing_weights(bench.model, data)  # what the library finds
    assert list(report.weights.values()) == pytest.approx(found, abs=1e-5)
    put = bench.model(**bench.test.given).loss
    tokens = (bench.test.told[:, 0] != -100).sum(1)
    nll, *_ = bench._scores(found, bench.test)
    assert float(nll[:, 0].sum() / tokens.sum()) == pytest.approx(put.item(), rel=1e-4)
    judged, weights = bench.learned((2, 0), [0.25] * 4, tmp_path)
    assert sum(weights) == pytest.approx(1)
    assert weights != pytest.approx([0.25] * 4, abs=1e-2)
    assert judged == bench.judged(weights)


def test_the_command_measures_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_answers, "TEST", 10)
    whole = long_answers.open_made_benches
    monkeypatch.setattr(long_answers, "open_made_benches", lambda folder: whole(folder, (4, 2)))
    command = [
        "long-answers",
        "--shots",
        "2",
        "--seeds",
        "2",
        "--trained",
        "1",
        "--output",
        str(tmp_path),
        "--to",
        str(tmp_path),
    ]
    shown = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    records = read(tmp_path / "long-answers.jsonl", key="method")
    assert len(records) == 3 * (4 + 2 + 2 * len(answers.WAYS) + len(answers.TRAINED))
    assert "**mean of 3 tasks**" in shown
