"""Two real processes over gloo: DDP with the plain Trainer, FSDP1 and FSDP2, and who asks the Hub.

What runs in them is in `distributed_worker.py`; the runs in one process that they are compared with run here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_composition import CompositionConfig
from peft_composition.tuner.mixing import Mixing

from . import distributed_worker as worker
from . import tiny, warm
from .hub_server import HubServer, environment_of
from .ports import free_port
from .upstream_faults import GLOO_ADDS_FOR_MEANS, TRANSFORMERS_RESUMES_ON_GPUS_ALONE


# Both sides add the same float32 numbers in another order: 8 examples at once, or 4 and 4. Six steps of Adam carry
# that on; a weight that was not reduced differs by far more than 1%. Adam hardly sees a gradient's scale, so gradients
# are compared, too: a sum in the place of a mean doubles them.
RELATIVE = 1e-4
ABSOLUTE = 1e-5
STEPS = 6


def forked(group: str, folder: Path) -> list[dict[str, Any]]:
    """Run a group of checks in two processes; returns the results by name, for each rank."""
    arguments = ("-m", "tests.distributed_worker", group, folder)
    done = warm.run(*arguments, processes=2, timeout=worker.SECONDS + 30, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-6000:]
    return results_in(folder)


def launched(group: str, folder: Path, **environment: str) -> list[dict[str, Any]]:
    """The same in new processes that accelerate starts, with variables that they read as they import."""
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "tests.distributed_worker", group, str(folder)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=worker.SECONDS + 30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-6000:]
    return results_in(folder)


def results_in(folder: Path) -> list[dict[str, Any]]:
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(worker.WORLD_SIZE)]
    assert [result.pop("world_size") for result in results] == [worker.WORLD_SIZE] * worker.WORLD_SIZE
    return results


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRAs for the tiny BERT, and one as PEFT makes it: its B is zero."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny.save_pair(folder, "bert")
    lora = get_peft_model(tiny.build("bert"), LoraConfig(r=2, target_modules=["query", "value"]))
    lora.save_pretrained(str(folder / "zero"))
    return folder


def result(results: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The results of a check, rank by rank."""
    found = [of_rank[name] for of_rank in results]
    for of_rank in found:
        assert not isinstance(of_rank, dict) or "error" not in of_rank, of_rank["error"]
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            actual[name], weight, rtol=RELATIVE, atol=ABSOLUTE, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Those of mixing weights are small differences of what has the size of others, and of its rounding errors."""
    assert actual.keys() == expected.keys()
    rounding = 4 * torch.finfo(torch.float32).eps * float(max(gradient.abs().max() for gradient in expected.values()))
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=RELATIVE, atol=rounding, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


# DDP


@pytest.fixture(scope="module")
def ddp(inputs: Path) -> list[dict[str, Any]]:
    return forked("ddp", inputs)


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return worker.ddp(inputs, tmp_path_factory.mktemp("alone") / "rank0")


DDP_RUNS = [*worker.VARIANTS, *worker.TRAINERS, "zero"]


@pytest.mark.parametrize("name", DDP_RUNS)
def test_two_processes_train_as_one_does(ddp: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    first, second = result(ddp, name)
    (expected,) = result([alone], name)
    assert [first["is_ddp"], second["is_ddp"], expected["is_ddp"]] == [True, True, False]
    assert len(first["losses"]) == STEPS
    assert first["losses"] == pytest.approx(expected["losses"], rel=RELATIVE)
    assert len(first["norms"]) == STEPS
    assert first["norms"] == pytest.approx(expected["norms"], rel=RELATIVE)
    assert_equal(first["weights"], second["weights"])
    assert_close(first["weights"], expected["weights"])
    if name not in ("uniform", "zero"):
        moved = [w for n, w in first["weights"].items() if "composition_mixing" in n]
        assert moved
        assert all(w.abs().max() > 1e-3 for w in moved)


@pytest.mark.parametrize("name", DDP_RUNS)
def test_a_step_carries_only_gradients_of_what_trains(ddp: list[dict[str, Any]], name: str) -> None:
    """Beside them, DDP sends the base model's own buffers; BERT has two of 512 int64 each."""
    found = result(ddp, name)[0]
    traffic = found["traffic"]
    trainable = sum(weight.numel() for weight in found["weights"].values())
    buffers = sum(buffer.nbytes for buffer in worker.composition_base().buffers())
    assert buffers == 2 * 512 * 8
    bitmap = 4 * len(found["weights"]) + 1000  # once or every step: which parameters were used; how to bucket them
    gradients = STEPS * 4 * trainable
    assert gradients <= traffic["step", "allreduce_"] <= gradients + STEPS * bitmap
    assert STEPS * buffers <= traffic["step", "broadcast_"] <= STEPS * buffers + bitmap
    assert {operation for phase, operation in traffic if phase == "step"} == {"allreduce_", "broadcast_"}
    # At the start DDP sends the whole model once.
    assert traffic["start", "broadcast_"] > 4 * sum(p.numel() for p in worker.composition_base().parameters())


def test_only_the_first_process_writes(ddp: list[dict[str, Any]]) -> None:
    first, second = result(ddp, "saving")
    assert {Path(file).name for file in second["files"]} == {"rng_state_1.pth"}  # the Trainer's, one per process
    for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert {f"saved/checkpoint-3/{file}", f"saved/checkpoint-6/{file}", f"pretrained/{file}"} <= {*first["files"]}
    assert "saved/README.md" in first["files"]


def test_resumed_training_ends_where_an_uninterrupted_one_does(ddp: list[dict[str, Any]]) -> None:
    if TRANSFORMERS_RESUMES_ON_GPUS_ALONE:
        for name in ("resuming", "LoRA resuming"):  # fails again as soon as one of them works
            assert all("don't know how to restore data location" in of_rank[name]["error"] for of_rank in ddp), name
        return
    for name in ("resuming", "LoRA resuming"):
        for of_rank in result(ddp, name):
            assert_equal(of_rank["resumed"], of_rank["whole"])


# FSDP


@pytest.fixture(scope="module")
def fsdp(inputs: Path) -> list[dict[str, Any]]:
    return forked("fsdp", inputs)


@pytest.fixture(scope="module")
def plain(inputs: Path) -> Callable[..., dict[str, Any]]:
    """What one process computes, by the fields of the composition; each is computed once."""
    known: dict[str, dict[str, Any]] = {}

    def run(**fields: Any) -> dict[str, Any]:
        key = repr(sorted(fields.items()))
        if key not in known:
            known[key] = worker.plain(inputs, **fields)
        return known[key]

    return run


FSDP_RUNS = {
    **{f"fsdp2 {name}": fields for name, fields in worker.VARIANTS.items()},
    "fsdp2 checkpointing": {},
    "fsdp1 module": {},
    "fsdp1 uniform": {"mixing": "uniform"},
}


# By what the gradients are multiplied, LoRA's as well.
FSDP2_FACTOR = worker.WORLD_SIZE if GLOO_ADDS_FOR_MEANS else 1


def test_gradients_of_lora_are_multiplied_by_the_same_factor(fsdp: list[dict[str, Any]]) -> None:
    """Where PyTorch's FSDP2 sums over CPU processes, so that the tests below expect it; fails once that is mended."""
    expected = worker.gradients_of_lora(worker.lora(), range(worker.WORLD_SIZE))
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
    for of_rank in result(fsdp, "LoRA"):
        assert_same_gradients(of_rank, {name: FSDP2_FACTOR * gradient for name, gradient in expected.items()})


@pytest.mark.parametrize("name", FSDP_RUNS)
def test_sharded_training_is_that_of_one_process(
    fsdp: list[dict[str, Any]], plain: Callable[..., dict[str, Any]], name: str
) -> None:
    factor = FSDP2_FACTOR if name.startswith("fsdp2") else 1
    expected = plain(factor=factor, **FSDP_RUNS[name])
    for of_rank in result(fsdp, name):
        assert of_rank["losses"] == pytest.approx(expected["losses"], rel=RELATIVE)
        assert_same_gradients(of_rank["gradients"], expected["gradients"])
        assert_close(of_rank["weights"], expected["weights"])
        for logits in (of_rank["logits"], of_rank["again"], of_rank["reloaded"]):
            torch.testing.assert_close(logits, expected["logits"], rtol=RELATIVE, atol=ABSOLUTE)
        assert of_rank["mixing"].keys() == expected["mixing"].keys()
        for module, weights in expected["mixing"].items():
            assert of_rank["mixing"][module] == pytest.approx(weights, abs=ABSOLUTE)
        assert "cannot be merged into a sharded model" in of_rank["merge"]


@pytest.mark.parametrize("name", [name for name in FSDP_RUNS if name.startswith("fsdp2")])
def test_sharded_checkpoint_resumes(fsdp: list[dict[str, Any]], name: str) -> None:
    for of_rank in result(fsdp, name):
        assert of_rank["sharded"] == ["DTensor"]
        assert_equal(of_rank["resumed"], of_rank["weights"])
        assert "are sharded over several processes" in of_rank["export"]


@pytest.mark.parametrize("sharing", ["module", "model"])
def test_mixing_weights_stay_float32_under_mixed_precision(
    fsdp: list[dict[str, Any]], plain: Callable[..., dict[str, Any]], sharing: str
) -> None:
    for of_rank in result(fsdp, f"bf16 {sharing}"):
        assert of_rank["dtypes"] == {
            "theta": {torch.float32},
            "weights": {torch.float32},
            "factors": {torch.bfloat16},
        }
        assert of_rank["losses"] == pytest.approx(plain(weight_sharing=sharing)["losses"], rel=2**-6)


def test_weights_that_are_only_partly_here_are_refused() -> None:
    """As FSDP1 leaves those that several modules share; a process group would have to be torn down to see it."""
    mixing = Mixing(CompositionConfig(adapters=["a", "b"]), torch.float32)
    mixing.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"only 1 of 2 mixing weights: .* use FSDP2"):
        mixing()


# The Hub


CONFIG, SAFETENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture(scope="module")
def hub(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes composed that share a cache, started by accelerate: it has the one form that starts two."""
    folder = tmp_path_factory.mktemp("hub")
    lora = tiny.save_lora(folder / "lora", tiny.build("mlp"), ["lin0"], seed=3)
    dora = tiny.save_lora(folder / "dora", tiny.build("mlp"), ["lin0"], seed=3, use_dora=True)
    files = {name: (lora / name).read_bytes() for name in (CONFIG, SAFETENSORS)}
    for repo in ("me/shared", "me/alone", "me/nodes", "me/locked"):
        server.push(repo, {**files, CARD: b"# An adapter"})
    server.push("me/bare", files)
    server.push("me/dora", {name: (dora / name).read_bytes() for name in (CONFIG, SAFETENSORS)})
    server.latency = 0.05  # so that processes that do not wait would overlap
    return launched("hub", folder, **environment_of(server, folder / "home"))


def requests(server: HubServer, repo: str, rank: int) -> list[tuple[str, str]]:
    """Revision and file of what a process asked for; redirects of a weight file do not count."""
    return [
        (request.revision, request.file)
        for request in server.requests
        if request.repo == repo and request.authorized == bool(worker.TOKENS[rank]) and request.host == "hub"
    ]


def test_only_the_first_process_asks_the_hub(server: HubServer, hub: list[dict[str, Any]]) -> None:
    first, second = result(hub, "shared")
    assert first == second
    assert [commit for commit, _ in first] == [server.repositories[r].refs["main"] for r in ("me/shared", "me/bare")]
    for repo in ("me/shared", "me/bare"):
        assert {file for _, file in requests(server, repo, 0)} == {CONFIG, SAFETENSORS, CARD}
        assert requests(server, repo, 1) == []
    assert result(hub, "again") == [first, second]


@pytest.mark.parametrize(("name", "message"), [("missing", "me/missing is neither"), ("not a LoRA", "DoRA adapter")])
def test_every_process_says_what_is_wrong(hub: list[dict[str, Any]], name: str, message: str) -> None:
    first, second = result(hub, name)
    assert first.startswith("AdapterError: ")
    assert message in first
    assert second == first


def test_a_process_may_compose_alone(hub: list[dict[str, Any]]) -> None:
    first, second = result(hub, "rank 0 alone")
    assert len(first) == 1
    assert second is None


def test_one_process_of_every_node_downloads(server: HubServer, hub: list[dict[str, Any]]) -> None:
    first, second = result(hub, "two nodes")
    assert first == second
    ((commit, _),) = first
    assert {revision for revision, _ in requests(server, "me/nodes", 0)} == {"main", commit}
    assert {revision for revision, _ in requests(server, "me/nodes", 1)} == {commit}
    assert {file for _, file in requests(server, "me/nodes", 1)} == {CONFIG, SAFETENSORS, CARD}


def test_without_a_group_no_file_is_downloaded_twice(server: HubServer, hub: list[dict[str, Any]]) -> None:
    first, second = result(hub, "no group")
    assert first == second
    bodies = [request for request in server.requests if request.repo == "me/locked" and request.method == "GET"]
    files = sorted(request.file for request in bodies if request.status == 200)
    assert files == sorted([CONFIG, SAFETENSORS, CARD])
