"""Versions of other packages that fail together whatever the PEFT method is: tests expect what LoRA gets there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model

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


# load_adapter of transformers before 5.18, also in from_pretrained, looks for heads under the wrong name and leaves
# new ones in their place, with a report of missing and unexpected keys.
TRANSFORMERS_LOSES_HEADS = Version(version("transformers")) < Version("5.18")


def loaded_by_transformers(test: Callable[..., None]) -> Callable[..., None]:
    """For tests that have transformers load an adapter for the model `name`; where heads get lost, LoRA's must too."""

    @functools.wraps(test)
    def outcome(*args: Any, name: str, tmp_path: Path, **kwargs: Any) -> None:
        if not (TRANSFORMERS_LOSES_HEADS and tiny.TINY[name].head):
            test(*args, name=name, tmp_path=tmp_path, **kwargs)
            return
        lora = get_peft_model(tiny.build("bert"), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        head = lora.get_submodule("base_model.model.classifier.modules_to_save.default")
        torch.nn.init.constant_(head.weight, 3.0)
        lora.save_pretrained(str(tmp_path / "lora"))
        plain = tiny.build("bert")
        plain.load_adapter(str(tmp_path / "lora"))
        loaded = plain.get_submodule("classifier.modules_to_save.default")
        assert not torch.equal(loaded.weight, head.weight), "this transformers loads heads: raise the version above"
        with pytest.raises(AssertionError, match="not equal"):
            test(*args, name=name, tmp_path=tmp_path, **kwargs)

    return outcome


# The Trainer before 5.18 reads the optimizer of several CPU processes onto "cpu:0", which PyTorch does not know.
TRANSFORMERS_RESUMES_ON_GPUS_ALONE = Version(version("transformers")) < Version("5.18")


# gloo before PyTorch 2.9 adds in `reduce_scatter` where it is asked for a mean (pytorch issue 162338): under FSDP2 on
# CPUs, gradients are multiplied by the number of processes.
GLOO_ADDS_FOR_MEANS = Version(torch.__version__) < Version("2.9")
