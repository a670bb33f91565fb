"""`inspect` goes on, whatever is wrong with an adapter."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_composition import AdapterError, CompositionConfig
from peft_composition.analysis import inspection
from peft_composition.analysis.inspection import AdapterReport, inspect_adapters
from peft_composition.upstream import adapter, stacking

from .. import tiny


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def inspect(*folders: Path | str, **kwargs: Any) -> list[AdapterReport]:
    return inspect_adapters(CompositionConfig(adapters=list(folders)).references, **kwargs)


class _Panic(BaseException):
    """As what Rust's extensions raise, which is no Exception."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Exception("something\nelse"), "Exception: something else"),
        (MemoryError(), "MemoryError:"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("\x1b[2J"), r"\x1b[2J"),
        (_Panic("called unwrap"), "_Panic: called unwrap"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize(
    ("room", "where"),
    [
        (inspection, "read_config"),
        (adapter, "index_factors"),
        (inspection, "require_finite"),
        (inspection, "is_hub_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_that_nobody_thought_of(
    room: ModuleType,
    where: str,
    error: BaseException,
    reason: str,
    good: Path,
    bad: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They cannot be caused otherwise: what can be is refused by name."""
    for folder in (good, bad):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": f"{folder.name}/model"}))
    whole = getattr(room, where)

    def fails(*args: Any) -> Any:
        what = args[0] if isinstance(args[0], str) else args[0].name
        if what.startswith("bad"):
            raise error
        return whole(*args)

    monkeypatch.setattr(room, where, fails)
    first, second = inspect(bad, good)
    assert first.reason == reason
    assert second.reason is None


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_wants_to_stop_can(stop: type[BaseException], bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(*args: Any) -> Any:
        raise stop

    monkeypatch.setattr(inspection, "read_config", stops)
    with pytest.raises(stop):
        inspect(bad)


@pytest.mark.parametrize(
    "path",
    [
        ".",
        "..",
        "/",
        "~",
        "\0",
        "\ud800",
        "a\nb",
        "\x1b[2J",
        "x" * 100_000,
        "/" + "x/" * 10_000,
        "ünï/cödé",
        "a/b/c/d",
        "--help",
        "me/lora@",
    ],
    ids=lambda value: repr(value)[:20],
)
def test_places_where_there_is_nothing(path: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    first, second = inspect(path, good)
    assert first.reason
    assert second.reason is None


def test_a_subfolder_that_no_folder_can_be_called(good: Path) -> None:
    for subfolder in ("x" * 1000, "\0", "\ud800"):
        first, second = inspect({"path": str(good), "subfolder": subfolder}, good)  # type: ignore[arg-type]
        assert "is not an adapter: it has no adapter_config.json" in (first.reason or "")
        assert second.reason is None


def sparse(folder: Path, columns: int) -> None:
    """Valid weights of one module with so many columns, all zero, which take no room on the disk."""
    header = {
        "base_model.model.lin0.lora_A.weight": {
            "dtype": "F32",
            "shape": [4, columns],
            "data_offsets": [0, 16 * columns],
        },
        "base_model.model.lin0.lora_B.weight": {
            "dtype": "F32",
            "shape": [20, 4],
            "data_offsets": [16 * columns, 16 * columns + 320],
        },
    }
    content = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + 16 * columns + 320)


def test_gigabytes_of_nothing(good: Path, bad: Path) -> None:
    sparse(bad, 1 << 32)
    start = time.process_time()
    (alone,) = inspect(bad)
    first, second = inspect(bad, good, model=tiny.build("mlp"))
    assert time.process_time() - start < 10
    assert alone.reason is None
    assert alone.notes == ["its values were not checked: they take 68.7 GB"]
    assert "has shape (4, 4294967296), but Linear in the model needs (4, 10)" in (first.reason or "")
    assert second.reason is None


def test_a_refusal_does_not_wait_for_the_hash_of_gigabytes(good: Path, bad: Path) -> None:
    os.truncate(bad / WEIGHTS, 1 << 40)
    start = time.process_time()
    with pytest.raises(AdapterError, match=r"'bad'.*is not a readable safetensors file"):
        tiny.compose("mlp", [str(good), str(bad)])
    assert time.process_time() - start < 10


def test_values_are_checked_in_parts(bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "CHECKED_AT_ONCE", 7)
    tensors = load_file(bad / WEIGHTS)
    tensors["base_model.model.lin1.lora_B.weight"][3, 1] = float("nan")
    tensors["base_model.model.lin1.lora_B.weight"][9, 0] = float("inf")
    save_file(tensors, bad / WEIGHTS)
    (report,) = inspect(bad)
    assert report.reason == "module 'lin1': lora_B: 2 of 64 values are NaN or infinite"


def test_hashes_that_nobody_asks_for_are_not_computed(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(adapter, "sha256_of", lambda path, _: asked.append(path) or "")
    (report,) = inspect(good)
    assert report.reason is None
    assert not asked


def _set(**fields: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **fields}))

    return edit


def _card(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "README.md").write_text(text)


def _pipe(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def _pickled(content: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "adapter_model.bin")

    return edit


# Whether the adapter can be composed all the same.
HOSTILE: dict[str, tuple[Callable[[Path], object], bool]] = {
    "endless-pattern": (_set(rank_pattern={r"(([\w.])+)+!": 8}), True),
    "endless-alpha": (_set(alpha_pattern={r"(.*)*!": 8}), True),
    "costly-pattern": (_set(rank_pattern={"(" * 12 + r"[\w.]" + "{1,900})" * 12 + "!": 8}), True),
    "broken-pattern": (_set(rank_pattern={"*.lin0": 8}), False),
    "list-as-base": (_set(base_model_name_or_path=["x/y"]), False),
    "number-as-targets": (_set(target_modules=5), False),
    "escapes": (_set(task_type="\x1b[2J"), False),
    "new-variant": (_set(use_warp_drive=True), False),
    "large-config": (lambda folder: os.truncate(folder / CONFIG, 10 << 30), False),
    "deep-config": (lambda folder: (folder / CONFIG).write_text("[" * 1_000_000), False),
    "pipe": (_pipe, False),
    "yaml-bomb": (_card("---\na: &a [x]\nb: &b [*a, *a]\nlicense: *b\n---\n"), True),
    "deep-card": (_card("---\nlicense: " + "[" * 60_000 + "\n---\n"), True),
    "long-number": (_card("---\nlicense: 0x" + "f" * 60_000 + "\n---\n"), True),
    "large-card": (lambda folder: os.truncate(folder / "README.md", 10 << 30), True),
    "sparse-weights": (lambda folder: sparse(folder, 1 << 32), False),
    "cut-weights": (lambda folder: os.truncate(folder / WEIGHTS, 300), False),
    "no-weights": (lambda folder: (folder / WEIGHTS).unlink(), False),
    "pickle-of-views": (
        _pickled({f"base_model.model.lin0.lora_{x}.weight": torch.zeros(1).expand(1 << 15, 1 << 15) for x in "AB"}),
        False,
    ),
    "pickle-of-strings": (_pickled({"a": "b" * 1000}), False),
}


def test_twenty_broken_and_hostile_adapters_in_thirty_seconds(tmp_path: Path) -> None:
    """As a user calls it, in a process of its own; seconds of a core, which other programs do not make more."""
    base = tiny.build("mlp")
    folders = [tiny.save_lora(tmp_path / f"good-{number}", base, ["lin0"], r=4) for number in range(2)]
    for name, (break_it, _) in HOSTILE.items():
        folders.append(tiny.save_lora(tmp_path / name, base, ["lin0"], r=4))
        break_it(folders[-1])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "peft_composition", "inspect", *map(str, folders), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert done.returncode == 1, done.stderr
    rows = json.loads(done.stdout)["adapters"]
    assert [row["name"] for row in rows] == [folder.name for folder in folders]
    expected = {"good-0": True, "good-1": True, **{name: is_good for name, (_, is_good) in HOSTILE.items()}}
    assert {row["name"]: row["composable"] for row in rows} == expected
    assert all(bool(row["reason"]) is not row["composable"] for row in rows)
    assert seconds < 30
    assert len(HOSTILE) == 20
    assert inspection.MOST_BYTES < 4 * (4 << 32)
