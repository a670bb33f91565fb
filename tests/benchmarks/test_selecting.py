"""The benchmark of selecting, on a tiny network: its pool, its selectors, its tables."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.selecting import __main__ as command_line
from benchmarks.selecting import backward, planted, pool, report, selectors
from benchmarks.selecting.cost import measure, so_many
from benchmarks.selecting.features import BASE, added, features
from benchmarks.selecting.judged import judge, table
from peft_composition.choosing import select_adapters
from peft_composition.evidence.own_heads import own_head
from peft_composition.evidence.scores import leave_one_out_distances, margins
from peft_composition.evidence.streamed import read_in_turn
from peft_composition.references import AdapterReference


SIZE, SUPPORT = 48, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pool")
    planted.make_pool(made, SIZE, steps=(150, 60), seeds=2)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Tensor]:
    x = torch.cat([planted.points(SUPPORT, 1)[0], planted.points(500, 2)[0]])
    read = planted.reading(x)(range(len(x)))
    computed = features(planted.network(), pool.candidates_in(folder), read, folder / "features")
    again = features(planted.network(), pool.candidates_in(folder), lambda _: 1 / 0, folder / "features")
    assert all(torch.equal(computed[name], again[name]) for name in computed)  # from the disk
    return computed


def products(folder: Path) -> dict[str, np.ndarray]:
    """s B A by module, in float64."""
    tensors = {name: own.double().numpy() for name, own in load_file(folder / pool.WEIGHTS).items()}
    config = json.loads((folder / pool.CONFIG).read_text())
    return {
        name: config["lora_alpha"] / config["r"] * tensors[name.replace("_A.", "_B.")] @ tensors[name]
        for name in tensors
        if ".lora_A." in name
    }


# The pool


def test_the_pool_has_all_kinds_and_only_the_broken_ones_cannot_be_read(
    folder: Path, found: dict[str, Tensor]
) -> None:
    names = [own.name for own in pool.candidates_in(folder)]
    kinds = Counter(name.partition("-")[0] for name in names)
    assert kinds == {"related": 4, "broken": 12, "unrelated": SIZE // 3, "random": SIZE - 16 - SIZE // 3}
    assert {name for name in names if name not in found} == {name for name in names if name.startswith("broken")}
    assert BASE in found


def test_features_are_those_of_the_library_which_refuses_the_broken_ones(
    folder: Path, found: dict[str, Tensor]
) -> None:
    x = torch.cat([planted.points(SUPPORT, 1)[0], planted.points(500, 2)[0]])
    base = planted.network()
    before = {name: own.clone() for name, own in base.state_dict().items()}
    for own in pool.candidates_in(folder):
        alone = read_in_turn(base, [str(own)])[0]
        if not own.name.startswith(pool.BROKEN):
            with alone.switch(), torch.no_grad():
                torch.testing.assert_close(base.features(x), found[own.name], rtol=1e-4, atol=1e-4)
        elif "not-finite" not in own.name:  # which shows in what it puts out
            with pytest.raises(ValueError, match=own.name), alone.switch():
                pass
    with added(base, folder / "related-150-0"):
        assert not torch.equal(base.lin0.weight, before["lin0.weight"])
    assert all(torch.equal(base.state_dict()[name], own) for name, own in before.items())


def test_what_is_made_of_other_adapters_has_the_right_products(folder: Path) -> None:
    sources = [products(own) for own in sorted((folder / "others").iterdir())]
    made = [products(folder / f"unrelated-{number:03}") for number in range(SIZE // 3)]
    assert len(sources) == 4
    for module in sources[0]:
        for number, source in enumerate(sources):
            np.testing.assert_array_equal(made[number][module], source[module])
            np.testing.assert_allclose(made[4 + number][module], source[module] / 2)
        np.testing.assert_allclose(made[8][module], (sources[0][module] + sources[1][module]) / 2, atol=1e-6)
        np.testing.assert_allclose(made[13][module], (sources[2][module] + sources[3][module]) / 2, atol=1e-6)
        noise = made[14][module] - sources[0][module]
        norms = [np.linalg.norm(own) for own in (noise, sources[0][module])]
        np.testing.assert_allclose(norms[0], norms[1] / 2, rtol=1e-5)
        random = products(folder / "random-000")[module]
        trained = products(folder / "related-150-0")[module]
        np.testing.assert_allclose(np.linalg.norm(random), np.linalg.norm(trained), rtol=1e-5)
        cosine = (random * trained).sum() / np.linalg.norm(trained) ** 2
        assert abs(cosine) < 0.3


# The selectors


def test_slopes_are_those_of_finite_differences(folder: Path) -> None:
    """A thousandth of an adapter in one block moves the library's own mean margin by so much."""
    x, labels = planted.points(12, 1)
    base = planted.network()
    names = ["related-150-0", "unrelated-008", "random-003"]
    modules = backward.modules_of(folder / names[0])
    assert modules == ["lin0", "lin1"]
    slopes, norms = backward.derivatives(
        [folder / name for name in names],
        [backward.gradients(base, planted.reading(x)(range(12)), labels, modules)],
    )
    assert slopes.shape == (1, 3, 2)
    assert norms.shape == (3, 2)
    wide = copy.deepcopy(base).double()

    def mean_margin() -> float:
        with torch.no_grad():
            return float(margins(leave_one_out_distances(wide.features(x.double()), labels)).mean())

    for number, name in enumerate(names):
        own = products(folder / name)
        for block, module in enumerate(modules):
            weight = wide.get_submodule(module).weight
            delta = 1e-5 * torch.from_numpy(own[f"base_model.model.{module}.lora_A.weight"])
            with torch.no_grad():
                weight += delta
                above = mean_margin()
                weight -= 2 * delta
                below = mean_margin()
                weight += delta
            delta_norm = float(torch.linalg.matrix_norm(delta)) / 1e-5
            assert float(norms[number, block]) == pytest.approx(delta_norm, rel=1e-5)
            assert float(slopes[0, number, block]) == pytest.approx((above - below) / 2e-5, rel=1e-3, abs=1e-6)
    assert all(own.requires_grad for own in base.parameters())


def draw_of(folder: Path, found: dict[str, Tensor], x: Tensor, labels: Tensor) -> tuple[list[str], selectors.Draw]:
    names = sorted(name for name in found if name != BASE)
    own = torch.stack([found[name][: len(labels)] for name in names])
    along = backward.gradients(planted.network(), planted.reading(x)(range(len(x))), labels, ["lin0", "lin1"])
    slopes, norms = backward.derivatives([folder / name for name in names], [along])
    heads = [own_head("head", AdapterReference(name=name, path=str(folder / name))) for name in names]
    scales = backward.scales_of(along)
    return names, selectors.Draw(own, found[BASE][: len(labels)], labels, slopes[0], norms, scales, 0, heads)


def rows_of(x: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    return [{"x": own, "labels": int(label)} for own, label in zip(x, labels)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {"x": torch.stack([row["x"] for row in rows]), "labels": torch.tensor([row["labels"] for row in rows])}


def test_halving_on_features_is_what_the_library_does(folder: Path, found: dict[str, Tensor]) -> None:
    x, labels = planted.points(SUPPORT, 1)
    candidates = pool.candidates_in(folder)
    selection = select_adapters(
        planted.network(), candidates, rows_of(x, labels), head="head", collate=collate, most=1, progress=False
    )
    names, draw = draw_of(folder, found, x, labels)
    ordered = selectors.orders(draw)
    order = ordered[selectors.HALVING]
    assert order.order.tolist() != ordered[selectors.WITHOUT_HEADS].order.tolist()
    assert ordered[selectors.WITHOUT_HEADS].order.tolist() != ordered[selectors.PLAIN].order.tolist()
    whole = [own.name for own in selection.ranking if own.is_dropped or own.score is not None]
    assert [names[place] for place in order.order] == whole
    assert order.risk == pytest.approx(selection.risk_worse_than_base, abs=1e-6)
    assert selection.passed == order.passed + SUPPORT  # of the base; broken ones are refused before their pass
    assert 0 < order.passed < len(names) * SUPPORT


def test_every_selector_orders_all_candidates_and_pays_for_what_it_sees(
    folder: Path, found: dict[str, Tensor]
) -> None:
    names, draw = draw_of(folder, found, *planted.points(SUPPORT, 1))
    ordered = selectors.orders(draw)
    assert tuple(ordered) == selectors.SELECTORS
    for own in ordered.values():
        assert sorted(own.order.tolist()) == list(range(len(names)))
    whole = len(names) * SUPPORT
    assert ordered[selectors.FULL].passed == ordered[selectors.ACCURACY].passed == whole
    assert ordered[selectors.RANDOM].passed == 0
    backward_pass = 4 * SUPPORT
    assert ordered[selectors.BLOCKS].passed == ordered[selectors.WHOLE].passed == backward_pass
    kept = 8  # at least
    assert ordered[selectors.APART].passed == len(names) * 2 + kept * (SUPPORT - 2)
    assert backward_pass < ordered[selectors.SCREEN].passed < ordered[selectors.HALVING].passed < whole
    assert len(names) == 36
    assert ordered[selectors.PLAIN].passed == 36 * 6 + 9 * (18 - 6) + kept * (SUPPORT - 18)
    looked, second = 26, 11 + 1  # 70%; 30% and one of 50
    before_the_last = backward_pass + looked * 2 + second * (18 - 2)
    assert kept <= (ordered[selectors.HALVING].passed - before_the_last) / (SUPPORT - 18) <= kept + 2


# The tables


def test_lines_and_table(folder: Path, found: dict[str, Tensor]) -> None:
    (x, labels), (_, tests) = planted.points(SUPPORT, 1), planted.points(500, 2)
    supports = [[*range(start, start + 20)] for start in (0, 20)]
    lines = judge(found, labels, tests, supports, folder, planted.network(), planted.reading(x))
    assert len(lines) == 2 * len(selectors.SELECTORS)
    by_name = {line["selector"]: line for line in lines if line["seed"] == 0}
    full = by_name[selectors.FULL]
    # The pick's accuracy, by hand.
    rows = supports[0]
    scores = {
        name: float(margins(leave_one_out_distances(own[rows], labels[rows])).mean()) for name, own in found.items()
    }
    pick = max((name for name in scores if name != BASE), key=scores.__getitem__)
    own = found[pick].double().numpy()
    means = [own[[row for row in rows if labels[row] == label]].mean(0) for label in (0, 1)]
    nearest = np.stack([((own[SUPPORT:] - mean) ** 2).sum(1) for mean in means]).argmin(0)
    assert full["pick"] == pytest.approx(float((nearest == tests.numpy()).mean()))
    assert full["first"] == float(pick.startswith("related"))
    assert full["cost"] == 1
    assert all(line["pick"] <= line["best"] for line in lines)
    assert by_name[selectors.RANDOM]["risk"] is None
    assert 0 <= by_name[selectors.HALVING]["risk"] <= 1


def line(seed: int, selector: str, pick: float) -> dict[str, Any]:
    return {
        "k": 5,
        "seed": seed,
        "selector": selector,
        "pick": pick,
        "best": 0.9,
        "base": 0.6,
        "first": 1.0,
        "among first": 0.4,
        "among as many": 0.25,
        "cost": 0.5,
        "risk": None,
    }


def test_the_table_pairs_draws() -> None:
    lines = [line(seed, name, 0.8) for seed in (0, 1) for name in selectors.SELECTORS]
    lines += [line(seed, name, 0.5) for seed in (2, 3) for name in selectors.SELECTORS]
    for own in lines:
        if own["selector"] == selectors.HALVING and own["seed"] == 0:
            own["pick"] = 0.7
    rows = table(lines, 12).splitlines()[2:]
    half = 1.96 * np.std([10, 10, 40, 40], ddof=1) / 2
    assert rows[0] == f"| 5 | {selectors.FULL} | 25.0 ± {half:.1f} |  | 100% | 40% | 25% | 50% | 50% |"
    assert rows[1].split(" | ")[3] == "+0.0 ± 0.0"
    assert rows[2].split(" | ")[3] == f"+2.5 ± {1.96 * np.std([10, 0, 0, 0], ddof=1) / 2:.1f}"


def test_the_block_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no block\n")
    with pytest.raises(ValueError, match=r"page\.md needs the lines"):
        report.write_block(tmp_path, page)
    lines = [line(seed, name, 0.8) for seed in (0, 1) for name in selectors.SELECTORS]
    facts = {"candidates": 48, "related": 4, "unrelated": 16, "random": 16, "broken": 12, "lines": lines}
    (tmp_path / "selecting-small.json").write_text(json.dumps(facts))
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    command_line.main(["report", "--out", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "48 candidates, 4 of the task" in text
    assert table(lines, 4) in text


def test_the_cost_of_a_selection(folder: Path, tmp_path: Path) -> None:
    candidates = pool.candidates_in(folder)
    assert len(so_many(candidates, 12, tmp_path)) == len(set(so_many(candidates, 12, tmp_path))) == 12
    more = so_many(candidates, SIZE + 10, tmp_path)
    assert len(set(more)) == SIZE + 10
    x, labels = planted.points(SUPPORT, 1)
    rows = rows_of(x, labels)
    whole, halved = (
        measure(planted.network(), more, rows, halving, head="head", collate=collate) for halving in (False, True)
    )
    good = [own for own in more if not own.resolve().name.startswith(pool.BROKEN)]
    assert whole["passed"] >= (len(good) + 1) * SUPPORT > halved["passed"] > 0
    assert halved["candidates"] == SIZE + 10
    assert 0 < halved["before MB"] <= halved["peak MB"]
