"""Importing the package registers the method and loads no wing that is not asked for; all names are there anyway."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import peft_composition
from peft_composition import _HOMES


SOURCE = Path(peft_composition.__file__)
# What other packages load by themselves is not counted.
FRESH = """
import sys, peft, transformers
transformers.PreTrainedModel
before = set(sys.modules)
import peft_composition
loaded = set(sys.modules) - before
"""
PROGRAM = """
import json
from peft.utils import PeftType
from mine import loaded, peft_composition
first = "PeftType" in vars(peft_composition) or "explain" in vars(peft_composition)
wing = peft_composition.choosing.read_data.__name__
from peft_composition import *
print(json.dumps([sorted(loaded), "COMPOSITION" in PeftType.__members__, first, wing, explain.__module__]))
"""


def run(*words: str, path: Path) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join([str(path), str(SOURCE.parents[1])])
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": places}
    )


def test_a_program_of_others_gets_the_method_and_no_wing(tmp_path: Path) -> None:
    """Run with `-m`, as trainings are: then Python imports the program's package while it looks for the program."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(FRESH)
    (tmp_path / "mine" / "__main__.py").write_text(PROGRAM)
    done = run("-m", "mine", path=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded, is_registered, has_name, wing, home = json.loads(done.stdout)
    assert is_registered
    assert "peft_composition.tuner.model" in loaded
    parts = {name.split(".")[1] for name in loaded if name.startswith("peft_composition.")}
    assert not parts & {*peft_composition._WINGS, "cli", "terminal"}
    assert not {name.split(".")[0] for name in loaded} & {
        "scipy",
        "pandas",
        "matplotlib",
        "datasets",
        "jinja2",
        "rich",
    }
    assert (has_name, wing, home) == (False, "read_data", "peft_composition.explaining.explain")


@pytest.mark.parametrize("words", [("--help",), ("compare", "--help"), ("weights", "no-such-folder")])
def test_help_and_wrong_arguments_load_no_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    done = run("-X", "importtime", "-m", "peft_composition", *words, path=tmp_path)
    assert done.returncode == (0 if "--help" in words else 2), done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"typer", "peft_composition_cli"} <= loaded
    assert not loaded & {"torch", "peft", "transformers", "numpy", "peft_composition.plugin"}


def test_all_names_are_there_in_each_way() -> None:
    """For type checkers, for `dir` and `from peft_composition import *`, and when they are asked for."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == _HOMES
    assert {*typed, "__version__"} == {*peft_composition.__all__} <= {*dir(peft_composition)}
    for name in typed:
        found = getattr(peft_composition, name)
        assert found is vars(peft_composition)[name]
        assert pickle.loads(pickle.dumps(found)) is found
    for wing in peft_composition._WINGS:
        assert getattr(peft_composition, wing) is sys.modules[f"peft_composition.{wing}"]
    with pytest.raises(AttributeError, match="module 'peft_composition' has no attribute 'nothing'"):
        peft_composition.nothing  # noqa: B018
