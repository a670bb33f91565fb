"""`peft-composition compose`: mixes adapters without training, saves the result and pushes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from huggingface_hub import CommitInfo
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict

from ..analysis.report import weights_table
from ..checkpoint.base_models import base_config
from ..checkpoint.card import write_model_card
from ..checkpoint.export import to_lora
from ..checkpoint.push import push_to_hub
from ..checkpoint.saved import head_hash
from ..config import CompositionConfig
from ..names import LORA_SUBFOLDER
from ..terminal import print_json, say
from ..text import LONG, in_python, one_line, plural
from .inputs import new_modules, references_of, task_and_loader


def run(
    base: str,
    adapters: Sequence[str],
    mixing: str,
    weights: list[float] | None,
    normalization: str,
    out: Path,
    *,
    task: str | None,
    num_labels: int | None,
    save_adapters: bool,
    with_lora: bool,
    push: str | None,
    as_json: bool,
    check_base: bool = True,
) -> None:
    """Build a composition, save it, and push it if a repository is given."""
    references = references_of(adapters)
    task, loader = task_and_loader(references, task, base_config(base), check_base, is_strict=True)
    if num_labels is not None and not loader.is_classifier:
        wanted = "leave it out" if task else "the adapters state no task: give --task SEQ_CLS, or leave it out"
        raise ValueError(f"--num-labels is for classifiers, but the model is a {loader.builds.__name__}; {wanted}")
    base_model, new = loader.from_pretrained(
        base,
        num_labels=num_labels,
        is_reported=not loader.is_classifier,  # for classifiers it is reported below
    )
    has_new_head = loader.is_classifier and any(new)
    is_headless = has_new_head and num_labels is None
    config = CompositionConfig(
        adapters=[*references],
        mixing=mixing,  # type: ignore[arg-type]  # the config refuses others
        weights=weights,
        normalization=normalization,  # type: ignore[arg-type]
        task_type=None if is_headless else task,  # with a task type, PEFT would save the head as a trained one
        modules_to_save=new_modules(new, task) if has_new_head and not is_headless else None,
        save_adapters=save_adapters,
        check_base_model=check_base,
    )
    model = get_peft_model(base_model, config)
    config = cast(CompositionConfig, model.peft_config["default"])
    if is_headless:
        config.num_labels = config.class_names = None
    elif has_new_head:
        config.untrained_head = head_hash(get_peft_model_state_dict(model))
    lora = to_lora(model) if with_lora else None
    model.save_pretrained(str(out))
    if lora is not None:
        lora.save_beside(out, LORA_SUBFOLDER)
        write_model_card(out)  # again: the card mentions the export
    commit = _push(model, push, with_lora, out) if push else None
    mixed = model.mixing_weights()
    means = {row.adapter: row.mean for row in weights_table(mixed)}
    if as_json:
        print_json(
            {
                "out": str(out),
                "task_type": task,
                "num_labels": config.num_labels,
                "head": None if is_headless or not config.modules_to_save else "new" if has_new_head else "base",
                "modules": len(mixed),
                "weights": means,
                "lora": str(out / LORA_SUBFOLDER) if lora is not None else None,
                "commit": commit.commit_url if commit else None,
            }
        )
        return
    shares = ", ".join(f"{one_line(name)} {weight:.3g}" for name, weight in means.items())
    say(f"Composed {plural(len(means), 'adapter')} in {plural(len(mixed), 'module')} ({shares}): {out}")
    if is_headless:
        say(f"It has no head: {base} has no trained one ({', '.join(new)}). To add a new one, use --num-labels.")
    elif has_new_head:
        say(
            f"Its head for {plural(num_labels or 0, 'label')} is new and untrained ({', '.join(new)}): "
            "train it before use."
        )
    if lora is not None:
        say(f"{lora}: {out / LORA_SUBFOLDER}")
    if commit:
        say(f"Pushed: {commit.commit_url}")


def _push(model: PeftModel, repo_id: str, with_lora: bool, out: Path) -> CommitInfo:
    """Push a saved composition; an error says that it was saved."""
    try:
        return push_to_hub(model, repo_id, lora=with_lora)
    except Exception as error:  # errors of the Hub, its HTTP client or the network
        lora = "" if with_lora else ", lora=False"
        raise RuntimeError(
            f"{out} was saved completely, but pushing it to {one_line(repo_id)} failed: "
            f"{one_line(error, LONG // 2) or type(error).__name__} To push it later, load it as its README.md shows "
            f"and call peft_composition.push_to_hub(model, {in_python(repo_id)}{lora})"
        ) from error
