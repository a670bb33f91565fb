"""Rounds, on candidates whose scores are made up: who passes what, and in which order they come out."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

import pytest
import torch

from peft_composition.choosing.plan import after_a_look, looked_at, those_who_go_on
from peft_composition.choosing.rounds import Rounds, expected, in_rounds
from peft_composition.choosing.trials import SLOPES, Trial, apartness


class Candidates:
    """The last is the best by its score and its distance, the first by its slope."""

    def __init__(self, count: int, sizes: Sequence[int], has_slopes: bool = True, broken: Sequence[int] = ()) -> None:
        self.count, self.sizes, self.has_slopes, self.broken = count, sizes, has_slopes, {*broken}
        self.first_scored = 1
        self.passed: dict[int, list[int]] = {}

    def run(self, rung: int, numbers: Sequence[int]) -> dict[int, Trial]:
        assert rung not in self.passed
        self.passed[rung] = [*numbers]
        nothing = torch.empty(0)
        if rung == SLOPES:
            slopes = {own: 1.0 - own / self.count if self.has_slopes else None for own in numbers}
            return {own: Trial(nothing, nothing.bool(), slopes[own]) for own in numbers if own not in self.broken}
        if rung < self.first_scored:
            return {own: Trial(nothing, nothing.bool(), apart=float(own)) for own in numbers}
        size = self.sizes[rung]
        return {own: Trial(torch.full((size,), float(own)), torch.ones(size).bool()) for own in [0, *numbers]}

    def rounds(self, halving: bool = True) -> Rounds:
        return in_rounds(self.run, self.sizes, self.first_scored, self.count, 8, halving)


def test_of_five_of_a_class_under_a_third_of_all_examples_are_passed() -> None:
    """Two classes, 256 candidates: slopes, one of each class for 70%, all ten examples for 15% and a fiftieth."""
    own = Candidates(256, [2, 4, 10])
    found = own.rounds()
    looked = math.ceil(0.7 * 256)
    assert own.passed[SLOPES] == [*range(1, 257)]
    assert own.passed[0] == [*range(1, looked + 1)]  # the steepest
    best, steep = math.ceil(0.15 * 256), math.ceil(256 / 50)
    going = [*range(looked, looked - best, -1), *range(1, steep + 1)]
    assert own.passed[2] == going
    assert set(own.passed) == {SLOPES, 0, 2}
    assert found.order == sorted(going, reverse=True)
    others = [*range(looked - best, steep, -1)]
    assert found.behind == [*others, *range(looked + 1, 257)]  # the steepest of those that passed nothing come first
    assert {number for number, why in found.dropped.items() if "one example of each class" in why} == {*others}
    assert {*found.dropped} == {*found.behind}
    assert found.first is found.last
    assert 4 * 10 + 2 * looked + (10 - 2) * len(going) < 0.3 * 256 * 10
    assert expected([2, 4, 10], 1, 256, 8, True) == [256, looked, best + steep]


def test_of_twenty_of_a_class_there_is_a_round_between() -> None:
    own = Candidates(256, [2, 6, 18, 40])
    found = own.rounds()
    assert set(own.passed) == {SLOPES, 0, 2, 3}
    second = len(own.passed[2])
    assert second == math.ceil(0.3 * 256) + 6
    by_score, by_slope = math.ceil(second / 6), math.ceil(second / 8)
    in_order = sorted(own.passed[2], reverse=True)
    going = {*in_order[:by_score], *sorted(own.passed[2])[:by_slope]}
    assert {*own.passed[3]} == going
    assert found.behind[: second - len(going)] == [number for number in in_order if number not in going]
    assert len(found.behind) == 256 - len(going)
    assert {*found.first} - {0} == {*own.passed[2]}
    assert expected([2, 6, 18, 40], 1, 256, 8, True) == [256, 180, second, by_score + by_slope]


def test_where_eight_go_on_they_pass_all() -> None:
    own = Candidates(24, [2, 6, 18, 40])
    found = own.rounds()
    assert set(own.passed) == {SLOPES, 0, 3}
    assert len(found.order) == 8 + 1
    assert expected([2, 6, 18, 40], 1, 24, 8, True) == [24, 17, 9]


@pytest.mark.parametrize(("first_scored", "sizes"), [(1, [2, 6, 18, 40]), (0, [6, 18, 40])])
def test_without_slopes_the_best_quarter_goes_on(first_scored: int, sizes: list[int]) -> None:
    own = Candidates(256, sizes, has_slopes=False, broken=[1, 2])
    own.first_scored = first_scored
    found = own.rounds()
    count = 256 - 2 * first_scored  # else nobody looked before
    passed = [len(numbers) for rung, numbers in own.passed.items() if rung != SLOPES]
    assert passed == [count, math.ceil(count / 4), 16]
    assert found.order == [*range(256, 240, -1)]
    assert found.dropped == {}
    assert expected([6, 18, 40], 0, 256, 8, True) == [256, 64, 16]


def test_where_one_of_each_class_is_much_of_all_nobody_is_dropped_by_it() -> None:
    own = Candidates(100, [2, 4, 6])
    found = own.rounds()
    assert set(own.passed) == {1, 2}
    assert len(found.order) == 25
    two_of_each = Candidates(100, [2, 4])
    assert len(two_of_each.rounds().order) == 100
    assert set(two_of_each.passed) == {1}


def test_few_candidates_and_no_halving_pass_all() -> None:
    for own, halving in ((Candidates(8, [2, 4, 10]), True), (Candidates(100, [2, 4, 10]), False)):
        found = own.rounds(halving=halving)
        assert set(own.passed) == {2}
        assert len(found.order) == own.count
        assert found.behind == []
        assert expected([2, 4, 10], 1, own.count, 8, halving) == [own.count]


def test_those_whose_slope_is_not_known_pass_one_of_each_class() -> None:
    assert looked_at({1: 0.1, 2: None, 3: 0.3, 4: 0.2, 5: 0.0}) == [1, 2, 3, 4]


def test_after_a_look_distance_and_heads_count_alike() -> None:
    apart = {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1, 5: 0.0}
    told = {1: 0.0, 2: 0.9, 3: 0.5, 4: 0.3, 5: 0.2}
    # places by distance 0, 1/4, 2/4, 3/4, 1; by heads 1, 0, 1/4, 2/4, 3/4
    assert after_a_look(apart, told, dict.fromkeys(apart), 2) == ([2, 3], [1, 4, 5])
    assert after_a_look(apart, dict.fromkeys(apart), dict.fromkeys(apart), 2) == ([1, 2], [3, 4, 5])
    slopes = {**dict.fromkeys(range(1, 52), 0.0), 3: 0.5, 4: 0.7}
    assert after_a_look(apart, dict.fromkeys(apart), slopes, 1) == ([1, 4, 3], [2, 5])  # of 51 candidates two


def test_those_without_a_slope_go_on_by_their_scores() -> None:
    slopes_of = {own: None if own < 10 else float(own) for own in range(40)}
    assert those_who_go_on(range(40), slopes_of, 3) == [*range(7), *range(35, 40)]
    assert those_who_go_on(range(40), dict.fromkeys(range(40)), 3) == [*range(10)]
    assert those_who_go_on([3, 1, 2], {1: 1.0, 2: 2.0, 3: 0.0}, 1) == [3, 2]


def test_how_far_apart_examples_are_by_hand() -> None:
    assert apartness(torch.tensor([[2.0, 0.0], [0.0, 3.0]])) == pytest.approx(1)
    assert apartness(torch.tensor([[2.0, 0.0], [5.0, 0.0]])) == pytest.approx(0)
    assert apartness(torch.tensor([[2.0, 0.0], [-5.0, 0.0]])) == pytest.approx(2)
    rows = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for one, other in itertools.combinations(rows.tolist(), 2):
        product = sum(a * b for a, b in zip(one, other))
        found.append(1 - product / (math.hypot(*one) * math.hypot(*other)))
    assert apartness(rows) == pytest.approx(statistics.fmean(found), rel=1e-12)


def test_after_a_look_those_that_are_far_apart_go_on() -> None:
    apart = {1: 0.2, 2: 1.4, 3: 0.9}
    going, others = after_a_look(apart, dict.fromkeys(apart), dict.fromkeys(apart), 2)
    assert (going, others) == ([2, 3], [1])
