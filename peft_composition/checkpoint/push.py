"""Pushes compositions to the Hub with their card and their plain LoRA; also the mixin for the Trainer."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import RemoteEntryNotFoundError
from peft import PeftModel

from ..config import CompositionConfig
from ..names import LORA_SUBFOLDER
from ..public import publish
from .card import write_model_card
from .explained import NAMES as REPORT_FILES
from .explained import Report, write_report
from .export import LoraExport, lora_from_checkpoint
from .exported import sha256_of, weights_file
from .saved import SavedComposition


def add_to_checkpoint(folder: str | os.PathLike[str], subfolder: str = LORA_SUBFOLDER, **options: Any) -> LoraExport:
    """Export a saved composition into its own subfolder, for users who do not have this plugin.

    Once pushed, `PeftModel.from_pretrained(base, "me/composed", subfolder="lora")` loads it with PEFT alone. When
    other weights are saved into the folder, the export in `lora` no longer matches them and is removed with a warning.

    Args:
        folder: the folder of the saved composition.
        subfolder: the subfolder to export to. Default: `lora`.
        **options: as in `to_lora`: `rank`, `energy`, `round_rank`, `one_rank`, `include_head`, `dtype`.

    Returns:
        The saved adapter.

    Raises:
        ValueError: as in `lora_from_checkpoint`.
    """
    weights = weights_file(Path(folder))
    before = None if weights is None else sha256_of(weights)  # before reading: the weights may be replaced meanwhile
    export = lora_from_checkpoint(folder, **options)
    export.save_beside(folder, subfolder, before)
    if Path(folder, REPOCARD_NAME).is_file():
        write_model_card(folder)  # explains how to load the export
    return export


if TYPE_CHECKING:
    from transformers import Trainer

    _TrainerBase = Trainer
else:
    _TrainerBase = object


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload composition",
    metrics: Mapping[str, float] | None = None,
    lora: bool = True,
    explanation: Report | None = None,
) -> CommitInfo:
    """Push the compositions of a model to the Hub, with their model card and as plain LoRAs.

    `model.push_to_hub` pushes the same weights but replaces a new card by an empty one. Here, text that people wrote
    into the card on the Hub stays. Call it in one process only; to push a sharded model, use the Trainer with
    `CompositionCardMixin`.

    Args:
        model: the model.
        repo_id: the repository; created if it does not exist.
        private: whether a new repository is private. Default: the setting of the owner.
        token: Hub token. Default: from the usual places (`HF_TOKEN`, `hf auth login`).
        revision: branch to push to; created if it does not exist. Default: the main branch.
        commit_message: first line of the commit message.
        metrics: evaluation results for the card, by name.
        lora: whether to push the exact export, too, in the subfolder `lora`, for users who do not have this plugin
            (default: True). Not for a composition with `save_adapters=False`, whose repository must not contain the
            factors.
        explanation: of the active composition, from `explain`: a page and a picture beside it, and a section in the
            card. Default: none; the report of an earlier push is removed, because it was about other weights.

    Returns:
        The commit.

    Raises:
        ValueError: the model has no composition; or one with `save_adapters=False` has upstream adapters in local
            folders, so that nobody else could load it. Nothing is pushed.
    """
    configs = {name: c for name, c in model.peft_config.items() if isinstance(c, CompositionConfig)}
    if not configs:
        raise ValueError(f"The model has no composition to push; its adapters are {sorted(model.peft_config)}.")
    for config in configs.values():
        _require_public_sources(config)
    api = HfApi(token=token)
    exports = [_lora_folder(name) for name in configs]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name, config in configs.items():
            if lora and config.save_adapters:
                lora_from_checkpoint(_folder_of(folder, name)).save_beside(_folder_of(folder, name), LORA_SUBFOLDER)
        if explanation is not None:
            write_report(_folder_of(folder, explanation.adapter_name), explanation)
        for name in configs:
            publish(_folder_of(folder, name))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        _fetch_card(api, repo_id, revision, Path(folder))  # replaces PEFT's card, which would remove people's tags
        for name in configs:
            write_model_card(folder, subfolder=_subfolder_of(name), repo_id=repo_id, metrics=metrics)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            # Files of an earlier push would be outdated.
            delete_patterns=[*(f"{export}/*" for export in exports), *(_reports(configs))],
        )


class CompositionCardMixin(_TrainerBase):
    """Completes the model card that a Trainer writes, and adds the plain LoRA, so that `push_to_hub` pushes both.

    The Trainer writes its card after saving, without calling any callback, so this mixin overrides
    `create_model_card`. It works with every subclass of `Trainer`. Until the model is saved in `output_dir`, the card
    stays as the Trainer wrote it.

    Example:
        >>> class ComposedTrainer(CompositionCardMixin, Trainer):
        ...     pass
    """

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's card and add the composition's section, with the evaluation results."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        folder = Path(cast(str, self.args.output_dir))
        for name, config in getattr(model, "peft_config", {}).items():
            subfolder = _subfolder_of(name)
            if isinstance(config, CompositionConfig) and SavedComposition(folder, subfolder).is_complete:
                if self.args.push_to_hub:
                    publish(_folder_of(folder, name))
                if self.args.push_to_hub and config.save_adapters:
                    add_to_checkpoint(_folder_of(folder, name))
                write_model_card(folder, subfolder=subfolder, repo_id=self.hub_model_id, metrics=_evaluation_of(self))


def _subfolder_of(adapter_name: str) -> str | None:
    return None if adapter_name == "default" else adapter_name


def _folder_of(folder: str | os.PathLike[str], adapter_name: str) -> Path:
    return Path(folder, _subfolder_of(adapter_name) or "")


def _lora_folder(adapter_name: str) -> str:
    return (Path(_subfolder_of(adapter_name) or "") / LORA_SUBFOLDER).as_posix()


def _reports(adapter_names: Iterable[str]) -> list[str]:
    return [(Path(_subfolder_of(name) or "") / file).as_posix() for name in adapter_names for file in REPORT_FILES]


def _require_public_sources(config: CompositionConfig) -> None:
    local = [entry["name"] for entry in config.provenance or () if entry["commit"] is None]
    if local and not config.save_adapters:
        raise ValueError(
            f"With save_adapters=False nobody else could load this composition: {', '.join(map(repr, local))} "
            "came from local folders. Push these adapters first and compose them from the Hub, or set "
            "save_adapters=True."
        )


def _fetch_card(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> None:
    """Download the repository's card, if it has one, into a folder."""
    try:
        # Forced: a cached copy could lack recent edits.
        card = api.hf_hub_download(repo_id, REPOCARD_NAME, revision=revision, force_download=True)
    except RemoteEntryNotFoundError:
        return
    shutil.copyfile(card, folder / REPOCARD_NAME)


def _evaluation_of(trainer: Trainer) -> dict[str, float]:
    """The Trainer's evaluation results for the weights that it holds after training; empty if there are none."""
    state = trainer.state
    step = state.global_step
    if trainer.args.load_best_model_at_end and state.best_global_step:
        step = state.best_global_step
    about_speed = ("_runtime", "_per_second", "_time")
    return {
        key.removeprefix("eval_"): value
        for entry in state.log_history
        if entry["step"] == step
        for key, value in entry.items()
        if key.startswith("eval_") and not key.endswith(about_speed) and isinstance(value, (int, float))
    }
