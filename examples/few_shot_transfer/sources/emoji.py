"""Emoji as four sets of artists drew them, out of npm packages of Iconify: one drawing style is one data set.

Only emoji that all styles have, so that the styles differ in nothing but the drawing. Classes are Unicode's groups.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from packages import NpmArchive, fetch
from PIL import Image

from . import Splits
from .mnist import image_dataset


STYLES = {
    # Google, Apache-2.0
    "noto": NpmArchive(
        "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"
    ),
    # Twitter and its successors, CC BY 4.0
    "twemoji": NpmArchive(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    # HfG Schwäbisch Gmünd, CC BY-SA 4.0
    "openmoji": NpmArchive(
        "@iconify-json/openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"
    ),
    # Microsoft, MIT
    "fluent": NpmArchive(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
}
# Unicode's groups under short names. "Activities" (85 emoji) and "Flags" (5) are left out: too few for a test set.
GROUPS = {
    "Smileys & Emotion": "smiley",
    "People & Body": "person",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "place",
    "Objects": "object",
    "Symbols": "symbol",
}
GROUPED_BY = "noto"  # whose categories are Unicode's groups, letter by letter
VARIATION_SELECTOR = "fe0f"  # asks for the coloured form of a character; it makes no other emoji
TEST, VALIDATION = 0.3, 0.12  # shares of all emoji


class Drawings(NamedTuple):
    """What a package holds of emoji of one code point.

    Attributes:
        svg: the drawings, by code point in hexadecimal digits.
        category: the package's own, by code point.
    """

    svg: dict[str, str]
    category: dict[str, str]


def load(style: str, side: int = 32, views: int = 1) -> Splits:
    """Renders one style on white.

    Emoji of several code points are left out: they are variants of others in skin, hair or gender, keycaps and flags.
    An emoji is in the same split in every style, so no test example of one style was seen in another.

    Args:
        style: one of `STYLES`.
        side: of the images, in pixels.
        views: of each training emoji; those after the first are mirrored, scaled and moved at random. For pretraining:
            in a pool that support sets are drawn from each emoji should be there once.

    Raises:
        ValueError: for an unknown style.
        RuntimeError: if a package is not in the cache and cannot be fetched; all styles are needed to know which emoji
            they share.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: choose one of {', '.join(STYLES)}")
    svg, labels = _drawings(STYLES[style]).svg, _labels()
    splits = {}
    for split in ("train", "validation", "test"):
        chosen = [emoji for emoji in labels if split_of(emoji) == split]
        first = [render(svg[emoji], side) for emoji in chosen]
        further = range(1, views if split == "train" else 1)
        images = first + [moved(image, f"{emoji} {view}") for view in further for emoji, image in zip(chosen, first)]
        numbers = np.array([labels[emoji] for emoji in chosen] * (1 + len(further)))
        splits[split] = image_dataset(np.stack(images), numbers, list(GROUPS.values()))
    return splits


def split_of(emoji: str) -> str:
    """The split of an emoji, which depends on its code point alone.

    Args:
        emoji: its code point, in hexadecimal digits.
    """
    place = int.from_bytes(hashlib.sha256(emoji.encode("ascii")).digest()[:4], "big") / 2**32
    if place < TEST:
        return "test"
    return "validation" if place < TEST + VALIDATION else "train"


def render(svg: str, side: int) -> np.ndarray:
    """A drawing of its own size as an image on white, (side, side, 3), uint8."""
    import resvg_py

    # Without the system's fonts an image is the same everywhere.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, background="#ffffff", skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def moved(image: np.ndarray, seed: str) -> np.ndarray:
    """The image mirrored or not, up to a quarter smaller or larger, up to an eighth of its side off its place."""
    generator, side = random.Random(seed), len(image)
    mirror, scale = generator.choice((-1, 1)), generator.uniform(0.75, 1.25)
    across, down = (side * (0.5 + generator.uniform(-0.125, 0.125)) for _ in range(2))
    # Where a pixel of the new image is found in the old one.
    affine = (mirror * scale, 0, across - mirror * scale * side / 2, 0, scale, down - scale * side / 2)
    old = Image.fromarray(image)
    new = old.transform(old.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
    return np.asarray(new)


def _labels() -> dict[str, int]:
    """The emoji that all styles have, in order, and their classes."""
    shared = set.intersection(*(set(_drawings(archive).svg) for archive in STYLES.values()))
    category = _drawings(STYLES[GROUPED_BY]).category
    places = {group: label for label, group in enumerate(GROUPS)}
    return {emoji: places[category[emoji]] for emoji in sorted(shared) if category.get(emoji) in places}


@cache
def _drawings(archive: NpmArchive) -> Drawings:
    with tarfile.open(fetch(archive)) as package:
        icons = _member(package, archive, "icons.json")
        names = _member(package, archive, "chars.json")
        categories = _member(package, archive, "metadata.json")["categories"]
    category_of = {name: category for category, members in categories.items() for name in members}
    svg, category = {}, {}
    for code_points, name in names.items():
        own = [code_point for code_point in code_points.split("-") if code_point != VARIATION_SELECTOR]
        if len(own) == 1 and name in icons["icons"]:
            svg[own[0]] = _svg(icons, name)
            category[own[0]] = category_of.get(name, "")
    return Drawings(svg, category)


def _svg(icons: dict[str, Any], name: str) -> str:
    icon = {"left": 0, "top": 0, "width": icons["width"], "height": icons["height"], **icons["icons"][name]}
    box = " ".join(str(icon[key]) for key in ("left", "top", "width", "height"))
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    # Shown in a square whatever the drawing's shape: it is centred, not stretched.
    return f'<svg {spaces} width="64" height="64" viewBox="{box}">{icon["body"]}</svg>'


def _member(package: tarfile.TarFile, archive: NpmArchive, name: str) -> Any:
    # Read by its exact name and in memory: nothing is ever written to a path that an archive names.
    file = package.extractfile(f"package/{name}")
    if file is None:
        raise RuntimeError(f"package/{name} is not a file in {archive.filename}")
    return json.load(file)
