"""Files that are replaced as a whole."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from peft.utils import CONFIG_NAME

from peft_composition import CompositionConfig
from peft_composition.drafts import write_whole


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("own", [0o600, 0o664])
def test_a_file_that_is_replaced_keeps_its_permissions(own: int, tmp_path: Path) -> None:
    """Also where it is reached by a link, and a config is saved again."""
    path, link, config = tmp_path / "result.json", tmp_path / "link.json", tmp_path / CONFIG_NAME
    CompositionConfig(adapters=["a"]).save_pretrained(tmp_path)
    usual = mode(config)
    write_whole(path, "one")
    assert mode(path) == usual
    link.symlink_to(path)
    path.chmod(own)
    config.chmod(own)
    write_whole(path, "two")
    assert (path.read_text(), mode(path)) == ("two", own)
    write_whole(link, "three")
    assert (path.read_text(), mode(path), link.is_symlink()) == ("three", own, True)
    CompositionConfig(adapters=["a", "b"]).save_pretrained(tmp_path)
    assert ('"b"' in config.read_text(), mode(config)) == (True, own)
