"""A log is continued where its numbers are those of this selection, and nowhere else, however damaged it is."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_composition.choosing import Selection, select_adapters
from peft_composition.choosing.identity import digest_of_weights
from peft_composition.choosing.journal import Journal

from .. import tiny, warm
from ..hub_server import HubServer, as_the_hub
from . import candidates


ROWS = 12


@pytest.fixture
def pool(tmp_path: Path) -> list[str]:
    return candidates.save_pool(tmp_path / "pool", 3, broken=False)


def select(pool: Any, **options: Any) -> Selection:
    return select_adapters(
        options.pop("base", candidates.base()), pool, candidates.rows(ROWS), progress=False, **options
    )


def scores(selection: Selection) -> dict[str, Any]:
    return {own.name: own.score for own in [*selection.ranking, selection.base]}


def retrain(folder: str, seed: int = 777) -> None:
    tiny.save_lora(Path(folder), candidates.base(), ["query", "value"], seed=seed, r=2, lora_alpha=300)


def test_an_adapter_with_other_files_is_scored_again(pool: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    before = scores(select(pool, log=log))
    retrain(pool[0])
    expected = scores(select(pool))
    assert expected["000"] != before["000"]
    size = len(log.read_bytes().splitlines())
    for _ in range(2):
        assert scores(select(pool, log=log)) == expected
        assert len(log.read_bytes().splitlines()) == size + 1  # the others were not scored again
    shutil.rmtree(pool[0])
    assert scores(select(pool, log=log))["000"] is None


def test_an_adapter_at_another_commit_is_scored_again(pool: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with HubServer() as server, as_the_hub(server, tmp_path / "cache"):

        def push() -> None:
            server.push("me/a", {file.name: file.read_bytes() for file in Path(pool[0]).iterdir()})

        push()
        before = scores(select(["me/a", *pool[1:]], log=log))
        assert scores(select(["me/a", *pool[1:]], log=log)) == before
        retrain(pool[0])
        push()
        found = scores(select(["me/a", *pool[1:]], log=log))
    assert found["a"] == scores(select(pool))["000"] != before["a"]


def test_other_weights_settings_or_versions_are_refused(pool: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    select(pool, log=log)
    refused = pytest.raises(ValueError, match=r"log\.jsonl belongs to another selection: .* weights of the base")
    with refused:
        select(pool, log=log, base=tiny.build("bert", seed=5).eval())
    with refused:
        select(pool, log=log, mixed_precision="bf16")
    base = candidates.base()
    with refused:
        select(pool, log=log, base=base, head=base.bert.pooler.dense)
    with pytest.MonkeyPatch.context() as patch, refused:
        patch.setattr("peft_composition.choosing.identity.__version__", "0.0.9")
        select(pool, log=log)
    with torch.no_grad():
        base.classifier.weight += 1  # of the head, which may be new each time
    assert scores(select(pool, log=log, base=base)) == scores(select(pool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_digest_notices_one_value_and_two_that_changed_places(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5)).to(dtype)
    found = {digest_of_weights(model, None)}
    assert digest_of_weights(model, None) in found
    weight, mean = model[0].weight.data, model[1].running_mean
    assert isinstance(mean, torch.Tensor)
    weight[4, 6] = torch.nextafter(weight[4, 6].float(), torch.tensor(9.0)).to(dtype) if dtype.itemsize > 2 else 9
    found.add(digest_of_weights(model, None))
    weight[:2, 0] = weight[:2, 0].flip(0)
    found.add(digest_of_weights(model, None))
    mean[3] = 1
    found.add(digest_of_weights(model, None))
    assert len(found) == 4
    model[1].weight.data[0] = 3
    assert digest_of_weights(model, model[1]) != digest_of_weights(model, None)


def test_the_digest_reads_tensors_of_every_kind() -> None:
    kinds = [torch.eye(3).to_sparse(), torch.ones(9, dtype=torch.bool), torch.ones(2, dtype=torch.complex64)]
    kinds += [torch.tensor(1.5), torch.zeros(0), torch.ones(4).to(torch.float8_e4m3fn), torch.ones(2, device="meta")]
    found = set()
    for kind in kinds:
        model = torch.nn.Module()
        model.register_buffer("own", kind)
        found.add(digest_of_weights(model, None))
    assert len(found) == len(kinds)


@pytest.mark.parametrize(
    "changes",
    [
        {"values": [1.0]},
        {"values": "abc"},
        {"values": ["1.0"] * ROWS},
        {"values": [math.nan] * ROWS},
        {"right": [True]},
        {"right": [7] * ROWS},
        {"right": None},
        {"rung": [1]},
        {"rung": "0"},
        {"rung": True},
        {"rung": 99},
        {"candidate": {}},
        {"candidate": None},
        {"slope": math.nan},
        {"slope": "1.0"},
        {"head": "1.0"},
        {"apart": math.inf},
    ],
)
def test_a_damaged_line_is_scored_again(pool: list[str], tmp_path: Path, changes: dict[str, Any]) -> None:
    log = tmp_path / "log.jsonl"
    expected = scores(select(pool, log=log))
    lines = log.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), **changes})
    log.write_text("\n".join([*lines, ""]))
    assert scores(select(pool, log=log)) == expected
    assert len(log.read_text().splitlines()) == len(lines) + 1


@pytest.mark.parametrize("left", [0, 1, 20, 60, 110])
def test_a_file_that_ends_within_its_first_line_begins_anew(pool: list[str], tmp_path: Path, left: int) -> None:
    log = tmp_path / "log.jsonl"
    expected = scores(select(pool, log=log))
    whole = log.read_bytes()
    assert len(whole.splitlines()[0]) > left
    log.write_bytes(whole[:left])
    for _ in range(2):
        assert scores(select(pool, log=log)) == expected
        assert log.read_bytes() == whole


@pytest.mark.parametrize("content", [b"[]\n", b"\xff\xfe\n", b"text,label\na,0\n", b'{"form\n{"rung": 0}\n'])
def test_a_file_of_something_else_stays_as_it_is(pool: list[str], tmp_path: Path, content: bytes) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(content)
    with pytest.raises(ValueError, match=r"log\.jsonl does not begin as the log of a selection"):
        select(pool, log=log)
    assert log.read_bytes() == content


def test_a_log_of_another_version_is_told_from_something_else(pool: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"format": "peft-composition selection 1", "key": "0"}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl belongs to another selection: .* version"):
        select(pool, log=log)


def test_a_file_that_cannot_be_written_is_refused_first(pool: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the log .*pool cannot be used: .*; give another file"):
        select(pool, log=tmp_path / "pool")
    with pytest.raises(ValueError, match=r"the log .*config\.json/log cannot be used"):
        select(pool, log=Path(pool[0], "adapter_config.json", "log"))


def test_names_with_brackets(tmp_path: Path) -> None:
    path = tmp_path / "l[1]*.jsonl"
    line = {"values": [1.0], "right": [True]}
    Journal(path, "key", 1, {0: 1}).add(0, 1, line)
    assert Journal(path, "key", 0, {0: 1}).found == {(0, 1): line}


def test_candidates_in_several_spellings_count_once(pool: list[str], tmp_path: Path) -> None:
    folder = Path(pool[0])
    spellings = [pool[0], f"{pool[0]}/", os.path.relpath(pool[0]), {"path": folder.parent, "subfolder": folder.name}]
    found = select([*spellings, {"path": pool[0], "name": "other"}, pool[1]])
    assert [own.name for own in found.ranking if own.name != "001"] == ["000"]
    assert found.candidates == 2
    assert select({"path": pool[0], "name": "one"}).candidates == 1
    with pytest.raises(ValueError, match=r"an adapter is a Hub id, a local folder or a dict with 'path', got 5"):
        select([5])


def test_batches_with_a_tensor_that_is_a_number(pool: list[str]) -> None:
    rows = candidates.rows(ROWS)
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    found, expected = (
        select_adapters(candidates.base(), pool, [own], progress=False)
        for own in ({**batch, "output_attentions": torch.tensor(False)}, batch)
    )
    assert scores(found) == scores(expected)


@pytest.mark.parametrize("fault", ["folder", "full"])
def test_the_error_of_one_process_is_that_of_all(pool: list[str], tmp_path: Path, fault: str) -> None:
    if fault == "folder":
        (tmp_path / "log.jsonl.2").mkdir()
    warm.run(
        "-m", "tests.choosing.worker", tmp_path / "pool", tmp_path / "log.jsonl", tmp_path / "out",
        -1 if fault == "full" else 0, processes=2, timeout=100,
    )  # fmt: skip
    texts = [(tmp_path / f"out.{rank}").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert ("No space left" if fault == "full" else "log.jsonl.2 cannot be used") in texts[0]
