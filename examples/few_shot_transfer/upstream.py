"""Phases 1 and 2: the foundation model, where it is pretrained here, and the LoRAs of the upstream tasks.

Both are trained once and kept in folders whose names depend on everything that decides them, so scenarios share them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from random_lora import with_random_factors
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, ViTImageProcessor

from .data import Tasks, balanced, labels_of, task
from .language_model import LanguageModel
from .models import HEAD, Classifier, Foundation, small_vit
from .plan import HELD_OUT, Plan
from .records import identity
from .scenario import CAUSAL, Scenario
from .training import fit, predict


WEIGHTS, CONFIG, FACTS = "adapter_model.safetensors", "adapter_config.json", "study.json"


@dataclass(frozen=True)
class Adapter:
    """A trained upstream LoRA.

    Attributes:
        name: the task's.
        folder: an ordinary PEFT adapter.
        facts: what it was trained on, its accuracy on its own task in percent, and the seconds it took.
    """

    name: str
    folder: Path
    facts: Mapping[str, Any]


def foundation(scenario: Scenario, folder: Path, progress: bool = True) -> Classifier | LanguageModel:
    """Phase 1: the foundation model, given or pretrained here.

    Args:
        scenario: names the model.
        folder: where models that are pretrained here are kept.
        progress: whether to show the Trainer's progress bar.
    """
    spec = scenario.model.pretraining
    if scenario.is_language:
        return LanguageModel(scenario.model)
    if spec is None:
        return Classifier(scenario.model)
    data = scenario.data[spec.data]
    recipe = {"pretraining": asdict(spec), "data": asdict(data), "splits": asdict(scenario.splits)}
    home = folder / f"{spec.data}-{identity(recipe)}"
    if _is_missing(home):
        own = task(data, spec.classes, scenario.splits)
        side = own.train[0]["input"].size[0]
        torch.manual_seed(0)
        model = small_vit(scenario.model, len(own.classes), side)
        draft = _draft(home)
        if PartialState().is_main_process:
            ViTImageProcessor(size={"height": side, "width": side}, do_resize=False).save_pretrained(draft)
            model.save_pretrained(draft)  # for `Classifier`, which turns images into pixel values
        PartialState().wait_for_everyone()
        examples = Classifier(scenario.model, draft)
        started = time.perf_counter()
        plan = Plan(
            spec.learning_rate, _epochs_of(spec.steps), spec.batch_size, max_steps=spec.steps, checkpoint_steps=200
        )
        fit(model, examples.encode(own.train), plan, _scratch(home), examples.collate, progress)
        accuracy = _accuracy(model, examples, own.test, scenario.downstream.test_size, _scratch(home))
        facts = {**recipe, "accuracy": accuracy, "seconds": round(time.perf_counter() - started, 1)}
        _finish(draft, home, facts, model)
    return Classifier(scenario.model, home)


def train_adapter(
    scenario: Scenario, name: str, rank: int, tasks: Tasks, model: Foundation, folder: Path, progress: bool = True
) -> Adapter:
    """Phase 2 for one task: trains its LoRA, or finds it.

    Args:
        scenario: says how.
        name: the upstream task.
        rank: of the LoRA.
        tasks: the scenario's.
        model: the foundation model.
        folder: where adapters are kept. A training that was killed goes on from its last checkpoint.
        progress: whether to show the Trainer's progress bar.
    """
    spec, how = scenario.tasks[name], scenario.upstream
    recipe = {
        "model": model.name,
        "read": asdict(scenario.model),
        "data": asdict(scenario.data[spec.data]),
        "classes": spec.classes,
        "splits": asdict(scenario.splits),
        "training": {key: value for key, value in asdict(how).items() if key not in ("ranks", "checkpoint_steps")},
        "rank": rank,
    }
    home = folder / f"{name.replace('/', '-')}-r{rank}-{identity(recipe)}"
    if _is_missing(home):
        own = tasks[name]
        config = LoraConfig(
            r=rank,
            lora_alpha=round(how.alpha_per_rank * rank),
            target_modules=list(scenario.model.target_modules),
            **peft_options(scenario),
        )
        base = model.build(len(own.classes), seed=0)
        torch.manual_seed(0)
        lora = get_peft_model(base, config)
        plan = Plan(
            how.learning_rate,
            how.epochs if how.max_steps < 0 else _epochs_of(how.max_steps),
            how.batch_size,
            max_steps=how.max_steps,
            checkpoint_steps=how.checkpoint_steps,
        )
        train = own.train.select(balanced(labels_of(own.train), how.limit))
        started = time.perf_counter()
        fit(lora, model.encode(train), plan, _scratch(home), model.collate, progress)
        accuracy = _accuracy(lora, model, own.test, scenario.downstream.test_size, _scratch(home))
        facts = {
            **recipe,
            "task": name,
            "examples": len(train),
            "steps": plan.steps(len(train)),
            "accuracy": accuracy,
            "seconds": round(time.perf_counter() - started, 1),
        }
        _finish(_draft(home), home, facts, lora)
    return Adapter(name, home, json.loads((home / FACTS).read_text(encoding="utf-8")))


def peft_options(scenario: Scenario) -> dict[str, Any]:
    """What every PEFT config of a scenario says besides its method: the head that is trained, or the kind of task."""
    if scenario.is_language:
        return {"task_type": "CAUSAL_LM" if scenario.model.kind in CAUSAL else "SEQ_2_SEQ_LM"}
    return {"modules_to_save": [HEAD]}


def random_adapter(adapter: Adapter, folder: Path) -> Adapter:
    """A control: a copy of an adapter whose A and B are random, with the norm of every product B A kept."""
    home = folder / adapter.folder.name
    if _is_missing(home):
        draft = _draft(home)
        seed = int(identity({"random": adapter.folder.name})[:8], 16)
        tensors = with_random_factors(load_file(adapter.folder / WEIGHTS), seed)
        if PartialState().is_main_process:
            save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
            shutil.copy(adapter.folder / CONFIG, draft / CONFIG)
        _finish(draft, home, {"random": adapter.name})
    return Adapter(adapter.name, home, {"random": adapter.name})


def _epochs_of(steps: int) -> float:
    # More passes than so many steps can make, whatever the size of the data: `Plan.max_steps` decides.
    return float(steps)


def _accuracy(model: nn.Module, examples: Foundation, data: Any, test_size: int | None, scratch: Path) -> float:
    """In percent, on as many test examples as downstream, but no more than `HELD_OUT`."""
    size = min(HELD_OUT, test_size or HELD_OUT)
    sample = examples.sort_by_length(data.select(balanced(labels_of(data), size)))
    if isinstance(examples, LanguageModel):
        return round(100 * float(np.mean(examples.correct(model, sample))), 2)
    logits = predict(model, examples.encode(sample), scratch, examples.collate)
    return round(100 * float((logits.argmax(axis=-1) == np.asarray(labels_of(sample))).mean()), 2)


def _is_missing(home: Path) -> bool:
    """Whether all processes must make it; none starts before all have looked."""
    missing = not (home / FACTS).exists()
    PartialState().wait_for_everyone()
    return missing


def _scratch(home: Path) -> Path:
    return home.with_name(f".{home.name}-training")


def _draft(home: Path) -> Path:
    draft = home.with_name(f".{home.name}-draft")
    draft.mkdir(parents=True, exist_ok=True)
    return draft


def _finish(
    draft: Path, home: Path, facts: Mapping[str, Any], model: PreTrainedModel | PeftModel | None = None
) -> None:
    """Saves into the draft, and only then gives it its name: what is found there is whole."""
    if PartialState().is_main_process:
        if model is not None:
            model.save_pretrained(str(draft))
        if (draft / CONFIG).exists():
            _write_card(draft, facts)
        (draft / FACTS).write_text(json.dumps(facts, indent=2), encoding="utf-8")
        os.replace(draft, home)
        with suppress(FileNotFoundError):
            shutil.rmtree(_scratch(home))
    PartialState().wait_for_everyone()


def _write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    base = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    # A folder is no model id: the Hub refuses such a card.
    front = "" if not base or Path(base).exists() else f"base_model: {base}\n"
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    text = f"An upstream adapter of the study of arXiv 2402.15414.\n\n{lines}\n"
    card = ModelCard(f"---\nlibrary_name: peft\n{front}tags:\n- lora\n---\n\n# {folder.name.strip('.')}\n\n{text}")
    card.save(folder / "README.md")
