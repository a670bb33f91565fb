"""Progress in a log file: a line every so often, and none of what is over before."""

from __future__ import annotations

import sys

import pytest

from peft_composition import progress
from peft_composition.progress import Lines, progress_bar


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar(10, "Comparing", "run") as bar:
        assert isinstance(bar, Lines)
        for step in range(10):
            bar.set_postfix_str(f"part {step}")
            now[0] += 12
            bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "Comparing: 3 of 10 runs, 00:36, about 01:24 left (part 2)",
        "Comparing: 6 of 10 runs, 01:12, about 00:48 left (part 5)",
        "Comparing: 9 of 10 runs, 01:48, about 00:12 left (part 8)",
    ]


def test_what_is_quick_or_not_wanted_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for is_shown in (True, False):
        with progress_bar(2, "Comparing", "run", is_shown) as bar:
            bar.update()
            bar.reset()
            bar.update(2)
            assert bar.n == 2 or not is_shown
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar(2, "Comparing", "run") as bar:
        assert not isinstance(bar, Lines)
        assert (bar.total, bar.desc) == (2, "Comparing")
