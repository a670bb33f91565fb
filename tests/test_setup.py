"""What is installed: the committed lock, and the ranges of setup.cfg."""

from __future__ import annotations

import configparser
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("benchmark", "demo", "dev")
PYTHONS = ("3.11", "3.12", "3.13")


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def required(extra: str | None = None) -> list[Requirement]:
    """The requirements of an extra with those that it refers to, or of the package itself."""
    options = setup()["options.extras_require"]
    text = setup()["options"]["install_requires"] if extra is None else options[extra]
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def locked(name: str) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Every package of a lock with its pins, one for each kind of machine, and their hashes."""
    pins: dict[str, list[tuple[Requirement, list[str]]]] = {}
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    for block in re.split(r"\n(?=\S)", text.strip()):
        line, *hashes = re.split(r"\s*\\\n\s*", block.strip())
        requirement = Requirement(line)
        pins.setdefault(canonicalize_name(requirement.name), []).append((requirement, hashes))
    return pins


@pytest.mark.parametrize("name", LOCKS)
def test_lock_pins_everything_with_hashes_and_names_no_host(name: str) -> None:
    pins = locked(name)
    assert len(pins) > 50
    for package, entries in pins.items():
        for requirement, hashes in entries:
            assert re.fullmatch(r"==[^*]+", str(requirement.specifier)), package
            assert hashes, package
            assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", value) for value in hashes), package
    assert not re.search(r"https?:|file:|--index|--find-links", (ROOT / "requirements" / f"{name}.lock").read_text())


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", LOCKS)
def test_lock_has_what_setup_cfg_asks_for(name: str, python: str) -> None:
    pins = locked(name)
    machine = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux", "extra": ""}
    assert {requirement.name for requirement in required(name)}, "an empty extra would show nothing"
    for requirement in [*required(), *required(name)]:
        entries = [pin for pin, _ in pins[canonicalize_name(requirement.name)]]
        chosen = [pin for pin in entries if pin.marker is None or pin.marker.evaluate(machine)]
        assert len(chosen) == 1, requirement
        version = next(iter(chosen[0].specifier)).version
        assert requirement.specifier.contains(version), (str(requirement), version)


def test_locks_agree() -> None:
    everything = locked("dev")
    for name in LOCKS:
        for package, entries in locked(name).items():
            assert [pin.specifier for pin, _ in entries] == [pin.specifier for pin, _ in everything[package]], package


def test_every_minimum_is_below_an_upper_bound() -> None:
    """A major version that nobody has seen is not taken for one that works."""
    for requirement in required():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert ">=" in operators, requirement
        assert "<" in operators, requirement


def test_python_is_what_is_said() -> None:
    asked = SpecifierSet(setup()["options"]["python_requires"])
    classified = re.findall(r"Python :: (3\.\d+)$", setup()["metadata"]["classifiers"], re.M)
    assert classified == list(PYTHONS)
    assert all(asked.contains(version) for version in classified)
    assert not asked.contains("3.10")
    assert asked.contains(Version(sys.version.split()[0]))
