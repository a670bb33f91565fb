"""Where the study's data come from: npm packages through the real client, and the emoji that are drawn out of them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from few_shot_transfer import sources
from few_shot_transfer.sources import emoji
from packages import NpmArchive, fetch


SPLITS = ("train", "validation", "test")
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


# Packages


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, NpmArchive]]:
    """An npm registry on loopback with one package; its address, and what to fetch from it."""
    name, version, root = "@drawings/ink", "1.2.3", tmp_path / "registry"
    tarball = root / "ink.tgz"
    root.mkdir()
    content = _packed(tarball, {"package.json": {"name": name, "version": version}, "icons.json": {"icons": {}}})

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Keeps the test's output clean."""

        def translate_path(self, path: str) -> str:
            # npm asks for @drawings%2fink.
            return str(tarball if path.endswith(".tgz") else root / "about.json")

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    address = f"http://127.0.0.1:{server.server_port}"
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode("ascii")
    release = {"name": name, "version": version, "dist": {"tarball": f"{address}/ink.tgz", "integrity": integrity}}
    about = {"name": name, "dist-tags": {"latest": version}, "versions": {version: release}}
    (root / "about.json").write_text(json.dumps(about), encoding="utf-8")
    _configure_npm(monkeypatch, address, tmp_path)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield address, NpmArchive(name, version, hashlib.sha256(content).hexdigest())
    server.shutdown()
    thread.join()
    server.server_close()


def _configure_npm(monkeypatch: pytest.MonkeyPatch, address: str, folder: Path) -> None:
    for key, value in {"registry": address, "cache": str(folder / "npm-cache"), "fetch_retries": "0"}.items():
        monkeypatch.setenv(f"npm_config_{key}", value)


@needs_npm
def test_an_npm_package_is_fetched_once(registry: tuple[str, NpmArchive], tmp_path: Path) -> None:
    _, archive = registry
    kept = fetch(archive, tmp_path / "cache")
    assert kept == tmp_path / "cache" / "drawings-ink-1.2.3.tgz"
    assert kept.read_bytes() == (tmp_path / "registry" / "ink.tgz").read_bytes()
    (tmp_path / "registry" / "ink.tgz").unlink()
    assert fetch(archive, tmp_path / "cache") == kept
    assert list((tmp_path / "cache").iterdir()) == [kept]


@needs_npm
def test_an_npm_package_that_is_not_the_pinned_one_is_refused(
    registry: tuple[str, NpmArchive], tmp_path: Path
) -> None:
    _, archive = registry
    with pytest.raises(RuntimeError) as raised:
        fetch(archive._replace(sha256="0" * 64), tmp_path / "cache")
    assert f"its sha256 is {archive.sha256}, not {'0' * 64}" in str(raised.value)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("has_npm", [True, False], ids=["unreachable", "no-npm"])
def test_without_a_registry_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_npm: bool
) -> None:
    _configure_npm(monkeypatch, "http://127.0.0.1:9", tmp_path)  # where nobody listens
    if not has_npm:
        monkeypatch.setenv("PATH", str(tmp_path))
    elif shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    archive = NpmArchive("@drawings/ink", "1.2.3", "0" * 64)
    with pytest.raises(RuntimeError) as raised:
        fetch(archive, tmp_path / "cache")
    words = str(raised.value)
    assert words.startswith("cannot fetch drawings-ink-1.2.3.tgz: ")
    assert ("npm pack @drawings/ink@1.2.3 failed" if has_npm else "npm is not installed") in words
    assert f"into {tmp_path / 'cache'} as drawings-ink-1.2.3.tgz" in words


# Emoji


SHAPES = {
    "round": '<circle cx="18" cy="18" r="9" fill="{}"/>',
    "square": '<path d="M8 8h20v20H8z" fill="{}"/>',
    "wide": '<path d="M0 0h36v18H0z" fill="{}"/>',
}
CATEGORIES = ("Smileys & Emotion", "Objects", "Activities")  # of which the last is left out
FIRST, COUNT = 0x1F600, 60
LACKING = FIRST + 6  # one style has no such drawing


def _color(code_point: int) -> tuple[int, int, int]:
    place = code_point - FIRST
    return 4 * place, 255 - 4 * place, 128


def _packed(path: Path, members: dict[str, Any]) -> bytes:
    """Writes a tarball as npm packs it; returns its bytes."""
    with tarfile.open(path, "w:gz") as package:
        for name, content in members.items():
            data = json.dumps(content).encode("utf-8")
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            package.addfile(entry, io.BytesIO(data))
    return path.read_bytes()


def _members(style: str) -> dict[str, Any]:
    """A package of Iconify: every emoji a shape of the style in a colour of its own, and what must be left out."""
    icons, chars = {}, {}
    categories: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for code_point in range(FIRST, FIRST + COUNT):
        if style == "wide" and code_point == LACKING:
            continue
        name = f"{style}-{code_point:x}"  # the packages' names differ here and there
        icons[name] = {"body": SHAPES[style].format("#{:02x}{:02x}{:02x}".format(*_color(code_point)))}
        if style == "wide":
            icons[name]["height"] = 18
        chars[f"{code_point:x}-fe0f" if code_point % 5 == 0 else f"{code_point:x}"] = name
        categories[CATEGORIES[code_point % 3]].append(name)
    # A skin tone, a sequence, and a character whose drawing is not there.
    black = {"body": SHAPES[style].format("#000000")}
    icons |= {"toned": black, "joined": black}
    chars |= {"1f600-1f3fb": "toned", "1f600-200d-2642": "joined", "1f9ff": "gone"}
    categories[CATEGORIES[0]] += ["toned", "joined", "gone"]
    return {
        "icons.json": {"icons": icons, "width": 36, "height": 36},
        "chars.json": chars,
        "metadata.json": {"categories": categories},
    }


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three small packages, in the user's cache, take the place of the real ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "peft-composition"
    cache.mkdir()
    styles = {}
    for style in SHAPES:
        content = _packed(cache / f"drawings-{style}-1.0.0.tgz", _members(style))
        styles[style] = NpmArchive(f"@drawings/{style}", "1.0.0", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(emoji, "STYLES", styles)
    monkeypatch.setattr(emoji, "GROUPED_BY", "round")


def _pixels(data: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in data["input"][:]])


@pytest.mark.usefixtures("drawn")
def test_an_emoji_is_in_the_same_split_in_every_style_and_in_no_other() -> None:
    expected = {_color(c) for c in range(FIRST, FIRST + COUNT) if c % 3 != 2 and c != LACKING}
    labels = {_color(c): ("smiley", "object")[c % 3] for c in range(FIRST, FIRST + COUNT) if c % 3 != 2}
    found: dict[str, list[list[tuple[int, ...]]]] = {}
    for style in SHAPES:
        splits = sources.load("emoji", {"style": style, "side": 24})
        assert tuple(splits) == SPLITS
        found[style] = []
        for split in splits.values():
            pixels = _pixels(split)
            assert pixels.shape[1:] == (24, 24, 3)
            colors = [tuple(int(value) for value in image[12, 12]) for image in pixels]
            names = split.features["label"].names
            assert [names[label] for label in split["label"][:]] == [labels[color] for color in colors]
            found[style].append(colors)
    assert found["round"] == found["square"] == found["wide"]
    everything = [color for split in found["round"] for color in split]
    assert len(everything) == len(set(everything))
    assert set(everything) == expected
    assert all(found["round"]), "a split is empty"


@pytest.mark.usefixtures("drawn")
def test_drawings_are_centred_on_white_and_not_stretched() -> None:
    inked = {}
    for style in SHAPES:
        pixels = _pixels(sources.load("emoji", {"style": style, "side": 36})["train"])
        assert (pixels[:, 0, 0] == 255).all()
        inked[style] = (pixels < 255).any(axis=3)[0]
    assert [inked["wide"].any(axis=axis).sum() for axis in (0, 1)] == [36, 18]
    assert [np.flatnonzero(inked["square"].any(axis=axis)).tolist() for axis in (0, 1)] == [list(range(8, 28))] * 2
    assert inked["round"].sum() == pytest.approx(np.pi * 9**2, rel=0.15)


@pytest.mark.usefixtures("drawn")
def test_further_views_are_of_training_emoji_alone() -> None:
    plain, viewed = (sources.load("emoji", {"style": "square", "side": 36, "views": views}) for views in (1, 4))
    for split in ("validation", "test"):
        assert (_pixels(viewed[split]) == _pixels(plain[split])).all()
    count = len(plain["train"])
    assert viewed["train"]["label"][:] == plain["train"]["label"][:] * 4
    pixels = _pixels(viewed["train"])
    assert (pixels[:count] == _pixels(plain["train"])).all()
    again = _pixels(sources.load("emoji", {"style": "square", "side": 36, "views": 4})["train"])
    assert (pixels == again).all()
    inked = (pixels < 255).any(axis=3)
    # Were places and sizes drawn once for all emoji, or once for all views, there would be 3 or `count` of them.
    assert len({image.tobytes() for image in inked[count:]}) > 2 * count
    sides = np.sqrt(inked[count:].sum(axis=(1, 2)))
    assert sides.min() >= 20 / 1.25 - 1
    assert sides.max() <= 20 / 0.75 + 2
    assert (pixels[np.arange(4 * count), 18, 18] == np.tile(pixels[:count, 18, 18], (4, 1))).all()


def test_some_views_are_mirrored() -> None:
    image = np.full((20, 20, 3), 255, np.uint8)
    image[:, :10] = 0
    left = [
        emoji.moved(image, str(seed))[10, 3].mean() < emoji.moved(image, str(seed))[10, 16].mean()
        for seed in range(20)
    ]
    assert 0 < sum(left) < 20


@pytest.mark.parametrize(
    ("code_point", "split"),
    [
        ("1f600", "test"),  # sha256sum begins with 308e7b21, 0.19 of the range
        ("1f40d", "validation"),  # 6a5ea361, 0.416
        ("1f697", "train"),  # aea6dba4, 0.68
        ("1f30b", "train"),  # 97e46409, 0.59
    ],
)
def test_an_emoji_keeps_its_split(code_point: str, split: str) -> None:
    assert emoji.split_of(code_point) == split


@pytest.mark.usefixtures("drawn")
def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown style 'oil': choose one of round, square, wide"):
        sources.load("emoji", {"style": "oil"})


def test_the_real_packages_share_their_emoji_and_differ_in_style() -> None:
    try:
        styles = {style: sources.load("emoji", {"style": style, "side": 16}) for style in emoji.STYLES}
    except RuntimeError as error:
        pytest.skip(str(error))
    for split in SPLITS:
        assert len({tuple(own[split]["label"][:]) for own in styles.values()}) == 1
        first, *others = [_pixels(own[split]).astype(float) for own in styles.values()]
        assert all(np.abs(first - other).mean() > 10 for other in others)
    counts = {split: Counter(styles["noto"][split]["label"][:]) for split in SPLITS}
    assert sum(sum(count.values()) for count in counts.values()) == 1280
    assert all(len(count) == 7 for count in counts.values())
    assert min(counts["test"].values()) >= 35
    assert min(counts["train"].values()) >= 60
