"""A composition on disk: its config and its weights, opened in one place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from ..config import CompositionConfig
from ..names import name_in_checkpoint
from ..references import Provenance, is_hub_id
from ..tuner.fingerprint import checked_weights
from ..tuner.mixing import Mixing
from ..upstream.keys import BASE_COPY
from ..upstream.weights import WeightsFile
from .exported import Exported, export_in, weights_file
from .kinds import why_no_composition


PREFIX = "base_model.model."
INFIX = ".composition_"


def read_config(folder: Path) -> CompositionConfig:
    """The config of a saved composition that carries its factors and its record."""
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(why_no_composition(folder))
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, CompositionConfig):
        raise ValueError(why_no_composition(folder))
    if not config.save_adapters:
        raise ValueError(
            f"{folder} was saved with save_adapters=False and does not hold the factors of its adapters. Load it "
            "(PeftModel.from_pretrained) and export the model: to_lora(model)"
        )
    if config.composed_modules is None or config.lora_layout is None:
        raise ValueError(
            f"{folder} does not record its modules (composed_modules, lora_layout in {CONFIG_NAME}). Load it "
            "(PeftModel.from_pretrained) and save it again, or export the model: to_lora(model)"
        )
    return config


def open_weights(folder: Path) -> WeightsFile:
    """The weights file of a saved composition, opened."""
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            return WeightsFile(folder.name, folder / name)
    raise ValueError(f"{folder} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}")


def saved_mixing_weights(folder: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """The mixing weights of a saved composition, from its files alone: no base model, no network.

    Args:
        folder: what `save_pretrained` wrote.

    Returns:
        `{module name: {upstream adapter name: weight}}`, in the model's order, as `mixing_weights(model)` gives
        them.

    Raises:
        ValueError: there is no saved composition, or its weights are not in it.
    """
    saved = Saved(Path(folder), None)
    if not saved.is_complete:
        raise ValueError(f"{why_no_composition(saved.folder)}.")
    weights = saved.mixing_weights()
    if not weights:
        raise ValueError(f"The weights file in {saved.folder} does not hold the mixing weights of all its modules.")
    names = saved.config.adapter_names
    return {
        module: {name: weight for name, weight, rank in zip(names, weights[module], ranks) if rank}
        for module, ranks in saved.ranks.items()
    }


def saved_head(folder: str | os.PathLike[str]) -> tuple[list[str], bool]:
    """The modules beside the composition's own in a saved composition, and whether they are known to be untrained.

    Args:
        folder: what `save_pretrained` wrote.

    Raises:
        ValueError: there is no saved composition.
    """
    saved = Saved(Path(folder), None)
    if not saved.is_complete:
        raise ValueError(f"{why_no_composition(saved.folder)}.")
    return saved.head_modules, saved.has_untrained_head


def head_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the tensors of a checkpoint that are not the composition's own, to tell whether they have changed."""
    digest = hashlib.sha256()
    for key in sorted(key for key in tensors if not _is_of_composition(key)):
        content = tensors[key].detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(key.encode("utf-8", "surrogatepass"))
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()


def _is_of_composition(key: str) -> bool:
    """Whether a tensor belongs to the composed modules, as PEFT's copy of the base weight of one does."""
    return key.endswith(BASE_COPY) or any(part.startswith("composition_") for part in key.split("."))


@dataclass(frozen=True)
class Saved:
    """A composition that `save_pretrained` wrote.

    Attributes:
        root: folder of the card.
        subfolder: where in it the composition is.
    """

    root: Path
    subfolder: str | None

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.root / (self.subfolder or "")

    @property
    def weights_file(self) -> Path | None:
        """The file of its weights; None where there is none."""
        return weights_file(self.folder)

    @property
    def is_complete(self) -> bool:
        """Whether both files are there, and describe a composition."""
        config = self.folder / CONFIG_NAME
        if self.weights_file is None or not config.is_file():
            return False
        return json.loads(config.read_text(encoding="utf-8")).get("peft_type") == "COMPOSITION"

    @cached_property
    def lora(self) -> Exported | None:
        """The plain LoRA of these weights, where there is one."""
        return export_in(self.folder)

    @cached_property
    def config(self) -> CompositionConfig:
        """Its config."""
        config = CompositionConfig.from_pretrained(str(self.folder))
        assert isinstance(config, CompositionConfig)
        return config

    @property
    def ranks(self) -> dict[str, list[int]]:
        """The rank of every adapter by module."""
        return self.config.composed_modules or {}

    @property
    def provenance(self) -> list[Provenance]:
        """What its upstream adapters were when they were read."""
        return self.config.provenance or []

    @property
    def base_model(self) -> str | None:
        """The Hub id of the base model; None for a local one."""
        name = self.config.base_model_name_or_path
        return name if is_hub_id(name) else None

    @cached_property
    def head(self) -> dict[str, Tensor]:
        """The tensors beside the composition's own: those of modules that are trained in full."""
        if self.weights_file is None:
            return {}
        file = WeightsFile(self.subfolder or "default", self.weights_file)
        return {key: file.read(key) for key in file if not _is_of_composition(key)}

    @property
    def head_modules(self) -> list[str]:
        """The names of the modules that are trained in full."""
        return sorted({key.removeprefix("base_model.model.").rpartition(".")[0] for key in self.head})

    @property
    def has_untrained_head(self) -> bool:
        """Whether it is still the one that was recorded as untrained."""
        return self.config.untrained_head is not None and self.config.untrained_head == head_hash(self.head)

    def mixing_weights(self) -> dict[str, list[float]]:
        """The weight of every adapter in every composed module, from theta in the weights file; empty if not there."""
        mixing = Mixing(self.config, torch.float32)
        if mixing.weight is None:
            return dict.fromkeys(self.ranks, mixing().tolist())
        assert self.weights_file is not None
        file = WeightsFile(self.subfolder or "default", self.weights_file)
        weights = {}
        checked_weights(self.config, {key: file.read(key) for key in file})
        for key in file:
            path, found, _ = key.removeprefix("base_model.model.").partition(".composition_mixing.")
            if found:
                mixing.load_state_dict({"weight": file.read(key)})
                weights[name_in_checkpoint(path, self.ranks)] = mixing().tolist()
        if weights.keys() != self.ranks.keys():  # DeepSpeed, for one, can leave an empty file here and save elsewhere
            return {}
        return {module: weights[module] for module in self.ranks}
