"""Registration: `COMPOSITION` behaves like PEFT's own members, on every interpreter at hand."""

from __future__ import annotations

import configparser
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import packaging
import peft
import pytest
from packaging.requirements import Requirement
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch.utils.data import DataLoader, Dataset

from peft_composition import CompositionConfig, CompositionModel
from peft_composition.registration import add_peft_type, register_method
from peft_composition.versions import MINIMUM, require_supported_versions

from . import warm


LIBRARY = Path(__file__).parents[1] / "peft_composition"

# What a member of a str enum must do; run here and, as a script, on other interpreters.
MEMBER_CHECKS = textwrap.dedent(
    """
    def check_member(PeftType):
        import copy, enum, json, pickle
        member = PeftType.COMPOSITION
        assert type(member) is PeftType and isinstance(member, (PeftType, str))
        assert PeftType("COMPOSITION") is member and PeftType["COMPOSITION"] is member
        assert getattr(PeftType, "COMPOSITION") is member and PeftType(member) is member
        assert member.name == member.value == "COMPOSITION" and member == "COMPOSITION"
        assert member in PeftType and member in list(PeftType) and "COMPOSITION" in list(PeftType)
        assert list(PeftType)[-1] is member and len(PeftType) == len(list(PeftType))
        assert list(PeftType.__members__)[-1] == "COMPOSITION"
        assert [m for m in PeftType if m.value == "COMPOSITION"] == [member]
        assert copy.copy(member) is member and copy.deepcopy({"t": member})["t"] is member
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(member, protocol)) is member
        assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "COMPOSITION"}
        assert {member: 1}[PeftType("COMPOSITION")] == 1 and hash(member) == hash(PeftType.COMPOSITION)
        assert repr(member) == repr(PeftType.LORA).replace("LORA", "COMPOSITION")
        assert str(member) == str(PeftType.LORA).replace("LORA", "COMPOSITION")
        assert f"{member}" == f"{PeftType.LORA}".replace("LORA", "COMPOSITION")
        assert PeftType("LORA") is PeftType.LORA and PeftType.LORA is not member
        for wrong in ("composition", "NONSENSE"):
            try:
                PeftType(wrong)
            except ValueError:
                pass
            else:
                raise AssertionError(wrong)
    """
)


def test_member_behaves_like_a_built_in_one() -> None:
    scope: dict = {}
    exec(MEMBER_CHECKS, scope)
    scope["check_member"](PeftType)


def interpreters() -> list[str]:
    """Every Python 3.10 or newer on this machine: on the path, and side by side under pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [sys.executable, *map(str, pyenv.glob("3.1[0-9].*/bin/python"))]
    candidates += filter(None, (shutil.which(f"python3.{minor}") for minor in range(10, 16)))
    found = {}
    for candidate in candidates:
        told = subprocess.run(
            [candidate, "-c", "import sys; print(sys.version, sys.base_prefix)"], capture_output=True, text=True
        )
        if told.returncode == 0:  # pyenv's shims refuse for versions that are not switched on
            found.setdefault(told.stdout, candidate)
    return sorted(found.values())


@pytest.mark.parametrize("interpreter", interpreters())
def test_member_can_be_added_on_every_interpreter_at_hand(interpreter: str, tmp_path: Path) -> None:
    """PEFT's real enum (a file that needs the standard library alone) and our recipe, without installing torch."""
    stub = tmp_path / "peft" / "utils"
    stub.mkdir(parents=True)
    (tmp_path / "peft" / "__init__.py").touch()
    shutil.copy(Path(peft.__file__).parent / "utils" / "peft_types.py", stub / "peft_types.py")
    (stub / "__init__.py").write_text("from .peft_types import PeftType\n")
    shutil.copytree(Path(packaging.__file__).parent, tmp_path / "packaging")
    shutil.copy(LIBRARY / "registration.py", tmp_path / "registration.py")
    script = tmp_path / "script.py"
    script.write_text(
        MEMBER_CHECKS + "import registration\n"
        "from peft.utils import PeftType\n"
        "before = len(PeftType)\n"
        "member = registration.add_peft_type()\n"
        "assert registration.add_peft_type() is member and len(PeftType) == before + 1\n"
        "check_member(PeftType)\n"
        "print('all right')\n"
    )
    done = subprocess.run([interpreter, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "all right\n", done.stderr


def test_config_and_model_are_entered_once() -> None:
    member = PeftType("COMPOSITION")
    tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    before = [dict(table) for table in tables]
    register_method(CompositionConfig, CompositionModel)
    assert add_peft_type() is member
    assert [dict(table) for table in tables] == before
    assert [table[member] for table in tables] == [CompositionConfig, CompositionModel, "composition_"]


def test_another_method_of_the_same_name_is_a_clear_error() -> None:
    class Foreign(CompositionConfig):
        """Stands for a config that PEFT itself might ship one day."""

    with pytest.raises(ImportError, match=r"COMPOSITION is already taken by peft_composition\.config"):
        register_method(Foreign, CompositionModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("COMPOSITION")] is CompositionConfig


class _Types(Dataset):
    """Sends what a worker process sees of the enum to the parent."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bytes:
        import peft_composition

        assert PeftType("COMPOSITION") is PeftType["COMPOSITION"]
        return pickle.dumps((PeftType("COMPOSITION"), len(PeftType), peft_composition.__version__))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_see_the_same_member(context: str) -> None:
    loader = DataLoader(_Types(), batch_size=None, num_workers=1, multiprocessing_context=context)
    for message in loader:
        member, count, _ = pickle.loads(message)
        assert member is PeftType("COMPOSITION")
        assert count == len(PeftType)


def test_config_survives_pickle_and_copies(two_adapters: list[str]) -> None:
    config = CompositionConfig(adapters=two_adapters)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert twin.peft_type is PeftType("COMPOSITION")
    assert json.loads(json.dumps(config.to_dict()))["peft_type"] == "COMPOSITION"


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("torch", "2.7.1+cu126"),
        ("peft", "0.20.0"),
        ("transformers", "5.15.1"),
        ("accelerate", "1.2.1"),
        ("safetensors", "0.7.0"),
        ("huggingface_hub", "1.10.2"),
    ],
)
def test_what_is_too_old_is_refused_at_import(tmp_path: Path, name: str, old: str) -> None:
    """A real older distribution on the path, as far as its metadata go: the refusal comes before anything of it."""
    error = error_at_import(tmp_path, **{name: old})
    minimum = MINIMUM[name]
    assert error == (
        f"ImportError: peft-composition needs {name} {minimum} or newer but {old} is installed; "
        f'run: pip install "{name}>={minimum}"'
    )


def test_all_that_is_too_old_is_named_at_once(tmp_path: Path) -> None:
    error = error_at_import(tmp_path, peft="0.20.0", torch="2.5.1")
    assert "torch 2.8 or newer but 2.5.1 is installed, and peft 0.21.0 or newer but 0.20.0 is installed" in error
    assert error.endswith('pip install "torch>=2.8" "peft>=0.21.0"')


VENDORS = ["2.8.0a0+34c6371d24.nv25.08", "2.8.0+cu128"]


@pytest.mark.parametrize("number", VENDORS)
def test_builds_of_vendors_are_taken_for_their_release(
    tmp_path: Path, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, torch=number)
    monkeypatch.syspath_prepend(tmp_path)
    assert version("torch") == number
    require_supported_versions()


def test_a_version_that_lacks_something_is_named() -> None:
    program = (
        "import sys, transformers.conversion_mapping as changed\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'peft_composition']:\n"
        "    del sys.modules[name]\n"
        "del changed.get_model_conversion_mapping\n"
        "import peft_composition\n"
    )
    done = warm.run("-c", program)
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: peft-composition does not work with these versions: ")
    assert "get_model_conversion_mapping" in error
    assert f"transformers {version('transformers')}" in error


def test_minimums_are_those_of_setup_cfg() -> None:
    parser = configparser.ConfigParser()
    parser.read(LIBRARY.parent / "setup.cfg")
    asked = [Requirement(line) for line in parser["options"]["install_requires"].split("\n") if line]
    minimum = {r.name: [s.version for s in r.specifier if s.operator == ">="] for r in asked}
    assert {name: [oldest] for name, oldest in MINIMUM.items()} == {name: minimum[name] for name in MINIMUM}


def error_at_import(folder: Path, **versions: str) -> str:
    """The error of an import where these distributions come first on the path."""
    install(folder, **versions)
    done = run_with(folder, "import peft_composition")
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def install(folder: Path, **versions: str) -> None:
    """Distributions as far as their metadata go."""
    for name, number in versions.items():
        metadata = folder / f"{name}-{number}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")


def run_with(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh process where what is in a folder comes first on the path."""
    path = os.pathsep.join([str(folder), str(LIBRARY.parent)])
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_import_in_a_fresh_process_registers(tmp_path: Path) -> None:
    """Under a vendor's version of PyTorch."""
    install(tmp_path, torch=VENDORS[0])
    program = (
        "import peft_composition, peft_composition as again\n"
        "from peft import PeftConfig\n"
        "from peft.utils import PeftType\n"
        "print(sum(m.value == 'COMPOSITION' for m in PeftType))\n"
    )
    done = run_with(tmp_path, program)
    assert done.stdout == "1\n", done.stderr
