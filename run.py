"""Does everything on a machine that has Python alone: `python3 run.py demo`, `python3 run.py test`.

Makes a virtual environment in `.venv`, installs what the command needs from the committed lock and runs it there.
`python3 run.py test --lowest` and `--newest` run the core tests in environments of their own, with the lowest and the
newest versions that setup.cfg admits. `python3 run.py lock` writes the lock anew. Standard library only.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import os
import re
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parent
LOCKS = ROOT / "requirements"
UV = "uv==0.13.9"  # makes the lock and the environments of the lowest and the newest versions; see `install_range`

SITE = ["-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-b", "html", "docs", "build/docs"]

# Tests of one file in one process, which makes what they share once, and files in the order of tests/conftest.py.
WHOLE_FILES = ["--dist", "loadfile", "--no-loadscope-reorder"]

# command -> (lock that it installs, what it runs)
COMMANDS: dict[str, tuple[str, list[list[str]]]] = {
    "demo": ("demo", [["examples/quickstart.py"]]),
    "test": ("dev", [["-m", "pytest", "--numprocesses", "auto", "--maxprocesses", "4", *WHOLE_FILES]]),
    "benchmark": ("benchmark", [["-m", "benchmarks"]]),
    "check": (
        "dev",
        [["-m", "ruff", "format", "--check", "."], ["-m", "ruff", "check", "."], ["-m", "mypy"], SITE],
    ),
    "docs": ("dev", [SITE]),
}
# What must hold at both ends of the range of versions.
CORE_TESTS = [
    "tests/test_registration.py",
    "tests/test_compat.py",
    "tests/test_config.py",
    "tests/tuner/test_layer.py",
    "tests/tuner/test_functional.py",
    "tests/upstream/test_adapters.py",
    "tests/tuner/test_model.py",
    "tests/checkpoint/test_checkpoints.py",
    "tests/test_trainer.py",
    "tests/test_training.py",
    "tests/test_distributed.py",
]
RANGES = {"lowest": "lowest-direct", "newest": "highest"}


def run(*command: str | Path) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def make(environment: Path) -> Path:
    """The interpreter of an environment, which is made where it does not exist."""
    if not python_of(environment).is_file():
        print(f"Making a virtual environment in {environment.name}/ ...", flush=True)
        venv.create(environment, with_pip=True)
    return python_of(environment)


def install_locked(lock: str) -> Path:
    """An environment with what a lock lists, and this project; nothing to do if that was done for this lock."""
    environment = ROOT / ".venv"
    file = LOCKS / f"{lock}.lock"
    wanted, stamp = digest(file, ROOT / "setup.cfg"), environment / f".installed-{lock}"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        pip = (make(environment), "-m", "pip", "install", "--quiet")
        print(f"Installing {file.name}; the first time this takes some minutes ...", flush=True)
        run(*pip, "--require-hashes", "--requirement", file)
        run(*pip, "--no-deps", "--no-build-isolation", "--editable", ".")
        stamp.write_text(wanted)
    return python_of(environment)


def excluded() -> list[str]:
    """The requirements of setup.cfg that leave versions out, without leaving them out."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options"]["install_requires"].split()
    return [re.sub(r"!=[^,]+,?", "", line).rstrip(",") for line in lines if "!=" in line]


def install_range(end: str) -> Path:
    """An environment with the lowest or the newest versions that setup.cfg admits, the newest of today."""
    environment = ROOT / f".venv-{end}"
    wanted, stamp = digest(ROOT / "setup.cfg"), environment / ".installed"
    python = make(environment)
    if end == "newest" or not (stamp.is_file() and stamp.read_text() == wanted):
        print(f"Installing the {end} versions; the first time this takes some minutes ...", flush=True)
        run(python, "-m", "pip", "install", "--quiet", UV)
        uv: tuple[str | Path, ...] = (
            python,
            "-m",
            "uv",
            "pip",
            "install",
            "--quiet",
            "--upgrade",
            "--resolution",
            RANGES[end],
        )
        if end == "newest":  # also what the range leaves out: tests say by name what does not work there
            left_out = environment / "overrides.txt"
            left_out.write_text("".join(f"{line}\n" for line in excluded()))
            uv += ("--overrides", left_out)
        run(*uv, "--python", python, "--editable", ".[core-test]")
        stamp.write_text(wanted)
    return python


def lock(further: list[str]) -> None:
    """Write the lock; versions that it has stay unless `--upgrade` or `--upgrade-package NAME` is among `further`."""
    python = make(ROOT / ".venv")
    run(python, "-m", "pip", "install", "--quiet", UV)
    uv: list[str | Path] = [
        python,
        "-m",
        "uv",
        "pip",
        "compile",
        "setup.cfg",
        "requirements/build.in",
        "--quiet",
        "--universal",
    ]
    uv += ["--python-version", "3.11", "--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url"]
    for name in ("dev", "demo", "benchmark"):  # the others take the versions of the first
        same = [] if name == "dev" else ["--constraint", "requirements/dev.lock"]
        run(*uv, "--extra", name, *same, *further, "--output-file", f"requirements/{name}.lock")


def main() -> int:
    """Run one command; further arguments go to it."""
    if sys.version_info < (3, 11):  # noqa: UP036  (this file is what an old interpreter meets first)
        print(f"peft-composition needs Python 3.11 or newer, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*COMMANDS, "lock"])
    ends = parser.add_mutually_exclusive_group()
    for end in RANGES:
        ends.add_argument(f"--{end}", dest="end", action="store_const", const=end, help=f"test: the {end} versions")
    options, further = parser.parse_known_args()
    if options.end and options.command != "test":
        parser.error(f"--{options.end} goes with test")
    try:
        if options.command == "lock":
            lock(further)
            return 0
        needed, steps = COMMANDS[options.command]
        if options.end:
            python, steps = install_range(options.end), [[*steps[0], *CORE_TESTS]]
        else:
            python = install_locked(needed)
        for number, step in enumerate(steps):
            last = number == len(steps) - 1
            run(python, *step, *(further if last else []))
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
