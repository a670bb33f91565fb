"""The house: no circle, arrows between rooms point down, no room is too large, and tests lie as rooms do."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import peft_composition


PACKAGE = Path(peft_composition.__file__).parent
TESTS = Path(__file__).parent
MOST_LINES = 400

# What stands on what. A wing may import those below it and its own rooms; those on one floor do not import each other.
FLOORS = [
    {"__init__", "__main__", "plugin", "cli", "terminal", "inspection"},
    {"explaining", "comparing"},
    {"choosing"},
    {"training", "sharding", "checkpoint", "analysis", "evidence"},
    {"tuner"},
    {"upstream"},
    {"config", "as_built", "given_weights", "record", "selection", "references", "drafts", "public"},
    {"names", "text", "progress", "scalars", "compat", "version", "versions", "registration"},
]
# Rooms of one floor that stand on each other, in order.
ON_THE_SAME_FLOOR = [FLOORS[0], FLOORS[-2], FLOORS[-1]]


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str, source: str, known: set[str]) -> Iterator[str]:
    """The modules of the package that a module imports, also within functions and for types alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE.name:
                    yield alias.name.partition(".")[2] or "__init__"
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            parts = module.split(".")[: -node.level]
        elif node.module and node.module.split(".")[0] == PACKAGE.name:
            parts = []
        else:
            continue
        named = (node.module or "").split(".") if node.level else (node.module or "").split(".")[1:]
        base = [*parts, *filter(None, named)]
        for alias in node.names:
            for candidate in (".".join([*base, alias.name]), ".".join(base), ".".join([*base, "__init__"])):
                if candidate in known:
                    yield candidate
                    break


def graph() -> dict[str, set[str]]:
    found = modules()
    return {name: set(imports(name, path.read_text(encoding="utf-8"), set(found))) for name, path in found.items()}


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def wing_of(module: str) -> str:
    return module.split(".")[0]


def floor_of(module: str) -> int:
    return next(number for number, wings in enumerate(FLOORS) if wing_of(module) in wings)


def upward(edges: dict[str, set[str]]) -> list[str]:
    """The imports that point up, or aside."""
    return [
        f"{module} -> {other}"
        for module, others in edges.items()
        for other in sorted(others)
        if wing_of(module) != wing_of(other)
        and (
            floor_of(other) < floor_of(module)
            or (floor_of(other) == floor_of(module) and FLOORS[floor_of(module)] not in ON_THE_SAME_FLOOR)
        )
    ]


def test_no_circle() -> None:
    edges = graph()
    assert len(edges) > 50
    assert edges["tuner.layer"] >= {"tuner.functional", "tuner.holder"}
    assert circle_in(edges) == []


def test_a_circle_would_be_found() -> None:
    known = {"a", "wing.b", "wing.c"}
    sources = {
        "a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .wing.b import x",
        "wing.b": "def f():\n    from . import c",
        "wing.c": "import peft_composition.a",
    }
    edges = {name: set(imports(name, source, known)) for name, source in sources.items()}
    assert edges == {"a": {"wing.b"}, "wing.b": {"wing.c"}, "wing.c": {"a"}}
    assert sorted(set(circle_in(edges))) == ["a", "wing.b", "wing.c"]


def test_every_arrow_points_down() -> None:
    edges = graph()
    assert {wing_of(module) for module in edges} <= set().union(*FLOORS)
    assert upward(edges) == []
    assert upward({"upstream.files": {"tuner.model"}}) == ["upstream.files -> tuner.model"]
    assert upward({"analysis.cka": {"checkpoint.card"}}) == ["analysis.cka -> checkpoint.card"]


@pytest.mark.parametrize("path", modules().values(), ids=modules())
def test_no_room_is_too_large(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", modules().values(), ids=modules())
def test_every_room_says_what_lives_in_it(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_names_load_no_torch() -> None:
    """Also not through what they import: the rooms are loaded without the package around them."""
    reached, waiting = set(), ["names"]
    edges = graph()
    while waiting:
        room = waiting.pop()
        if room not in reached:
            reached.add(room)
            waiting += edges[room]
    sources = [modules()[room].read_text(encoding="utf-8") for room in reached]
    loaded = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
        for alias in node.names
    }
    assert loaded <= set(sys.stdlib_module_names)


def test_the_tests_lie_as_the_rooms_do() -> None:
    wings = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert wings <= {path.name for path in TESTS.iterdir() if path.is_dir()}
    for wing in wings:
        assert [*(TESTS / wing).glob("test_*.py")], wing
