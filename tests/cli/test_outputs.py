"""Files that cannot be written are refused before a long run; what fails afterwards does not take the result along."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from typer.testing import CliRunner, Result

from peft_composition.choosing.candidates import write_candidates
from peft_composition.choosing.search import FoundAdapter
from peft_composition.cli import compare as compare_command
from peft_composition.cli import search as search_command
from peft_composition.cli.outputs import require_writable
from peft_composition_cli import app

from .test_compare import QUICK
from .test_compare import folder as reviews  # noqa: F401
from .test_explain import folder as saved  # noqa: F401


COMPARE = ("compare", "--base", "org/base-model", "me/lora-a", "--data", "mine.csv", "--text", "review", "--label",
           "stars", "--fast", *QUICK)  # fmt: skip


def run(*args: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, list(map(str, args)))


@pytest.mark.parametrize(
    "args",
    [
        ("compare", "--base", "none", "none", "--data", "none.csv", "--label", "x", "--png", "file/plot.png"),
        ("select", "--base", "none", "none", "--data", "none.csv", "--out", "file/found.json"),
        ("explain", ".", "--data", "none.csv", "--out", "file/report.md"),
        ("prune", ".", "--data", "none.csv", "--out", "file/new"),
        ("search", "--base", "none", "--out", "file/found.txt"),
    ],
)
def test_a_file_that_cannot_be_written_comes_first(
    args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    result = run(*args)
    assert result.exit_code == 1, result.output
    assert "cannot be written: Not a directory; give another path" in result.stderr


def test_what_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("old")
    require_writable([None, tmp_path / "there.json", tmp_path / "new" / "deep" / "a.png", Path(os.devnull)])
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]
    assert (tmp_path / "there.json").read_text() == "old"
    with pytest.raises(OSError, match="Is a directory"):
        require_writable([tmp_path])


def test_without_matplotlib_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"a\.png' needs matplotlib: pip install 'peft-composition\[cli\]'"):
        require_writable([tmp_path / "a.png"])
    require_writable([tmp_path / "a.html"])


def test_a_comparison_is_printed_if_its_plot_fails(
    reviews: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(compare_command, "plot_comparison", full)
    for more in ((), ("--json",)):
        result = run(*COMPARE, "--png", "plot.png", *more)
        assert result.exit_code == 1
        assert "No space left on device" in result.stderr
        assert "head only" in result.stdout


def test_an_explanation_is_printed_if_a_report_fails(
    saved: Path,  # noqa: F811
) -> None:
    # Both can be written by themselves; with the first there, the folder of the second cannot be made.
    result = run("explain", "composed", "--data", "mine.csv", "--out", "a.md", "--out", "a.md/b.md", "--json")
    assert result.exit_code == 1
    assert '"out"' in result.stdout
    assert "a.md" in result.stdout


def test_what_was_pruned_and_found_is_printed_if_it_cannot_be_saved(
    saved: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    for more in ((), ("--json",)):
        result = run("prune", "composed", "--data", "mine.csv", "--out", "new", *more)
        assert result.exit_code == 1
        assert "No space left on device" in result.stderr
        assert "lora-a" in result.stdout
        assert "Saved" not in result.stdout
    assert json.loads(result.stdout)["out"] is None

    row = FoundAdapter("me/found", "org/base-model")
    monkeypatch.setattr(search_command, "search_adapters", lambda *_, **__: [row])
    monkeypatch.setattr(search_command, "write_candidates", full)
    for more in ((), ("--json",)):
        result = run("search", "--base", "org/base-model", "--out", "found.json", *more)
        assert result.exit_code == 1
        assert "No space left on device" in result.stderr
        assert "me/found" in result.stdout
    assert json.loads(result.stdout)["out"] is None


def test_a_file_stays_whole_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found.json"
    write_candidates(path, "org/base-model", [])
    before = path.read_text()
    link = tmp_path / "link.json"
    link.symlink_to(path)

    def half(self: Path, text: str, encoding: str) -> None:
        with open(self, "w", encoding=encoding) as file:
            file.write(text[: len(text) // 2])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="No space left"):
            write_candidates(path, "org/other", [])
    assert path.read_text() == before
    write_candidates(link, "org/third", [])
    assert json.loads(path.read_text())["base"] == "org/third"
    assert link.is_symlink()
    write_candidates(os.devnull, "org/third", [])
    assert not Path(os.devnull).is_file()
    assert sorted(own.name for own in tmp_path.iterdir()) == ["found.json", "link.json"]
