"""Does everything on a machine that has Python alone: `python3 run.py demo`, `python3 run.py test`.

Makes a virtual environment in `.venv`, installs what the command needs and runs it there. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# command -> (extra of setup.cfg that it needs, what it runs)
COMMANDS: dict[str, tuple[str, list[list[str]]]] = {
    "demo": ("demo", [["examples/quickstart.py"]]),
    "test": ("test", [["-m", "pytest", "--numprocesses", "auto", "--maxprocesses", "4", "--dist", "loadgroup"]]),
    "benchmark": ("benchmark", [["-m", "benchmarks"]]),
    "check": (
        "dev",
        [["-m", "ruff", "format", "--check", "."], ["-m", "ruff", "check", "."], ["-m", "mypy"]],
    ),
}


def install(extra: str) -> None:
    """Make the environment and install the project with an extra, unless that was done for this `setup.cfg`."""
    wanted = hashlib.sha256((ROOT / "setup.cfg").read_bytes()).hexdigest()
    stamp = ENVIRONMENT / f".installed-{extra}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    if not PYTHON.is_file():
        print(f"Making a virtual environment in {ENVIRONMENT.name}/ ...", flush=True)
        venv.create(ENVIRONMENT, with_pip=True)
    print(f"Installing peft-composition[{extra}]; the first time this takes some minutes ...", flush=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "--editable", f".[{extra}]"], cwd=ROOT, check=True)
    stamp.write_text(wanted)


def main() -> int:
    """Run one command; further arguments go to it."""
    if sys.version_info < (3, 10):  # noqa: UP036  (this file is what an old interpreter meets first)
        print(f"peft-composition needs Python 3.10 or newer, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    options, further = parser.parse_known_args()
    extra, steps = COMMANDS[options.command]
    try:
        install(extra)
        for number, step in enumerate(steps):
            last = number == len(steps) - 1
            subprocess.run([PYTHON, *step, *(further if last else [])], cwd=ROOT, check=True)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
