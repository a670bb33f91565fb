"""The table in words, as JSON and as a plot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from peft_composition.comparing import BrokenAdapter, Comparison, MethodScore, Verdict, plot_comparison


VERDICT = Verdict("cannot tell", "evidence", "fresh LoRA", 0.1, -0.05, 0.2, 0.7, 0.1, 0.2, 3, 0.01, 0.9, 120)
RESULT = Comparison(
    (
        MethodScore("head only", "alternative", 0.5, 0.4, 0.6, 0.7, 770, 0.1),
        MethodScore("fresh LoRA", "alternative", 0.7, 0.6, 0.8, 0.5, 111_362, 60.0),
        MethodScore("evidence", "adapters", 0.8, 0.7, 0.9, 0.4, 770, 0.5),
        MethodScore("random LoRAs", "control", 0.45, 0.3, 0.6, 0.7, 770, 0.2),
    ),
    VERDICT,
    "accuracy",
    "40 examples, each left out 1 time (5 folds)",
)


def test_a_table_with_the_verdict_in_words() -> None:
    first, _, *rows, empty, verdict = str(RESULT).splitlines()
    assert rows[-3:] == RESULT.legend
    assert first == RESULT.setting
    assert rows[1].split() == [
        "fresh",
        "LoRA",
        "70.0",
        "%",
        "[60.0,",
        "80.0]",
        "0.500",
        "111,362",
        "60.0",
        *["without", "adapters"],
    ]
    assert empty == ""
    assert verdict == (
        "cannot tell whether evidence is better or worse than fresh LoRA: +10.0 points [-5.0, +20.0] "
        "(helps 70%, equivalent 10%, harms 20%; 90% are needed; the same in practice within 1 point). "
        "About 120 more examples would tell, if the difference stays as it is."
    )


def test_what_needs_a_word_is_said_below() -> None:
    more = (*RESULT.rows, MethodScore("fresh LoRA x 0.5", "alternative", 0.6, 0.5, 0.7, 0.5, 111_362, 60.0))
    broken = (BrokenAdapter("c", "is empty"),)
    shown = str(replace(RESULT, rows=more, broken=broken, seconds=61.0)).splitlines()
    assert shown[-7:-1] == [
        "left out: c: is empty",
        "evidence: adapters weighed by how well each predicts examples that are left out",
        "random LoRAs: random values of the adapters' sizes; what they gain is not what adapters know",
        "fresh LoRA x 0.5: the fresh LoRA with its product times 0.5",
        "seconds: of a method by itself; 61.0 in all, where passes are shared",
        "",
    ]
    assert not any("x 0.5" in line for line in RESULT.legend)


def test_json_is_plain() -> None:
    found = json.loads(json.dumps(RESULT.as_json()))
    assert found["format"] == 2
    assert (found["verdict"], found["best"], found["against"]) == ("cannot tell", "evidence", "fresh LoRA")
    assert (found["seconds"], found["broken"]) == (0.0, [])
    assert found["methods"][1] == {
        "name": "fresh LoRA", "kind": "alternative", "score": 0.7, "low": 0.6, "high": 0.8, "loss": 0.5,
        "trainable": 111_362, "seconds": 60.0,
    }  # fmt: skip


def test_a_plot_has_every_method_and_the_verdict(tmp_path: Path) -> None:
    figure = plot_comparison(RESULT)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "random LoRAs", "head only", "fresh LoRA", "evidence",
    ]  # fmt: skip
    points = sorted(float(line.get_xdata()[0]) for line in axes.get_lines() if len(line.get_xdata()) == 1)  # type: ignore[arg-type,index]
    for value in (45.0, 50.0, 70.0, 80.0):
        assert any(point == pytest.approx(value) for point in points)
    assert "cannot tell" in figure.get_supxlabel()
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
