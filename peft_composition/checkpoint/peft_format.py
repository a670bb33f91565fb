"""PEFT's format of a LoRA: names of tensors, `LoraConfig`, patterns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from ..config import CompositionConfig
from ..references import LoraLayout
from ..tuner.base_parameter import IN_PROJ, OUT_PROJ
from ..tuner.wrapping import target_of, wrapped_path
from .saved import PREFIX


# PEFT expects a head in every adapter of these task types, and fails without one.
_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def missing_projections(state_dict: Mapping[str, Tensor], layout: LoraLayout) -> dict[str, Tensor]:
    """Zeros for the projection of an attention of which only the other one is composed: PEFT needs both or none."""
    zeros: dict[str, Tensor] = {}
    for owner in layout.get("attentions", ()):
        prefixes = [f"{PREFIX}{wrapped_path(f'{owner}.{key}', layout)}.lora_" for key in (IN_PROJ, OUT_PROJ)]
        for prefix, other, rows in zip(prefixes, prefixes[::-1], (3, 1)):
            if f"{prefix}A.weight" not in state_dict:
                A = torch.zeros_like(state_dict[f"{other}A.weight"])  # (R, in); both projections have the same input
                zeros[f"{prefix}A.weight"] = A
                zeros[f"{prefix}B.weight"] = A.new_zeros(rows * A.shape[1], A.shape[0])
    return zeros


def require_one_kind_of_bias(config: CompositionConfig) -> None:
    """Refuse LoRA biases beside embeddings or parameters: PEFT has no LoRA with both."""
    layout = config.lora_layout
    assert layout is not None
    parameters = [f"{owner}.{key}" for owner, keys in layout.get("parameters", {}).items() for key in keys]
    alone = {"touches an embedding": layout["embeddings"], "touches a parameter directly": parameters}
    for what, names in alone.items():
        if config.biased_modules and names:
            raise ValueError(
                f"PEFT has no LoRA that both has biases (here in {config.biased_modules[0]!r}) and {what} (here "
                f"{names[0]!r}). Compose without one of them (exclude_modules)"
            )
    if layout["fan_in_fan_out"] and parameters:
        raise ValueError(
            f"PEFT has no LoRA that touches both transformers' Conv1D layers and a parameter directly (here "
            f"{parameters[0]!r}). Compose without one of them (exclude_modules)"
        )


def named_tensors(is_embedding: bool, A: Tensor, B: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """The tensors of one module by the suffixes of their keys in a PEFT adapter."""
    if is_embedding:
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    named = {"lora_A.weight": A, "lora_B.weight": B}
    return named if bias is None else {**named, "lora_B.bias": bias}


def lora_config(config: CompositionConfig, ranks: Mapping[str, int], has_head: bool) -> LoraConfig:
    """The config of the exported adapter: its targets, and ranks and alphas so that every scale is 1."""
    layout = config.lora_layout
    assert layout is not None
    highest = max(ranks.values())
    ranks = {target_of(name, layout): rank for name, rank in ranks.items()}
    others = _pattern({name: rank for name, rank in ranks.items() if rank != highest}, ranks)
    lora = LoraConfig(
        task_type=config.task_type if has_head or config.task_type not in _TASKS_WITH_HEAD else None,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
        r=highest,
        lora_alpha=highest,
        rank_pattern=others,
        alpha_pattern=dict(others),
        lora_bias=bool(config.biased_modules),
        fan_in_fan_out=layout["fan_in_fan_out"],
        modules_to_save=list(dict.fromkeys(config.modules_to_save or ())) or None if has_head else None,
    )
    # Set afterwards: LoraConfig turns lists into sets, whose order in the file would change from run to run.
    lora.target_modules = layout["target_modules"]
    lora.target_parameters = layout.get("target_parameters")
    return lora


def _pattern(values: Mapping[str, int], modules: Mapping[str, Any]) -> dict[str, int]:
    """Entries of a `rank_pattern`, which PEFT reads as regexes for a suffix of a module's name."""
    parts = [name.split(".") for name in modules]
    suffixes = {".".join(own[first:]) for own in parts for first in range(1, len(own))}
    if suffixes.isdisjoint(values):
        return dict(values)
    return {f"^{re.escape(name)}": value for name, value in values.items()}  # an entry would match other modules
