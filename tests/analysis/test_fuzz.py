"""Hundreds of broken adapters and arguments; thousands with `PEFT_COMPOSITION_FUZZ=20000 pytest -k fuzz`.

`python -m tests.fuzzing --seed 0 --only 123` runs one case again.
"""

from __future__ import annotations

import json
import os

from .. import warm
from ..mutations import MUTATIONS


CASES = int(os.environ.get("PEFT_COMPOSITION_FUZZ", "700"))


def test_broken_adapters_end_in_right_numbers_or_an_error_that_names_them() -> None:
    """In one process of its own: its memory is measured and limited, and a crash is no end of all tests."""
    done = warm.run("-m", "tests.fuzzing", "--cases", CASES, timeout=300 + CASES)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    print(json.dumps({name: value for name, value in result.items() if name != "failures"}, indent=2))
    assert not result["failures"], "\n".join(result["failures"][:5])
    assert done.returncode == 0
    assert result["cases"] == result["right"] + result["refused"] == CASES
    assert result["memory"] < 2 << 30
    # Refusing everything, or breaking nothing, would not do.
    assert result["kinds"].keys() == {*MUTATIONS, "arguments"}
    for kind in ("arguments", "config", "files", "pickles", "safetensors", "tensors"):
        row = result["kinds"][kind]
        assert min(row.values()) > sum(row.values()) / 20, (kind, row)
    for kind in ("cards", "harmless"):
        assert result["kinds"][kind]["refused"] == 0
