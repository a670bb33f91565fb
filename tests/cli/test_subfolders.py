"""Adapters in folders of Hub repositories, by the commands that take adapters and by files of candidates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from peft_composition import AdapterError, CompositionConfig
from peft_composition.upstream.files import locate_one
from peft_composition_cli import app

from .. import docs_setups, tiny
from ..hub_server import HubServer, as_the_hub
from ..upstream.test_hub import files_of


NAMES = ["hub/runs/first", "hub/runs/deep/second@v1"]


def run(*args: object) -> Result:
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, [*map(str, args)])


@pytest.fixture
def commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Two adapters in one repository, the second one only at a tag; the base and examples here."""
    monkeypatch.chdir(tmp_path)
    with docs_setups.text(), HubServer() as hub, as_the_hub(hub, tmp_path / "cache"):
        from transformers import AutoModelForSequenceClassification

        base = AutoModelForSequenceClassification.from_pretrained("org/base-model")
        first, second = (
            tiny.save_lora(tmp_path / name, base, ["query"], seed=number, task_type="SEQ_CLS")
            for number, name in enumerate(("one", "two"))
        )
        old = hub.push("hub/runs", files_of(second, "deep/second/"))
        hub.tag("hub/runs", "v1", old)
        new = hub.push("hub/runs", files_of(first, "first/"))
        rows = [
            "text,label",
            *(f"{word} film {end},{word}" for word in ("good", "bad") for end in ("a", "the", "was")),
        ]
        Path("mine.csv").write_text("\n".join(rows))
        yield old, new


def test_inspect(commits: tuple[str, str]) -> None:
    result = run("inspect", *NAMES, "--base", "org/base-model", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["adapters"]
    assert [(row["path"], row["revision"], row["commit"]) for row in rows] == [
        ("hub/runs/deep/second", "v1", commits[0]) if "deep" in name else ("hub/runs/first", None, commits[1])
        for name in NAMES
    ]


def test_compose(commits: tuple[str, str], tmp_path: Path) -> None:
    result = run("compose", *NAMES, "--base", "org/base-model", "--out", tmp_path / "mix", "--json")
    assert result.exit_code == 0, result.output
    provenance = json.loads((tmp_path / "mix" / "adapter_config.json").read_text())["provenance"]
    assert [(own["path"], own["subfolder"], own["commit"]) for own in provenance] == [
        ("hub/runs", "first", commits[1]),
        ("hub/runs", "deep/second", commits[0]),
    ]
    composition = str(tmp_path / "mix")
    explained = run("explain", composition, "--base", "org/base-model", "--data", "mine.csv", "--json")
    assert explained.exit_code == 0, explained.output
    assert [own["source"] for own in json.loads(explained.stdout)["adapters"]] == [
        f"hub/runs/first at {commits[1][:12]}",
        f"hub/runs/deep/second at {commits[0][:12]}",
    ]


@pytest.mark.parametrize("are_in_a_file", [False, True])
def test_select_and_compare(commits: tuple[str, str], are_in_a_file: bool) -> None:
    Path("list.txt").write_text("\n".join([*NAMES, "me/lora-a"]))
    adapters = ["--candidates", "list.txt"] if are_in_a_file else [*NAMES, "me/lora-a"]
    options: list[Any] = [*adapters, "--base", "org/base-model", "--data", "mine.csv", "--json"]
    selected = run("select", *options)
    assert selected.exit_code == 0, selected.output
    ranking = json.loads(selected.stdout)["ranking"]
    assert {row["adapter"] for row in ranking} == {"hub/runs/first", "hub/runs/deep/second", "me/lora-a"}
    assert {row["reason"] for row in ranking} == {None}
    compared = run("compare", *options, "--fast")
    assert compared.exit_code == 0, compared.output
    assert json.loads(compared.stdout)["broken"] == []


def test_the_command_that_select_prints_names_the_folder(commits: tuple[str, str], tmp_path: Path) -> None:
    selected = run("select", NAMES[1], "--base", "org/base-model", "--data", "mine.csv")
    assert selected.exit_code == 0, selected.output
    assert f"--base org/base-model {NAMES[1]} --mixing" in selected.stdout


def test_what_is_not_there_is_named(commits: tuple[str, str]) -> None:
    missing = run(
        "inspect", "hub/runs/third", "hub/runs/deep", "hub/gone/first", "hub/runs", "one/two/three", "--json"
    )
    assert missing.exit_code == 1
    reasons = [row["reason"] for row in json.loads(missing.stdout)["adapters"]]
    assert "hub/runs/third is not an adapter: it has no adapter_config.json" in reasons[0]
    assert "hub/runs/deep is not an adapter: it has no adapter_config.json" in reasons[1]
    assert "hub/gone is neither a local folder nor a Hub repository that you can read" in reasons[2]
    assert "Choose one: its path with /first" in reasons[3]
    expected = (
        "there is no folder one/two/three; one is a folder here, so the Hub was not asked: for the Hub's one/two"
    )
    assert expected in reasons[4]


def test_in_python_it_is_a_dict(commits: tuple[str, str]) -> None:
    (reference,) = CompositionConfig(adapters=["hub/runs/first"]).references
    with pytest.raises(AdapterError, match=r'there is no folder hub/runs/first; .*, write {"path": "hub/runs", "subf'):
        locate_one(reference)
