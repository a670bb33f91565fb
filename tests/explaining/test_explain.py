"""`explain`: its numbers by independent computations, its files, and the page in a browser."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_composition import explain, mixing_weights, score_adapters
from peft_composition.explaining import Explanation, prune_adapters
from peft_composition.explaining.page import spans

from .. import tiny
from ..browser import browsing, chromium
from ..evidence.test_fit import points, questions
from ..reference import read_lora
from . import planted


HOSTILE = (
    '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{7*7}}<!-- peft-composition:end -->\u202eevil\x1b[2J'
)


def of_planted(folder: Path, **options: Any) -> Explanation:
    folders = planted.adapters(folder)
    model = tiny.compose("mlp", folders, mixing="fixed", weights=[0.5, 0.1, 0.2])
    return explain(model, planted.batches(folders), **options)


# Numbers


def test_scores_and_costs_are_those_of_the_other_functions(tmp_path: Path) -> None:
    folders = planted.adapters(tmp_path)
    data = planted.batches(folders)
    model = tiny.compose("mlp", folders, mixing="fixed", weights=[0.5, 0.1, 0.2])
    found = explain(model, data)
    assert found.weights == mixing_weights(model)
    by_name = {row.name: row for row in score_adapters(model, data)}
    for row in found.scores:
        if row.name != "mix":
            assert (row.score, row.low, row.high) == pytest.approx(
                (by_name[row.name].score, by_name[row.name].low, by_name[row.name].high)
            )
    pruned = prune_adapters(model, data, tolerance=0.0)
    assert [row.change for row in found.left_out] == [row.change for row in pruned.rows]


@pytest.mark.parametrize("options", [{"mixing": "uniform"}, {}, {"mixing": "fixed", "weights": [1 / 3] * 3}])
def test_a_mix_that_is_uniform_is_listed_once(options: Any, tmp_path: Path) -> None:
    """Also where adapters have the names of the other rows."""
    folders = planted.adapters(tmp_path)
    named = [{"path": path, "name": name} for path, name in zip(folders, ("uniform", "base", "mix"))]
    found = explain(tiny.compose("mlp", named, **options), planted.batches(folders))
    assert [(row.name, row.kind) for row in found.scores][3:] == [("base", "base"), ("mix", "mix")]
    uneven = explain(tiny.compose("mlp", named, mixing="fixed", weights=[0.2] * 3), planted.batches(folders))
    assert [row.kind for row in uneven.scores][3:] == ["uniform", "base", "mix"]
    both = {row.kind: row for row in uneven.scores}
    assert found.scores[-1].score == pytest.approx(both["uniform"].score)
    said = (
        f"The mix of 3 adapters, which is uniform, gets {100 * both['uniform'].accuracy:.1f} % of 24 examples right "
    )
    assert found.summary[0] == f"{said}and the base model alone {100 * both['base'].accuracy:.1f} %."
    assert [*found.classes.right] == ["mix", "base"]  # type: ignore[union-attr]
    page = found.to_html()
    assert "uniform mix" not in page
    assert "Gain: of the mix over the base model." in page


def test_updates_are_those_of_the_products(tmp_path: Path) -> None:
    folders = planted.adapters(tmp_path)
    found = of_planted(tmp_path).updates
    whole = [read_lora(folder) for folder in folders]
    flat = [
        torch.cat([own[name].delta().flatten() if name in own else torch.zeros(size) for name, size in SIZES.items()])
        for own in whole
    ]
    for number, delta in enumerate(flat):
        assert found.norms[number] == pytest.approx(float(delta.norm()), rel=1e-5)
        for other, delta_of_other in enumerate(flat):
            cosine = float(delta @ delta_of_other / (delta.norm() * delta_of_other.norm()))
            assert found.cosines[number][other] == pytest.approx(cosine, abs=1e-5)
    mix = sum(weight * delta for weight, delta in zip([0.5, 0.1, 0.2], flat))
    shares = [float(weight * delta @ mix / (mix @ mix)) for weight, delta in zip([0.5, 0.1, 0.2], flat)]
    assert list(found.shares) == pytest.approx(shares, abs=1e-5)


SIZES = {"lin0": 10 * 20, "lin1": 20 * 16}


@pytest.mark.parametrize("name", ["conv", "embedding", "mixtral", "gpt_oss", "attention"])
def test_updates_of_every_kind_of_layer(name: str, pair) -> None:
    from peft_composition.evidence.passes import composition_in
    from peft_composition.explaining.updates import updates_in

    found = updates_in(composition_in(tiny.compose(name, pair(name)), None))
    for number, folder in enumerate(pair(name)):
        squared = sum(float(lora.delta().square().sum()) for lora in read_lora(folder).values())
        assert found.norms[number] == pytest.approx(squared**0.5, rel=1e-4)
    assert sum(found.shares) == pytest.approx(1)


def test_classes_by_loops(tmp_path: Path) -> None:
    folders = planted.adapters(tmp_path)
    found = of_planted(tmp_path, labels=["low", "high"])
    classes = planted.labels(folders)
    table = found.classes
    assert table is not None
    assert (table.names, table.examples) == (("low", "high"), (12, 12))
    for mix, weights in (("mix", [0.5, 0.1, 0.2]), ("uniform", [1 / 3] * 3), ("base", [0.0] * 3)):
        model = tiny.composed_by_hand(tiny.build("mlp"), folders, weights)
        features = planted.features_of(model)
        counts = [[0, 0], [0, 0]]
        for i in range(24):
            others = torch.arange(24) != i
            to_mean = [float((features[i] - features[others & (classes == c)].mean(0)).square().sum()) for c in (0, 1)]
            counts[int(classes[i])][int(to_mean[1] < to_mean[0])] += 1
        assert table.right[mix] == (counts[0][0], counts[1][1])
        assert found.scores[mix].accuracy == pytest.approx(table.accuracy(mix))
        if mix == "mix":
            assert table.confusion == tuple(map(tuple, counts))


def test_test_data_are_predicted_by_the_models_own_head(tmp_path: Path) -> None:
    folders = planted.adapters(tmp_path)
    data = planted.batches(folders)
    model = tiny.compose("mlp", folders)
    found = explain(model, data, test=data, labels={0: "low", 1: "high"})
    by_hand = tiny.composed_by_hand(tiny.build("mlp"), folders, [1 / 3] * 3)
    with torch.no_grad():
        taken = by_hand(x=planted.POINTS).argmax(1)
    tested = found.tested
    assert tested is not None
    assert tested.classes is not None
    assert tested.accuracy == pytest.approx(float((taken == planted.labels(folders)).double().mean()))
    assert tested.classes.names[:2] == ("low", "high")  # and what else the head names
    assert sum(map(sum, tested.classes.confusion)) == 24


def test_language_models_have_no_classes(pair) -> None:
    found = explain(tiny.compose("llama", pair("llama")), questions("llama"), test=questions("llama"))
    assert found.classes is None
    assert found.tested is not None
    assert found.tested.log_likelihood == pytest.approx(found.scores["mix"].score)
    page = found.to_html()
    assert "Gains and mistakes" not in page
    assert "log-likelihood of an answer token" in page.lower()


def test_what_is_refused(pair, tmp_path: Path) -> None:
    model = tiny.compose("mlp", pair("mlp"))
    with pytest.raises(ValueError, match=r"no name for class 1 among the 1 that are given"):
        explain(model, points(), labels=["low"])
    with pytest.raises(ValueError, match=r"there they are classes, here answers in tokens"):
        explain(model, points(), test=[{"x": points()[0]["x"], "labels": torch.zeros(8, 3, dtype=torch.long)}])
    with pytest.raises(ValueError, match=r"must be one of \.html, \.md, \.png, \.json"):
        explain(model, points()).save(tmp_path / "report.pdf")


# Files


def test_the_files(tmp_path: Path) -> None:
    found = of_planted(tmp_path, command="peft-composition explain composed", data_name="points.csv")
    for suffix in (".html", ".md", ".png", ".json"):
        assert found.save(tmp_path / "out" / f"report{suffix}").stat().st_size > 500
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        f"report.{suffix}" for suffix in ("html", "json", "md", "png")
    ]
    fields = json.loads((tmp_path / "out" / "report.json").read_text())
    assert fields["format"] == 1
    assert fields["command"] == "peft-composition explain composed"
    assert fields["data"] == "points.csv: 24 examples of 2 classes, 12 of each"
    assert [row["name"] for row in fields["scores"]["rows"]] == [*planted.NAMES, "uniform", "base", "mix"]
    assert fields["summary"] == found.summary
    assert str(tmp_path) not in found.to_html() + found.to_markdown() + json.dumps(fields)  # of your machine


class _Parsed(HTMLParser):
    """Tags, and attributes that could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loading: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loading += [
            (name, value)
            for name, value in attrs
            if name in ("src", "href", "srcset", "data") or name.startswith("on")
        ]


def hostile(folder: Path) -> Explanation:
    first, *_ = planted.adapters(folder)
    entries: list[Any] = [{"path": first, "name": f"{number}{HOSTILE}"} for number in range(2)]
    model = tiny.compose("mlp", entries)
    named = {"title": HOSTILE, "data_name": HOSTILE, "command": HOSTILE, "labels": [HOSTILE, "</style>" + HOSTILE]}
    data = planted.batches([first])
    return explain(model, data, test=data, similarities={"lin0": {f"0{HOSTILE}": 0.5, f"1{HOSTILE}": 0.25}}, **named)


def test_foreign_text_is_text(tmp_path: Path) -> None:
    found = hostile(tmp_path)
    page = found.to_html()
    parsed = _Parsed()
    parsed.feed(page)
    assert parsed.tags.isdisjoint({"script", "img", "iframe", "object", "embed", "base", "form"})
    assert all(value is not None and value.startswith(("#", "data:,")) for _, value in parsed.loading)
    assert "49" not in page.replace("7*7", "")[: page.find("In short")].split("<title>")[1].split("</title>")[0]
    assert "\x1b" not in page
    assert "\u202e" not in page
    text = found.to_markdown()
    assert "<script" not in text
    assert "<!--" not in text
    assert "\x1b" not in text


# The folder of a saved composition, and its card


def test_beside_a_checkpoint_until_the_weights_are_others(tmp_path: Path) -> None:
    folders = planted.adapters(tmp_path)
    model = tiny.compose("mlp", folders)
    saved = tmp_path / "saved"
    model.save_pretrained(str(saved))
    found = explain(model, planted.batches(folders))
    found.save_beside(saved)
    names = {"composition-report.html", "composition-report.png", "composition-report.json"}
    assert names <= {path.name for path in saved.iterdir()}
    card = (saved / "README.md").read_text()
    assert card.count("## Why these weights") == 1
    assert "| `needed` | 0.333 |" in card
    assert "](<composition-report.png>)" in card
    model.save_pretrained(str(saved))  # the same weights again
    assert "## Why these weights" in (saved / "README.md").read_text()

    prune_adapters(model, planted.batches(folders), tolerance=0.02)
    with pytest.raises(ValueError, match=r"not about the composition in .*adapter 'needed' has weight"):
        explain(
            tiny.compose("mlp", folders, mixing="fixed", weights=[0.8, 0.1, 0.1]), planted.batches(folders)
        ).save_beside(saved)
    with pytest.warns(UserWarning, match=r"composition-report\.html was about earlier weights and was removed"):
        model.save_pretrained(str(saved))
    assert names.isdisjoint({path.name for path in saved.iterdir()})
    assert "## Why these weights" not in (saved / "README.md").read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.pop("left_out"),
        lambda fields: fields.update(scores=3),
        lambda fields: fields["adapters"][0].update(mean="<b>"),
        lambda fields: fields.update(format=2),
        lambda fields: fields.update(summary=None),
    ],
)
def test_a_record_of_others_does_not_reach_the_card(change: Any, tmp_path: Path) -> None:
    folders = planted.adapters(tmp_path)
    model = tiny.compose("mlp", folders)
    saved = tmp_path / "saved"
    model.save_pretrained(str(saved))
    explain(model, planted.batches(folders)).save_beside(saved)
    record = saved / "composition-report.json"
    fields = json.loads(record.read_text())
    change(fields)
    record.write_text(json.dumps(fields))
    model.save_pretrained(str(saved))
    assert "## Why these weights" not in (saved / "README.md").read_text()


def test_hostile_names_stay_inside_the_card(tmp_path: Path) -> None:
    first, *_ = planted.adapters(tmp_path)
    model = tiny.compose("mlp", [{"path": first, "name": HOSTILE}])
    model.save_pretrained(str(tmp_path / "saved"))
    explain(model, planted.batches([first]), data_name=HOSTILE).save_beside(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "## Why these weights" in card
    assert card.count("<!-- peft-composition:end -->") == 1
    assert "<script" not in card


# What is drawn


def test_spans_keep_their_order_and_lie_inside() -> None:
    for intervals in (
        [(-0.2, -0.1, 0.3), (0.1, 0.2, 0.25)],
        [(5.0, 5.1, 5.2)],
        [(0.0, 0.0, 0.0)],
        [(-3.0, -2.9, -2.0)],
    ):
        for span in spans(intervals):
            assert 0 <= span.low <= span.mean <= span.high <= 100
            assert span.zero is None or 0 <= span.zero <= 100
    assert spans([(5.0, 5.1, 5.2)])[0].zero is None
    assert spans([(0.1, 0.4, 0.5)])[0].zero is not None


@pytest.mark.skipif(chromium() is None, reason="this machine has no Chromium")
def test_in_a_browser(tmp_path: Path) -> None:
    """Desktop and narrow, light and dark: nothing is asked for, nothing complains, nothing is wider than a window."""
    plain = of_planted(tmp_path / "plain", labels=["low", "high"]).save(tmp_path / "plain.html")
    bad = hostile(tmp_path / "bad").save(tmp_path / "bad.html")
    with browsing() as page:
        for path in (plain, bad):
            for width, dark in ((1280, False), (390, False), (320, True)):
                page.requests.clear()
                page.open(path, width, dark=dark)
                assert page.value("document.querySelectorAll('section').length") == 7
                assert page.requests == [path.resolve().as_uri()]
                assert page.complaints == []
                assert page.value("document.documentElement.scrollWidth") <= width
                # every region that is wider than the window can be scrolled, also with the keyboard
                regions = page.value(
                    "[...document.querySelectorAll('.scroll')].map(r => [r.tabIndex, r.getAttribute('aria-label')])"
                )
                assert all(index == 0 and label for index, label in regions)
                if path == plain and width == 390:  # what leaving one out costs is seen whole on a phone
                    sizes = page.value(
                        "(r => [r.scrollWidth, r.clientWidth])(document.querySelector('#without .scroll'))"
                    )
                    assert sizes[0] <= sizes[1]
                colors = page.value("[getComputedStyle(document.body).backgroundColor]")
                assert colors == (["rgb(20, 23, 29)"] if dark else ["rgb(251, 250, 247)"])
        page.open(plain, 1280)
        assert page.value("[...document.querySelectorAll('h1')].map(h => h.innerText)") == [
            "A composition of 3 LoRA adapters"
        ]
        assert page.value(CONTRAST) >= 4.5
        page.open(plain, 1280, dark=True)
        assert page.value(CONTRAST) >= 4.5


# The least contrast of text in cells with their colours, by the formula of WCAG; color-mix is drawn to be read.
CONTRAST = """(() => {
  const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d');
  const rgb = (...colors) => { context.clearRect(0, 0, 1, 1);
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    return context.getImageData(0, 0, 1, 1).data; };
  const light = color => { const [r, g, b] = [...color].slice(0, 3).map(v => v / 255).map(
    v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const least = [...document.querySelectorAll('td, th, p, a, dt, summary')].map(cell => {
    const style = getComputedStyle(cell);
    const card = getComputedStyle(cell.closest('section') || document.body).backgroundColor;
    const a = light(rgb(card, style.backgroundColor, style.color)), b = light(rgb(card, style.backgroundColor));
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); });
  return Math.min(...least); })()"""
