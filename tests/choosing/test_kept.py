"""What candidates put out on earlier rungs is not computed again, changes no score, and stays within its memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_composition.choosing import Selection, select_adapters, trials
from peft_composition.choosing.kept import Kept, KeptOutputs
from peft_composition.evidence.own_heads import own_head
from peft_composition.evidence.passes import Outputs

from .. import tiny
from . import candidates


def counted(model: nn.Module) -> tuple[nn.Module, Counter[tuple[int, ...]]]:
    """A model, and how often it has run on each example."""
    seen: Counter[tuple[int, ...]] = Counter()
    model.get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]
        lambda _, given: seen.update(tuple(row.tolist()) for row in given[0])
    )
    return model, seen


def answers(count: int) -> dict[str, Any]:
    ids = torch.randint(1, 60, (count, 9), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": own, "labels": torch.where(torch.arange(9) < 6, -100, own)} for own in ids]
    return {"data": rows, "collate": lambda own: {key: torch.stack([row[key] for row in own]) for key in own[0]}}


def select(kind: str, pool: list[str]) -> tuple[Selection, Counter[tuple[int, ...]]]:
    model, seen = counted(tiny.build(kind).eval())
    given = {"data": candidates.rows(40)} if kind == "bert" else answers(36)
    return select_adapters(model, pool, most=1, progress=False, **given), seen


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_an_example_is_passed_once_and_scores_are_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = ["query", "value"] if kind == "bert" else ["q_proj", "v_proj"]
    model = tiny.build(kind)
    pool = [str(tiny.save_lora(tmp_path / f"{n:02}", model, targets, seed=n + 1, r=2)) for n in range(60)]
    heads: list[str] = []

    def reading(name: str, reference: Any) -> Any:
        heads.append(reference["path"])
        return own_head(name, reference)

    monkeypatch.setattr(trials, "own_head", reading)
    found, seen = select(kind, pool)
    assert len(heads) == len({*heads}) == (42 if kind == "bert" else 0)  # each is read once
    monkeypatch.setattr(trials, "KeptOutputs", lambda: KeptOutputs(0))
    again, more = select(kind, pool)
    assert found.as_json() == again.as_json()
    # With the base, of 61 answers 16 go on to the second rung and 9 to the last. Of 60 for classes 42 go to the first,
    # without the base, 20 to the second, and of these 8 by their scores and 3 by their slopes to the last.
    first, second, whole = (2, 18, 40) if kind == "bert" else (4, 12, 36)
    assert sorted({own.examples for own in found.ranking} - {0}) == [first, second, whole]
    firsts, seconds, wholes = (sum(own.examples >= rung for own in found.ranking) for rung in (first, second, whole))
    assert (firsts, seconds) == (42, 20) if kind == "bert" else (firsts, seconds, wholes) == (60, 15, 8)
    assert 8 <= wholes <= 11
    once = firsts * first + seconds * (second - first) + wholes * (whole - second) + whole
    each = firsts * first + seconds * second + wholes * whole + second + whole
    if kind != "bert":
        each += first  # of the base, which passes no example of each class by itself
    weighing = (3 if kind == "bert" else 2) * whole  # the mixes of the last weights
    forward, slopes = (2 * whole, 4 * whole) if kind == "bert" else (0, 0)  # a backward pass is as two forward ones
    assert sum(more.values()) == each + weighing + forward
    assert sum(seen.values()) == once + weighing + forward
    assert found.passed == once + slopes
    assert again.passed == each + slopes  # nothing was kept


def test_what_a_log_has_is_not_counted_and_what_is_passed_again_is(tmp_path: Path) -> None:
    pool = candidates.save_pool(tmp_path / "pool", 40)
    log = tmp_path / "log.jsonl"

    def run() -> tuple[int, int]:
        model, seen = counted(tiny.build("bert").eval())
        found = select_adapters(model, pool, candidates.rows(40), most=1, log=log, progress=False)
        return found.passed, sum(seen.values()) - 3 * 40  # the last weights are not candidates

    first, seen = run()
    assert first == seen + 2 * 40  # a backward pass is as two forward ones
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(line for line in lines if b'"rung": 3' not in line))
    # Those of the last rung and the base run over all 40; no outputs of the rungs before are there.
    last = sum(b'"rung": 3' in line for line in lines)
    assert 9 <= last <= 12
    assert run() == (last * 40, last * 40)
    assert run() == (0, 0)


def test_the_worst_go_where_room_ends() -> None:
    kept = KeptOutputs(1000)
    for number, score in enumerate((0.3, 0.1, 0.2, 0.4)):
        kept.put(number, score, Kept(Outputs(1, (torch.zeros(100),))))  # 400 bytes
    assert [kept.take(number) is None for number in range(4)] == [False, True, True, False]
    for number in range(2):
        kept.put(number, 0.0, Kept(Outputs(1, (torch.zeros(50),)), {"weight": torch.zeros(50)}))
    kept.drop_others({1})
    kept.put(2, -1.0, Kept(Outputs(2, (torch.zeros(50), torch.zeros(50)))))
    kept.put(2, 1.0, Kept(Outputs(3, (torch.zeros(50), torch.zeros(50)))))  # in place of the one before
    assert kept.take(0) is None
    assert kept.take(1) is not None
    last = kept.take(2)
    assert last is not None
    assert last.outputs.batches == 3
    kept.put(5, 0.0, Kept(Outputs(1, (torch.zeros(10),)), {"weight": torch.zeros(1000)}))  # more than fits
    assert kept.take(5) is None
