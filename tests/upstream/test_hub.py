"""Adapters from the Hub: the real client in processes of its own, against a server on loopback.

`huggingface_hub` reads its environment when it is imported, so an online and an offline process do the composing; the
tests read what came back and what the server was asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_composition import AdapterError, CompositionConfig
from peft_composition.tuner.locating import composition_layers

from .. import tiny
from ..hub_server import Client, HubServer
from ..reference import Reference, relative_error


CONFIG, SAFETENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CARD = "README.md"

# What runs in the other process


@dataclass
class Outcome:
    """What composing came to: the record and the products, or the error."""

    provenance: list[dict[str, Any]] = field(default_factory=list)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    error: str = ""
    stderr: str = ""


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def compose(
    adapters: Sequence[str | dict[str, Any]] = (),
    *,
    load: str = "",
    save: str = "",
    save_adapters: bool = True,
    cache: str = "",
    terminal: bool = False,
    **environment: str,
) -> Outcome:
    """Compose adapters in float64, or load a saved composition.

    Args:
        adapters: for a uniform composition on the tiny MLP.
        load: folder or id of a saved composition, in place of `adapters`.
        save: folder to save the composition to.
        save_adapters: of the config.
        cache: folder of the Hub cache, if not that of the process.
        terminal: whether stderr claims to be one.
        **environment: variables such as HF_TOKEN that the client reads when it needs them.
    """
    base = tiny.build("mlp").double()
    stderr = _Terminal() if terminal else io.StringIO()
    cache_folder = patch.object(constants, "HF_HUB_CACHE", cache or constants.HF_HUB_CACHE)
    with patch.dict(os.environ, environment), cache_folder, redirect_stderr(stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if load:
                model = PeftModel.from_pretrained(base, load)
            else:
                config = CompositionConfig(adapters=list(adapters), mixing="uniform", save_adapters=save_adapters)
                model = get_peft_model(base, config)
        except Exception as error:
            kind = type(error).__name__
            if isinstance(error, AdapterError) and not kind.startswith("_"):
                kind = "AdapterError"
            return Outcome(error=f"{kind}: {error}", stderr=stderr.getvalue())
        if save:
            model.save_pretrained(save)
    return Outcome(
        provenance=model.peft_config["default"].provenance,
        deltas={name: m.get_delta_weight("default") for name, m in composition_layers(model.get_base_model())},
        stderr=stderr.getvalue(),
    )


def model_info(repo: str) -> tuple[str, list[str]]:
    """Commit and files of a repository, through the client's API."""
    info = HfApi().model_info(repo)
    return info.sha, sorted(sibling.rfilename for sibling in info.siblings)


# The processes and what the tests need


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="module")
def online(hub: HubServer, home: Path) -> Iterator[Client]:
    client = Client(hub, home)
    yield client
    client.close()


@pytest.fixture(scope="module")
def offline(hub: HubServer, home: Path) -> Iterator[Client]:
    client = Client(hub, home, HF_HUB_OFFLINE="1")
    yield client
    client.close()


@pytest.fixture(autouse=True)
def _fresh_log(hub: HubServer) -> None:
    hub.clear()


class Adapters:
    """Makes LoRAs for the tiny MLP, and computes what their uniform composition is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = tiny.build("mlp").double()
        self.count = 0

    def make(self) -> Path:
        """A LoRA that differs from all others."""
        self.count += 1
        return tiny.save_lora(
            self.folder / f"lora-{self.count}", self.base, ["lin0", "lin1"], seed=self.count, r=1 + self.count % 3
        )

    def check(self, outcome: Outcome, *folders: Path) -> None:
        """The outcome has the products of these LoRAs, in equal parts."""
        assert outcome.error == ""
        reference = Reference(self.base, folders)
        weights = torch.full((len(folders),), 1 / len(folders), dtype=torch.float64)
        assert list(outcome.deltas) == ["lin0", "lin1"]
        for module, delta in outcome.deltas.items():
            assert relative_error(delta, reference.delta(module, weights)) < 1e-7, module


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("adapters"))


def files_of(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """The files of a repository that somebody made from a folder."""
    return {f"{prefix}{file.name}": file.read_bytes() for file in folder.iterdir() if file.is_file()}


def pickled(folder: Path) -> dict[str, bytes]:
    """The same adapter with pickled weights."""
    files = files_of(folder)
    del files[SAFETENSORS]
    buffer = io.BytesIO()
    torch.save(load_file(folder / SAFETENSORS), buffer)
    return {**files, PICKLE: buffer.getvalue()}


# Finding an adapter


def test_the_server_describes_its_repositories(hub: HubServer, online: Client, adapters: Adapters) -> None:
    commit = hub.push("me/described", files_of(adapters.make()))
    assert online(model_info, "me/described") == (commit, sorted(["README.md", SAFETENSORS, CONFIG]))


def test_an_adapter_by_id(hub: HubServer, online: Client, adapters: Adapters) -> None:
    lora = adapters.make()
    commit = hub.push("me/by-id", {**files_of(lora), PICKLE: b"never asked for"})

    outcome = online(compose, ["me/by-id"])

    adapters.check(outcome, lora)
    assert outcome.provenance == [
        {
            "name": "by-id",
            "path": "me/by-id",
            "subfolder": None,
            "commit": commit,
            "sha256": _sha256(lora / SAFETENSORS),
            "base_model_name_or_path": None,
            "license": None,
        }
    ]
    assert hub.asked("me/by-id", "GET") == [CONFIG, SAFETENSORS, CARD]
    assert PICKLE not in hub.asked("me/by-id")
    # What git LFS holds comes from the storage host, which must not see the token; here there is none at all.
    assert {(r.host, r.file) for r in hub.requests if r.method == "GET"} == {
        ("hub", CONFIG),
        ("storage", SAFETENSORS),
        ("hub", CARD),
    }


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_branch_a_tag_and_a_commit(hub: HubServer, online: Client, adapters: Adapters) -> None:
    loras = [adapters.make() for _ in range(4)]
    first = hub.push("me/versions", files_of(loras[0]))
    second = hub.push("me/versions", files_of(loras[1]))
    hub.push("me/versions", files_of(loras[2]))
    third = hub.push("me/versions", files_of(loras[3]), branch="feature/x")
    hub.tag("me/versions", "v1.0", second)
    revisions = {"commit": first, "tag": "v1.0", "branch": "feature/x"}

    outcome = online(
        compose, [{"path": "me/versions", "revision": revision, "name": n} for n, revision in revisions.items()]
    )

    adapters.check(outcome, loras[0], loras[1], loras[3])
    assert [entry["commit"] for entry in outcome.provenance] == [first, second, third]


def test_a_subfolder(hub: HubServer, online: Client, adapters: Adapters) -> None:
    inner, other = adapters.make(), adapters.make()
    hub.push("me/many", {**files_of(inner, "runs/best/"), **files_of(other)})

    outcome = online(compose, [{"path": "me/many", "subfolder": "runs/best"}, "me/many"])

    adapters.check(outcome, inner, other)
    assert [entry["subfolder"] for entry in outcome.provenance] == ["runs/best", None]


def test_hub_and_local_adapters_together(hub: HubServer, online: Client, adapters: Adapters) -> None:
    remote, local = adapters.make(), adapters.make()
    commit = hub.push("me/remote", files_of(remote))

    outcome = online(compose, ["me/remote", str(local)])

    adapters.check(outcome, remote, local)
    assert [entry["commit"] for entry in outcome.provenance] == [commit, None]


def test_a_pickle_is_fetched_only_where_there_are_no_safetensors(
    hub: HubServer, online: Client, adapters: Adapters
) -> None:
    lora = adapters.make()
    hub.push("me/pickle", pickled(lora))

    adapters.check(online(compose, ["me/pickle"]), lora)
    assert hub.asked("me/pickle", "GET") == [CONFIG, PICKLE, CARD]


def test_a_cache_under_a_folder_called_snapshots(
    hub: HubServer, online: Client, adapters: Adapters, tmp_path: Path
) -> None:
    lora = adapters.make()
    commit = hub.push("me/snapshots", files_of(lora))

    outcome = online(compose, ["me/snapshots"], cache=str(tmp_path / "snapshots" / "hub"))

    adapters.check(outcome, lora)
    assert outcome.provenance[0]["commit"] == commit


# Access


@pytest.mark.parametrize("access", ["private", "gated"])
def test_a_token_opens_private_and_gated_repositories(
    access: str, hub: HubServer, online: Client, adapters: Adapters
) -> None:
    lora = adapters.make()
    hub.push(f"me/{access}", files_of(lora), **{access: True})

    adapters.check(online(compose, [f"me/{access}"], HF_TOKEN=hub.token), lora)
    assert all(request.authorized == (request.host == "hub") for request in hub.requests)


def test_a_token_from_hf_auth_login(hub: HubServer, online: Client, adapters: Adapters, home: Path) -> None:
    lora = adapters.make()
    hub.push("me/logged-in", files_of(lora), private=True)
    (home / "token").write_text(hub.token)
    try:
        adapters.check(online(compose, ["me/logged-in"]), lora)
    finally:
        (home / "token").unlink()


@pytest.mark.parametrize(
    ("token", "adapter", "message"),
    [
        (
            "",
            "me/secret",
            "me/secret is neither a local folder nor a Hub repository that you can read; for a private",
        ),
        (
            HubServer.token_of_another,
            "me/secret",
            "me/secret is neither a local folder nor a Hub repository that you can read",
        ),
        ("", "me/fenced", "me/fenced is gated: accept its terms on the Hub and log in"),
        (HubServer.token_of_another, "me/fenced", "me/fenced is gated: accept its terms on the Hub and log in"),
        ("hf_expired", "me/public", "me/public could not be downloaded: "),
        ("", "me/nowhere", "me/nowhere is neither a local folder nor a Hub repository that you can read"),
        ("", {"path": "me/open", "revision": "v9"}, "me/open has no revision 'v9'"),
        ("", {"path": "me/open", "subfolder": "no"}, "me/open/no is not an adapter: it has no adapter_config.json"),
        ("", "me/model", "me/model is not an adapter: it has no adapter_config.json; it is a whole model"),
        (
            "",
            {"path": "me/runs", "subfolder": "sst"},
            "me/runs/sst is not an adapter: it has no adapter_config.json; there are adapters in its subfolders",
        ),
        ("", "me/mlx", "me/mlx has neither adapter_model.safetensors nor adapter_model.bin; it is an MLX adapter"),
        ("", "me/no-weights", "me/no-weights has neither adapter_model.safetensors nor adapter_model.bin"),
        ("", "not a Hub id!", "'not a Hub id!' is neither a local folder nor a Hub id"),
    ],
    ids=lambda value: str(value) if len(str(value)) < 40 else "",
)
def test_what_cannot_be_read_is_refused(
    token: str, adapter: str | dict[str, str], message: str, hub: HubServer, online: Client, adapters: Adapters
) -> None:
    if "me/open" not in hub.repositories:
        files = files_of(adapters.make())
        hub.push("me/open", files)
        hub.push("me/public", files)
        hub.push("me/secret", files, private=True)
        hub.push("me/fenced", files, gated=True)
        hub.push("me/model", {"config.json": b"{}", "model.safetensors": b""})
        hub.push("me/no-weights", {CONFIG: files[CONFIG]})
        hub.push("me/runs", {"sst/README.md": b"# Runs", f"sst/last/{CONFIG}": files[CONFIG]})
        hub.push("me/mlx", {CONFIG: b'{"fine_tune_type": "lora"}', "adapters.safetensors": b""})
    bad = {"path": adapter} if isinstance(adapter, str) else adapter

    error = online(compose, [{**bad, "name": "mine"}, "me/open"], HF_TOKEN=token).error

    assert error.startswith(f"AdapterError: adapter 'mine': {message}")
    assert token == "" or token not in error


def test_a_composition_names_its_export(hub: HubServer, online: Client, adapters: Adapters, tmp_path: Path) -> None:
    lora = adapters.make()
    assert online(compose, [str(lora)], save=str(tmp_path)).error == ""
    composed = files_of(tmp_path)
    hub.push("me/bare-composition", composed)
    hub.push("me/composition", {**composed, **files_of(lora, "lora/")})

    message = (
        "AdapterError: adapter 'composition': it is itself a composition. Its folder 'lora' holds it as a plain LoRA"
    )
    error = online(compose, ["me/composition"]).error
    assert error.startswith(message)
    advised = json.loads(error[error.index("{") :])
    adapters.check(online(compose, [advised]), lora)
    error = online(compose, ["me/bare-composition"]).error
    assert "it is itself a composition. Export it as a plain LoRA, which can be composed: load it" in error


# Licenses


def test_licenses_come_from_the_cards(hub: HubServer, online: Client, offline: Client, adapters: Adapters) -> None:
    cards = {
        "me/licensed": b"---\nlicense: mit\n---\n# Mine\n",
        "me/with-a-name": b"---\nlicense: other\nlicense_name: llama3.1\n---\n",
        "me/silent": b"# No metadata\n",
        "me/empty": b"---\ntags:\n- lora\n---\n",
        "me/damaged": b"---\nlicense: [mit\n---\n",
        "me/no-text": b"---\nlicense: \xff\n---\n",
        "me/bare": None,
    }
    loras = [adapters.make() for _ in cards]
    for (repo, card), lora in zip(cards.items(), loras):
        files = files_of(lora, "inner/")  # the card is that of the repository, wherever in it the adapter is
        hub.push(repo, {**files, CARD: card} if card is not None else files)
    references = [{"path": repo, "subfolder": "inner", "name": repo} for repo in cards]

    outcome = online(compose, references)

    adapters.check(outcome, *loras)
    expected = ["mit", "other (llama3.1)", None, None, None, None, None]
    assert [entry["license"] for entry in outcome.provenance] == expected
    assert [entry["license"] for entry in offline(compose, references).provenance] == expected
    hub.clear()
    again = online(
        compose,
        [
            {**reference, "revision": next(iter(hub.repositories[reference["path"]].commits))}
            for reference in references
        ],
    )
    assert [entry["license"] for entry in again.provenance] == expected
    assert hub.requests == []  # that a repository has no card is remembered, too


def test_the_license_of_a_folder_is_in_its_card(online: Client, adapters: Adapters, tmp_path: Path) -> None:
    lora = adapters.make()
    (lora / CARD).write_text("---\nlicense: apache-2.0\n---\n")
    outcome = online(compose, [str(lora)])
    adapters.check(outcome, lora)
    assert outcome.provenance[0]["license"] == "apache-2.0"


def test_an_adapter_is_not_refused_for_its_card(hub: HubServer, online: Client, adapters: Adapters) -> None:
    lora = adapters.make()
    hub.push("me/broken-card", files_of(lora))
    hub.cut("me/broken-card", CARD, *[0] * 9, method="HEAD")
    outcome = online(compose, ["me/broken-card"])
    adapters.check(outcome, lora)
    assert outcome.provenance[0]["license"] is None


# Many, and interrupted


def test_many_adapters_are_fetched_at_the_same_time_and_each_file_once(
    hub: HubServer, online: Client, adapters: Adapters
) -> None:
    loras = [adapters.make() for _ in range(20)]
    repos = [f"me/many-{number}" for number in range(20)]
    for repo, lora in zip(repos, loras):
        hub.push(repo, files_of(lora))
    hub.latency = 0.02
    try:
        outcome = online(compose, repos)
    finally:
        hub.latency = 0.0

    adapters.check(outcome, *loras)
    assert [entry["path"] for entry in outcome.provenance] == repos
    assert all(hub.asked(repo, "GET") == [CONFIG, SAFETENSORS, CARD] for repo in repos)
    assert hub.most_at_once > 3
    assert _bars(outcome.stderr) == {"Fetching adapters"}
    assert re.search(r"Fetching adapters: 100%.* 20/20 ", outcome.stderr)


def test_a_terminal_shows_one_bar(hub: HubServer, online: Client, adapters: Adapters) -> None:
    loras = [adapters.make(), adapters.make()]
    for number, lora in enumerate(loras):
        hub.push(f"me/shown-{number}", files_of(lora))

    outcome = online(compose, ["me/shown-0", "me/shown-1"], terminal=True)

    adapters.check(outcome, *loras)
    assert _bars(outcome.stderr) == {"Fetching adapters"}


def _bars(stderr: str) -> set[str]:
    """The names of the progress bars in what was written to stderr."""
    return set(re.findall(r"([A-Za-z_][\w. ]*):\s+\d+%\|", stderr))


def test_no_bar_for_local_adapters(online: Client, adapters: Adapters) -> None:
    lora = adapters.make()
    outcome = online(compose, [str(lora)])
    adapters.check(outcome, lora)
    assert outcome.stderr == ""


def test_an_interrupted_download_is_resumed(
    hub: HubServer, online: Client, adapters: Adapters, tmp_path: Path
) -> None:
    """The client keeps whole chunks of 10 MB, so the file must be larger."""
    lora = adapters.make()
    tensors = load_file(lora / SAFETENSORS)
    large = {**tensors, "base_model.model.head.weight": torch.randn(3_500_000)}
    save_file(large, tmp_path / SAFETENSORS)
    hub.push("me/large", {**files_of(lora), SAFETENSORS: (tmp_path / SAFETENSORS).read_bytes()})
    hub.cut("me/large", SAFETENSORS, 12_000_000)

    adapters.check(online(compose, ["me/large"]), lora)
    attempts = [request for request in hub.requests if request.host == "storage"]
    assert [request.range for request in attempts] == [None, f"bytes={10 * 2**20}-"]


@pytest.mark.parametrize(("method", "file"), [("HEAD", CONFIG), ("HEAD", SAFETENSORS)])
def test_a_connection_that_breaks_before_an_answer_names_the_adapter(
    method: str, file: str, hub: HubServer, online: Client, adapters: Adapters
) -> None:
    repo = f"me/broken-{file.partition('.')[2]}"
    lora = adapters.make()
    hub.push(repo, files_of(lora))
    hub.cut(repo, file, *[0] * 9, method=method)

    error = online(compose, [{"path": repo, "name": "mine"}]).error

    assert error.startswith(f"AdapterError: adapter 'mine': {repo}")
    assert "could not be downloaded" in error
    hub.cut(repo, file, method=method)
    adapters.check(online(compose, [repo]), lora)


# Without the network


@pytest.fixture(scope="module")
def cached(hub: HubServer, online: Client, adapters: Adapters) -> dict[str, Path]:
    """Adapters that an online process has read before, one of them pickled, one by a tag and in a subfolder."""
    loras = {repo: adapters.make() for repo in ("me/cached", "me/cached-pickle", "me/cached-inner")}
    hub.push("me/cached", files_of(loras["me/cached"]))
    hub.push("me/cached-pickle", pickled(loras["me/cached-pickle"]))
    commit = hub.push("me/cached-inner", files_of(loras["me/cached-inner"], "inner/"))
    hub.tag("me/cached-inner", "v1", commit)
    adapters.check(online(compose, _as_cached(loras)), *loras.values())
    return loras


def _as_cached(repos: Iterable[str], **extra: Any) -> list[dict[str, Any]]:
    inner = {"subfolder": "inner", "revision": "v1"}
    return [{"path": repo, "name": repo, **(inner if repo.endswith("inner") else {}), **extra} for repo in repos]


def test_offline_reads_the_cache(hub: HubServer, offline: Client, adapters: Adapters, cached: dict[str, Path]) -> None:
    hub.clear()
    outcome = offline(compose, _as_cached(cached))
    adapters.check(outcome, *cached.values())
    assert [entry["commit"] for entry in outcome.provenance] == [
        next(iter(hub.repositories[r].commits)) for r in cached
    ]
    assert hub.requests == []


def test_local_files_only_reads_the_cache(
    hub: HubServer, online: Client, adapters: Adapters, cached: dict[str, Path]
) -> None:
    hub.clear()
    adapters.check(online(compose, _as_cached(cached, local_files_only=True)), *cached.values())
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["me/cached", "me/cached-pickle", "me/cached-inner"])
def test_a_server_that_is_gone_does_not_matter_to_the_cache(
    repo: str, hub: HubServer, online: Client, adapters: Adapters, cached: dict[str, Path]
) -> None:
    hub.stop()
    try:
        adapters.check(online(compose, _as_cached([repo])), cached[repo])
    finally:
        hub.start()


def test_the_cache_follows_a_branch_that_moves(hub: HubServer, online: Client, adapters: Adapters) -> None:
    old, new = adapters.make(), adapters.make()
    hub.push("me/moving", files_of(old))
    adapters.check(online(compose, ["me/moving"]), old)
    commit = hub.push("me/moving", files_of(new))
    outcome = online(compose, ["me/moving"])
    adapters.check(outcome, new)
    assert outcome.provenance[0]["commit"] == commit


@pytest.mark.parametrize("how", ["offline", "local_files_only"])
def test_what_is_not_in_the_cache(
    how: str, hub: HubServer, online: Client, offline: Client, adapters: Adapters
) -> None:
    hub.push("me/uncached", files_of(adapters.make()))
    reference = {"path": "me/uncached", "name": "mine"}
    if how == "offline":
        error = offline(compose, [reference]).error
    else:
        error = online(compose, [{**reference, "local_files_only": True}]).error
    assert error.startswith("AdapterError: adapter 'mine': me/uncached is neither a local folder nor in the Hub cache")
    assert hub.requests == []


def test_a_cache_that_lacks_the_weights(hub: HubServer, online: Client, offline: Client, adapters: Adapters) -> None:
    """The repository does have weights; only the cache does not."""
    hub.push("me/half", files_of(adapters.make()))
    online(hf_hub_download, "me/half", CONFIG)

    error = offline(compose, [{"path": "me/half", "name": "mine"}]).error

    assert error.startswith("AdapterError: adapter 'mine': me/half")
    assert "cache" in error


# Compositions that name their adapters


def test_a_light_composition_reloads_the_recorded_commits(
    hub: HubServer, online: Client, adapters: Adapters, tmp_path: Path
) -> None:
    loras, later = [adapters.make(), adapters.make()], adapters.make()
    card = {CARD: b"---\nlicense: mit\n---\n"}
    commits = [hub.push(f"me/light-{n}", files_of(lora) | card) for n, lora in enumerate(loras)]
    saved = tmp_path / "saved"
    adapters.check(online(compose, ["me/light-0", "me/light-1"], save=str(saved), save_adapters=False), *loras)
    assert sum(file.stat().st_size for file in saved.iterdir()) < 20_000
    assert not [key for key in load_file(saved / SAFETENSORS) if "composition_factors" in key]
    for number in (0, 1):
        hub.push(f"me/light-{number}", files_of(later))
    hub.clear()

    outcome = online(compose, load=str(saved), cache=str(tmp_path / "elsewhere"))

    adapters.check(outcome, *loras)
    assert [entry["commit"] for entry in outcome.provenance] == commits
    assert {(request.repo, request.revision) for request in hub.requests} == {
        (f"me/light-{number}", commit) for number, commit in enumerate(commits)
    }
    # The licenses are in the record.
    assert [entry["license"] for entry in outcome.provenance] == ["mit", "mit"]
    assert CARD not in hub.asked("me/light-0")

    hub.clear()
    adapters.check(online(compose, load=str(saved), cache=str(tmp_path / "elsewhere")), *loras)
    assert hub.requests == []

    hub.falsify("me/light-1", commits[1], SAFETENSORS, (later / SAFETENSORS).read_bytes())
    error = online(compose, load=str(saved), cache=str(tmp_path / "third")).error
    assert error.startswith("AdapterError: adapter 'light-1': its weights have changed: recorded sha256 ")
    assert _sha256(loras[1] / SAFETENSORS) in error
    assert _sha256(later / SAFETENSORS) in error


def test_a_composition_on_the_hub_stands_alone(
    hub: HubServer, online: Client, adapters: Adapters, tmp_path: Path
) -> None:
    loras = [adapters.make(), adapters.make()]
    for number, lora in enumerate(loras):
        hub.push(f"me/part-{number}", files_of(lora))
    adapters.check(online(compose, ["me/part-0", "me/part-1"], save=str(tmp_path)), *loras)
    hub.push("me/whole", files_of(tmp_path))
    del hub.repositories["me/part-0"], hub.repositories["me/part-1"]
    hub.clear()

    adapters.check(online(compose, load="me/whole", cache=str(tmp_path / "cache")), *loras)
    assert {request.repo for request in hub.requests} == {"me/whole"}
