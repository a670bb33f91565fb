"""Selecting from a pool: scores, rungs, broken candidates, what is kept on disk, several processes, and the base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_composition import CompositionConfig, fit_mixing_weights, score_adapters
from peft_composition.choosing import Selection, adapters_in, select_adapters
from peft_composition.choosing.ladder import ladder
from peft_composition.choosing.risk import Gains, chance_of_harm
from peft_composition.choosing.trials import Trial, ranked

from .. import tiny, warm
from ..hub_server import HubServer, as_the_hub
from . import candidates


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return candidates.save_pool(tmp_path_factory.mktemp("pool"), 60)


def select(pool: list[str], rows: int = 40, **options: object) -> Selection:
    return select_adapters(candidates.base(), pool, candidates.rows(rows), progress=False, **options)  # type: ignore[arg-type]


def test_without_halving_scores_are_those_of_score_adapters(pool: list[str]) -> None:
    good = [own for own in pool if Path(own).name not in candidates.BROKEN][:12]
    found = select(good, halving=False)
    expected = score_adapters(candidates.base(), candidates.rows(40), adapters=good)
    assert [own.name for own in found.ranking] == [
        row.name for row in sorted(expected.rows[:-1], key=lambda row: -row.score)
    ]
    for own in found.ranking:
        # The order of the examples is another, and so is that of the sums.
        assert own.score == pytest.approx(expected[own.name].score, abs=1e-5)
        assert own.accuracy == pytest.approx(expected[own.name].accuracy)
        assert (own.low or 0) < (own.score or 0) < (own.high or 0)
    assert found.base.score == pytest.approx(expected["base"].score, abs=1e-5)
    assert found.passed >= 13 * 40


def test_halving_sees_less_than_half_and_its_best_is_among_the_best(pool: list[str]) -> None:
    """20 of a class: 2, 18 and 40 examples; of 60 candidates the mixes of the last 8 are a good part."""
    found, whole = select(pool), select(pool, halving=False)
    assert found.passed < 0.5 * whole.passed
    ranked = [own.name for own in whole.ranking]
    assert found.ranking[0].name in ranked[:8]
    assert {own.examples for own in found.ranking} == {0, 2, 18, 40}
    assert [own.examples for own in found.ranking[:8]] == [40] * 8
    assert 8 <= sum(own.examples == 40 for own in found.ranking) <= 8 + 3  # and those that are steep
    assert sum(own.examples > 2 for own in found.ranking) == 18 + 2  # of 60 that can be read, 30% and a fiftieth
    assert sum(own.examples == 2 for own in found.ranking) == 42 - 18 - 2  # 70%, without those that went on
    assert (found.candidates, found.examples) == (64, 40)


def test_broken_candidates_are_rows_with_a_reason_and_the_base_stays_as_it_was(pool: list[str]) -> None:
    base = candidates.base()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    trained = [parameter.requires_grad for parameter in base.parameters()]
    base.train()
    found = select_adapters(base, pool, candidates.rows(12), progress=False)
    reasons = {own.name: own.reason or "" for own in found.ranking[-4:]}
    assert set(reasons) == set(candidates.BROKEN)
    assert "DoRA" in reasons["dora"]
    assert "has neither adapter_model.safetensors" in reasons["no-weights"]
    assert "q_proj" in reasons["other-shape"]
    assert not any(own.is_dropped for own in found.ranking[-4:])
    assert all((own.reason is None) == (own.score is not None) for own in found.ranking[:-4])
    assert all(own.is_dropped for own in found.ranking[:-4] if own.score is None)
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [parameter.requires_grad for parameter in base.parameters()] == trained
    assert base.training


def test_the_result_is_a_config_json_and_a_table(pool: list[str]) -> None:
    found = select(pool, most=3, task_type="SEQ_CLS")
    assert 1 <= len(found.chosen) <= 3
    assert next(iter(found.chosen)) == found.ranking[0].name
    assert 0 < sum(found.chosen.values()) <= 1 + 1e-6
    model = get_peft_model(candidates.base(), found.config)
    assert set(next(iter(model.mixing_weights().values()))) == set(found.chosen)
    weights = next(iter(model.mixing_weights().values()))
    assert weights == pytest.approx(found.chosen, abs=1e-6)
    printed = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert set(printed) == {"chosen", "ranking", "candidates", "examples", "risk_worse_than_base"}
    assert set(printed["ranking"][0]) == {
        "adapter", "score", "low", "high", "examples", "information", "dropped", "reason"
    }  # fmt: skip
    assert printed["chosen"][0]["adapter"] in pool
    assert [own["adapter"] for own in printed["chosen"]] == [own["path"] for own in found.references]
    text = str(found)
    assert "64 candidates on 40 examples" in text
    assert f"{100 * found.risk_worse_than_base:.0f} %" in text
    assert text.isascii()


def test_those_without_a_score_are_dropped_or_broken_and_say_why(pool: list[str]) -> None:
    found = select(pool, rows=12)
    printed = found.as_json()["ranking"]
    json.dumps(printed, allow_nan=False)
    dropped = [own for own in printed if own["dropped"]]
    assert {own["examples"] for own in dropped} == {0, 2}
    for own in dropped:
        assert own["score"] is own["low"] is own["high"] is None  # six of a class: none was scored before all
        assert own["reason"].startswith("dropped " + ("after one example" if own["examples"] else "before"))
    assert [own["examples"] for own in dropped] == sorted((own["examples"] for own in dropped), reverse=True)
    whole = [own for own in printed if own["score"] is not None]
    assert printed == [*whole, *dropped, *printed[-4:]]
    assert all(own["examples"] == 12 and own["reason"] is None for own in whole)
    text = str(found)
    assert f"and {len(dropped)} more that were dropped before they had a score" in text
    assert "dora: it is a DoRA" in text
    assert "dropped after" not in text
    assert not any(own.is_dropped for own in select(pool, rows=12, halving=False).ranking)


def trial(score: float, information: float | None) -> Trial:
    return Trial(torch.full((4,), score), torch.ones(4, dtype=torch.bool), information=information)


def test_the_order_is_by_score_and_by_what_heads_tell() -> None:
    trials = {1: trial(0.3, 0.1), 2: trial(0.2, 0.4), 3: trial(0.1, None), 4: trial(0.0, 0.3)}
    # places by score 0, 1/3, 2/3, 1; by heads 1, 0, 1/2 (not known), 1/2
    assert ranked(trials) == [2, 1, 3, 4]
    one_head = {**trials, 1: trial(0.3, None), 2: trial(0.2, None)}
    assert ranked(one_head) == [1, 2, 3, 4], "one head alone cannot be compared"
    assert ranked({7: trial(0.3, 0.1)}) == [7]


def test_heads_of_candidates_are_asked_as_fit_mixing_weights_asks_them(tmp_path: Path) -> None:
    folders = candidates.save_pool(tmp_path, 4, broken=False)
    for number, folder in enumerate(folders):
        file = Path(folder, "adapter_model.safetensors")
        factors = {key: value for key, value in load_file(file).items() if ".lora_" in key}
        generator = torch.Generator().manual_seed(number)
        head = {"base_model.model.classifier.weight": number * torch.randn(3, 16, generator=generator)}
        save_file({**factors, **(head if number else {})}, file)
    found = select_adapters(candidates.base(), folders, candidates.rows(12), progress=False)
    config = CompositionConfig(adapters=[*folders], mixing="fixed", task_type="SEQ_CLS")
    report = fit_mixing_weights(get_peft_model(candidates.base(), config), candidates.rows(12))
    told = {own.name: own.information for own in found.ranking}
    assert told["000"] is None
    assert {name: told[name] for name in ("001", "002", "003")} == pytest.approx(
        {name: own for name, own in (report.informations or {}).items() if own is not None}, abs=1e-5
    )
    assert "head: what its own head tells" in str(found)
    assert f"{told['003']:.3f}" in str(found)


def test_answers_of_language_models(tmp_path: Path) -> None:
    base = tiny.build("llama").eval()
    pool = [str(tiny.save_lora(tmp_path / f"{n}", base, ["q_proj", "v_proj"], seed=n + 1, r=2)) for n in range(5)]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (6, 9), generator=generator)
    rows = [{"input_ids": own, "labels": torch.where(torch.arange(9) < 6, -100, own)} for own in ids]

    def collate(own: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([row[key] for row in own]) for key in own[0]}

    found = select_adapters(base, pool, rows, collate=collate, progress=False)
    expected = score_adapters(base, [collate(rows)], adapters=pool)
    assert found.measure == "log-likelihood"
    assert found.ranking[0].name == expected.best.name
    for own in found.ranking:
        assert own.score == pytest.approx(expected[own.name].score, abs=1e-5)


def test_rungs_have_the_same_number_of_each_class_and_grow() -> None:
    rows = candidates.rows(40)
    model = candidates.base()
    by_rows = ladder(model, rows, None, None, 16, seed=3)
    assert by_rows.sizes == [2, 6, 18, 40]
    assert by_rows.first_scored == 1
    assert ladder(model, rows[:38], None, None, 16, seed=3).sizes == [2, 4, 12, 38]
    for rung in by_rows.rungs:
        assert rung.labels is not None
        assert rung.labels.bincount().tolist() == [len(rung) // 2] * 2
    batches = [
        {key: torch.stack([torch.as_tensor(row[key]) for row in rows[start : start + 7]]) for key in rows[0]}
        for start in range(0, 40, 7)
    ]
    by_batches = ladder(model, batches, None, None, 16, seed=3)
    for one, other in zip(by_rows.rungs, by_batches.rungs, strict=True):
        ids = [{tuple(ids.tolist()) for batch in own.batches for ids in batch["input_ids"]} for own in (one, other)]
        assert ids[0] == ids[1]
    assert ladder(model, rows, None, None, 16, seed=4).digest != by_rows.digest
    with pytest.raises(ValueError, match="one example of each of 2 classes"):
        ladder(model, rows[:2], None, None, 16, seed=0)
    with pytest.raises(ValueError, match="all 9 examples have the same class"):
        ladder(model, rows[:18:2], None, None, 16, seed=0)


def test_what_is_refused(pool: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no candidates"):
        select([])
    with pytest.raises(ValueError, match="most must be at least 1"):
        select(pool, most=0)
    with pytest.raises(ValueError, match=r"none of 2 candidates could be scored; of the first, 'dora': it is a DoRA"):
        select([own for own in pool if Path(own).name in ("dora", "no-weights")])
    with pytest.raises(ValueError, match="is no adapter and has none in its subfolders"):
        adapters_in(tmp_path)
    log = tmp_path / "log.jsonl"
    select(pool[:3], log=log)
    with pytest.raises(ValueError, match=r"log\.jsonl belongs to another selection"):
        select(pool[:3], log=log, seed=1)
    with pytest.raises(ValueError, match=r"log\.jsonl belongs to another selection"):
        select(pool[:4], log=log)


def test_it_goes_on_from_lines_that_are_there_and_one_that_was_cut_off(pool: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    expected = select(pool, log=log)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:20]) + lines[20][:30])
    assert select(pool, log=log).as_json() == expected.as_json()
    after = [json.loads(line) for line in log.read_bytes().splitlines() if line != lines[20][:30]]
    places = [(line["rung"], line["candidate"]) for line in after[1:]]
    assert len(places) == len(set(places)) == len(lines) - 1
    assert select(pool).as_json() == expected.as_json()


def test_the_log_of_classes_of_which_one_has_a_single_example_is_used_again(tmp_path: Path) -> None:
    """That one cannot be left out: there are fewer scores than examples."""
    pool = candidates.save_pool(tmp_path / "pool", 12, broken=False)
    rows = [own for own in candidates.rows(20) if own["labels"]] + candidates.rows(1)
    assert len(rows) == 11
    log = tmp_path / "log.jsonl"
    selections = [select_adapters(candidates.base(), pool, rows, log=log, progress=False) for _ in range(2)]
    assert selections[0].as_json() == selections[1].as_json()
    written = log.read_bytes().splitlines()
    assert len(written) == len({(own["rung"], own["candidate"]) for own in map(json.loads, written[1:])}) + 1


def test_two_processes_share_100_candidates_and_survive_kill_9(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    candidates.save_pool(folder, 96)
    warm.run("-m", "tests.choosing.worker", folder, "", tmp_path / "one.json")
    expected = json.loads((tmp_path / "one.json").read_text())
    assert expected["candidates"] == 100
    log = tmp_path / "log.jsonl"
    killed = warm.run("-m", "tests.choosing.worker", folder, log, tmp_path / "two.json", 20, processes=2)
    assert killed.returncode != 0
    assert not (tmp_path / "two.json").exists()
    before = {file: file.read_bytes() for file in (log, tmp_path / "log.jsonl.2")}
    assert len(before[log].splitlines()) == 21
    done = warm.run("-m", "tests.choosing.worker", folder, log, tmp_path / "two.json", processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two.json").read_text()) == expected
    for file, lines in before.items():
        assert file.read_bytes().startswith(lines)
    scored = [json.loads(line) for file in before for line in file.read_bytes().splitlines()]
    places = [(own["rung"], own["candidate"]) for own in scored if "rung" in own]
    assert len(places) == len(set(places))
    assert all(len(file.read_bytes().splitlines()) > len(places) / 3 for file in before)  # they shared them out
    known = [json.loads(line) for lines in before.values() for line in lines.splitlines()]
    new = {*places} - {(own["rung"], own["candidate"]) for own in known if "rung" in own}
    one, two = (int((tmp_path / f"{name}.json.passed").read_text()) for name in ("one", "two"))
    # Each process that scores first finds the slopes: once without the others, and twice after the kill.
    assert one - two == passed({*places}) - passed(new) - 4 * 40


def passed(places: set[tuple[int, int]]) -> int:
    """How many examples go through the model on these rungs, by those on them."""
    sizes, before = {-1: 0, 0: 2, 2: 18, 3: 40}, {-1: -1, 0: -1, 2: 0, 3: 2}
    return sum(sizes[rung] - (sizes[before[rung]] if (before[rung], own) in places else 0) for rung, own in places)


MEMORY = """
import gc, sys
from pathlib import Path
import torch
from transformers import BertConfig, BertForSequenceClassification
from peft_composition.choosing import adapters_in, select_adapters
from tests import tiny
from tests.choosing import candidates

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

torch.manual_seed(0)
sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
base = BertForSequenceClassification(BertConfig(vocab_size=60, **sizes)).eval()
first = tiny.save_lora(Path(sys.argv[1], "0"), base, ["query", "value"], seed=1, r=256)
size = (first / "adapter_model.safetensors").stat().st_size / 1e6
for number in range(1, 64):
    (first.parent / str(number)).symlink_to(first)
pool = adapters_in(sys.argv[1])
select_adapters(base, pool[:10], candidates.rows(12), progress=False)  # with a composition of 8
before = resident()
select_adapters(base, pool, candidates.rows(12), progress=False)
print(size, resident() - before)
"""


def test_memory_does_not_grow_with_the_number_of_candidates(tmp_path: Path) -> None:
    done = warm.run("-c", MEMORY, tmp_path)
    assert done.returncode == 0, done.stderr
    size, growth = map(float, done.stdout.split())
    assert size > 2
    assert growth < 8 * size  # of 64


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server, as_the_hub(server, tmp_path / "cache"):
        yield server


def test_downloads_stay_within_the_budget(hub: HubServer, pool: list[str], tmp_path: Path) -> None:
    """What was in the cache before stays; with no budget nothing else does, and the result is the same."""
    good = [own for own in pool if Path(own).name not in candidates.BROKEN][:10]
    for own in good:
        hub.push(f"me/{Path(own).name}", {file.name: file.read_bytes() for file in Path(own).iterdir()})
    ids = [f"me/{Path(own).name}" for own in good]
    cache = tmp_path / "cache"
    select(ids[:1])
    assert [own.name for own in cache.glob("models--*")] == ["models--me--000"]
    expected = select(good, rows=12)
    found = select(ids, rows=12, cache_budget=0.0, most=1)
    left = {own.name for own in cache.glob("models--*")}
    assert left == {"models--me--000", f"models--me--{next(iter(found.chosen))}"}  # read once more for its weight
    assert [own.score for own in found.ranking] == [own.score for own in expected.ranking]
    select(ids, rows=12)
    assert len([*cache.glob("models--*")]) == 10


# The risk


@pytest.mark.parametrize("halving", [False, True])
def test_the_risk_is_that_of_the_trials(halving: bool, pool: list[str], tmp_path: Path) -> None:
    """From the log: gains over the base in the first round with scores, and of those that were in the last."""
    found = select(pool, log=tmp_path / "log.jsonl", halving=halving)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[1:]]
    seen = {(line["rung"], line["candidate"]): line for line in lines}
    rungs = sorted({rung for rung, number in seen if number == 0})
    assert rungs == ([2, 3] if halving else [3])
    assert {rung for rung, _ in seen} - {*rungs} == ({-1, 0} if halving else set())
    begun, ended = (sorted(number for place, number in seen if place == rung and number) for rung in (rungs[0], 3))
    assert len(begun) > len(ended) >= 8 if halving else begun == ended
    best = max(ended, key=lambda number: np.mean(seen[3, number]["values"]))

    def gains(key: str) -> Gains:
        first, last = (
            [np.subtract(seen[rung, own][key], seen[rung, 0][key], dtype=float) for own in some]
            for rung, some in ((rungs[0], begun), (3, ended))
        )
        places = torch.tensor([begun.index(own) for own in ended])
        return Gains(torch.tensor(np.array(first)), torch.tensor(np.array(last)), places, ended.index(best))

    assert found.risk_worse_than_base == pytest.approx(chance_of_harm(gains("values"), gains("right"), True), abs=1e-9)
