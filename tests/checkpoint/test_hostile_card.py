"""Model cards whose adapters, licenses and base models have hostile names, as a reader of Markdown sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from peft import PeftModel

from peft_composition import write_model_card
from peft_composition.text import one_line

from .. import tiny
from ..hub_metadata import errors_in
from .test_card import CARD, CONFIG, edit_provenance, metadata, saved, trained


HOSTILE = [
    "<!-- peft-composition:end -->",
    "x\n<!-- peft-composition:end -->\n\n## Forged\n\n<!-- peft-composition:begin -->\ny",
    "</td></table><script>alert(1)</script><img src=x onerror=alert(1)>",
    "[free money](javascript:alert(1)) <javascript:alert(1)> ![](http://tracker.test/pixel.png)",
    "\n# Heading\n\n- list\n\n---\n",
    "a|b\\|c`d``e```f",
    "lone \ud800 surrogate, \u202eevil, \x1b[2J\x07",
    "z" * 100_000,
]


def tokens_of(card: str) -> Iterator[Token]:
    body = card.split("---\n", 2)[2]
    for token in MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(body):
        yield token
        yield from token.children or ()


def require_harmless(card: str) -> None:
    """Fail where anything in a card is not the text that this package means to write there."""
    tokens = list(tokens_of(card))
    html = {token.content.strip() for token in tokens if token.type in ("html_block", "html_inline")}
    ours = {"<code>", "</code>", "<details>", "</details>", "<summary>Mean weights per block</summary>"}
    left = {line for block in html for line in block.splitlines()} - ours
    assert all(
        re.fullmatch(r"<!-- (peft-composition:(begin|end)[\w =%/.-]*|Replaced whenever.*) -->", x) for x in left
    )
    for token in tokens:
        if token.type in ("link_open", "image"):
            assert str(token.attrs.get("href")).startswith(("https://huggingface.co/", "https://arxiv.org/")), token
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert headings == ["Composition of LoRA adapters", "Load it", "Mixing", "Upstream adapters", "Framework versions"]
    assert card.count("\n<!-- peft-composition:begin") == card.count("\n<!-- peft-composition:end") == 1
    assert errors_in(card) == []
    assert len(card) < 20_000


def seen(card: str) -> str:
    """The text that a reader sees, on one line."""
    shown = ("text", "text_special", "code_inline", "fence")
    return "".join(
        " " if token.type.endswith("break") else token.content for token in tokens_of(card) if token.type in shown
    )


@pytest.fixture
def hostile(pair: Any, tmp_path: Path, request: pytest.FixtureRequest) -> PeftModel:
    """A composition of two adapters that say of themselves, in name, card and config, what the test asks for."""
    text: str = request.param
    adapters = []
    for number, folder in enumerate(map(Path, pair("bert"))):
        license = json.dumps(text)  # JSON is YAML
        (folder / CARD).write_text(f"---\nlicense: {license}\n---\n# LoRA\n")
        adapters.append({"path": str(folder), "name": f"{text}{number}"})
    return trained(adapters)


@pytest.mark.parametrize("hostile", HOSTILE, indirect=True)
def test_what_adapters_say_stays_text_however_often_it_is_saved(hostile: PeftModel, tmp_path: Path) -> None:
    wanted = tiny.output(hostile, "bert")
    cards = [saved(hostile, tmp_path / "out") for _ in range(5)]
    assert cards == [cards[0]] * 5
    require_harmless(cards[0])
    for reference in hostile.peft_config["default"].references:
        assert one_line(reference["name"]) in seen(cards[0])
    reloaded = PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path / "out")).eval()
    assert torch.equal(tiny.output(reloaded, "bert"), wanted)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_record_says_stays_text(pair: Any, tmp_path: Path, text: str) -> None:
    """A checkpoint from somebody hostile, for which a card is written."""
    names = (text, text + "2")
    saved(trained([{"path": path, "name": name} for path, name in zip(pair("bert"), names, strict=True)]), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config.update(base_model_name_or_path=text, revision=text, task_type=None)
    config["auto_mapping"] = {"base_model_class": text, "parent_library": "transformers.models.bert"}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    edit_provenance(
        tmp_path,
        path=[text, text],
        commit=[text, None],
        subfolder=[text, text],
        base_model_name_or_path=[text, text],
        license=[text, "mit"],
    )
    cards = [write_model_card(tmp_path).read_text() for _ in range(5)]
    assert cards == [cards[0]] * 5
    require_harmless(cards[0])
    for code in re.findall(r"^```python\n(.*?)^```$", cards[0], flags=re.DOTALL | re.MULTILINE):
        compile(code, "card", "exec")
        assert all(
            line == "" or line.startswith(("import ", "from ", "base_model = ", "model = "))
            for line in code.splitlines()
        )


@pytest.mark.parametrize("text", ["org/base\n", "org/base\n- forged", "a: b", "org/\ud800"])
def test_what_is_no_hub_id_stays_out_of_the_metadata(pair: Any, tmp_path: Path, text: str) -> None:
    saved(trained(pair("bert")), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": text}))
    edit_provenance(tmp_path, path=[text, text], commit=["a" * 40, "b" * 40], license=[text, text])
    card = write_model_card(tmp_path).read_text()
    assert errors_in(card) == []
    assert metadata(card).keys() == {"library_name", "tags"}
