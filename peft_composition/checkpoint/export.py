"""Exports a composition as a plain LoRA, exact or truncated, which PEFT, vLLM and others load without this plugin."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import CommitInfo, HfApi
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import CompositionConfig
from ..drafts import LORA_DRAFT, alone_in, draft_in, take_place
from ..public import publish
from ..text import one_line, plural
from ..tuner.layer import CompositionLayer
from ..tuner.locating import composition_layers
from ..tuner.mixing import Mixing
from ..tuner.wrapping import attention_output_times, is_attention_output, wrapped_path
from .exported import HEAD_NAME, RECORD_NAME, sha256_of, weights_file, write_record
from .peft_format import lora_config, missing_projections, named_tensors, require_one_kind_of_bias
from .ranks import ExportedModule, ExportedModules, ExportOptions, choose_ranks, factorize, mixed_modules, ratio_of
from .saved import INFIX, PREFIX, SavedComposition


@dataclass(repr=False)  # the repr of its tensors fills screens
class LoraExport:
    """A plain LoRA adapter made from a composition; every module has scale 1 (alpha = rank).

    Attributes:
        config: its `LoraConfig`; `r` is the rank of all modules. With `one_rank=False` it is the largest rank, and the
            others are in `rank_pattern` and `alpha_pattern`.
        state_dict: its tensors on the CPU, by their keys in `adapter_model.safetensors`.
        ranks: rank of every module, in the model's order; for a parameter of several matrices, the rank of each
            matrix.
        errors: relative error of the truncation by module, ||Delta - Delta'|| / ||Delta|| in the Frobenius norm; 0 if
            nothing was cut. The rounding to the dtype of the export is not included.
        total_error: the relative error over all modules together.
        head: with `include_head="separate"`, the tensors of the head by their names in the base model.
    """

    config: LoraConfig
    state_dict: dict[str, Tensor]
    ranks: dict[str, int]
    errors: dict[str, float]
    total_error: float
    head: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        lowest, highest = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {highest}" if lowest == highest else f"ranks {lowest} to {highest}"
        text = f"Plain LoRA of {plural(len(self.ranks), 'module')}, {ranks}: "
        if not any(self.errors.values()):
            return text + "exact"
        worst = max(self.errors, key=lambda module: self.errors[module])
        worst_error = f"{self.errors[worst]:.3g} ({one_line(worst)})"
        return text + f"relative error {self.total_error:.3g}, at most {worst_error}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save as `adapter_config.json` and `adapter_model.safetensors`, and a separate head as `head.safetensors`.

        All files are written completely before the first one replaces an older one. If the process is killed between
        two replacements, the folder has no `adapter_config.json`, so that nothing loads it.

        Args:
            folder: the folder; created if it does not exist.
        """
        self._save(Path(folder))

    def save_beside(self, composition: str | os.PathLike[str], subfolder: str, sha256: str | None = None) -> None:
        """Save in a subfolder of the saved composition that it was made from, with a record of its origin.

        Args:
            composition: folder of the saved composition.
            subfolder: name of the subfolder.
            sha256: hash of the weights file that it was made from. Default: the hash of the present one.
        """
        weights = weights_file(Path(composition))
        if sha256 is None and weights is not None:
            sha256 = sha256_of(weights)
        self._save(Path(composition, subfolder), sha256)

    def _save(self, folder: Path, composition_sha256: str | None = None) -> None:
        with draft_in(folder, LORA_DRAFT) as draft:
            save_file(self.state_dict, draft / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            self.config.save_pretrained(str(draft))
            if self.head:
                save_file(self.head, draft / HEAD_NAME, metadata={"format": "pt"})
            if composition_sha256 is not None:
                write_record(draft, composition_sha256, self.total_error)
            with alone_in(folder):
                _take_places(draft, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload LoRA adapter",
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload the files of `save_pretrained` in one commit to a repository, which is created if it does not exist.

        Other files of the repository stay unchanged, also a `head.safetensors` of an earlier export.

        Args:
            repo_id: the repository.
            subfolder: folder in the repository. Default: its root.
            private: whether a new repository is private. Default: the setting of the owner.
            token: a Hub token, as in `huggingface_hub`. Default: the stored token.
            revision: branch to commit to. Default: `main`.
            commit_message: message of the commit.
            create_pr: whether to open a pull request instead of committing. Default: False.

        Returns:
            The commit, as `huggingface_hub` describes it.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            publish(Path(folder))
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )


def _take_places(draft: Path, folder: Path) -> None:
    """Replace the files of an older export by those of a new one, so that no reader gets a mixture of both."""
    config, head = folder / CONFIG_NAME, folder / HEAD_NAME
    is_same_config = config.is_file() and config.read_bytes() == (draft / CONFIG_NAME).read_bytes()
    if not is_same_config or head.exists() or (draft / HEAD_NAME).exists():
        config.unlink(missing_ok=True)
        head.unlink(missing_ok=True)
    (folder / RECORD_NAME).unlink(missing_ok=True)
    for name in (SAFETENSORS_WEIGHTS_NAME, HEAD_NAME, RECORD_NAME, CONFIG_NAME):
        if (draft / name).exists():
            take_place(draft / name, folder / name)


def to_lora(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    round_rank: bool = False,
    one_rank: bool = True,
    include_head: bool | Literal["separate"] = True,
    dtype: torch.dtype | None = None,
) -> LoraExport:
    """Turn a composition into a plain LoRA adapter; the model stays unchanged.

    The product of the exported factors is the composed update B diag(u) A (see `tuner.functional`), either exactly,
    with the stacked factors, or as the nearest update of a lower rank. The dense update is never formed.

    Args:
        model: a `PeftModel`, a transformers model or any model that a composition was injected into; merged or not.
        adapter_name: name of the composition. Default: the active one.
        rank: largest rank per module; where the stacked rank is larger, the nearest update of rank `rank` is exported.
            Default: exact, with the largest sum of upstream ranks in one module.
        energy: instead of `rank`: the share of the squared Frobenius norm of its update that every module keeps, above
            0 and at most 1; the smallest rank that reaches it is used. With 1, only rounding errors are cut.
        round_rank: whether to round the rank of all modules up to a rank that vLLM accepts: 8, 16, 32, 64, 128, 256,
            320, 512. Default: False.
        one_rank: whether all modules get the largest rank (default: True). Modules of a lower rank are filled with
            components that were truncated, then with zeros. Programs scale by different rules: alpha / r of the config
            (vLLM), alpha / rank of every tensor (llama.cpp, diffusers), `alpha_pattern` / `rank_pattern` (PEFT). With
            one rank, all rules give 1, and servers that stack the factors of several modules (SGLang) accept the
            adapter. False keeps every module's own rank, which makes a smaller file; PEFT and vLLM scale it correctly,
            llama.cpp and diffusers do not, and a warning says so if ranks differ.
        include_head: True (default) saves the modules in `modules_to_save`, such as the head, with the adapter, as
            PEFT does. `"separate"` saves them in a separate file `head.safetensors`, with the names of the base model:
            `base.load_state_dict(load_file(...), strict=False)`. False leaves them out. vLLM refuses an adapter with a
            head.
        dtype: dtype of the exported factors. Default: the dtype of the stacked factors.

    Returns:
        The adapter.

    Raises:
        ValueError: the composition does not exist, or several are active; an option is invalid; a value is not finite,
            or not after rounding to `dtype`; or PEFT has no format for the export.
    """
    options = ExportOptions(rank, energy, round_rank, one_rank, include_head, dtype)
    base = _composed_base(model)
    adapter_name = _chosen_composition(base, adapter_name)
    config = cast(CompositionConfig, base.peft_config[adapter_name])
    modules = {
        name: partial(_read_layer, layer, adapter_name)
        for name, layer in composition_layers(base)
        if adapter_name in layer.composition_factors
    }
    others = {}
    if include_head:
        saved = get_peft_model_state_dict(base, adapter_name=adapter_name)
        others = {key: tensor for key, tensor in saved.items() if INFIX not in key}
    export = _export(config, modules, others, options)
    if config.task_type is None:  # AutoPeftModel needs a task type or an auto mapping
        export.config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return export


def lora_from_checkpoint(
    folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    round_rank: bool = False,
    one_rank: bool = True,
    include_head: bool | Literal["separate"] = True,
    dtype: torch.dtype | None = None,
) -> LoraExport:
    """Like `to_lora`, but from the files of a saved composition; needs no base model and no network.

    Args:
        folder: folder of a composition that was saved with `save_adapters=True`.
        rank: as in `to_lora`.
        energy: as in `to_lora`.
        round_rank: as in `to_lora`.
        one_rank: as in `to_lora`.
        include_head: as in `to_lora`.
        dtype: as in `to_lora`.

    Returns:
        The adapter.

    Raises:
        ValueError: the folder holds no composition or not its factors; or as in `to_lora`.
    """
    options = ExportOptions(rank, energy, round_rank, one_rank, include_head, dtype)
    saved = SavedComposition.opened(folder)
    saved.require_factors()
    modules = {name: partial(_read_saved, saved, name) for name in saved.ranks}
    return _export(saved.config, modules, saved.others if include_head else {}, options)


def _composed_base(model: nn.Module) -> Any:
    """The inner base model, which holds the configs of its adapters."""
    model = getattr(model, "_orig_mod", model)  # inside torch.compile
    if isinstance(model, PeftModel):
        model = model.base_model
    if isinstance(model, BaseTuner):
        model = model.model
    configs = getattr(model, "peft_config", None) or {}
    if not any(isinstance(config, CompositionConfig) for config in configs.values()):
        kinds = sorted({str(config.peft_type.value) for config in configs.values()})
        found = f"its adapters are of type {', '.join(kinds)}" if kinds else "it has no adapter"
        raise ValueError(f"The model ({type(model).__name__}) holds no composition: {found}.")
    return model


def _chosen_composition(base: Any, adapter_name: str | None) -> str:
    names = [name for name, config in base.peft_config.items() if isinstance(config, CompositionConfig)]
    if adapter_name is not None:
        if adapter_name not in names:
            raise ValueError(f"There is no composition {adapter_name!r}; there are {sorted(names)}.")
        return adapter_name
    layers = [layer for _, layer in composition_layers(base)]
    active = [n for n in names if any(n in x.active_adapters and n in x.composition_factors for x in layers)]
    if len(active) != 1:
        state = f"{sorted(active)} are active" if active else f"none is active of {sorted(names)}"
        raise ValueError(f"It is unclear which composition to export: {state}. Pass adapter_name=...")
    return active[0]


def _read_layer(layer: CompositionLayer, adapter_name: str) -> ExportedModule:
    with layer.onloaded([adapter_name]):
        factors = layer.whole_factors(adapter_name)  # refuses factors that were never loaded
        weights = layer.mixing_weights(adapter_name)
        return mixed_modules(factors.A, factors.B, factors.bias, factors.ranks, weights, factors.has_experts)


def _read_saved(saved: SavedComposition, module: str) -> ExportedModule:
    config = saved.config
    assert config.lora_layout is not None
    ranks = saved.ranks[module]
    A, B = saved.read(module, "factors.A"), saved.read(module, "factors.B")
    owner, _, key = module.rpartition(".")
    has_experts = A.dim() == 3 and key in config.lora_layout.get("parameters", {}).get(owner, ())
    found = (A.shape[1], B.shape[2]) if has_experts else (A.shape[0], B.shape[1])
    if found != (sum(ranks), sum(ranks)):
        raise ValueError(
            f"the saved composition is damaged: module {module!r} has ranks {ranks} in its config, but factors of "
            f"rank {found[0]} and {found[1]}"
        )
    bias = saved.read(module, "factors.bias") if module in (config.biased_modules or ()) else None
    theta = saved.read(module, "mixing.weight") if config.mixing == "learned" else None
    mixing = Mixing(config, torch.float32 if theta is None else theta.dtype, torch.device("cpu"))
    if theta is not None and mixing.weight is not None:
        mixing.weight.data = theta
    return mixed_modules(A, B, bias, ranks, mixing(A.device, A.dtype), has_experts)


def _export(
    config: CompositionConfig, modules: ExportedModules, others: Mapping[str, Tensor], options: ExportOptions
) -> LoraExport:
    layout = config.lora_layout
    assert layout is not None
    require_one_kind_of_bias(config)
    ranks = choose_ranks(modules, layout, options)
    state_dict: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    norms: dict[str, float] = {}
    for name, read in modules.items():
        module = read()
        A, B, lost[name], norms[name] = factorize(module, ranks[name], is_measured=options.is_truncating)
        if is_attention_output(name, layout):
            B = B / attention_output_times()
        dtype = options.dtype or module.A.dtype
        bias = module.bias
        if config.biased_modules and bias is None:  # in PEFT, all modules have a bias or none
            bias = torch.zeros(B.shape[0])
        for key, tensor in named_tensors(name in layout["embeddings"], A, B, bias).items():
            state_dict[f"{PREFIX}{wrapped_path(name, layout)}.{key}"] = _rounded(
                tensor, dtype, f"module {name!r}: {key}"
            )
    state_dict |= missing_projections(state_dict, layout)
    is_separate = options.include_head == "separate"
    if not is_separate:
        state_dict.update({f"{PREFIX}{key}": _on_cpu(tensor) for key, tensor in others.items()})
    return LoraExport(
        config=lora_config(config, ranks, has_head=bool(others) and not is_separate),
        state_dict=state_dict,
        ranks=ranks,
        errors={name: ratio_of(lost[name], norms[name]) for name in ranks},
        total_error=ratio_of(math.hypot(*lost.values()), math.hypot(*norms.values())),
        head={key.replace(".base_layer.", "."): _on_cpu(t) for key, t in others.items()} if is_separate else {},
    )


def _rounded(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    rounded = tensor.to(dtype).contiguous()
    if not rounded.isfinite().all():
        raise ValueError(
            f"{what}: values up to {float(tensor.abs().max()):.3g} overflow in {dtype}; export in a wider dtype: "
            "dtype=torch.float32"
        )
    return rounded


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy, so that the export stays unchanged when the model is trained further."""
    return tensor.detach().to("cpu", copy=True).contiguous()
