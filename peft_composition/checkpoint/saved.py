"""A composition on disk: its config and its weights, opened in one place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor

from ..config import CompositionConfig
from ..names import name_in_checkpoint
from ..references import Provenance, is_hub_id
from ..tuner.fingerprint import checked_weights
from ..tuner.mixing import Mixing
from ..upstream.keys import BASE_COPY
from ..upstream.weights import WeightsFile
from .exported import Exported, export_in, weights_file
from .kinds import peft_type_in, why_no_composition


PREFIX = "base_model.model."
INFIX = ".composition_"


def saved_mixing_weights(folder: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """The mixing weights of a saved composition, from its files alone: no base model, no network.

    Args:
        folder: the folder that `save_pretrained` wrote.

    Returns:
        `{module name: {upstream adapter name: weight}}`, in the model's order, like `mixing_weights(model)`.

    Raises:
        ValueError: the folder holds no saved composition, or not its mixing weights.
    """
    saved = SavedComposition.opened(folder)
    weights = saved.mixing_weights()
    if not weights:
        raise ValueError(f"The weights file in {saved.folder} does not hold the mixing weights of all its modules.")
    names = saved.config.adapter_names
    return {
        module: {name: weight for name, weight, rank in zip(names, weights[module], ranks) if rank}
        for module, ranks in saved.ranks.items()
    }


def head_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the tensors of a checkpoint that are not part of the composition, to detect changes."""
    digest = hashlib.sha256()
    for key in sorted(key for key in tensors if not _is_of_composition(key)):
        content = tensors[key].detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(key.encode("utf-8", "surrogatepass"))
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()


def _is_of_composition(key: str) -> bool:
    """Whether a tensor belongs to a composed module, such as PEFT's copy of its base weight."""
    return key.endswith(BASE_COPY) or any(part.startswith("composition_") for part in key.split("."))


@dataclass(frozen=True)
class SavedComposition:
    """A composition that `save_pretrained` wrote; each of its two files is opened once, on first use.

    Attributes:
        root: folder of the card.
        subfolder: the composition's subfolder of `root`; None: `root` itself.
    """

    root: Path
    subfolder: str | None = None

    @classmethod
    def opened(cls, root: str | os.PathLike[str], subfolder: str | None = None) -> SavedComposition:
        """The composition in a folder.

        Args:
            root: folder of the card.
            subfolder: the composition's subfolder of `root`. Default: `root` itself.

        Raises:
            ValueError: there is no composition, or its weights file is missing.
        """
        saved = cls(Path(root), subfolder or None)
        if not saved.is_complete:
            raise ValueError(f"{why_no_composition(saved.folder)}.")
        return saved

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.root / (self.subfolder or "")

    @property
    def is_complete(self) -> bool:
        """Whether both files exist and describe a composition."""
        return weights_file(self.folder) is not None and peft_type_in(self.folder) == "COMPOSITION"

    @cached_property
    def lora(self) -> Exported | None:
        """The plain LoRA of these weights, if there is one."""
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
        """What was recorded about its upstream adapters when they were read."""
        return self.config.provenance or []

    @property
    def base_model(self) -> str | None:
        """The Hub id of the base model; None for a local model."""
        name = self.config.base_model_name_or_path
        return name if is_hub_id(name) else None

    @cached_property
    def weights(self) -> WeightsFile:
        """Its weights, not yet compared with the config."""
        path = weights_file(self.folder)
        if path is None:
            raise ValueError(f"{why_no_composition(self.folder)}.")
        return WeightsFile(self.subfolder or self.folder.name, path)

    @cached_property
    def _paths(self) -> dict[str, str]:
        """The prefix of each module in the keys of the weights file, which must belong to the config."""
        checked_weights(self.config, {key: self.weights.read(key) for key in self.weights})
        ours = dict.fromkeys(key.removeprefix(PREFIX).partition(INFIX)[0] for key in self.weights if INFIX in key)
        return {name_in_checkpoint(path, self.ranks): path for path in ours}

    def require_factors(self) -> None:
        """Check that it holds everything that an export needs.

        Raises:
            ValueError: it was saved without its factors, or by a version that recorded too little.
        """
        if not self.config.save_adapters:
            raise ValueError(
                f"{self.folder} was saved with save_adapters=False and does not contain the factors of its adapters. "
                "Load it (PeftModel.from_pretrained) and export the model: to_lora(model)"
            )
        if self.config.composed_modules is None or self.config.lora_layout is None:
            raise ValueError(
                f"{self.folder} does not record its modules (composed_modules, lora_layout in {CONFIG_NAME}). Load it "
                "(PeftModel.from_pretrained) and save it again, or export the model: to_lora(model)"
            )

    def read(self, module: str, part: str) -> Tensor:
        """A tensor of a composed module.

        Args:
            module: name of the module.
            part: the tensor, such as `factors.A` or `mixing.weight`.

        Raises:
            ValueError: the tensor is missing, or the weights do not belong to the config.
        """
        key = f"{PREFIX}{self._paths.get(module, module)}{INFIX}{part}"
        if key not in self.weights:
            raise ValueError(f"the saved composition is damaged: {key!r} is missing from its weights")
        return self.weights.read(key)

    @cached_property
    def others(self) -> dict[str, Tensor]:
        """All tensors except those of composed modules, by their keys without PEFT's prefix."""
        return {key.removeprefix(PREFIX): self.weights.read(key) for key in self.weights if INFIX not in key}

    @cached_property
    def head(self) -> dict[str, Tensor]:
        """The tensors of modules that are trained in full."""
        return {key: self.weights.read(key) for key in self.weights if not _is_of_composition(key)}

    @property
    def head_modules(self) -> list[str]:
        """The names of the modules that are trained in full."""
        return sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in self.head})

    @property
    def has_untrained_head(self) -> bool:
        """Whether the head is still the one that was recorded as untrained."""
        return self.config.untrained_head is not None and self.config.untrained_head == head_hash(self.head)

    def mixing_weights(self) -> dict[str, list[float]]:
        """The weight of every adapter in every composed module, from theta in the weights file; empty if missing."""
        mixing = Mixing(self.config, torch.float32)
        if mixing.weight is None:
            return dict.fromkeys(self.ranks, mixing().tolist())
        weights = {}
        for module, path in self._paths.items():
            key = f"{PREFIX}{path}{INFIX}mixing.weight"
            if key in self.weights:
                mixing.weight.data = self.weights.read(key).to(torch.float32)
                weights[module] = mixing().tolist()
        if weights.keys() != self.ranks.keys():  # DeepSpeed, for example, can save the weights elsewhere
            return {}
        return {module: weights[module] for module in self.ranks}
