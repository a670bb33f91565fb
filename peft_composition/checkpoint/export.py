"""A composition as a plain LoRA adapter, exact or truncated, that PEFT, vLLM and others load without this plugin."""

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
from ..drafts import LORA_DRAFT, alone_in, draft_in
from ..public import publish
from ..text import one_line
from ..tuner.layer import CompositionLayer
from ..tuner.locating import composition_layers
from ..tuner.mixing import Mixing
from ..tuner.wrapping import attention_output_times, is_attention_output, wrapped_path
from .exported import HEAD_NAME, RECORD_NAME, sha256_of, weights_file, write_record
from .peft_format import lora_config, missing_projections, named_tensors, require_one_kind_of_bias
from .ranks import ExportedModule, ExportedModules, ExportOptions, choose_ranks, factorize, mixed_modules, ratio_of
from .saved import INFIX, PREFIX, SavedComposition


@dataclass(repr=False)  # that of its tensors fills screens
class LoraExport:
    """A plain LoRA adapter made from a composition; every module has scale 1 (alpha = rank).

    Attributes:
        config: its `LoraConfig`; `r` is the rank of all modules. With `one_rank=False` it is the largest, and other
            ranks are in `rank_pattern` and `alpha_pattern`.
        state_dict: its tensors by the keys of an `adapter_model.safetensors`, on the CPU.
        ranks: rank of every module, in the model's order; of a parameter of several matrices, that of each.
        errors: for every module the relative error of the truncation, ||Delta - Delta'|| / ||Delta|| in the Frobenius
            norm; 0 where nothing was cut. The rounding to the dtype of the export is not in it.
        total_error: the same over all modules together.
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
        text = f"Plain LoRA of {len(self.ranks)} modules, {ranks}: "
        if not any(self.errors.values()):
            return text + "exact"
        worst = max(self.errors, key=lambda module: self.errors[module])
        worst_error = f"{self.errors[worst]:.3g} ({one_line(worst)})"
        return text + f"relative error {self.total_error:.3g}, at most {worst_error}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save as `adapter_config.json` and `adapter_model.safetensors`, and a separate head as `head.safetensors`.

        All files are written in full before the first takes the place of an older one. What is then cut short between
        two of them leaves a folder without `adapter_config.json`, which nothing loads.

        Args:
            folder: made where it does not exist.
        """
        self._save(Path(folder))

    def save_beside(self, composition: str | os.PathLike[str], subfolder: str, sha256: str | None = None) -> None:
        """Save in a subfolder of the saved composition that it was made from, with a record of that.

        Args:
            composition: folder of the saved composition.
            subfolder: where to, inside it.
            sha256: of the weights file that it was made from. Default: of the one that is there.
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
        """Upload the files of `save_pretrained` in one commit to a repository, made where it does not exist.

        Other files of the repository stay as they are, a `head.safetensors` of an earlier export too.

        Args:
            repo_id: of the repository.
            subfolder: folder in the repository. Default: its root.
            private: whether a new repository is private. Default: as the owner's settings say.
            token: as for all of `huggingface_hub`. Default: the one logged in with.
            revision: branch to commit to. Default: `main`.
            commit_message: of the commit.
            create_pr: open a pull request instead of committing.

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
    """Put the files of a new export in the places of an older one, so that no reader gets some of each."""
    config, head = folder / CONFIG_NAME, folder / HEAD_NAME
    is_same_config = config.is_file() and config.read_bytes() == (draft / CONFIG_NAME).read_bytes()
    if not is_same_config or head.exists() or (draft / HEAD_NAME).exists():
        config.unlink(missing_ok=True)
        head.unlink(missing_ok=True)
    (folder / RECORD_NAME).unlink(missing_ok=True)
    for name in (SAFETENSORS_WEIGHTS_NAME, HEAD_NAME, RECORD_NAME, CONFIG_NAME):
        if (draft / name).exists():
            os.replace(draft / name, folder / name)


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
    """Turn a composition into a plain LoRA adapter; the model stays as it is.

    The product of the exported factors is the composed update B diag(u) A (see `tuner.functional`): exactly, with the
    stacked factors, or the nearest one of a lower rank. The dense update is never formed.

    Args:
        model: a `PeftModel`, a transformers model or any model that a composition was injected into; merged or not.
        adapter_name: name of the composition. Default: the active one.
        rank: highest rank per module; where more are stacked, the nearest update of that rank is exported. Default:
            exact, with the largest sum of the ranks of the upstream adapters of one module.
        energy: instead of `rank`, the share of the squared Frobenius norm of its update that every module keeps, above
            0 and at most 1, with the least rank that does. With 1 only what rounding hides is left out.
        round_rank: round the rank of all modules up to one that vLLM accepts: 8, 16, 32, 64, 128, 256, 320, 512.
            Default: False.
        one_rank: give all modules the rank of the largest (default). What was truncated fills the room; beyond the
            rank of the update there are zeros. Readers scale by different rules: alpha / r of the config (vLLM),
            alpha / rank of every tensor (llama.cpp, diffusers), `alpha_pattern` / `rank_pattern` (PEFT). With one rank
            all of them give 1, and servers that stack the factors of several modules (SGLang) take the adapter.
            `False` keeps every module's own rank: a smaller file that PEFT and vLLM scale rightly, and llama.cpp and
            diffusers wrongly; a warning says so where ranks differ.
        include_head: `True` (default) puts what the composition trains or saves besides (`modules_to_save`) into the
            adapter, as PEFT does; `"separate"` puts it into a file of its own, `head.safetensors`, with the names of
            the base model: `base.load_state_dict(load_file(...), strict=False)`. `False` leaves it out. vLLM refuses
            an adapter with a head.
        dtype: of the exported factors. Default: that of the stacked ones.

    Returns:
        The adapter.

    Raises:
        ValueError: there is no such composition or more than one is active; an option has no meaning; a value is not
            finite, also once rounded to `dtype`; or the export has no form that PEFT can load.
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
    if config.task_type is None:  # AutoPeftModel needs one or the other
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
    """As `to_lora`, from the files of a saved composition; needs no base model and no network.

    Args:
        folder: of a composition saved with `save_adapters=True`.
        rank: as in `to_lora`.
        energy: as in `to_lora`.
        round_rank: as in `to_lora`.
        one_rank: as in `to_lora`.
        include_head: as in `to_lora`.
        dtype: as in `to_lora`.

    Returns:
        The adapter.

    Raises:
        ValueError: the folder holds no composition, or not its factors; or as in `to_lora`.
    """
    options = ExportOptions(rank, energy, round_rank, one_rank, include_head, dtype)
    saved = SavedComposition.opened(folder)
    saved.require_factors()
    modules = {name: partial(_read_saved, saved, name) for name in saved.ranks}
    return _export(saved.config, modules, saved.others if include_head else {}, options)


def _composed_base(model: nn.Module) -> Any:
    """The base model inside, which carries the configs of its adapters."""
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
        raise ValueError(f"Which composition is to be exported? Say adapter_name=...; {state}.")
    return active[0]


def _read_layer(layer: CompositionLayer, adapter_name: str) -> ExportedModule:
    with layer.onloaded([adapter_name]):
        factors = layer.whole_factors(adapter_name)  # refuses factors that never came
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
        if config.biased_modules and bias is None:  # PEFT gives all modules a bias, or none
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
    """A copy: the export stays what it is when the model trains on."""
    return tensor.detach().to("cpu", copy=True).contiguous()
