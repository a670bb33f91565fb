"""How like the new task's own LoRA each upstream adapter is, by CKA in every module (figures 7 and 8)."""

from __future__ import annotations

from accelerate import PartialState
from peft import PeftModel
from torch.utils.data import DataLoader

from peft_composition.analysis.similarity import layerwise_cka
from peft_composition.analysis.views import single_adapters

from .data import Task, balanced, labels_of
from .methods import Contender, build
from .models import Foundation
from .scenario import Scenario, Setting
from .upstream import Adapter


BATCH = 32


def upstream_cka(
    scenario: Scenario, setting: Setting, task: Task, model: Foundation, upstream: list[Adapter], own: Adapter
) -> dict[str, dict[str, float]]:
    """CKA of the model with one upstream adapter each, and with the new task's own, on the new task's examples.

    Args:
        scenario: says how many examples.
        setting: the downstream task and the rank.
        task: its data; test examples are compared.
        model: the foundation model.
        upstream: the adapters that are composed.
        own: a LoRA that was trained on all of the new task's data.

    Returns:
        `{module: {adapter: similarity}}`, to six digits.
    """
    how = scenario.similarity
    assert how is not None
    classes, device = len(task.classes), PartialState().device
    composition = build(Contender("uniform", tuple(upstream)), scenario, setting.rank, model, classes, 0).to(device)
    target = PeftModel.from_pretrained(model.build(classes, 0), str(own.folder)).to(device)
    assert isinstance(composition, PeftModel)
    chosen = task.test.select(balanced(labels_of(task.test), how.examples)).shuffle(seed=0)
    batches = DataLoader(model.encode(chosen), batch_size=BATCH, collate_fn=model.collate)
    found = layerwise_cka(target, single_adapters(composition), batches)
    return {module: {name: round(value, 6) for name, value in row.items()} for module, row in found.items()}
