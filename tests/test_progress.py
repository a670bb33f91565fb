"""Progress: a bar, or on the command line in a log file a line every so often, and none of what is over before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from peft_composition import progress
from peft_composition.progress import Lines, progress_bar, say_in_lines


@pytest.fixture
def in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a command that writes into a log file."""
    monkeypatch.setattr(progress, "_are_lines", False)
    say_in_lines()


@pytest.mark.usefixtures("in_lines")
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


@pytest.mark.usefixtures("in_lines")
def test_what_is_quick_or_not_wanted_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for is_shown in (True, False):
        with progress_bar(2, "Comparing", "run", is_shown) as bar:
            bar.update()
            bar.reset()
            bar.update(2)
            assert bar.n == 2 or not is_shown
    assert capsys.readouterr().err == ""


def test_a_bar_in_python_wherever_stderr_goes() -> None:
    """A notebook is no terminal either. In a fresh process: others here may have turned bars off."""
    program = (
        "from peft_composition.progress import progress_bar as p\nwith p(2, 'Comparing', 'run') as b: b.update(2)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "Comparing: 100%|" in run.stderr
