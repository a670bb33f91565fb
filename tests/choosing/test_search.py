"""Searching a Hub on loopback with the real client: what is found, filtered, refused, and what is fetched for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from peft_composition.choosing import read_candidates, search_adapters
from peft_composition_cli import app

from ..hub_server import HubServer, as_the_hub


BASE = "org/model-7b"
WEIGHTS = b"\0" * 1234
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": BASE,
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["v_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
}


def publish(hub: HubServer, repo: str, downloads: int, *tags: str, base: str = BASE, **fields: Any) -> str:
    config = {**CONFIG, "base_model_name_or_path": base, **fields}
    commit = hub.push(repo, {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": WEIGHTS})
    hub.repositories[repo].downloads = downloads
    hub.repositories[repo].tags = [f"base_model:adapter:{base}", *tags]
    return commit


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server, as_the_hub(server, tmp_path / "cache"):
        server.page = 2  # so that a listing has several pages
        server.push(BASE, {"config.json": b"{}"})
        for number in range(5):
            publish(server, f"me/lora-{number}", 100 - number, "license:mit")
        yield server


def ids(found: Any) -> list[str]:
    return [own.id for own in found]


def test_all_pages_are_listed_and_no_weights_are_fetched(hub: HubServer) -> None:
    commit = publish(hub, "me/best", 1000, "license:apache-2.0", rank_pattern={"layers.0.q_proj": 32}, r=4)
    found = search_adapters(BASE)
    assert ids(found) == ["me/best", *(f"me/lora-{number}" for number in range(5))]
    best = found[0]
    assert (best.ranks, best.targets, best.task, best.license) == (
        (4, 32),
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
        "apache-2.0",
    )
    assert (best.downloads, best.updated, best.bytes, best.commit) == (1000, "2026-01-02", 1234, commit)
    assert best.is_composable
    fetched = {request.file for request in hub.requests if request.method == "GET" and request.status == 200}
    assert fetched == {"", "adapter_config.json"}
    assert not [request for request in hub.requests if request.host == "storage"]


def test_filters(hub: HubServer) -> None:
    publish(hub, "you/other", 500, "license:gpl-3.0", "dataset:x", r=64, task_type="SEQ_CLS")
    assert ids(search_adapters(BASE, limit=2)) == ["you/other", "me/lora-0"]
    assert ids(search_adapters(BASE, author="you")) == ["you/other"]
    assert ids(search_adapters(BASE, tags=["dataset:x"])) == ["you/other"]
    assert ids(search_adapters(BASE, licenses=["GPL-3.0"])) == ["you/other"]
    assert ids(search_adapters(BASE, task="SEQ_CLS")) == ["you/other"]
    assert ids(search_adapters(BASE, most_rank=8, limit=1)) == ["me/lora-0"]
    assert ids(search_adapters(BASE, min_downloads=99)) == ["you/other", "me/lora-0", "me/lora-1"]
    assert search_adapters(BASE, author="nobody") == []


def test_adapters_of_copies_are_listed_too_from_either_end(hub: HubServer) -> None:
    copy, merge = "fast/model-7b-bnb-4bit", "someone/model-7b-poetry"
    for name in (copy, merge):
        hub.push(name, {"config.json": b"{}"})
    hub.repositories[copy].tags = [f"base_model:quantized:{BASE}"]
    hub.repositories[merge].tags = [f"base_model:finetune:{BASE}"]
    publish(hub, "me/of-copy", 50, base=copy)
    publish(hub, "me/of-poetry", 50, base=merge)
    assert "me/of-copy" in ids(search_adapters(BASE))
    assert "me/of-copy" not in ids(search_adapters(BASE, with_copies=False))
    for base in (BASE, copy):
        found = search_adapters(base)
        assert {"me/lora-0", "me/of-copy"} <= set(ids(found))
        assert "me/of-poetry" not in ids(found)
        assert all(own.is_composable for own in found), [own.reason for own in found]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"peft_type": "IA3"}, "its peft_type is IA3"),
        ({"peft_type": ["x"]}, "peft_type"),
        ({"r": "many"}, "r"),
        ({"base_model_name_or_path": "org/another"}, "it was trained on 'org/another', not on 'org/model-7b'"),
        ({"bias": "all"}, "it trained biases"),
    ],
)
def test_what_cannot_be_composed_is_a_row_with_the_reason(hub: HubServer, fields: dict[str, Any], reason: str) -> None:
    publish(hub, "me/bad", 5000)
    config = json.dumps({**CONFIG, **fields}).encode()
    hub.push("me/bad", {"adapter_config.json": config, "adapter_model.safetensors": WEIGHTS})
    found = search_adapters(BASE)
    assert found[0].id == "me/bad"
    assert reason in (found[0].reason or "")
    assert all(own.is_composable for own in found[1:])


def test_broken_repositories_are_rows(hub: HubServer) -> None:
    publish(hub, "me/empty", 905)
    hub.push("me/empty", {})
    publish(hub, "me/no-weights", 904)
    hub.push("me/no-weights", {"adapter_config.json": json.dumps(CONFIG).encode()})
    publish(hub, "me/not-json", 903)
    hub.push("me/not-json", {"adapter_config.json": b"{" * 9000, "adapter_model.safetensors": WEIGHTS})
    publish(hub, "me/gated", 902)
    hub.repositories["me/gated"].gated = True
    publish(hub, "me/../../x", 901)  # no honest Hub has such an id
    reasons = {own.id: own.reason or "" for own in search_adapters(BASE)}
    assert len(reasons) == 10
    assert "it has no adapter_config.json" in reasons["me/empty"]
    assert "neither adapter_model.safetensors nor adapter_model.bin" in reasons["me/no-weights"]
    assert reasons["me/not-json"]
    assert "gated" in reasons["me/gated"]
    assert reasons["me/../../x"]


def test_the_command_prints_hostile_text_as_text_and_writes_candidates(hub: HubServer, tmp_path: Path) -> None:
    evil = "\x1b[2J[red]\u202e"
    commit = publish(hub, "me/evil", 9000, f"license:{evil}", task_type="CAUSAL_LM", target_modules=[evil])
    publish(hub, "me/bad", 8000, use_dora=True)
    out = tmp_path / "new" / "candidates.json"
    runner = CliRunner(env={"COLUMNS": "300"})
    result = runner.invoke(app, ["search", "--base", BASE, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "\x1b[2J" not in result.stdout
    assert "\u202e" not in result.stdout
    assert "me/bad: it is a DoRA adapter" in result.stdout
    assert "candidates.json" in result.stdout
    found = read_candidates(out)
    assert len(found) == 6 - ("me/evil" not in str(found))
    assert {"path": "me/lora-0", "revision": hub.repositories["me/lora-0"].refs["main"]} in found
    assert not [own for own in found if "me/bad" in str(own)]
    assert commit
    printed = json.loads(runner.invoke(app, ["search", "--base", BASE, "--json", "--limit", "3"]).stdout)
    assert [row["id"] for row in printed["adapters"]] == ["me/evil", "me/bad", "me/lora-0"]
    assert [row["composable"] for row in printed["adapters"]][1:] == [False, True]


def test_without_the_hub_it_says_so(hub: HubServer) -> None:
    for wrong in ("model", "../x", ""):
        with pytest.raises(ValueError, match="base must be the Hub id of a model"):
            search_adapters(wrong)
    hub.stop()
    with pytest.raises(RuntimeError, match=r"the Hub could not be asked for models with base_model:"):
        search_adapters(BASE)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "lists no candidate"),
        ("# nothing\n\n", "lists no candidate"),
        ("{", "is not JSON"),
        ('{"format": "other", "adapters": []}', "its format is 'other', not"),
        ('{"format": "peft-composition candidates 1", "adapters": [{}]}', "entry 1 of its adapters has no id"),
    ],
)
def test_files_of_candidates_that_are_refused(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "c").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        read_candidates(tmp_path / "c")


def test_a_list_of_lines_is_a_file_of_candidates(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("me/a  # the first\n\n./local\n")
    assert read_candidates(tmp_path / "c") == ["me/a", "./local"]


def test_files_of_candidates_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"\xef\xbb\xbfme/a\nme/b\n")
    assert read_candidates(tmp_path / "c") == ["me/a", "me/b"]
    content = {"format": "peft-composition candidates 1", "adapters": [{"id": "me/a"}]}
    (tmp_path / "c").write_text(json.dumps(content), encoding="utf-8-sig")
    assert read_candidates(tmp_path / "c") == [{"path": "me/a"}]
