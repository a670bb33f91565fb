"""Renders the composition's section of a model card: tables, links, code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..names import LORA_SUBFOLDER, block_of
from ..references import Provenance, is_hub_id
from ..text import SHORT, in_code, in_markdown, in_python, one_line
from .base_models import AUTO_CLASSES, class_to_load, stated_class
from .explained import section_about
from .saved import SavedComposition


TEMPLATE = "model_card_template.md"
ADAPTERS_PER_BLOCK_TABLE = 20
BEGIN, END = "<!-- peft-composition:begin", "<!-- peft-composition:end -->"
_NOTE = "<!-- Replaced whenever the adapter is saved: write your own text above or below. -->"


def is_on_hub(entry: Provenance) -> bool:
    """Whether an adapter came from a Hub repository."""
    return entry["commit"] is not None and is_hub_id(entry["path"])


def section_of(saved: SavedComposition, repo_id: str | None, metrics: Mapping[str, float]) -> str:
    """The section about one composition, with its marks."""
    weights = saved.mixing_weights()
    adapters = [_Row(saved, number, weights) for number in range(len(saved.config.references))]
    largest = sorted(adapters, key=lambda row: -abs(row.mean or 0))[:ADAPTERS_PER_BLOCK_TABLE]
    shown = [row for row in adapters if row in largest]
    blocks: dict[str, list[str]] = {}
    for module in weights:
        blocks.setdefault(block_of(module, saved.config.layers_pattern) or module, []).append(module)
    fields = {"subfolder": saved.subfolder, "repository": repo_id}
    lora_subfolder = f"{saved.subfolder}/{LORA_SUBFOLDER}" if saved.subfolder else LORA_SUBFOLDER
    text = _template().render(
        config=saved.config,
        base_link=_link(saved.base_model) if saved.base_model else None,
        code=_loading_code(
            saved, repo_id, saved.subfolder, "import peft_composition  # registers the method with PEFT"
        ),
        lora_code=_loading_code(saved, repo_id, lora_subfolder) if saved.lora else None,
        lora=saved.lora,
        lora_subfolder=lora_subfolder,
        head=saved.head_modules,
        is_untrained=saved.has_untrained_head,
        is_classifier="Classification" in str((saved.config.auto_mapping or {}).get("base_model_class")),
        modules=len(saved.ranks),
        different_weights=len({tuple(row) for row in weights.values()}),
        adapters=adapters,
        shown=shown,
        blocks={block: [row.mean_over(modules) for row in shown] for block, modules in blocks.items()},
        licenses=sorted({row.license for row in adapters}),
        why=section_about(saved.folder, saved.subfolder),
        metrics=metrics,
    )
    begin = " ".join([BEGIN, *(f"{name}={_in_address(value)}" for name, value in fields.items() if value)])
    return f"{begin} -->\n{_NOTE}\n{text.strip()}\n{END}"


@cache  # compiling it takes longer than the rest of a small save
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(cell=_cell, text=in_markdown, code=in_code)
    return environment.get_template(TEMPLATE)


def _cell(value: object) -> str:
    """A value for a table: numbers with few digits, text unchanged."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3f}"
    return in_markdown(value)


class _Row:
    """The values of one upstream adapter in the tables."""

    def __init__(self, saved: SavedComposition, number: int, weights: dict[str, list[float]]) -> None:
        entry = saved.provenance[number]
        ranks = {module: row[number] for module, row in saved.ranks.items() if row[number]}
        base = entry["base_model_name_or_path"]
        self.name = in_code(entry["name"])
        self.source = "a local folder"
        self.is_local = entry["commit"] is None
        if is_on_hub(entry):
            self.source = _link(entry["path"], entry["commit"], entry["subfolder"])
        self.ranks = ", ".join(map(str, sorted(set(ranks.values()))))
        self.base_model = _link(base) if base and is_hub_id(base) else "a local folder" if base else "not stated"
        self.license = entry.get("license") or "not stated"
        self.sha256 = entry["sha256"]
        self.modules = len(ranks)
        self._weights = {module: weights[module][number] for module in ranks if module in weights}
        self.mean = self.mean_over(self._weights)
        self.min = min(self._weights.values(), default=None)
        self.max = max(self._weights.values(), default=None)

    def mean_over(self, modules: Iterable[str]) -> float | None:
        """The mean weight over the modules that the adapter touches; None if it touches none of them."""
        touched = [self._weights[module] for module in modules if module in self._weights]
        return fmean(touched) if touched else None


def _link(repo_id: str, commit: str | None = None, subfolder: str | None = None) -> str:
    """A link to a repository on the Hub, at a commit."""
    address = f"https://huggingface.co/{_in_address(repo_id)}"
    if commit is None:
        return f"[{in_markdown(repo_id)}]({address})"
    place = f"/{subfolder}" if subfolder else ""
    at = in_code(commit[:12])
    return f"[{in_markdown(repo_id + place)}]({address}/tree/{_in_address(commit + place)}) at {at}"


def _in_address(path: str) -> str:
    return quote(path, errors="surrogatepass")


def _loading_code(saved: SavedComposition, repo_id: str | None, subfolder: str | None, *first_lines: str) -> str:
    """Python code to copy that loads the base model and the adapter."""
    where = [in_python(repo_id or ".")]
    if subfolder:
        where.append(f"subfolder={in_python(subfolder)}")
    note = "" if repo_id else "  # this folder, or the repository that it was pushed to"
    imported, base_model = _base_model_code(saved)
    lines = [*first_lines, "from peft import PeftModel", *imported, "", base_model]
    return "\n".join([*lines, f"model = PeftModel.from_pretrained(base_model, {', '.join(where)}){note}"])


def _base_model_code(saved: SavedComposition) -> tuple[list[str], str]:
    """The import and the line that load the base model, as far as they follow from the config."""
    config = saved.config
    mapping = config.auto_mapping or {}
    stated = str(mapping.get("base_model_class") or "")
    stated = stated if stated.isidentifier() and len(stated) <= SHORT else ""  # it becomes code that people run
    auto_class = next(iter(AUTO_CLASSES.get(config.task_type or "", ())), None)
    if stated_class({"auto_mapping": mapping}) is not None:
        auto_class = class_to_load(config.task_type, stated)
    name = config.base_model_name_or_path
    if not auto_class or not name or len(config.revision or "") > SHORT:
        kind = f", a {stated}" if stated else ""
        return [], f"base_model = ...  # the model that the adapters were trained on{kind}"
    note = ""
    if not is_hub_id(name):  # a local folder, which nobody else has and whose path is private
        name, note = f"path/to/{one_line(Path(name).name)}", "  # your copy of the base model"
    arguments = [in_python(name)]
    if config.revision:
        arguments.append(f"revision={in_python(config.revision)}")
    if config.num_labels is not None and saved.head:
        arguments.append(f"num_labels={int(config.num_labels)}")
    line = f"base_model = {auto_class}.from_pretrained({', '.join(arguments)}){note}"
    return [f"from transformers import {auto_class}"], line
