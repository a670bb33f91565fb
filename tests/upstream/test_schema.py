"""Configs and cards from strangers: every field is checked, every file is read up to a size, and reading ends."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from peft_composition import AdapterError, CompositionConfig
from peft_composition.analysis.inspection import inspect_adapters
from peft_composition.upstream.front_matter import MAX_BYTES, stated_license
from peft_composition.upstream.schema import MAX_CONFIG_BYTES

from .. import tiny


def edit(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def refuse(good: Path, bad: Path, message: str) -> None:
    """Composing names the adapter and the reason; `inspect` gives the same reason and goes on."""
    with pytest.raises(AdapterError, match=re.escape(message)) as caught:
        tiny.compose("mlp", [str(good), str(bad)])
    assert str(caught.value).startswith("adapter 'bad': ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    first, second = inspect_adapters(CompositionConfig(adapters=[bad, good]).references)
    assert first.reason == caught.value.reason
    assert second.reason is None


# The config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", ["LORA"], "peft_type must be the name of a PEFT method, got ['LORA']"),
        ("peft_type", None, "peft_type must be the name of a PEFT method, got None"),
        ("base_model_name_or_path", ["x/y"], "base_model_name_or_path must be the name of a model or null"),
        ("base_model_name_or_path", 7, "base_model_name_or_path must be the name of a model or null, got 7"),
        ("base_model_name_or_path", "a\nb", r"got 'a\nb'"),
        ("base_model_name_or_path", "\ud800", r"got '\ud800'"),
        ("base_model_name_or_path", "\x1b[2J", r"got '\x1b[2J'"),
        ("base_model_name_or_path", "x" * 100_000, "base_model_name_or_path must be the name of a model or null"),
        ("task_type", {"a": 1}, "task_type must be the name of a task or null, got {'a': 1}"),
        ("r", "4", "r must be a positive integer, got '4'"),
        ("r", 4.5, "r must be a positive integer, got 4.5"),
        ("r", True, "r must be a positive integer, got True"),
        ("r", 0, "r must be a positive integer, got 0"),
        ("r", -4, "r must be a positive integer, got -4"),
        ("r", 10**400, "r must be a positive integer, got 1000"),
        ("r", float("nan"), "r must be a positive integer, got nan"),
        ("lora_alpha", None, "lora_alpha must be a finite number, got None"),
        ("lora_alpha", "16", "lora_alpha must be a finite number, got '16'"),
        ("lora_alpha", True, "lora_alpha must be a finite number, got True"),
        ("lora_alpha", float("nan"), "lora_alpha must be a finite number, got nan"),
        ("lora_alpha", float("inf"), "lora_alpha must be a finite number, got inf"),
        ("lora_alpha", 10**400, "lora_alpha must be a finite number, got 1000"),
        ("rank_pattern", ["lin0"], "rank_pattern must be a dict of positive integers by module name, got ['lin0']"),
        ("rank_pattern", {"lin0": "4"}, "rank_pattern must be a dict of positive integers by module name"),
        ("rank_pattern", {**{f"x{n}": 4 for n in range(9)}, "y": {}}, "by module name, got {} for 'y'"),
        ("rank_pattern", {"(lin0": 4}, "rank_pattern: its key '(lin0' is not a regular expression: missing )"),
        ("rank_pattern", {"*.lin0": 4}, "rank_pattern: its key '*.lin0' is not a regular expression"),
        ("alpha_pattern", {"lin1": None}, "alpha_pattern must be a dict of finite numbers by module name"),
        ("alpha_pattern", {"lin1": float("inf")}, "alpha_pattern must be a dict of finite numbers by module name"),
        ("alpha_pattern", {"lin1)": 4}, "alpha_pattern: its key 'lin1)' is not a regular expression"),
        ("alpha_pattern", {"lin1": 4, "(l)in\\1": 4}, "not supported from character 6 on"),
        ("use_rslora", "false", "use_rslora must be true or false, got 'false'"),
        ("use_dora", [], "use_dora must be true or false, got []"),
        ("bias", 3, "bias must be a word, got 3"),
        ("bias", None, "bias must be a word, got None"),
        ("init_lora_weights", ["pissa"], "init_lora_weights must be true, false or a word, got ['pissa']"),
        ("target_modules", 5, "target_modules must be a list of module names, or one expression, got 5"),
        ("target_modules", [1, "lin0"], "target_modules must be a list of module names, or one expression"),
        ("target_parameters", "experts", "target_parameters must be a list of parameter names, got 'experts'"),
        ("target_parameters", [3], "target_parameters must be a list of parameter names, got [3]"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_field_that_cannot_be(field: str, value: Any, message: str, good: Path, bad: Path) -> None:
    refuse(good, edit(bad, **{field: value}), message)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": None},
        {"rank_pattern": None, "alpha_pattern": None},
        {"rank_pattern": {r"(([\w.])+)+!": 8}, "alpha_pattern": {"(.*)*!": 8}},
        {"lora_alpha": 16.0, "use_rslora": None},
        {"target_modules": None, "init_lora_weights": None},
        {"target_modules": "(.*)*!"},  # nothing matches it: the tensors say what was trained
        {"layers_pattern": "(", "layers_to_transform": "x", "exclude_modules": 5, "modules_to_save": {"a": "("}},
        {"base_model_name_or_path": "", "task_type": "ANYTHING"},
    ],
    ids=str,
)
def test_what_says_nothing_of_the_product_does_not_matter(changes: dict[str, Any], bad: Path) -> None:
    expected = tiny.output(tiny.compose("mlp", [str(bad)]), "mlp")
    found = tiny.output(tiny.compose("mlp", [str(edit(bad, **changes))]), "mlp")
    assert (found == expected).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"peft_type": "LORA", "r": ' + b"[" * 100_000, "is not valid JSON: maximum recursion depth exceeded"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        (b'{"peft_type": "LORA", "r": 4}' + b" " * MAX_CONFIG_BYTES, "too many for a config"),
        (b'{"peft_type": "LORA", "r": \xff}', "is not valid JSON: 'utf-8' codec can't decode"),
        (b"null", "does not describe a PEFT adapter"),
        (b"\0" * 10, "is not valid JSON"),
    ],
    ids=["deep", "long number", "large", "no text", "null", "zeros"],
)
def test_a_config_that_nobody_could_mean(content: bytes, message: str, good: Path, bad: Path) -> None:
    (bad / "adapter_config.json").write_bytes(content)
    start = time.process_time()
    refuse(good, bad, message)
    assert time.process_time() - start < 5


def test_a_config_with_a_byte_order_mark(bad: Path) -> None:
    file = bad / "adapter_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    tiny.compose("mlp", [str(bad)])


def test_a_sparse_config_of_gigabytes(good: Path, bad: Path) -> None:
    os.truncate(bad / "adapter_config.json", 10 << 30)
    start = time.process_time()
    refuse(good, bad, "too many for a config")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself", "link to nothing", "device"])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_file(kind: str, file: str, good: Path, bad: Path) -> None:
    path = bad / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link to itself": path, "link to nothing": bad / "nothing", "device": "/dev/zero"}[kind])
    message = "it has no adapter_config.json" if "config" in file else "has neither adapter_model.safetensors nor"
    refuse(good, bad, message)


# The license in the card


def write_card(folder: Path, front_matter: str | bytes, text: str = "# Title\n") -> Path:
    if isinstance(front_matter, str):
        front_matter = front_matter.encode()
    path = folder / "README.md"
    path.write_bytes(b"---\n" + front_matter + b"\n---\n" + text.encode())
    return path


@pytest.mark.parametrize(
    ("front_matter", "expected"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("tags:\n- lora\n- license\nlicense: mit\nmodel-index:\n- name: x\n  license: no\n", "mit"),
        ("license: other\nlicense_name: gemma\nlicense_link: https://x", "other (gemma)"),
        ("license_name: gemma\nlicense: other", "other (gemma)"),
        ("license:\n- mit\n- apache-2.0", "mit, apache-2.0"),
        ("license: [mit, 'apache-2.0']", "mit, apache-2.0"),
        ('"license": "cc-by-4.0"', "cc-by-4.0"),
        ("{license: mit, tags: [a]}", "mit"),
        ("license: &l mit\ntags: [*l]", "mit"),
        ("license: 3.0", "3.0"),
        ("license:", None),
        ("license: null", None),
        ("license: 'null'", "null"),
        ("license: []", None),
        ("tags: [license]", None),
        ("- license: mit", None),
        ("license", None),
        ("", None),
    ],
    ids=repr,
)
def test_licenses(front_matter: str, expected: str | None, tmp_path: Path) -> None:
    assert stated_license(write_card(tmp_path, front_matter)) == expected


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_line_ends_and_byte_order_marks(start: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(f"{start}---\nlicense: mit\ntags: [a]\n---\nText\n---\n".replace("\n", ending).encode())
    assert stated_license(path) == "mit" == (metadata_load(path) or {})["license"]


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "front_matter",
    [
        _BOMB + "license: *i",
        "license: " + "[" * 500 + "]" * 500,
        "license: " + "[" * 60_000,
        "license:\n" + "\n".join(" " * depth + "- - a" for depth in range(200)),
        "license: &a [*a]",
        "license: {a: b}",
        "license: [[mit]]",
        "license: " + "x" * 101,
        "license: [" + "mit, " * 100 + "]",
        "license: 0x" + "f" * 60_000,
        'license: "a\\nb"',
        'license: "\\uD800"',
        'license: "\\UFFFFFFFF"',
        'license: "\\e[2J"',
        "license: |\n  a\n  b",
        "license: !!python/object/apply:os.system [ls]",
        "license: mit\n" + "x: [1, 2]\n" * 40_000,
        "license: 'mit",
        b"license: \xff",
        "\n" * MAX_BYTES,
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_hostile_card_states_no_license_and_takes_no_time(front_matter: str | bytes, good: Path, bad: Path) -> None:
    write_card(bad, front_matter)
    start = time.process_time()
    first, second = inspect_adapters(CompositionConfig(adapters=[bad, good]).references)
    assert time.process_time() - start < 5
    assert (first.license, first.reason, second.reason) == (None, None, None)


def test_of_a_large_card_only_the_beginning_is_read(tmp_path: Path) -> None:
    path = write_card(tmp_path, "license: mit")
    os.truncate(path, 10 << 30)
    assert stated_license(path) == "mit"


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself"])
def test_a_card_that_is_no_file(kind: str, bad: Path) -> None:
    path = bad / "README.md"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    (report,) = inspect_adapters(CompositionConfig(adapters=[bad]).references)
    assert (report.license, report.reason) == (None, None)
