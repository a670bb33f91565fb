"""Forked programs end as those that `python` starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import warm


def test_a_program_has_its_arguments_variables_and_folder_and_one_thread(tmp_path: Path) -> None:
    code = (
        "import os, sys, threading; print(sys.argv[1:], os.environ['SAID'], os.getcwd(), threading.active_count());"
        "print(len(os.listdir('/proc/self/task')), 'transformers' in sys.modules, file=sys.stderr); sys.exit(3)"
    )
    done = warm.run("-c", code, 1, "two", cwd=tmp_path, SAID="this")
    assert done.returncode == 3
    assert done.stdout == f"['1', 'two'] this {tmp_path} 1\n"
    assert done.stderr == "1 True\n"


def test_files_and_modules_are_main_programs(tmp_path: Path) -> None:
    for name, text in (
        ("beside", "SAID = 'beside'"),
        ("program", "import sys, beside\nif __name__ == '__main__': print(beside.SAID, sys.argv)"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    assert warm.run(tmp_path / "program.py", "x").stdout == f"beside ['{tmp_path / 'program.py'}', 'x']\n"
    assert warm.run("-m", "program", "x", cwd=tmp_path).stdout == f"beside ['{tmp_path / 'program.py'}', 'x']\n"


def test_an_error_is_shown_and_ends_the_group() -> None:
    code = "import os, time\nassert os.environ['RANK'] == '0', 'no first'\ntime.sleep(600)"
    done = warm.run("-c", code, processes=2)
    assert done.returncode == 1
    assert "AssertionError: no first" in done.stderr


def test_what_takes_too_long_is_killed() -> None:
    with pytest.raises(TimeoutError, match="still running after 0 s"):
        warm.run("-c", "import time; time.sleep(600)", timeout=0.3)
