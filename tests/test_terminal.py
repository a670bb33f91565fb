"""What the commands print, in a terminal of 80 columns, and of names that others have made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from peft_composition.analysis.report import weights_table
from peft_composition.terminal import print_means, print_parts
from peft_composition_cli import app

from . import tiny
from .cli.test_commands import CONFIG, edit


BASE = "meta-llama/Meta-Llama-3.1-8B-Instruct"


def run(*args: object, columns: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, [*map(str, args)])


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    base = tiny.build("bert")
    good = tiny.save_lora(tmp_path / "amazon-reviews-sentiment", base, ["query", "value"], task_type="SEQ_CLS")
    dora = tiny.save_lora(tmp_path / "tweets", base, ["query"], task_type="SEQ_CLS", use_dora=True)
    (good / "README.md").write_text("---\nlicense: apache-2.0\n---\n# LoRA\n")
    return [edit(folder, base_model_name_or_path=BASE) for folder in (good, dora)]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_report_breaks_no_word(adapters: list[Path], columns: int) -> None:
    result = run("inspect", *adapters, columns=columns)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    cells = {cell.strip() for line in lines for cell in line.split("│")}
    assert {"amazon-reviews-sentiment", "tweets", BASE, "query, value", "apache-2.0", "yes", "no"} <= cells
    below = " ".join(" ".join(lines).split())
    assert "tweets: it is a DoRA adapter, whose update is not the product B A; convert it first with " in below
    assert "amazon-reviews-sentiment: not LoRA factors, not mixed: classifier.bias, classifier.weight" in below
    assert lines[-1] == "1 of 2 can be composed."


def test_a_note_about_many_is_said_once(tmp_path: Path) -> None:
    loras = [tiny.save_lora(tmp_path / f"n{n}", tiny.build("bert"), ["query"], task_type="SEQ_CLS") for n in range(9)]
    result = run("inspect", *loras)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("classifier.weight") == 1
    assert "n0, n1, n2, n3, n4, n5 and 3 more: not LoRA factors" in " ".join(result.stdout.split())


HOSTILE = "evil\x1b[2J\x1b]0;owned\x07[bold red]:fire: \u202egnp\ud800"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """An adapter whose folder, card and config come from somebody who wants to draw on the reader's terminal."""
    folder = tmp_path / "a\x1b[31mred:fire:\u202e[bold]"
    tiny.save_lora(folder, tiny.build("bert"), ["query"], task_type="SEQ_CLS")
    (folder / "README.md").write_text(f"---\nlicense: {json.dumps(HOSTILE)}\n---\n")
    return edit(folder, base_model_name_or_path=HOSTILE)


def require_harmless(text: str) -> None:
    text.encode("utf-8")
    assert all(line.isprintable() for line in text.splitlines())


def test_nothing_of_an_adapter_reaches_the_terminal_as_it_is(hostile: Path, tmp_path: Path) -> None:
    result = run("inspect", hostile, tmp_path / "no\x1b[2Jthing", columns=400)
    require_harmless(result.stdout + result.stderr)
    assert r"a\x1b[31mred:fire:\u202e[bold]" in result.stdout
    assert r"evil\x1b[2J\x1b]0;owned\x07[bold red]:fire: \u202egnp\ud800" in result.stdout
    assert r"no\x1b[2Jthing" in result.stdout
    as_json = run("inspect", hostile, "--json")
    require_harmless(as_json.stdout)
    assert json.loads(as_json.stdout)["adapters"][0]["path"] == str(hostile)


def test_errors_and_lines_show_names_escaped(hostile: Path, tmp_path: Path) -> None:
    tiny.build("bert").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    edit(hostile, base_model_name_or_path="base")
    result = run("compose", "--base", tmp_path / "base", "--adapters", hostile, "--out", tmp_path / "mix")
    assert result.exit_code == 0, result.output
    require_harmless(result.stdout + result.stderr)
    assert r"a\x1b[31mred:fire:\u202e[bold] 1" in result.stdout
    tables = run("weights", tmp_path / "mix", columns=200)
    require_harmless(tables.stdout + tables.stderr)
    assert r"a\x1b[31mred:fire:\u202e[bold]" in tables.stdout
    edit(hostile, task_type="evil\x1b[2J", peft_type=HOSTILE)
    for command in (["compose", "--out", tmp_path / "o"], ["compose", "--out", tmp_path / "o", "--task", "SEQ_CLS"]):
        refused = run(*command, "--base", tmp_path / "base", "--adapters", hostile)
        assert refused.exit_code == 1
        require_harmless(refused.stdout + refused.stderr)
        assert r"evil\x1b[2J" in refused.stderr
    (hostile / CONFIG).unlink()
    assert r"a\x1b[31mred" in run("inspect", hostile, columns=400).stdout


def test_columns_of_many_adapters_with_long_names_are_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"some-long-adapter-name-{number}" for number in range(10)]
    weights = {f"model.layers.{n}.q_proj": {name: 0.01 * k for k, name in enumerate(names)} for n in range(2)}
    whole = weights_table(weights)
    print_means(whole)
    print_parts(weights_table(weights, "block"), whole, "block")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split("│")[1:3] == [" (10) ", " some-long-adapter-name-9 "] for line in lines if "│" in line)
    heading = next(line for line in lines if "block" in line and "┃" in line)
    assert [cell.strip() for cell in heading.split("┃")[2:-1]] == [f"({number})" for number in range(5, 11)]
    row = next(line for line in lines if line.startswith("│ model.layers.1 "))
    assert [float(cell) for cell in row.split("│")[2:-1]] == pytest.approx([0.01 * k for k in range(4, 10)])


def test_one_adapter_is_no_plural(adapters: list[Path]) -> None:
    title = run("inspect", adapters[0]).stdout.splitlines()[0]
    assert title.strip() == "1 adapter"


def test_long_names_of_modules_are_shown_without_what_they_share(capsys: pytest.CaptureFixture[str]) -> None:
    weights = {
        f"base_model.vision_model.encoder.layers.{n}.self_attn.{module}": {f"adapter-{k}": 0.1 * k for k in range(6)}
        for n in (0, 11)
        for module in ("q_proj", "out_proj")
    }
    print_parts(weights_table(weights, "module"), weights_table(weights), "module")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].strip() == "Mean weight by module of base_model.vision_model.encoder.layers"
    cells = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert cells == ["0.self_attn.q_proj", "0.self_attn.out_proj", "11.self_attn.q_proj", "11.self_attn.out_proj"]
