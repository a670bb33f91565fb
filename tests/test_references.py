"""How adapters are named in a shell and in files of candidates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from peft_composition import AdapterError
from peft_composition.references import location_of, read_reference
from peft_composition.upstream.files import locate_one


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/lora", {"path": "me/lora"}),
        ("lora", {"path": "lora"}),
        ("me/lora@v2", {"path": "me/lora", "revision": "v2"}),
        ("me/lora@refs/pr/1", {"path": "me/lora", "revision": "refs/pr/1"}),
        ("me/runs/a", {"path": "me/runs", "subfolder": "a"}),
        ("me/runs/a/b-1", {"path": "me/runs", "subfolder": "a/b-1"}),
        ("me/runs/a/b@v2", {"path": "me/runs", "subfolder": "a/b", "revision": "v2"}),
        # folders here, also missing ones
        ("here/runs/a", {"path": "here/runs/a"}),
        ("here/runs/a@v2", {"path": "here/runs/a@v2"}),
        ("a@b", {"path": "a@b"}),
        *((text, {"path": text}) for text in ("./me/runs/a", "/me/runs/a", "~/runs/a", "me/runs/", "me/runs/a/../b")),
        *((text, {"path": text}) for text in ("me/runs//a", "me\\runs\\a\\b", "m e/runs/a", "C:/runs/a", "")),
    ],
)
def test_references(text: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "a@b").mkdir()
    monkeypatch.chdir(tmp_path)
    found = read_reference(text)
    assert found == expected
    assert location_of(found) == text


def test_a_typing_error_in_the_name_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a Hub id, but the folder around it is here."""
    (tmp_path / "pool" / "lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path, said in (
        ("pool/loar", "local folder (pool is one, without loar) nor"),
        ("poo/lora", "local folder nor"),
    ):
        with pytest.raises(AdapterError, match=re.escape(f"{path} is neither a {said} in the Hub cache")):
            locate_one({"path": path, "name": "a", "local_files_only": True})
