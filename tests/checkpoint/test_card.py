"""Model cards of saved compositions: what they say, that it is true, and that nobody's text is lost."""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_composition import CompositionCardMixin, CompositionConfig, add_to_checkpoint, push_to_hub, write_model_card

from .. import tiny
from ..hub_metadata import errors_in
from ..test_trainer import Sentences


CARD, CONFIG, WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"
COMMITS = ["a" * 40, "b" * 40]


@pytest.fixture
def local_base(tmp_path: Path) -> nn.Module:
    """A tiny BERT that was loaded from a folder."""
    tiny.build("bert").save_pretrained(tmp_path / "base")
    return type(tiny.build("bert")).from_pretrained(tmp_path / "base").eval()


@pytest.fixture
def hub_base() -> nn.Module:
    """A tiny BERT that says it came from the Hub."""
    return named(tiny.build("bert"), "org/base")


def named(model: nn.Module, name: str) -> nn.Module:
    model.name_or_path = model.config.name_or_path = name
    return model


def trained(adapters: Sequence[Any], base: nn.Module | None = None, seed: int = 0, **fields: Any) -> PeftModel:
    """A composition on the tiny BERT whose mixing weights are far from where they began."""
    model = tiny.compose("bert", adapters, base=base, **fields)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".composition_mixing." in name:
            parameter.data.normal_(std=0.03, generator=generator)
    return model


def saved(model: PeftModel, folder: Path, **kwargs: Any) -> str:
    """Save a model; the text of its card."""
    model.save_pretrained(str(folder), **kwargs)
    return (folder / CARD).read_text()


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def code_blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)


def table(card: str, *columns: str) -> dict[str, list[str]]:
    """The rows of a table, by their first cell without backticks; found by its first column names."""
    lines = card.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {' | '.join(columns)} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *rest = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        rows[first.strip("`")] = rest
    return rows


def by_hand(folder: Path) -> dict[str, list[float]]:
    """The mixing weights from the files, in float64."""
    gain = json.loads((folder / CONFIG).read_text())["gain"]
    return {
        key.removeprefix("base_model.model.").partition(".composition_mixing")[0]: (gain * theta.double())
        .softmax(0)
        .tolist()
        for key, theta in load_file(folder / WEIGHTS).items()
        if ".composition_mixing" in key
    }


def edit_provenance(folder: Path, **fields: Sequence[Any]) -> None:
    """Let a saved composition say that its adapters were others: one value per adapter and field."""
    config = json.loads((folder / CONFIG).read_text())
    for key, values in fields.items():
        for entry, value in zip(config["provenance"], values):
            entry[key] = value
    (folder / CONFIG).write_text(json.dumps(config))


# What it says


def test_the_learned_weights_are_in_the_card(tmp_path: Path) -> None:
    """The second adapter touches the values alone, so that its weights elsewhere do not count."""
    base = tiny.build("bert")
    both = tiny.save_lora(tmp_path / "both", base, ["query", "value"], seed=1)
    values = tiny.save_lora(tmp_path / "values", base, ["value"], seed=2)
    card = saved(trained([both, values]), tmp_path / "out")

    weights = by_hand(tmp_path / "out")
    assert len(weights) == 4
    assert max(max(row) for row in weights.values()) > 0.7
    of_both = [row[0] for row in weights.values()]
    of_values = [row[1] for module, row in weights.items() if module.endswith("value")]
    rows = table(card, "adapter", "mean", "min", "max", "modules")
    for name, counted in (("both", of_both), ("values", of_values)):
        mean, least, most, modules = map(float, rows[name])
        assert (mean, least, most) == pytest.approx(
            (sum(counted) / len(counted), min(counted), max(counted)), abs=6e-4
        )
        assert modules == len(counted)
    assert list(rows) == ["both", "values"]

    blocks = table(card, "block", "`both`", "`values`")
    assert list(blocks) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    for block, (of_first, of_second) in blocks.items():
        inside = {module: row for module, row in weights.items() if module.startswith(f"{block}.")}
        assert float(of_first) == pytest.approx(sum(row[0] for row in inside.values()) / 2, abs=6e-4)
        assert float(of_second) == pytest.approx(inside[f"{block}.attention.self.value"][1], abs=6e-4)


@pytest.mark.parametrize(
    ("fields", "sentence", "weights"),
    [
        ({"mixing": "uniform"}, "with equal weights w_n.", ["0.500", "0.500"]),
        ({"mixing": "fixed", "weights": [0.25, 0.75]}, "with weights w_n given by hand.", ["0.250", "0.750"]),
        (
            {"mixing": "fixed", "weights": [2.5, -1], "normalization": "none"},
            "with weights w_n given by hand.",
            ["2.5", "-1"],
        ),
        ({"weight_sharing": "model"}, "with weights w_n learned per model, all positive, with sum 1.", None),
    ],
)
def test_weights_that_are_the_same_everywhere_have_one_column(
    pair: Any, tmp_path: Path, fields: dict[str, Any], sentence: str, weights: list[str] | None
) -> None:
    card = saved(trained(pair("bert"), **fields), tmp_path)
    if weights is None:
        weights = [f"{weight:.3f}" for weight in next(iter(by_hand(tmp_path).values()))]
    assert sentence in " ".join(card.split())
    assert table(card, "adapter", "weight") == {"first": [weights[0]], "second": [weights[1]]}
    assert "per block" not in card


def test_every_upstream_adapter_is_named_with_what_is_known_of_it(pair: Any, tmp_path: Path) -> None:
    folders = pair("bert")
    saved(trained(folders), tmp_path)
    edit_provenance(
        tmp_path,
        path=["me/lora-a", folders[1]],
        commit=[COMMITS[0], None],
        subfolder=["runs/best one", None],
        base_model_name_or_path=["org/base", "/home/me/base"],
        license=["mit", None],
    )

    card = write_model_card(tmp_path).read_text()

    rows = table(card, "adapter", "source", "ranks", "base model", "license", "sha256 of its weights")
    link = f"https://huggingface.co/me/lora-a/tree/{COMMITS[0]}/runs/best%20one"
    sha256 = [entry["sha256"] for entry in json.loads((tmp_path / CONFIG).read_text())["provenance"]]
    assert rows == {
        "first": [
            f"[me/lora-a/runs/best one]({link}) at `{'a' * 12}`",
            "2",
            "[org/base](https://huggingface.co/org/base)",
            "mit",
            f"`{sha256[0]}`",
        ],
        "second": ["a local folder", "3", "a local folder", "not stated", f"`{sha256[1]}`"],
    }
    assert metadata(card)["upstream_adapters"] == ["me/lora-a"]
    assert folders[1] not in card
    assert "/home/me/base" not in card


def test_ranks_that_differ_by_module_are_all_there(tmp_path: Path) -> None:
    lora = tiny.save_lora(
        tmp_path / "lora", tiny.build("bert"), ["query", "value"], r=2, rank_pattern={"value": 8}, lora_alpha=4
    )
    assert table(saved(trained([lora]), tmp_path / "out"), "adapter", "source")["lora"][1] == "2, 8"


def test_an_adapter_that_touches_nothing_has_no_weight(tmp_path: Path) -> None:
    base = tiny.build("bert")
    query = tiny.save_lora(tmp_path / "query", base, ["query"], seed=1)
    key = tiny.save_lora(tmp_path / "key", base, ["key"], seed=2)
    with pytest.warns(UserWarning, match="'key' touches none of the composed modules"):
        model = trained([query, key], target_modules=["query"])
    card = saved(model, tmp_path / "out")
    assert table(card, "adapter", "mean")["key"] == ["-", "-", "-", "0"]
    assert [row[1] for row in table(card, "block", "`query`", "`key`").values()] == ["-", "-"]


def test_the_table_of_blocks_stays_readable(pair: Any, tmp_path: Path) -> None:
    adapters = [{"path": pair("bert")[0], "name": f"n{number}"} for number in range(25)]
    card = saved(trained(adapters), tmp_path)

    means = {name: float(row[0]) for name, row in table(card, "adapter", "mean").items()}
    assert len(means) == 25
    header = next(line for line in card.splitlines() if line.startswith("| block |"))
    shown = re.findall(r"`(n\d+)`", header)
    assert len(shown) == 20
    assert shown == [name for name in means if name in shown]  # in their order
    assert min(means[name] for name in shown) >= max(means[name] for name in means if name not in shown)
    assert "Of the 25 adapters, the 20 with the largest mean weights." in card


def test_a_name_with_a_bar_does_not_break_the_tables(pair: Any, tmp_path: Path) -> None:
    adapters = [{"path": path, "name": name} for path, name in zip(pair("bert"), ["a|b", "plain"])]
    card = saved(trained(adapters), tmp_path)
    assert list(table(card, "adapter", "mean", "min")) == ["<code>a&#124;b</code>", "plain"]


def test_weights_saved_as_pickle_are_read(pair: Any, tmp_path: Path) -> None:
    model = trained(pair("bert"))
    expected = saved(model, tmp_path / "safe")
    assert saved(model, tmp_path / "pickle", safe_serialization=False) == expected


def test_weights_that_are_not_there_are_not_made_up(pair: Any, tmp_path: Path) -> None:
    saved(trained(pair("bert")), tmp_path)
    save_file({}, tmp_path / WEIGHTS)
    card = write_model_card(tmp_path).read_text()
    assert "The learned weights are not in this folder." in card
    assert "| adapter | mean" not in card


# Metadata


def test_a_local_base_model_stays_out_of_the_metadata(pair: Any, local_base: nn.Module, tmp_path: Path) -> None:
    """Unlike in PEFT's own card, which the Hub refuses."""
    lora = tiny.save_lora(tmp_path / "lora", local_base, ["query"])
    assert errors_in((lora / CARD).read_text()) != []

    card = saved(trained(pair("bert"), base=local_base), tmp_path / "out")

    assert errors_in(card) == []
    assert str(tmp_path) not in card.split("---\n")[1]
    assert metadata(card) == {"library_name": "peft", "tags": ["transformers", "peft-composition"]}


def test_a_base_model_on_the_hub_is_named(pair: Any, hub_base: nn.Module, tmp_path: Path) -> None:
    card = saved(trained(pair("bert"), base=hub_base), tmp_path)
    assert errors_in(card) == []
    assert metadata(card) == {
        "library_name": "peft",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "tags": ["base_model:adapter:org/base", "transformers", "peft-composition"],
    }
    assert ModelCard(card).data.to_dict() == metadata(card)
    assert "adapter for [org/base](https://huggingface.co/org/base)" in card


@pytest.mark.parametrize(
    ("licenses", "commits", "in_metadata", "sentence"),
    [
        (["mit", "mit"], COMMITS, "mit", "All of them state the license mit."),
        (["mit", "mit"], [COMMITS[0], None], "mit", "All of them state the license mit."),
        (["MIT License", "MIT License"], COMMITS, None, "All of them state the license MIT License."),
        (["mit", "mit"], [None, None], None, "All of them state the license mit."),
        (["other (x)", "other (x)"], COMMITS, None, "All of them state the license other (x)."),
        (["other", "other"], COMMITS, None, "All of them state the license other."),
        (["mit", "gpl-3.0"], COMMITS, None, "**Their licenses differ (gpl-3.0, mit)"),
        (["mit", None], COMMITS, None, "**Their licenses differ (mit, not stated)"),
        ([None, None], COMMITS, None, "**No license is stated for any of them"),
    ],
)
def test_licenses(
    pair: Any,
    tmp_path: Path,
    licenses: list[str | None],
    commits: list[str | None],
    in_metadata: str | None,
    sentence: str,
) -> None:
    """In the metadata is only one that all share, and that the Hub has accepted in one of their cards."""
    saved(trained(pair("bert")), tmp_path)
    edit_provenance(tmp_path, license=licenses, commit=commits, path=["me/lora-a", "me/lora-b"])
    card = write_model_card(tmp_path).read_text()
    assert errors_in(card) == []
    assert metadata(card).get("license") == in_metadata
    assert sentence in card


def test_a_record_without_licenses_is_read(pair: Any, tmp_path: Path) -> None:
    """As checkpoints had it before licenses were read."""
    model = trained(pair("bert"))
    saved(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for entry in config["provenance"]:
        del entry["license"]
    del config["num_labels"], config["peft_composition_version"]
    (tmp_path / CONFIG).write_text(json.dumps(config))

    assert "No license is stated" in write_model_card(tmp_path).read_text()
    reloaded = PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path))
    assert torch.equal(tiny.output(reloaded.eval(), "bert"), tiny.output(model, "bert"))


# What people wrote


def test_saving_again_changes_the_section_alone(pair: Any, hub_base: nn.Module, tmp_path: Path) -> None:
    first = trained(pair("bert"), base=hub_base)
    card = saved(first, tmp_path)
    assert saved(first, tmp_path) == card
    assert card.count("peft-composition:begin") == 1

    mine = card.replace(
        "# Composition of LoRA adapters", "# Movies\n\nMy introduction.\n\n```python\n## no heading\n```"
    )
    mine = mine.replace("library_name: peft", "library_name: peft\nlicense: gpl-3.0\ndatasets:\n- me/movies\nmine: 1")
    mine += "\n## Limitations\n\nMany.\n"
    (tmp_path / CARD).write_text(mine)
    second = trained(pair("bert"), base=named(tiny.build("bert"), "org/base"), seed=1)
    again = saved(second, tmp_path)

    assert table(again, "adapter", "mean") != table(card, "adapter", "mean")
    outside = re.compile(r"<!-- peft-composition:begin.*peft-composition:end -->", re.DOTALL)
    assert outside.sub("", again).rstrip() == outside.sub("", mine).rstrip()
    assert metadata(again) == {**metadata(card), "license": "gpl-3.0", "datasets": ["me/movies"], "mine": 1}


def test_a_card_that_was_there_before_gets_the_section_before_its_first_heading(pair: Any, tmp_path: Path) -> None:
    text = "# Movies\n\nMine.\n\n```\n## no heading\n```\n\n## Results\n\n90%\n"
    (tmp_path / CARD).write_text(text)
    card = saved(trained(pair("bert")), tmp_path)
    before, _, rest = card.partition("<!-- peft-composition:begin -->")
    after = rest.partition("<!-- peft-composition:end -->")[2]
    assert before.endswith("---\n# Movies\n\nMine.\n\n```\n## no heading\n```\n\n")
    assert after.startswith("\n\n## Results\n\n90%\n")


def test_no_text_is_lost_where_a_mark_was_deleted(pair: Any, tmp_path: Path) -> None:
    model = trained(pair("bert"))
    card = saved(model, tmp_path)
    (tmp_path / CARD).write_text(card.replace("<!-- peft-composition:end -->", "My text."))
    once = saved(model, tmp_path)
    assert once.count("peft-composition:begin") == 2
    assert saved(model, tmp_path) == once
    assert "My text." in once


def test_a_failed_write_leaves_the_card(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = saved(trained(pair("bert")), tmp_path)

    def full_disk(self: ModelCard, path: Path) -> None:
        Path(path).write_text(str(self)[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(ModelCard, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_model_card(tmp_path, metrics={"accuracy": 1.0})
    assert (tmp_path / CARD).read_text() == card
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, CONFIG, WEIGHTS]


# Where it is written


def test_a_named_composition_is_described_in_the_card_above_it(
    pair: Any, local_base: nn.Module, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"adapters": pair("bert"), "task_type": "SEQ_CLS"}
    model = get_peft_model(local_base, CompositionConfig(**fields), adapter_name="my mix")
    model.add_adapter("other", CompositionConfig(**fields, mixing="uniform"))
    card = saved(model, tmp_path)

    assert errors_in(card) == []
    marks = re.findall("<!-- peft-composition:(.*) -->", card)
    assert marks == ["begin subfolder=my%20mix", "end", "begin subfolder=other", "end"]
    assert 'PeftModel.from_pretrained(base_model, ".", subfolder="my mix")' in code_blocks(card)[0]
    assert saved(model, tmp_path) == card
    edit_provenance(tmp_path / "my mix", path=["me/lora-a", "me/lora-b"], commit=COMMITS)
    edit_provenance(tmp_path / "other", path=["me/lora-b", "me/lora-c"], commit=COMMITS)
    card = write_model_card(tmp_path, subfolder="other").read_text()
    assert metadata(card)["upstream_adapters"] == ["me/lora-a", "me/lora-b", "me/lora-c"]


def test_a_config_on_its_own_has_no_card(pair: Any, tmp_path: Path) -> None:
    model = trained(pair("bert"))
    card = saved(model, tmp_path)
    trained(pair("bert"), seed=1).save_pretrained(str(tmp_path / "other"))
    (tmp_path / "other" / WEIGHTS).replace(tmp_path / WEIGHTS)
    model.peft_config["default"].save_pretrained(tmp_path)  # so does transformers, before it writes new weights
    assert (tmp_path / CARD).read_text() == card
    assert write_model_card(tmp_path).read_text() != card
    model.peft_config["default"].save_pretrained(tmp_path / "alone")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == [CONFIG]


def test_a_folder_without_a_composition_is_refused(tmp_path: Path) -> None:
    lora = tiny.save_lora(tmp_path / "lora", tiny.build("bert"), ["query"])
    before = (lora / CARD).read_text()
    for folder in (lora, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=rf"{re.escape(str(folder))} is not a saved composition: it "):
            write_model_card(folder)
    assert (lora / CARD).read_text() == before


def test_a_model_without_a_composition_is_not_pushed() -> None:
    model = get_peft_model(tiny.build("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"has no composition to push; its adapters are \['default'\]"):
        push_to_hub(model, "me/lora")


def test_a_missing_card_is_made(pair: Any, tmp_path: Path) -> None:
    card = saved(trained(pair("bert")), tmp_path)
    (tmp_path / CARD).unlink()
    again = write_model_card(tmp_path).read_text()
    section = re.compile(r"<!-- peft-composition:begin.*peft-composition:end -->", re.DOTALL)
    assert section.findall(again) == section.findall(card)
    assert metadata(again)["library_name"] == "peft"


# How to load it


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        exec(code, names)
    return names


def with_own_copy(code: str, base: Path) -> str:
    """The code with the reader's own folder in it, as its comment asks for."""
    assert '"path/to/base"' in code
    return code.replace("path/to/base", str(base))


def test_the_first_code_block_works_as_pasted(
    pair: Any, local_base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(pair("bert"), base=local_base)
    code = code_blocks(saved(model, tmp_path / "out"))[0]
    assert code.startswith("import peft_composition")
    monkeypatch.chdir(tmp_path / "out")
    loaded = run(with_own_copy(code, tmp_path / "base"))["model"].eval()
    assert torch.equal(tiny.output(loaded, "bert"), tiny.output(model, "bert"))


def test_a_model_without_a_task_type_is_loaded_by_its_class(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build("vit").vit.save_pretrained(tmp_path / "base")
    base = type(tiny.build("vit")).from_pretrained(tmp_path / "base", num_labels=5).eval()
    model = tiny.compose("vit", pair("vit"), base=base, task_type=None)
    code = code_blocks(saved(model, tmp_path / "out"))[0]
    assert "from transformers import ViTForImageClassification\n" in code
    monkeypatch.chdir(tmp_path / "out")
    loaded = run(with_own_copy(code, tmp_path / "base"))["model"].eval()
    assert torch.equal(tiny.output(loaded, "vit"), tiny.output(model, "vit"))


@pytest.mark.parametrize("is_absolute", [True, False])
def test_no_local_path_is_in_the_card(
    pair: Any, local_base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_absolute: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(tmp_path / "base") if is_absolute else "base"
    model = trained(pair("bert"), base=named(local_base, name))
    model.peft_config["default"].base_model_name_or_path = name
    card = saved(model, tmp_path / "out")
    assert str(tmp_path) not in card
    assert 'from_pretrained("path/to/base", num_labels=2)  # your copy of the base model\n' in card


def test_what_cannot_be_known_of_the_base_model_is_left_open(two_adapters: list[str], tmp_path: Path) -> None:
    code = code_blocks(saved(tiny.compose("mlp", two_adapters), tmp_path))[0]
    assert "base_model = ...  # the model that the adapters were trained on, a MLP\n" in code


def test_revision_of_the_base_model_and_repository(pair: Any, hub_base: nn.Module, tmp_path: Path) -> None:
    model = trained(pair("bert"), base=hub_base)
    model.peft_config["default"].revision = "v2"
    saved(model, tmp_path)
    card = write_model_card(tmp_path, repo_id="me/composed").read_text()
    assert 'from_pretrained("org/base", revision="v2", num_labels=2)\n' in code_blocks(card)[0]
    assert 'PeftModel.from_pretrained(base_model, "me/composed")\n' in code_blocks(card)[0]
    assert saved(model, tmp_path) == card  # the repository is remembered


def test_the_plain_lora_is_mentioned_where_there_is_one(pair: Any, hub_base: nn.Module, tmp_path: Path) -> None:
    card = saved(trained(pair("bert"), base=hub_base), tmp_path)
    assert "Without `peft-composition` this adapter cannot be loaded." in card
    assert len(code_blocks(card)) == 1

    tiny.save_lora(tmp_path / "lora", tiny.build("bert"), ["query"])  # whose it is, nobody knows
    assert write_model_card(tmp_path).read_text() == card

    add_to_checkpoint(tmp_path)
    card = write_model_card(tmp_path, repo_id="me/composed").read_text()
    assert "cannot be loaded" not in card
    _, stock = code_blocks(card)
    assert "peft_composition" not in stock
    assert stock.endswith('model = PeftModel.from_pretrained(base_model, "me/composed", subfolder="lora")\n')

    assert f"{sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()}`, exactly." in card
    error = add_to_checkpoint(tmp_path, rank=1).total_error
    assert f"truncated, with a relative error of {error:.2g}." in (tmp_path / CARD).read_text()


@pytest.mark.parametrize("commits", [[None, None], ["a" * 40, None], COMMITS], ids=["local", "both", "hub"])
def test_without_the_factors_local_folders_have_no_commits(commits: list[Any], pair: Any, tmp_path: Path) -> None:
    saved(tiny.compose("mlp", pair("mlp"), save_adapters=False), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for entry, commit in zip(config["provenance"], commits):
        entry["commit"] = commit
    (tmp_path / CONFIG).write_text(json.dumps(config))
    card = write_model_card(tmp_path).read_text().replace("\n", " ")
    assert ("at these commits" in card) == (commits != [None, None])
    assert ("local folders that they were in" in card) == (None in commits)


class TestALoraOfOtherWeights:
    """The plain LoRA beside a composition that was trained on and saved once more."""

    @staticmethod
    def train_on(model: PeftModel) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "composition_mixing" in name:
                    parameter[0] += 0.5

    def test_is_removed_by_the_save_and_no_longer_in_the_card(self, pair: Any, tmp_path: Path) -> None:
        model = trained(pair("bert"))
        before = saved(model, tmp_path)
        add_to_checkpoint(tmp_path, include_head="separate")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(str(tmp_path))  # the same weights: it still belongs to them
        assert (tmp_path / "lora" / WEIGHTS).is_file()
        self.train_on(model)
        with pytest.warns(UserWarning, match=r"was removed\. .*add_to_checkpoint") as told:
            card = saved(model, tmp_path)
        assert len(told) == 1
        assert not (tmp_path / "lora").exists()
        assert "Without `peft-composition` this adapter cannot be loaded." in card
        assert card != before
        add_to_checkpoint(tmp_path)
        lora = PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path / "lora")).eval()
        difference = tiny.output(lora, "bert") - tiny.output(model.eval(), "bert")
        assert difference.abs().max() < 1e-5

    def test_is_not_in_the_card_where_other_weights_came_without_a_save(self, pair: Any, tmp_path: Path) -> None:
        model = trained(pair("bert"))
        saved(model, tmp_path / "out")
        add_to_checkpoint(tmp_path / "out")
        self.train_on(model)
        saved(model, tmp_path / "other")
        (tmp_path / "out" / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
        assert "cannot be loaded" in write_model_card(tmp_path / "out").read_text()

    @pytest.mark.parametrize("is_recorded", [False, True])
    def test_of_somebody_else_stays(self, is_recorded: bool, pair: Any, tmp_path: Path) -> None:
        model = trained(pair("bert"))
        saved(model, tmp_path)
        if is_recorded:
            add_to_checkpoint(tmp_path)
        tiny.save_lora(tmp_path / "lora", tiny.build("bert"), ["query"])
        content = (tmp_path / "lora" / WEIGHTS).read_bytes()
        self.train_on(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            card = saved(model, tmp_path)
        assert (tmp_path / "lora" / WEIGHTS).read_bytes() == content
        assert 'subfolder="lora"' not in card

    def test_of_a_named_composition(self, pair: Any, tmp_path: Path) -> None:
        model = get_peft_model(tiny.build("mlp"), CompositionConfig(adapters=pair("mlp")), adapter_name="other")
        model.save_pretrained(str(tmp_path))
        add_to_checkpoint(tmp_path / "other")
        assert 'subfolder="other/lora"' in write_model_card(tmp_path, subfolder="other").read_text()
        self.train_on(model)
        with pytest.warns(UserWarning, match="was removed"):
            card = saved(model, tmp_path)
        assert not (tmp_path / "other" / "lora").exists()
        assert "other/lora" not in card


# The Trainer


class ComposedTrainer(CompositionCardMixin, Trainer):
    """As a user writes it."""


def test_the_trainers_card_has_the_section_and_the_results_of_the_best_weights(
    pair: Any, local_base: nn.Module, tmp_path: Path
) -> None:
    trainer = ComposedTrainer(
        model=trained(pair("bert"), base=local_base),
        args=TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=6,
            learning_rate=0.5,  # far too much, so that the first steps are the best
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Sentences(32, seed=0),
        eval_dataset=Sentences(32, seed=0, flipped=True),
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert min(losses.values()) < losses[6]

    trainer.create_model_card()  # nothing is saved in output_dir yet
    assert "peft-composition:begin" not in (tmp_path / "run" / CARD).read_text()
    trainer.save_model()
    trainer.create_model_card()

    card = (tmp_path / "run" / CARD).read_text()
    assert errors_in(card) == []
    assert card.count("peft-composition:begin") == 1
    assert "## Training procedure" in card
    best = table(card, "metric", "value")
    assert list(best) == ["loss"]
    assert float(best["loss"][0]) == pytest.approx(min(losses.values()), rel=1e-3)
    assert code_blocks(card)[0].startswith("import peft_composition")
