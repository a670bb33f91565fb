"""Versions of other packages that fail together whatever the PEFT method is: tests expect what LoRA gets there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version
from peft import LoraConfig

from . import tiny


# transformers 5.24 asks for PEFT >= 0.22 in add_adapter, set_adapter and its like; PEFT 0.21.2 is the newest.
TRANSFORMERS_REFUSES_PEFT = Version(version("transformers")).release[:2] == (5, 24) and Version(
    version("peft")
) < Version("0.22")
REFUSAL = "The version of PEFT you are using is not compatible"


def composed_by_transformers(test: Callable[..., None]) -> Callable[..., None]:
    """For tests that call transformers' own `add_adapter`.

    Where it refuses the PEFT that is installed, LoRA must be refused and the test must end in the same refusal: it
    fails again as soon as one of them works.
    """

    @functools.wraps(test)
    def outcome(*args: Any, **kwargs: Any) -> None:
        if not TRANSFORMERS_REFUSES_PEFT:
            test(*args, **kwargs)
            return
        with pytest.raises(ValueError, match=REFUSAL):
            tiny.build("bert").add_adapter(LoraConfig(r=2, target_modules=["query"]))
        with pytest.raises(ValueError, match=REFUSAL):
            test(*args, **kwargs)

    return outcome
