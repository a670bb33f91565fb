"""The table of gains that evidence brings in the study, by hand; and the committed draws behind `docs/study.md`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from few_shot_transfer import evidence
from few_shot_transfer import scenario as scenarios
from few_shot_transfer.__main__ import app
from few_shot_transfer.bench import features_of
from few_shot_transfer.gains import gains, means, of_tasks
from few_shot_transfer.plots import gain_over_shots
from few_shot_transfer.records import read
from few_shot_transfer.scenario import DownstreamSpec
from few_shot_transfer.stand_in import Corners, Recipe, train
from few_shot_transfer.training import fit_features
from few_shot_transfer.views import VIEWS, half, moved, view
from peft import PeftModel
from scipy import stats
from torch import Tensor
from typer.testing import CliRunner

from peft_composition import fit_mixing_weights
from peft_composition.evidence.scores import leave_one_out_distances

from .digits import digits


DRAWS = Path(__file__).parents[2] / "docs" / "study" / "evidence"


def record(method: str, seed: int, accuracy: float, adapter: str | None = None) -> dict[str, Any]:
    facts = {"scenario": "s", "target": "t", "k": 2, "seed": seed}
    return {**facts, "method": method, "accuracy": accuracy, "adapter": adapter}


def test_gains_are_paired_by_draw() -> None:
    uniform, vote = [50.0, 60.0, 70.0], [53.0, 61.0, 75.0]
    singles = {"a": [40.0, 80.0, 71.0], "b": [60.0, 60.0, 70.0]}
    records = [record("uniform", seed, value) for seed, value in enumerate(uniform)]
    records += [record("vote", seed, value) for seed, value in enumerate(vote)]
    records += [record("single", seed, v, name) for name, values in singles.items() for seed, v in enumerate(values)]
    lines = gains(records, ("vote",)).splitlines()
    assert lines[0] == "| `s`, t | K = 2 |"
    assert "| uniform, % | 60.0 |" in lines
    gained = np.subtract(vote, uniform)
    low, high = stats.t.interval(0.95, 2, gained.mean(), gained.std(ddof=1) / np.sqrt(3))
    assert f"| vote | +3.0 [{low:+.1f}, {high:+.1f}] |" in lines
    best = np.subtract(singles["a"], uniform)  # its mean is 63.7, that of the other 63.3
    assert any(line.startswith(f"| best single (by test) | {best.mean():+.1f} [") for line in lines)


def test_means_over_tasks_and_how_many_are_clear() -> None:
    gained = {"t": [1.0, 2.0, 3.0], "u": [-1.0, -1.2, -1.1], "v": [-3.0, 1.0, 5.0]}
    records = []
    for target, values in gained.items():
        for seed, value in enumerate(values):
            records += [
                {**record("uniform", seed, 50.0), "target": target},
                {**record("vote", seed, 50 + value), "target": target},
            ]
    # t: 2 +- 4.303 / sqrt(3) = 2 +- 2.48; u: -1.1 +- .25, wholly below; v: 1 +- 9.9
    assert "| vote | +0.6 (1 below, 0 above of 3) |" in means(records, ("vote",))


def test_a_plot_has_a_panel_for_each_task_and_their_mean_with_its_interval() -> None:
    gained = {"t": [1.0, 2.0, 3.0], "u": [-1.0, -1.2, -1.1]}
    records = []
    for target, values in gained.items():
        for seed, value in enumerate(values):
            records += [
                {**record("uniform", seed, 50.0), "target": target},
                {**record("vote", seed, 50 + value), "target": target},
            ]
    panels = of_tasks(records, ["vote"])
    assert list(panels) == ["s: t", "s: u", "mean of 2 tasks"]
    errors = [np.std(values, ddof=1) / np.sqrt(3) * stats.t.ppf(0.975, 2) for values in gained.values()]
    margin = np.sqrt(errors[0] ** 2 + errors[1] ** 2) / 2  # of independent draws
    assert panels["mean of 2 tasks"]["vote"][2] == pytest.approx((0.45, 0.45 - margin, 0.45 + margin))
    assert list(of_tasks(records[:6], ["vote"])) == ["s: t"]
    figure = gain_over_shots(panels)
    drawn = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in drawn] == list(panels)
    for axes, row in zip(drawn, panels.values()):
        (line,) = (own for own in axes.lines if own.get_marker() == "P" and len(own.get_xdata()))
        assert line.get_ydata().tolist() == [row["vote"][2].mean]


def test_the_command_writes_the_table_and_the_plot(tmp_path: Path) -> None:
    records = [record(method, seed, 50.0 + seed) for method in ("uniform", "vote") for seed in range(3)]
    evidence.append(iter(records), tmp_path / "draws.jsonl")
    asked = ["gains", str(tmp_path / "draws.jsonl"), "--no-tasks", "--png", str(tmp_path / "gains.png")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "| vote | +0.0 (0 below, 0 above of 1) |" in done.output
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")


def test_the_methods_are_those_of_the_library() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    noise = torch.randn(6, 4, generator=generator)
    apart = noise + 3 * labels[:, None]
    left = [leave_one_out_distances(features, labels) for features in (apart, noise, apart / 2 + noise / 2, noise)]
    for method in evidence.METHODS:
        assert float(evidence.weights_by(method, left, seed=0)[0]) > 0.7


def test_a_head_on_features_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    features = torch.randn(40, 8, generator=generator) + 2 * labels[:, None]
    head = fit_features(features, labels, 2, DownstreamSpec(shots=(20,), batch_size=16), seed=0)
    assert float((head(features).argmax(-1) == labels).double().mean()) > 0.9
    again = fit_features(features, labels, 2, DownstreamSpec(shots=(20,), batch_size=16), seed=0)
    assert torch.equal(head.weight, again.weight)


# One example of each class


def test_halves_of_texts_by_hand() -> None:
    assert [half([101, 1, 2, 3, 4, 5, 102], number) for number in (0, 1)] == [[101, 1, 2, 3, 102], [101, 4, 5, 102]]
    assert [half([101, 7, 102], number) for number in (0, 1)] == [[101, 7, 102]] * 2
    rows = Dataset.from_dict({"input_ids": [[101, 1, 2, 3, 102], [101, 4, 5, 102]], "labels": [1, 0]})
    second = view(rows, 1)
    assert second["input_ids"][:] == [[101, 3, 102], [101, 5, 102]]
    assert second["attention_mask"][:] == [[1, 1, 1], [1, 1, 1]]
    assert second["labels"][:] == [1, 0]


def test_images_are_moved_by_a_fourteenth_of_their_side() -> None:
    image = torch.arange(28 * 28).view(1, 28, 28)
    for number, step in ((0, 2), (1, -2)):
        found = moved(image, number)
        for y in range(28):
            for x in range(28):
                assert found[0, y, x] == image[0, (y - step) % 28, (x - step) % 28]


class Views:
    """A bench of two adapters, of which the second has the views of an example side by side."""

    names = ("first", "second")

    def labels(self, draw: tuple[int, int]) -> Tensor:
        return torch.arange(5)

    def view_features(self, candidate: str, view: str, draw: tuple[int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(len(candidate) + 10 * VIEWS.index(view))
        noise = torch.randn(5, 8, generator=generator)
        return noise + 20 * torch.eye(5, 8) if candidate == "second" else noise


def test_of_two_views_the_adapter_wins_that_keeps_them_together() -> None:
    bench: Any = Views()
    weights = evidence.chosen_weights(bench, (1, 0), evidence.OF_VIEWS)
    assert float(weights[1]) > 0.8


# Stand-ins


def corners(count: int, n: int = 6, width: int = 4) -> Corners:
    generator = torch.Generator().manual_seed(count)
    parts = torch.randn(count + 2, n, width, dtype=torch.float64, generator=generator)
    return Corners(parts[:count], parts[count], parts[count + 1])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_stand_ins_are_right_where_features_were_computed(count: int) -> None:
    known = corners(count)
    for number in range(count):
        alone = torch.eye(count, dtype=torch.float64)[number]
        torch.testing.assert_close(known.mixed(alone), known.adapters[number])
    torch.testing.assert_close(known.mixed(torch.zeros(count, dtype=torch.float64)), known.base)
    if count > 1:
        even = torch.full((count,), 1 / count, dtype=torch.float64)
        torch.testing.assert_close(known.mixed(even), known.uniform)


def test_stand_ins_between_by_a_loop() -> None:
    known, weights = corners(3), [0.5, 0.1, 0.2]
    bend = (0.8**2 - (0.25 + 0.01 + 0.04)) / (1 - 1 / 3)
    for i in range(6):
        for d in range(4):
            alone = [float(known.adapters[n, i, d]) for n in range(3)]
            value = sum(w * x for w, x in zip(weights, alone)) + 0.2 * float(known.base[i, d])
            value += bend * (float(known.uniform[i, d]) - sum(alone) / 3)
            assert float(known.mixed(torch.tensor(weights).double())[i, d]) == pytest.approx(value, rel=1e-6)


def separable(labels: Tensor) -> Corners:
    """Of two adapters the second one tells classes apart."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, len(labels), 8, generator=generator)
    first, second = noise[0], 0.1 * noise[1] + labels[:, None]
    return Corners(torch.stack([first, second]), (first + second) / 2, noise[3])


def test_training_finds_the_adapter_and_keeps_still_without_a_gain_or_within_the_warm_up() -> None:
    labels = torch.arange(20) % 2
    even = torch.tensor([0.5, 0.5], dtype=torch.float64)
    head, weights = train(separable(labels), labels, even, 2, Recipe(), batch_size=8, seed=0)
    assert float(weights[1]) > 0.8
    assert float((head(separable(labels).mixed(weights)).argmax(-1) == labels).double().mean()) > 0.9
    still = train(separable(labels), labels, even, 2, Recipe(gain=1e-12), batch_size=8, seed=0)[1]
    warm = train(separable(labels), labels, even, 2, Recipe(steps=30, warmup=30), batch_size=8, seed=0)[1]
    assert still.tolist() == warm.tolist() == pytest.approx([0.5, 0.5])
    part = train(separable(labels), labels, even / 2, 2, Recipe(gain=1e-12), batch_size=8, seed=0)[1]
    assert part.tolist() == pytest.approx([0.25, 0.25])


def test_the_base_models_share_trains_where_it_may_and_free_weights_need_no_sum_and_decay_pulls_back() -> None:
    labels = torch.arange(20) % 2
    known, quarter = separable(labels), torch.tensor([0.25, 0.25], dtype=torch.float64)
    turned = Corners(torch.stack([known.adapters[0], known.base]), known.uniform, known.adapters[1])  # the base knows
    share = {
        base: 1 - float(train(turned, labels, quarter, 2, Recipe(gain=10.0, base=base), 8, seed=0)[1].sum())
        for base in (False, True)
    }
    assert share[True] > share[False] > 0.5  # N logits that fall reach it, too, but not as far
    free, held = (
        train(known, labels, quarter, 2, Recipe(gain=2.0, free=True, decay=decay), 8, seed=0)[1]
        for decay in (0.0, 90.0)
    )
    assert float(free[1]) > 0.5
    assert float((held - quarter).abs().max()) < float((free - quarter).abs().max()) / 2


# A real task, small


TINY = (
    digits()
    + """upstream: {max_steps: 4, batch_size: 8, learning_rate: 0.05}
downstream: {shots: [3], seeds: 2, warmup_epochs: 2, epochs: 2, batch_size: 4, validation_size: 9, test_size: 21}
"""
)


def test_a_task_is_measured_once_and_its_features_are_those_of_the_adapters(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text(TINY, encoding="utf-8")
    spec = scenarios.load(str(tmp_path / "digits.yaml"))
    (bench,) = evidence.open_benches(spec, tmp_path, None, progress=False)
    draws, path = [(k, seed) for k in (1, 3) for seed in (0, 1)], tmp_path / "records.jsonl"
    trained = list(evidence.TRAINED)
    evidence.append(evidence.compare(bench, draws, ["likelihood-vote"], trained, progress=False), path)
    records = read(path, key="method")
    assert len(records) == 4 * (2 + 3) + 2 + 4 * (1 + len(trained))
    assert list(evidence.compare(bench, draws, ["likelihood-vote"], trained, records, progress=False)) == []
    more = list(evidence.compare(bench, [*draws, (3, 2)], ["vote"], [], records, progress=False))
    assert {(own["k"], own["seed"], own["method"]) for own in more if own["method"] == "vote"} == {
        (3, 0, "vote"),
        (3, 1, "vote"),
        (3, 2, "vote"),
    }

    (views,) = evidence.compare(bench, [(1, 0), (3, 0)], [evidence.OF_VIEWS], [], records, progress=False)
    assert (views["k"], views["method"]) == (1, evidence.OF_VIEWS)
    first, second = (bench.view_features("middle", name, (1, 0)) for name in VIEWS)
    assert not torch.allclose(first, second, rtol=1e-3)

    for draw in ((1, 0), (3, 0)):  # as the library weighs the same examples
        (heads,) = evidence.compare(bench, [draw], [evidence.WITH_HEADS], [], records, progress=False)
        encoded = bench.model.encode(bench.task.train.select(bench.support(draw)))
        batch = bench.model.collate([encoded[number] for number in range(len(encoded))])
        report = fit_mixing_weights(bench.composition.model, [batch])
        assert report.method == ("own-heads" if draw[0] == 1 else "heads-and-vote")
        assert heads["weights"] == pytest.approx(report.weights, abs=2e-3)

    base = bench.model.build(2, seed=0)
    alone = PeftModel.from_pretrained(base, str(bench.adapters[1].folder), adapter_name="x").eval()
    with torch.no_grad():
        expected = features_of(alone, bench.model, bench.judged["test"])
    torch.testing.assert_close(bench.features("middle", "test"), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bench.mixed([0.0, 1.0], "test"), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        bench.mixed([0.5, 0.5], (3, 1)), bench.features("uniform", (3, 1)), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(bench.features("base", "test"), expected, rtol=1e-3)
    (again,) = evidence.open_benches(spec, tmp_path, "new", progress=False)  # from the disk
    assert torch.equal(again.features("uniform", (3, 1)), bench.features("uniform", (3, 1)))


@pytest.mark.parametrize("path", sorted(DRAWS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_committed_draws_are_whole(path: Path) -> None:
    records = read(path, key="method")
    for target in {own["target"] for own in records}:
        for k in (2, 5, 20):
            seeds = sorted(
                own["seed"] for own in records if (own["target"], own["k"], own["method"]) == (target, k, "uniform")
            )
            assert seeds == list(range(20))


@pytest.mark.parametrize("path", sorted((DRAWS.parent / "recipes").glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_committed_recipe_has_its_uniform_mix_once(path: Path) -> None:
    records = read(path, key="method")
    draws = [(own["target"], own["k"], own["seed"]) for own in records if own["method"] == "uniform"]
    assert len(set(draws)) == len(draws) >= 10
    assert {(own["target"], own["k"], own["seed"]) for own in records} == set(draws)


@pytest.mark.parametrize("path", sorted((DRAWS.parent / "views").glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_committed_draws_of_two_views_are_paired_with_the_uniform_mix(path: Path) -> None:
    records = read(path, key="method")
    for target in {own["target"] for own in records}:
        of_task = [own for own in records if own["target"] == target]
        assert {own["k"] for own in of_task} == {1}
        for method in {own["method"] for own in of_task} - {"single"}:
            assert sorted(own["seed"] for own in of_task if own["method"] == method) == list(range(20))
        assert "two-views, stand-in" in {own["method"] for own in of_task}


@pytest.mark.parametrize(
    "path", sorted((DRAWS.parent / "two-shots" / "results").glob("*.jsonl")), ids=lambda path: path.stem
)
def test_the_committed_runs_at_two_shots_are_paired_by_seed(path: Path) -> None:
    final = [own for own in read(path) if own["phase"] == "final"]
    assert {own["k"] for own in final} == {2}
    for target in {own["target"] for own in final}:
        runs = sorted((own["method"], own["seed"]) for own in final if own["target"] == target)
        assert runs == [(method, seed) for method in ("learned", "uniform") for seed in range(3)]


@pytest.mark.parametrize(
    "path",
    sorted(own for name in ("draws", "heads") for own in (DRAWS.parent / name).glob("*.jsonl")),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_every_committed_draw_has_its_uniform_mix_and_weights_of_at_most_one(path: Path) -> None:
    records = read(path, key="method")
    draws = {(own["target"], own["k"], own["seed"]) for own in records if own["method"] == "uniform"}
    for own in records:
        assert (own["target"], own["k"], own["seed"]) in draws
        if own["method"] == "likelihood-vote":
            assert own["k"] > 1, "none of one example can be left out"
        if own["method"] in ("likelihood-vote", "heads-and-vote"):
            assert sum(own["weights"].values()) <= 1.001
    assert len({(own["target"], own["k"], own["seed"], own["method"], own["adapter"]) for own in records}) == len(
        records
    )


def test_a_torn_last_line_is_cut_off_before_the_next_is_written(tmp_path: Path) -> None:
    path = tmp_path / "draws.jsonl"
    evidence.append(iter([record("uniform", 0, 50.0)]), path)
    with path.open("a") as file:
        file.write('{"method": "uni')
    assert read(path, key="method") == [record("uniform", 0, 50.0)]
    evidence.append(iter([record("uniform", 1, 60.0)]), path)
    assert read(path, key="method") == [record("uniform", 0, 50.0), record("uniform", 1, 60.0)]
