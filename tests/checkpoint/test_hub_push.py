"""Pushing compositions: the real client and a real Trainer in processes of their own, against a server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertModel, Trainer, TrainingArguments

from peft_composition import CompositionCardMixin, CompositionConfig, explain, push_to_hub

from .. import tiny
from ..hub_metadata import errors_in
from ..hub_server import Client, HubServer
from ..test_trainer import Sentences
from ..upstream.test_hub import files_of
from .test_card import code_blocks, metadata, named, table, trained


CARD, CONFIG, WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"
BASE, UPSTREAM = "org/tiny-bert", ["you/lora-a", "they/lora-b"]
LABELS = 3

# What runs in the other process


class ComposedTrainer(CompositionCardMixin, Trainer):
    """As a user writes it."""


def base_model(name: str = BASE) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=LABELS)


def composition(adapters: list[str], seed: int = 0, **fields: Any) -> PeftModel:
    """A composition with weights as if it had been trained."""
    return trained(adapters, base=base_model(), seed=seed, **fields).eval()


def logits(model: nn.Module) -> Tensor:
    return tiny.output(model.eval(), "bert")


@dataclass
class Outcome:
    """What a model answers, or the error."""

    logits: Tensor | None = None
    error: str = ""


def attempt(function: Any, *args: Any, cache: str = "", is_offline: bool = False, **kwargs: Any) -> Outcome:
    """Call a function that gives a model, with a Hub cache of its own or offline."""
    folder = patch.object(constants, "HF_HUB_CACHE", cache or constants.HF_HUB_CACHE)
    offline = patch.object(constants, "HF_HUB_OFFLINE", is_offline)
    with folder, offline, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Outcome(logits(function(*args, **kwargs)))
        except Exception as error:
            return Outcome(error=f"{type(error).__name__}: {error}")


def train(
    kind: type[Trainer], repo: str, folder: str, base: str = BASE, adapters: list[str] = UPSTREAM, **more: Any
) -> nn.Module:
    """Train a composition for a few steps, pushing on the way and at the end."""
    config = CompositionConfig(adapters=list(adapters), task_type="SEQ_CLS")
    trainer = kind(
        model=get_peft_model(base_model(base), config),
        args=TrainingArguments(
            output_dir=folder,
            push_to_hub=True,
            hub_model_id=repo,
            max_steps=4,
            learning_rate=1e-3,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **more,
        ),
        train_dataset=Sentences(32, seed=0),
        eval_dataset=Sentences(32, seed=1),
    )
    trainer.train()
    trainer.push_to_hub()
    return trainer.model


def push(repo: str, adapters: list[str] = UPSTREAM, seed: int = 0, fields: Any = None, **kwargs: Any) -> PeftModel:
    model = composition(adapters, seed, **(fields or {}))
    push_to_hub(model, repo, **kwargs)
    return model


def push_explained(repo: str, seed: int = 0) -> PeftModel:
    """With a report about the composition of seed 0."""
    tokens = torch.randint(1, 60, (12, 9), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": own, "labels": number % LABELS} for number, own in enumerate(tokens)]
    return push(repo, seed=seed, explanation=explain(composition(UPSTREAM), rows))


def push_as_transformers_does(repo: str) -> PeftModel:
    model = composition(UPSTREAM)
    model.push_to_hub(repo)
    return model


def push_named(repo: str) -> PeftModel:
    config = CompositionConfig(adapters=UPSTREAM, mixing="fixed", weights=[0.9, 0.1], task_type="SEQ_CLS")
    model = get_peft_model(base_model(), config, adapter_name="mix")
    push_to_hub(model, repo)
    return model


def load(repo: str, **kwargs: Any) -> PeftModel:
    return PeftModel.from_pretrained(base_model(), repo, **kwargs)


def run_code(code: str) -> nn.Module:
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"]


def delete(*repos: str) -> None:
    for repo in repos:
        HfApi().delete_repo(repo)


def validate(card: str) -> str:
    """What the client's own validation says of a card."""
    try:
        ModelCard(card).validate()
    except ValueError as error:
        return str(error)
    return ""


# In a process that knows nothing of this repository's tests but the name of a repository on the Hub.
FRESH_PROCESS = """
import json, re, sys
from huggingface_hub import hf_hub_download
from peft import PeftModel
from torch import tensor, nn

repo, tokens = json.loads(sys.argv[1])
error = ""
try:
    PeftModel.from_pretrained(nn.Linear(1, 1), repo)
except KeyError as without_the_plugin:
    error = f"KeyError: {without_the_plugin}"
assert "peft_composition" not in sys.modules
card = open(hf_hub_download(repo, "README.md")).read()
names = {}
exec(re.search("```python\\n(.*?)```", card, re.DOTALL)[1], names)
logits = names["model"].eval()(input_ids=tensor(tokens)).logits
print(json.dumps([error, error in card, logits.tolist()]))
"""


def in_a_fresh_process(hub: HubServer, home: Path, repo: str) -> tuple[str, bool, Tensor]:
    """The error without the plugin, whether the card has it, and the logits after running the card's first block."""
    client = Client(hub, home)
    try:
        tokens = tiny.TINY["bert"].inputs()["input_ids"].tolist()
        answer = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, json.dumps([repo, tokens])],
            env={**os.environ, **client.environment},
            cwd=home,
            check=True,
            capture_output=True,
            text=True,
        )
    finally:
        client.close()
    error, is_in_card, found = json.loads(answer.stdout.splitlines()[-1])
    return error, is_in_card, torch.tensor(found)


# The server, the process and what is on the Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub with a base model and two LoRAs for it."""
    folder = tmp_path_factory.mktemp("published")
    BertModel(tiny.build("bert").config).save_pretrained(folder / "base")
    base = named(tiny.build("bert"), BASE)
    with HubServer() as server:
        server.push(BASE, files_of(folder / "base"))
        for number, repo in enumerate(UPSTREAM):
            lora = tiny.save_lora(folder / str(number), base, ["query", "value"], seed=number, r=number + 2)
            server.push(repo, {**files_of(lora), CARD: b"---\nlicense: apache-2.0\n---\n"})
        yield server


@pytest.fixture(scope="module")
def online(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub, tmp_path_factory.mktemp("hf_home"), HF_TOKEN=hub.token)
    yield client
    client.close()


@pytest.fixture(autouse=True)
def _fresh_log(hub: HubServer) -> None:
    hub.clear()


def content(hub: HubServer, repo: str, revision: str = "main") -> dict[str, bytes]:
    """The files of a repository at a branch."""
    repository = hub.repositories[repo]
    return repository.commits[repository.refs[revision]]


def card_of(hub: HubServer, repo: str, revision: str = "main") -> str:
    return content(hub, repo, revision)[CARD].decode()


# The Trainer


def test_what_a_trainer_pushed_loads_from_its_id_alone(hub: HubServer, online: Client, tmp_path: Path) -> None:
    """Also when the upstream adapters are gone, by the code in the card, in a process that imports nothing else."""
    private = ["me/private-a", "me/private-b"]
    for repo, source in zip(private, UPSTREAM):
        hub.push(repo, content(hub, source))
    outcome = online(attempt, train, ComposedTrainer, "me/trained", str(tmp_path / "run"), adapters=private)
    assert outcome.error == ""
    online(delete, *private)
    hub.clear()

    error, is_in_card, found = in_a_fresh_process(hub, tmp_path, "me/trained")

    assert torch.equal(found, outcome.logits)
    assert (error, is_in_card) == ("KeyError: 'COMPOSITION'", True)
    assert {request.repo for request in hub.requests} == {"me/trained", BASE}


def test_the_card_that_a_trainer_pushed(hub: HubServer, online: Client, tmp_path: Path) -> None:
    outcome = online(attempt, train, ComposedTrainer, "me/run", str(tmp_path / "run"), hub_strategy="all_checkpoints")
    assert outcome.error == ""

    card = card_of(hub, "me/run")
    for repo in UPSTREAM:
        assert f"(https://huggingface.co/{repo}/tree/{hub.repositories[repo].refs['main']})" in card
    assert list(table(card, "adapter", "mean")) == ["lora-a", "lora-b"]
    assert list(table(card, "metric", "value")) == ["loss"]
    assert code_blocks(card)[0].endswith('PeftModel.from_pretrained(base_model, "me/run")\n')
    assert "### Training hyperparameters" in card
    data = metadata(card)
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == (BASE, "adapter", "peft")
    assert data["upstream_adapters"] == UPSTREAM
    assert data["license"] == "apache-2.0"
    assert "peft-composition" in data["tags"]
    assert online(validate, card) == ""
    assert {CARD, CONFIG, WEIGHTS} < content(hub, "me/run").keys()


def test_a_plain_trainer_pushes_what_loads(hub: HubServer, online: Client, tmp_path: Path) -> None:
    """But the Trainer's card says nothing of the mix: see `CompositionCardMixin`."""
    outcome = online(attempt, train, Trainer, "me/plain", str(tmp_path / "run"), load_best_model_at_end=True)
    loaded = online(attempt, load, "me/plain", cache=str(tmp_path / "cache"))
    assert (outcome.error, loaded.error) == ("", "")
    assert torch.equal(loaded.logits, outcome.logits)
    assert errors_in(card_of(hub, "me/plain")) == []
    assert "peft-composition:begin" not in card_of(hub, "me/plain")


def test_a_local_base_model_is_no_obstacle(hub: HubServer, online: Client, tmp_path: Path) -> None:
    """The Hub refuses the card that PEFT makes of it."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name, file in content(hub, BASE).items():
        (folder / name).write_bytes(file)
    refused = online(attempt, train, Trainer, "me/local", str(tmp_path / "plain"), base=str(folder))
    assert refused.error.startswith("ValueError: Invalid metadata in README.md.")
    assert str(folder) in refused.error

    outcome = online(attempt, train, ComposedTrainer, "me/local", str(tmp_path / "run"), base=str(folder))

    assert outcome.error == ""
    assert "base_model" not in metadata(card_of(hub, "me/local"))
    pushed = content(hub, "me/local")
    assert {"adapter_config.json", "lora/adapter_config.json"} <= pushed.keys()
    telling = [name for name, file in pushed.items() if str(tmp_path).encode() in file]
    assert telling == ["training_args.bin"]  # which is the Trainer's
    assert torch.equal(online(attempt, load, "me/local").logits, outcome.logits)


# Without a Trainer


def test_pushed_in_one_commit_with_its_card(hub: HubServer, online: Client, tmp_path: Path) -> None:
    outcome = online(attempt, push, "me/pushed", metrics={"accuracy": 0.875, "examples": 40})
    assert outcome.error == ""
    assert len(hub.repositories["me/pushed"].commits) == 2  # the first makes the repository
    card = card_of(hub, "me/pushed")
    assert table(card, "metric", "value") == {"accuracy": ["0.875"], "examples": ["40"]}
    assert metadata(card)["upstream_adapters"] == UPSTREAM
    assert online(validate, card) == ""
    assert torch.equal(online(attempt, run_code, code_blocks(card)[0]).logits, outcome.logits)


def test_pushing_again_keeps_what_people_wrote_on_the_hub(hub: HubServer, online: Client) -> None:
    assert online(attempt, push, "me/edited").error == ""
    before = card_of(hub, "me/edited")
    edited = before.replace("license: apache-2.0", "license: gpl-3.0").replace("tags:\n", "tags:\n- movies\n")
    edited += "\n## Mine\n\nText.\n"
    hub.push("me/edited", {**content(hub, "me/edited"), CARD: edited.encode()})

    outcome = online(attempt, push, "me/edited", seed=1)

    assert outcome.error == ""
    after = card_of(hub, "me/edited")
    assert after.endswith("\n## Mine\n\nText.\n")
    tags = ["movies", *metadata(before)["tags"]]
    assert metadata(after) == {**metadata(before), "license": "gpl-3.0", "tags": tags}
    assert table(after, "adapter", "mean") != table(before, "adapter", "mean")
    assert after.count("peft-composition:begin") == 1


def test_what_transformers_pushed_loads_and_gets_its_card_later(hub: HubServer, online: Client) -> None:
    outcome = online(attempt, push_as_transformers_does, "me/transformers")
    loaded = online(attempt, load, "me/transformers")
    assert (outcome.error, loaded.error) == ("", "")
    assert torch.equal(loaded.logits, outcome.logits)

    online(attempt, push, "me/transformers")
    card = card_of(hub, "me/transformers")
    assert metadata(card)["library_name"] == "peft"
    assert code_blocks(card)[0].endswith('PeftModel.from_pretrained(base_model, "me/transformers")\n')
    online(attempt, push_as_transformers_does, "me/transformers")
    assert card_of(hub, "me/transformers") == card


def test_revisions(hub: HubServer, online: Client) -> None:
    first = online(attempt, push, "me/versions")
    commit = hub.repositories["me/versions"].refs["main"]
    second = online(attempt, push, "me/versions", seed=1)
    on_branch = online(attempt, push, "me/versions", seed=2, revision="try/one")
    assert not torch.equal(first.logits, second.logits)
    assert not torch.equal(on_branch.logits, second.logits)

    for revision, outcome in ((commit, first), ("main", second), ("try/one", on_branch)):
        loaded = online(attempt, load, "me/versions", revision=revision)
        assert loaded.error == ""
        assert torch.equal(loaded.logits, outcome.logits)


def test_a_private_repository_needs_the_token(hub: HubServer, online: Client, tmp_path: Path) -> None:
    outcome = online(attempt, push, "me/secret", private=True)
    assert hub.repositories["me/secret"].private
    stranger = online(attempt, load, "me/secret", token=hub.token_of_another, cache=str(tmp_path))
    assert "Can't find 'adapter_config.json' at 'me/secret'" in stranger.error
    assert torch.equal(online(attempt, load, "me/secret", cache=str(tmp_path)).logits, outcome.logits)


def test_the_cache_is_enough_offline(hub: HubServer, online: Client) -> None:
    outcome = online(attempt, push, "me/cached")
    assert online(attempt, load, "me/cached").error == ""
    hub.clear()
    loaded = online(attempt, load, "me/cached", is_offline=True)
    assert loaded.error == ""
    assert torch.equal(loaded.logits, outcome.logits)
    assert hub.requests == []


def test_who_may_not_write_is_told_so(hub: HubServer, online: Client) -> None:
    error = online(attempt, push, "me/not-mine", token=hub.token_of_another).error
    assert "403" in error
    assert "me/not-mine" not in hub.repositories


def test_a_named_composition_is_in_its_subfolder(hub: HubServer, online: Client) -> None:
    outcome = online(attempt, push_named, "me/named")
    card = card_of(hub, "me/named")
    assert 'PeftModel.from_pretrained(base_model, "me/named", subfolder="mix")' in code_blocks(card)[0]
    loaded = online(attempt, run_code, code_blocks(card)[0])
    assert loaded.error == ""
    assert torch.equal(loaded.logits, outcome.logits)


def test_an_upload_that_breaks_off_is_sent_again(hub: HubServer, online: Client) -> None:
    reference = online(attempt, push, "me/smooth")
    sha256 = hashlib.sha256(content(hub, "me/smooth")[WEIGHTS]).hexdigest()
    del hub.objects[sha256]
    hub.cut("me/bumpy", sha256, 1000, method="PUT")

    outcome = online(attempt, push, "me/bumpy")

    assert outcome.error == ""
    assert torch.equal(outcome.logits, reference.logits)
    assert content(hub, "me/bumpy")[WEIGHTS] == content(hub, "me/smooth")[WEIGHTS]
    # The one that broke off was no whole request.
    assert [r.status for r in hub.requests if r.method == "PUT" and r.file == sha256] == [200]
    assert hub.cut_off == [("PUT", "me/bumpy", sha256)]


# The plain LoRA


def test_the_pushed_lora_gives_the_same_logits(hub: HubServer, online: Client, tmp_path: Path) -> None:
    pushed = {
        "me/pushed": online(attempt, push, "me/pushed"),
        "me/trained": online(attempt, train, ComposedTrainer, "me/trained", str(tmp_path / "run")),
    }
    for repo, outcome in pushed.items():
        assert outcome.error == ""
        assert json.loads(content(hub, repo)[f"lora/{CONFIG}"])["peft_type"] == "LORA"
        by_hand = online(attempt, load, repo, subfolder="lora")
        as_the_card_says = online(attempt, run_code, code_blocks(card_of(hub, repo))[1])
        assert (by_hand.error, as_the_card_says.error) == ("", "")
        for found in (by_hand, as_the_card_says):
            assert (found.logits - outcome.logits).abs().max() < 1e-5


def test_a_lora_that_is_no_longer_pushed_is_taken_away(hub: HubServer, online: Client) -> None:
    assert online(attempt, push, "me/pushed").error == ""
    assert 'subfolder="lora"' in card_of(hub, "me/pushed")

    assert online(attempt, push, "me/pushed", seed=1, lora=False).error == ""

    assert not [file for file in content(hub, "me/pushed") if file.startswith("lora/")]
    assert 'subfolder="lora"' not in card_of(hub, "me/pushed")


def test_a_report_is_pushed_with_the_weights_that_it_is_about(hub: HubServer, online: Client) -> None:
    assert online(attempt, push_explained, "me/explained").error == ""
    files = content(hub, "me/explained")
    assert {"composition-report.html", "composition-report.png", "composition-report.json"} <= set(files)
    assert files["composition-report.html"].count(b"<h1>") == 1
    card = card_of(hub, "me/explained")
    assert "## Why these weights" in card
    assert online(validate, card) == ""

    assert "not about the composition" in online(attempt, push_explained, "me/refused", seed=1).error
    assert "me/refused" not in hub.repositories

    assert online(attempt, push, "me/explained", seed=1).error == ""  # other weights, without a report
    assert not [file for file in content(hub, "me/explained") if file.startswith("composition-report")]
    assert "## Why these weights" not in card_of(hub, "me/explained")


# Compositions that name their adapters


def test_a_light_composition_is_pushed_without_the_factors(hub: HubServer, online: Client, tmp_path: Path) -> None:
    light = {"save_adapters": False}
    whole, outcome = online(attempt, push, "me/whole"), online(attempt, push, "me/light", fields=light)
    assert torch.equal(outcome.logits, whole.logits)
    assert len(content(hub, "me/light")[WEIGHTS]) < len(content(hub, "me/whole")[WEIGHTS]) / 2
    assert "Their weights are not inside this adapter" in card_of(hub, "me/light")
    hub.clear()

    loaded = online(attempt, load, "me/light", cache=str(tmp_path))

    assert torch.equal(loaded.logits, outcome.logits)
    assert {(r.repo, r.revision) for r in hub.requests if r.repo in UPSTREAM} == {
        (repo, hub.repositories[repo].refs["main"]) for repo in UPSTREAM
    }


def test_a_light_composition_of_local_adapters_is_not_pushed(hub: HubServer, online: Client, tmp_path: Path) -> None:
    lora = tiny.save_lora(tmp_path / "lora", named(tiny.build("bert"), BASE), ["query"])
    adapters = [UPSTREAM[0], str(lora)]
    error = online(attempt, push, "me/nowhere", adapters, fields={"save_adapters": False}).error
    assert re.match(r"ValueError: With save_adapters=False nobody else could load .*'lora' came from local", error)
    assert "me/nowhere" not in hub.repositories


# The server's validation


def test_the_client_asks_the_server_to_validate(hub: HubServer, online: Client) -> None:
    assert online(validate, "---\nlicense: mit\nbase_model: org/base\n---\n") == ""
    assert "/some/folder" in online(validate, "---\nbase_model: /some/folder\n---\n")
    assert "not-a-license" in online(validate, "---\nlicense: not-a-license\n---\n")
