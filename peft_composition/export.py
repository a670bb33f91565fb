"""A composition as a plain LoRA adapter, exact or truncated, that PEFT, vLLM and others load without this plugin."""

from __future__ import annotations

import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.constants import REPOCARD_NAME
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import CompositionConfig
from .drafts import LORA_DRAFT, alone_in, draft_in
from .exported import HEAD_NAME, RECORD_NAME, sha256_of, weights_file, write_record
from .kinds import why_no_composition
from .names import LORA_SUBFOLDER, name_in_checkpoint
from .public import publish
from .references import LoraLayout
from .text import one_line
from .tuner import functional
from .tuner.base_parameter import IN_PROJ, OUT_PROJ
from .tuner.fingerprint import checked_weights
from .tuner.layer import CompositionLayer
from .tuner.locating import composition_layers
from .tuner.mixing import Mixing
from .tuner.wrapping import attention_output_times, is_attention_output, target_of, wrapped_path
from .upstream.weights import WeightsFile


# What vLLM takes as `max_lora_rank`.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# PEFT looks for a head in every adapter of these task types, and fails where there is none.
_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_PREFIX = "base_model.model."
_INFIX = ".composition_"


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

    The product of the exported factors is the composed update B diag(u) A (see `functional`), exactly with the stacked
    factors, or nearest to it at a lower rank. The dense update is never formed.

    Args:
        model: a `PeftModel`, a transformers model or any model that a composition was injected into; merged or not.
        adapter_name: name of the composition. Default: the active one.
        rank: highest rank per module; where more are stacked, the nearest update of that rank is exported. Default:
            exact, with the largest sum of the ranks of the upstream adapters of one module.
        energy: instead of `rank`, the share of the squared Frobenius norm of its update that every module keeps, above
            0 and at most 1, with the least rank that does. With 1 only what rounding hides is left out.
        round_rank: round the rank of all modules up to one that servers accept (`SERVED_RANKS`); vLLM allocates by
            such a rank.
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
    options = _Options(rank, energy, round_rank, one_rank, include_head, dtype)
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
        others = {key: tensor for key, tensor in saved.items() if _INFIX not in key}
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
    options = _Options(rank, energy, round_rank, one_rank, include_head, dtype)
    folder = Path(folder)
    config = _read_config(folder)
    weights = _open_weights(folder)
    checked_weights(config, {key: weights.read(key) for key in weights})
    composed = config.composed_modules or {}
    saved = dict.fromkeys(key.removeprefix(_PREFIX).partition(_INFIX)[0] for key in weights if _INFIX in key)
    paths = {name_in_checkpoint(path, composed): path for path in saved}
    modules = {name: partial(_read_saved, weights, config, name, paths.get(name, name)) for name in composed}
    others = {}
    if include_head:
        others = {key.removeprefix(_PREFIX): weights.read(key) for key in weights if _INFIX not in key}
    return _export(config, modules, others, options)


def add_to_checkpoint(folder: str | os.PathLike[str], subfolder: str = LORA_SUBFOLDER, **options: Any) -> LoraExport:
    """Put the export of a saved composition into a subfolder, for everybody who does not have this plugin.

    Once pushed, `PeftModel.from_pretrained(base, "me/composed", subfolder="lora")` loads it with PEFT alone. When
    other weights are saved into the folder, the export in `lora` no longer belongs to them and is removed, with a
    warning.

    Args:
        folder: of the saved composition.
        subfolder: where to, inside `folder`.
        **options: as in `to_lora`: `rank`, `energy`, `round_rank`, `one_rank`, `include_head`,
            `dtype`.

    Returns:
        The adapter that was saved.

    Raises:
        ValueError: as in `lora_from_checkpoint`.
    """
    weights = weights_file(Path(folder))
    before = None if weights is None else sha256_of(weights)  # what is saved from here on, it was not made from
    export = lora_from_checkpoint(folder, **options)
    export.save_beside(folder, subfolder, before)
    if Path(folder, REPOCARD_NAME).is_file():
        from .hub import write_model_card  # it builds on this module

        write_model_card(folder)  # says how to load the export
    return export


@dataclass(frozen=True)
class _Options:
    """What is asked of an export, checked."""

    rank: int | None
    energy: float | None
    round_rank: bool
    one_rank: bool
    include_head: bool | Literal["separate"]
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise ValueError(f"give rank or energy, not both: got rank={self.rank!r} and energy={self.energy!r}")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        if self.energy is not None and not (isinstance(self.energy, (int, float)) and 0 < self.energy <= 1):
            raise ValueError(f"energy must be a share above 0 and at most 1, got {self.energy!r}")
        if self.round_rank and not self.one_rank:
            raise ValueError("round_rank gives all modules one rank: it cannot go with one_rank=False")
        if self.include_head not in (True, False, "separate"):
            raise ValueError(f'include_head must be True, False or "separate", got {self.include_head!r}')
        if self.dtype is not None and not (self.dtype.is_floating_point and self.dtype.itemsize >= 2):
            raise ValueError(f"dtype must be a floating point dtype of at least 16 bits, got {self.dtype}")

    @property
    def is_truncating(self) -> bool:
        return self.rank is not None or self.energy is not None


@dataclass
class _Module:
    """What a composition does to one module, on the CPU: the update B diag(u) A, and the mixed bias.

    A parameter of several matrices has an update for each: A is (E, R, in) and B (E, out, R).
    """

    A: Tensor
    B: Tensor
    u: Tensor
    bias: Tensor | None
    has_experts: bool = False

    @property
    def stacked_rank(self) -> int:
        return len(self.u)

    @property
    def largest_rank(self) -> int:
        """The highest rank that the update can have."""
        A, B = self.experts[0]
        return min(self.stacked_rank, B.shape[0], A[0].numel())

    @property
    def experts(self) -> list[tuple[Tensor, Tensor]]:
        """The factors of every matrix."""
        return list(zip(self.A, self.B)) if self.has_experts else [(self.A, self.B)]

    def singular_values(self) -> Tensor:
        """Of the update, largest first; of several matrices the root of the sum of squares, place by place."""
        values = [functional.singular_values(A, B, self.u) for A, B in self.experts]
        return torch.stack(values).square().sum(0).sqrt()


_Modules = Mapping[str, Callable[[], _Module]]  # read when needed: a model's worth of factors is large


def _mixed(A: Tensor, B: Tensor, bias: Tensor | None, ranks: list[int], weights: Tensor, has_experts: bool) -> _Module:
    A, B, weights = A.detach().cpu(), B.detach().cpu(), weights.detach().cpu()
    u = weights.repeat_interleave(torch.tensor(ranks))
    mixed_bias = None if bias is None else functional.delta_bias(bias.detach().cpu().double(), weights)
    return _Module(A, B, u, mixed_bias, has_experts)


# From a model


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


def _read_layer(layer: CompositionLayer, adapter_name: str) -> _Module:
    with layer.onloaded([adapter_name]):
        factors = layer.whole_factors(adapter_name)  # refuses factors that never came
        weights = layer.mixing_weights(adapter_name)
        return _mixed(factors.A, factors.B, factors.bias, factors.ranks, weights, factors.has_experts)


# From a folder


def _read_config(folder: Path) -> CompositionConfig:
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


def _open_weights(folder: Path) -> WeightsFile:
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            return WeightsFile(folder.name, folder / name)
    raise ValueError(f"{folder} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}")


def _read_saved(weights: WeightsFile, config: CompositionConfig, module: str, path: str) -> _Module:
    keys = set(weights)

    def read(part: str) -> Tensor:
        key = f"{_PREFIX}{path}{_INFIX}{part}"
        if key not in keys:
            raise ValueError(f"the saved composition is damaged: {key!r} is missing from its weights")
        return weights.read(key)

    assert config.composed_modules is not None
    assert config.lora_layout is not None
    ranks = config.composed_modules[module]
    A, B = read("factors.A"), read("factors.B")
    owner, _, key = module.rpartition(".")
    has_experts = A.dim() == 3 and key in config.lora_layout.get("parameters", {}).get(owner, ())
    found = (A.shape[1], B.shape[2]) if has_experts else (A.shape[0], B.shape[1])
    if found != (sum(ranks), sum(ranks)):
        raise ValueError(
            f"the saved composition is damaged: module {module!r} has ranks {ranks} in its config, but factors of "
            f"rank {found[0]} and {found[1]}"
        )
    bias = read("factors.bias") if module in (config.biased_modules or ()) else None
    theta = read("mixing.weight") if config.mixing == "learned" else None
    mixing = Mixing(config, torch.float32 if theta is None else theta.dtype, torch.device("cpu"))
    if theta is not None and mixing.weight is not None:
        mixing.weight.data = theta
    return _mixed(A, B, bias, ranks, mixing(A.device, A.dtype), has_experts)


# The export itself


def _export(
    config: CompositionConfig, modules: _Modules, others: Mapping[str, Tensor], options: _Options
) -> LoraExport:
    layout = config.lora_layout
    assert layout is not None
    _require_one_kind_of_bias(config)
    ranks = _choose_ranks(modules, layout, options)
    state_dict: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    norms: dict[str, float] = {}
    for name, read in modules.items():
        module = read()
        A, B, lost[name], norms[name] = _factorize(module, ranks[name], is_measured=options.is_truncating)
        if is_attention_output(name, layout):
            B = B / attention_output_times()
        dtype = options.dtype or module.A.dtype
        bias = module.bias
        if config.biased_modules and bias is None:  # PEFT gives all modules a bias, or none
            bias = torch.zeros(B.shape[0])
        for key, tensor in _named_tensors(name in layout["embeddings"], A, B, bias).items():
            state_dict[f"{_PREFIX}{wrapped_path(name, layout)}.{key}"] = _rounded(
                tensor, dtype, f"module {name!r}: {key}"
            )
    state_dict |= _missing_projections(state_dict, layout)
    is_separate = options.include_head == "separate"
    if not is_separate:
        state_dict.update({f"{_PREFIX}{key}": _on_cpu(tensor) for key, tensor in others.items()})
    return LoraExport(
        config=_lora_config(config, ranks, has_head=bool(others) and not is_separate),
        state_dict=state_dict,
        ranks=ranks,
        errors={name: _ratio(lost[name], norms[name]) for name in ranks},
        total_error=_ratio(math.hypot(*lost.values()), math.hypot(*norms.values())),
        head={key.replace(".base_layer.", "."): _on_cpu(t) for key, t in others.items()} if is_separate else {},
    )


def _missing_projections(state_dict: Mapping[str, Tensor], layout: LoraLayout) -> dict[str, Tensor]:
    """Zeros for the projection of an attention that is not composed while the other is: PEFT has both or none."""
    zeros: dict[str, Tensor] = {}
    for owner in layout.get("attentions", ()):
        prefixes = [f"{_PREFIX}{wrapped_path(f'{owner}.{key}', layout)}.lora_" for key in (IN_PROJ, OUT_PROJ)]
        for prefix, other, rows in zip(prefixes, prefixes[::-1], (3, 1)):
            if f"{prefix}A.weight" not in state_dict:
                A = torch.zeros_like(state_dict[f"{other}A.weight"])  # (R, in); both projections have the same input
                zeros[f"{prefix}A.weight"] = A
                zeros[f"{prefix}B.weight"] = A.new_zeros(rows * A.shape[1], A.shape[0])
    return zeros


def _require_one_kind_of_bias(config: CompositionConfig) -> None:
    layout = config.lora_layout
    assert layout is not None
    parameters = [f"{owner}.{key}" for owner, keys in layout.get("parameters", {}).items() for key in keys]
    alone = {"touches an embedding": layout["embeddings"], "touches a parameter by itself": parameters}
    for what, names in alone.items():
        if config.biased_modules and names:
            raise ValueError(
                f"PEFT knows no LoRA that has biases, as here in {config.biased_modules[0]!r}, and {what}, as here "
                f"{names[0]!r}. Compose without one of them (exclude_modules)"
            )
    if layout["fan_in_fan_out"] and parameters:
        raise ValueError(
            f"PEFT knows no LoRA that touches transformers' Conv1D layers and a parameter by itself, as here "
            f"{parameters[0]!r}. Compose without one of them (exclude_modules)"
        )


def _choose_ranks(modules: _Modules, layout: LoraLayout, options: _Options) -> dict[str, int]:
    """The rank of every module; looks at all factors, and so is where values that are not finite are found."""
    ranks: dict[str, int] = {}
    for name, read in modules.items():
        module = read()
        for what, tensor in (("lora_A", module.A), ("lora_B", module.B), ("mixing weights", module.u)):
            if not tensor.isfinite().all():
                raise ValueError(f"module {name!r}: {what}: not all values are finite")
        if options.rank is not None and options.rank < module.stacked_rank:
            ranks[name] = min(options.rank, module.largest_rank)
        elif options.energy is not None:
            ranks[name] = functional.rank_for_energy(module.singular_values(), options.energy)
        else:
            ranks[name] = module.stacked_rank
    shared: dict[str, int] = {}  # PEFT gives both projections of an attention one rank
    for name, chosen in ranks.items():
        shared[target_of(name, layout)] = max(chosen, shared.get(target_of(name, layout), 0))
    ranks = {name: shared[target_of(name, layout)] for name in ranks}
    highest = max(ranks.values())
    if options.one_rank:
        return dict.fromkeys(ranks, _served_rank(highest) if options.round_rank else highest)
    if min(ranks.values()) < highest:
        warnings.warn(
            f"The modules of this LoRA have ranks {min(ranks.values())} to {highest}, each with an alpha of its own. "
            "PEFT and vLLM scale them rightly; llama.cpp and diffusers divide one alpha by the rank of a tensor and "
            "scale the smaller ones wrongly. For those export with one_rank=True.",
            stacklevel=4,
        )
    return ranks


def _served_rank(rank: int) -> int:
    for served in SERVED_RANKS:
        if served >= rank:
            return served
    raise ValueError(
        f"the highest rank is {rank}, but servers accept {SERVED_RANKS[-1]} at most; truncate with rank=... or "
        "energy=... (1.0 leaves out only what is zero)"
    )


def _factorize(module: _Module, rank: int, is_measured: bool) -> tuple[Tensor, Tensor, float, float]:
    """A and B of the given rank, the norm of what was cut, and that of the update (0 unless measured).

    For a parameter of several matrices A is (E r, in), and the columns of B go through the matrices before the ranks.
    """
    parts = [_factorize_one(A, B, module, rank, is_measured) for A, B in module.experts]
    if not module.has_experts:
        return parts[0]
    A = torch.cat([part[0] for part in parts])
    B = torch.stack([part[1] for part in parts], dim=-1).flatten(1)
    return A, B, math.hypot(*(part[2] for part in parts)), math.hypot(*(part[3] for part in parts))


def _factorize_one(
    A: Tensor, B: Tensor, module: _Module, rank: int, is_measured: bool
) -> tuple[Tensor, Tensor, float, float]:
    if rank >= module.stacked_rank:
        lost = 0.0
        norm = functional.norm_of_delta(A, B, module.u) if is_measured else 0.0
        A, B = functional.fold_evenly(A, B, module.u)
    else:
        kept = min(rank, module.largest_rank)
        A, B, S = functional.truncate(A, B, module.u, kept)
        lost, norm = float(S[kept:].norm()), float(S.norm())
    return _padded(A, 0, rank), _padded(B, 1, rank), lost, norm


def _padded(factor: Tensor, dim: int, rank: int) -> Tensor:
    zeros = factor.new_zeros(*factor.shape[:dim], rank - factor.shape[dim], *factor.shape[dim + 1 :])
    return torch.cat([factor, zeros], dim)


def _ratio(lost: float, norm: float) -> float:
    return lost / norm if lost else 0.0


def _named_tensors(is_embedding: bool, A: Tensor, B: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    if is_embedding:
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    named = {"lora_A.weight": A, "lora_B.weight": B}
    return named if bias is None else {**named, "lora_B.bias": bias}


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


def _lora_config(config: CompositionConfig, ranks: Mapping[str, int], has_head: bool) -> LoraConfig:
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
    # Set afterwards: LoraConfig makes lists sets, whose order in the file changes from run to run.
    lora.target_modules = layout["target_modules"]
    lora.target_parameters = layout.get("target_parameters")
    return lora


def _pattern(values: Mapping[str, int], modules: Mapping[str, Any]) -> dict[str, int]:
    """Entries of a `rank_pattern`, which PEFT reads as regexes for the end of a module's name."""
    parts = [name.split(".") for name in modules]
    ends = {".".join(own[first:]) for own in parts for first in range(1, len(own))}
    if ends.isdisjoint(values):
        return dict(values)
    return {f"^{re.escape(name)}": value for name, value in values.items()}  # an entry would be taken for others
