"""The benchmark programs: facts that hold whatever the clock says, through the command line and in their parts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command_line
from benchmarks import arithmetic, measure, report, run, train
from benchmarks.cells import require_same
from benchmarks.memory import SavedBytes, expected_growth, peak_during
from benchmarks.models import ARCHITECTURES, Workbench
from benchmarks.peers import FROZEN, PlainLoop, target_names
from benchmarks.results import Cell, Measurement, Results, Summary, UsageError
from benchmarks.text import seconds, size

from .. import warm


ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PAGE = b"# A project\r\n\r\n<!-- benchmarks:begin -->\nold figures\n<!-- benchmarks:end -->\r\n\r\n## Cite\n"


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of all tables for the tiny models, and a page that the same command rewrote."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "page.md").write_bytes(PAGE)
    words = ["all", "--models", "tiny-vit", "tiny-llama", "--adapters", "1", "5", "--repeats", "2"]
    paths = ["--out", str(folder / "results"), "--page", str(folder / "page.md")]
    done = warm.run("-m", "benchmarks", *words, *paths, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _results(folder: Path, table: str) -> Results:
    return Results.read(folder / "results" / f"{table}-cpu.json")


def _cell(results: Results, model: str, adapters: int) -> Cell:
    return next(cell for cell in results.cells if (cell.model, cell.adapters) == (model, adapters))


# Through the command line


def test_every_cell_is_measured_or_says_why_not(everything: Path) -> None:
    expected = {
        "train": {("tiny-vit", ""), ("tiny-llama", "")},
        "forward": {("tiny-vit", ""), ("tiny-llama", "")},
        "generate": {("tiny-llama", "")},
        "linear": {
            ("tiny-vit", f"32 to 32, {tokens}") for tokens in ("1 token", "8 tokens", "64 tokens", "512 tokens")
        },
        "load": {(model, case) for model in ("tiny-vit", "tiny-llama") for case in ("load", "save", "reload")},
        "export": {("tiny-vit", ""), ("tiny-llama", "")},
    }
    for table, keys in expected.items():
        results = _results(everything, table)
        assert {(cell.model, cell.case, cell.adapters) for cell in results.cells} == {
            (*key, count) for key in keys for count in (1, 5)
        }
        for cell in results.cells:
            for title, entry in cell.peers.items():
                if entry.skipped is not None:
                    assert (title, cell.model) in {("X-LoRA", "tiny-vit"), ("uniform composition", "tiny-llama")}
                    continue
                assert entry.seconds is not None
                assert entry.seconds.median > 0
                assert entry.ratio is not None
                assert entry.ratio.low <= entry.ratio.median <= entry.ratio.high
                assert entry.computed == (title == "arithmetic limit")
            reference = cell.peers[cell.reference].ratio
            assert reference is not None
            assert (reference.low, reference.median, reference.high) == (1, 1, 1)


def test_all_peers_take_part(everything: Path) -> None:
    train = {"LoRA", "composition", "uniform composition", "PEFT, N active", "PEFT, N trained", "plain loop", "X-LoRA"}
    assert set(_results(everything, "train").cells[0].peers) == train | {"frozen base", "arithmetic limit"}
    forward = {"base model", "composition", "merged composition", "LoRA", "PEFT, N active", "plain loop", "X-LoRA"}
    assert set(_results(everything, "forward").cells[0].peers) == forward | {"arithmetic limit"}
    for cell in _results(everything, "train").cells:
        if cell.model == "tiny-llama":
            assert cell.peers["X-LoRA"].seconds is not None


def test_a_loop_saves_the_output_of_every_adapter_and_the_composition_does_not(everything: Path) -> None:
    results = _results(everything, "train")

    def saved(title: str, adapters: int) -> int:
        found = _cell(results, "tiny-vit", adapters).peers[title].saved_bytes
        assert found is not None
        return found

    modules, tokens, features = 2 * 3, 4 * (1 + (32 // 8) ** 2), 32
    per_adapter = modules * (4 * tokens * features + 4)  # the output that its weight multiplies, and one softmax entry
    for title in ("plain loop", "PEFT, N active"):
        grown = saved(title, 5) - saved(title, 1)
        assert abs(grown - 4 * per_adapter) <= 4 * modules * 4
    assert saved("composition", 5) < saved("plain loop", 5)
    assert saved("frozen base", 5) < saved("LoRA", 5)
    assert saved("LoRA", 5) == saved("LoRA", 1)


def test_the_peak_holds_parameters_and_what_is_saved(everything: Path) -> None:
    parameters = 4 * sum(parameter.numel() for parameter in ARCHITECTURES["tiny-vit"].build().parameters())
    for count in (1, 5):
        for title, entry in _cell(_results(everything, "train"), "tiny-vit", count).peers.items():
            if entry.peak_bytes is not None:
                assert entry.saved_bytes is not None
                assert parameters + entry.saved_bytes < entry.peak_bytes < 20 * parameters, title


def test_the_limit_is_the_floor_made_longer(everything: Path) -> None:
    for table, floor in (("train", "frozen base"), ("forward", "base model"), ("linear", "base model")):
        for cell in _results(everything, table).cells:
            own, limit = cell.peers[floor].seconds, cell.peers["arithmetic limit"].seconds
            assert own is not None
            assert limit is not None
            assert own.median < limit.median
    # 512 tokens, 32 inputs and outputs, rank 16: merging adds 16 * 32 * 32 to 512 * 32 * 32 multiplications.
    cell = next(
        c for c in _results(everything, "linear").cells if c.case == "32 to 32, 512 tokens" and c.adapters == 1
    )
    ratio = cell.peers["arithmetic limit"].ratio
    assert ratio is not None
    assert ratio.median == pytest.approx(1 + 16 / 512)


def test_results_describe_the_machine_and_name_no_host_or_folder(everything: Path) -> None:
    for path in (everything / "results").glob("*.json"):
        content = path.read_text()
        assert str(everything) not in content
        assert os.uname().nodename not in json.loads(content)["machine"].values()
        assert str(ROOT) not in content
        results = json.loads(content)
        assert {"cpu", "cores", "threads", "ram_gib", "torch", "peft", "transformers", "commit", "date"} <= set(
            results["machine"]
        )
        table = path.name.removesuffix("-cpu.json")
        assert results["command"] == (
            f"python -m benchmarks {table} --models tiny-vit tiny-llama --adapters 1 5 --repeats 2"
        )


def test_the_page_holds_every_measurement_and_every_reason(everything: Path) -> None:
    page = (everything / "results" / "results.md").read_text()
    for table in run.TABLES:
        for cell in _results(everything, table).cells:
            for title, entry in cell.peers.items():
                if entry.skipped is not None:
                    assert f"- {title} at N = 1, 5: {entry.skipped}" in page
                    continue
                assert entry.seconds is not None
                first = f"| {cell.case} " if cell.case else f"| {title} "
                row = next(
                    line
                    for line in page.splitlines()
                    if line.startswith(first) and f" {title} " in line and seconds(entry.seconds.median) in line
                )
                assert row.count("|") == (5 if cell.case else 4)
                if entry.saved_bytes is not None:
                    assert size(entry.saved_bytes) in page


def test_only_the_block_of_the_page_changes(everything: Path) -> None:
    before, _, rest = PAGE.partition(b"<!-- benchmarks:begin -->")
    after = rest.partition(b"<!-- benchmarks:end -->")[2]
    content = (everything / "page.md").read_bytes()
    assert content.startswith(before + b"<!-- benchmarks:begin -->\n")
    assert content.endswith(b"\n<!-- benchmarks:end -->" + after)
    block = content[len(before) : -len(after)].decode()
    assert "old figures" not in block
    ratio = _cell(_results(everything, "train"), "tiny-vit", 5).peers["composition"].ratio
    assert ratio is not None
    row = next(line for line in block.splitlines() if "| training step / LoRA " in line and "| composition " in line)
    assert row.split("|")[-2].strip() == f"{ratio.median:.2f}"
    for link in ("results/results.md", "results/train-cpu-tiny-vit.png"):
        assert f"]({link})" in block
        assert (everything / link).is_file()
    assert (everything / "results" / "train-cpu-tiny-vit.png").stat().st_size < 150_000


def test_a_report_of_the_same_results_changes_nothing(everything: Path) -> None:
    files = [everything / "page.md", everything / "results" / "results.md"]
    contents = [path.read_bytes() for path in files]
    report.write_report(everything / "results", everything / "page.md")
    assert [path.read_bytes() for path in files] == contents


def test_a_peer_that_would_fill_the_memory_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "expected_growth", lambda *arguments: 24_400_000_000)
    words = "train --models tiny-vit --adapters 2 --peers loop --repeats 1 --memory-limit 24"
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words.split(), "--out", str(tmp_path)])
    assert command_line.main() == 0
    (path,) = tmp_path.glob("train-*.json")
    peers = Results.read(path).cells[0].peers
    assert set(peers) == {"LoRA", "plain loop"}
    assert peers["LoRA"].seconds is not None
    assert peers["plain loop"].seconds is None
    assert peers["plain loop"].skipped == "needs about 24 GB for a step"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --peers nobody", "there are no peers nobody here; there are lora, composition"),
        ("generate --models vit", "generate cannot be measured on vit"),
        ("report", "run a table first"),
        ("train --adapters 0", "must be at least 1"),
    ],
)
def test_wrong_options_are_refused(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words.split(), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_line_knows_all_tables_and_models() -> None:
    assert command_line.TABLES == tuple(run.TABLES) == tuple(report.TITLES)
    assert tuple(ARCHITECTURES) == command_line.MODELS


def test_the_documentation_has_the_block() -> None:
    report.around_block(command_line.PAGE)


@pytest.mark.parametrize("content", ["no block", "<!-- benchmarks:end --> <!-- benchmarks:begin -->"])
def test_a_page_without_the_block_is_refused_and_left_as_it_was(content: str, tmp_path: Path) -> None:
    summary = Summary.of([1.0])
    cell = Cell("m", 1, "LoRA", {"LoRA": Measurement(summary, summary)})
    Results("train", "cpu", "float32", "", {}, {"m": "model"}, {}, [cell]).write(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(content)
    with pytest.raises(UsageError, match="benchmarks:begin"):
        report.write_report(tmp_path, page)
    assert page.read_text() == content
    assert not list(tmp_path.glob("*.md.*"))
    assert not (tmp_path / "results.md").exists()


# The parts


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    entry = Measurement(Summary(1.0, 0.5, 2.0, 3), Summary.of([1.0, 3.0]), saved_bytes=7, peak_bytes=None)
    cell = Cell("vit", 5, "LoRA", {"LoRA": entry, "X-LoRA": Measurement(skipped="why")}, "a case")
    written = Results("train", "cpu", "float32", "command", {"cpu": "x"}, {"vit": "ViT"}, {"LoRA": "note"}, [cell])
    assert Results.read(written.write(tmp_path)) == written


def test_summary_is_the_median_and_the_quartiles() -> None:
    assert Summary.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Summary(3.0, 2.0, 4.0, 5)


def _calls(costs: dict[str, float], log: list[str]) -> dict[str, Callable[[], float]]:
    """Calls that write themselves down and return what the clock is to show."""

    def call(name: str) -> float:
        log.append(name)
        return costs[name]

    return {name: partial(call, name) for name in costs}


def test_race_compares_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    calls = _calls({"a": 1.0, "b": 3.0}, log)
    # The clock of a machine that gets slower from round to round.
    monkeypatch.setattr(measure, "elapsed", lambda call, device: call() * (1 + (len(log) - 1) // 2))

    found = measure.race(calls, "a", 7, CPU, "test", units=2)

    rounds = [log[start : start + 2] for start in range(0, 16, 2)]
    assert len(log) == 16
    assert all(sorted(names) == ["a", "b"] for names in rounds)
    assert ["b", "a"] in rounds
    assert found["a"].seconds == Summary.of([n / 2 for n in (2, 3, 4, 5, 6, 7, 8)])
    assert found["b"].ratio == Summary(3.0, 3.0, 3.0, 7)


def test_race_runs_rare_peers_in_every_third_round_where_they_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    calls = _calls({"a": 1.0, "long": measure.SHORT_SECONDS, "short": measure.SHORT_SECONDS / 2}, log)
    monkeypatch.setattr(measure, "elapsed", lambda call, device: call())

    found = measure.race(calls, "a", 7, CPU, "test", rare={"long", "short"})

    assert [log.count(name) for name in calls] == [1 + 7, 1 + 3, 1 + 7]
    assert found["long"].ratio == Summary.of([measure.SHORT_SECONDS] * 3)


def test_saved_bytes_count_each_tensor_once_and_no_parameter() -> None:
    model = nn.Linear(10, 6)
    x = torch.randn(5, 10, requires_grad=True)
    saved = SavedBytes(model)
    with saved.counting():
        y = model(x).exp()  # keeps x (for the weight), and its own output
        (y * y.view(5, 6)).sum()  # keeps y again
    assert saved.total == 4 * (5 * 10 + 5 * 6)


def test_peak_is_the_most_that_was_held_at_one_time() -> None:
    def call() -> None:
        first = torch.ones(1_000_000)
        del first
        second = torch.ones(300_000)
        third = torch.ones(400_000)
        del second, third

    assert 4_000_000 <= peak_during(call, CPU) < 4_000_000 + 10_000


def test_memory_is_foreseen_from_a_few_samples() -> None:
    expected = expected_growth(lambda size: torch.ones(size, 5_000_000), 32, CPU)
    assert expected == pytest.approx(32 * 4 * 5_000_000, rel=0.2)


def _multiplications(*products: tuple[torch.Tensor, torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        for left, right in products:
            left @ right
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("tokens", [1, 7, 40, 1000])
@pytest.mark.parametrize("rank", [1, 16, 300])
def test_the_limit_counts_the_products_of_the_best_way(tokens: int, rank: int) -> None:
    inputs, outputs = 12, 20
    x, g = torch.zeros(tokens, inputs, device="meta"), torch.zeros(tokens, outputs, device="meta")
    A, B = torch.zeros(rank, inputs, device="meta"), torch.zeros(outputs, rank, device="meta")
    hidden, G = torch.zeros(tokens, rank, device="meta"), torch.zeros(outputs, inputs, device="meta")
    stacked = _multiplications((x, A.T), (hidden, B.T), (g, B), (hidden, A))
    token_path = _multiplications((B, A), (x, A.T), (g, B))
    weight_path = _multiplications((B, A), (g.T, x), (B.T, G))
    layer = arithmetic.LinearCall(inputs, outputs, tokens)

    assert arithmetic.least_extra_training(layer, rank) == min(stacked, token_path, weight_path)
    assert arithmetic.least_extra_forward(layer, rank) == min(
        _multiplications((x, A.T), (hidden, B.T)), _multiplications((B, A))
    )
    assert layer.forward == _multiplications((x, G.T))
    assert arithmetic.factor([layer, layer], rank, lambda *_: 5, 100) == 1.1


def test_the_floor_asks_for_the_gradient_of_every_target_and_no_further(tmp_path: Path) -> None:
    bench = Workbench(ARCHITECTURES["tiny-vit"], tmp_path / "adapters", CPU, torch.float32)
    model = FROZEN.build(bench, 1)  # type: ignore[misc]
    inputs: dict[str, bool] = {}
    outputs: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs[name], outputs[name] = arguments[0].requires_grad, output
            output.retain_grad()

        return hook

    for name in target_names(bench):
        model.get_submodule(name).register_forward_hook(note(name))
    model(**bench.batch(labels=True)).loss.backward()

    assert len(outputs) == 6
    assert all(output.grad is not None for output in outputs.values())
    assert {name for name, has_gradient in inputs.items() if not has_gradient} == {
        name for name in outputs if ".layers.0." in name
    }
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "classifier.weight",
        "classifier.bias",
    ]


def test_the_plain_loop_computes_the_formula() -> None:
    base = nn.Linear(6, 4)
    factors = [(torch.randn(2, 6), torch.randn(4, 2)), (torch.randn(3, 6), torch.randn(4, 3))]
    loop = PlainLoop(base, factors)
    with torch.no_grad():
        loop.logits.copy_(torch.tensor([0.3, -0.5]))
    x = torch.randn(5, 6)

    odds = torch.tensor([0.3, -0.5], dtype=torch.float64).exp()
    W = base.weight.double() + sum(w * B.double() @ A.double() for w, (A, B) in zip(odds / odds.sum(), factors))
    expected = x.double() @ W.T + base.bias.double()
    torch.testing.assert_close(loop(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_peers_that_do_not_agree_are_not_compared() -> None:
    one = torch.ones(3)
    require_same({"composition": one, "plain loop": one + 1e-6})
    with pytest.raises(RuntimeError, match="composition and plain loop do not compute the same"):
        require_same({"composition": one, "merged": one, "plain loop": 1.1 * one})


def test_a_table_can_be_measured_in_parts(everything: Path, tmp_path: Path) -> None:
    before = _results(everything, "train")
    before.write(tmp_path)
    again = Results.read(before.path_in(tmp_path))
    again.command, again.cells = "another", []
    again.machine = {**again.machine, "load_before": 99.0}

    together = before.continued_by(again)
    cell = replace(before.cells[0], peers={})
    together.put(cell)
    together.put(replace(cell, adapters=7))

    assert together.command == f"{before.command}; another"
    assert together.cells == [cell, *before.cells[1:], replace(cell, adapters=7)]
    again.machine["cpu"] = "another"
    with pytest.raises(UsageError, match="cpu"):
        before.continued_by(again)
