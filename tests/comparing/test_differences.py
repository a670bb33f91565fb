"""Errors of paired differences against scipy, closed formulas and simulated truth; what follows from them in words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from peft_composition.comparing import verdict as verdicts
from peft_composition.comparing.differences import Differences, corrected_resampled, left_out, over_draws
from peft_composition.comparing.verdict import examples_to_tell, judge


def test_without_a_test_share_it_is_the_paired_t_test() -> None:
    a, b = np.random.default_rng(0).normal([[0.4], [0.1]], 1, (2, 12))
    found = corrected_resampled(a - b, 0.0)
    expected = stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.9)
    assert np.allclose(np.concatenate(found.interval(0.9)), [low, high])
    assert math.isclose(found.probabilities(0.0)[0, 0], stats.ttest_rel(a, b, alternative="greater").pvalue)


def test_the_correction_of_nadeau_and_bengio() -> None:
    # 10 splits of 90 and 10 examples: variance (1/10 + 10/90) s^2 and 9 degrees of freedom.
    values = np.array([0.02, 0.01, -0.01, 0.03, 0.0, 0.02, 0.04, -0.02, 0.01, 0.05])
    found = corrected_resampled(values, 10 / 90)
    mean = sum(values) / 10
    variance = sum((value - mean) ** 2 for value in values) / 9
    error = math.sqrt((1 / 10 + 1 / 9) * variance)
    assert math.isclose(float(found.error[0]), error, rel_tol=1e-12)

    def density(x: float) -> float:  # of t with 9 degrees of freedom, moved and scaled
        z = (x - mean) / error
        return math.gamma(5) / (math.sqrt(9 * math.pi) * math.gamma(4.5)) * (1 + z * z / 9) ** -5 / error

    middle = integrate.quad(density, -0.01, 0.01)[0]
    above = integrate.quad(density, 0.01, np.inf)[0]
    assert np.allclose(found.probabilities(0.01)[0], [1 - middle - above, middle, above], atol=1e-9)


def test_left_out_examples_are_those_of_many_folds_in_many_repeats() -> None:
    # With repeats the first term of 1/(R J) + n_test/n_train goes, and s^2 of folds is sigma^2 J / n.
    generator = np.random.default_rng(1)
    count, folds = 60_000, 1000
    values = generator.normal(0.1, 1, count)
    by_fold = [generator.permutation(values).reshape(folds, -1).mean(1) for _ in range(50)]
    repeated = corrected_resampled(np.concatenate(by_fold), 1 / (folds - 1))
    assert math.isclose(repeated.error[0], left_out(values[None], folds, prior=0.0).error[0], rel_tol=0.03)


def test_left_out_examples_by_hand() -> None:
    values = np.random.default_rng(2).integers(-1, 2, (3, 40)).astype(float)
    mean = values.mean(0)
    variance = sum((value - mean.mean()) ** 2 for value in mean) / 39
    found = left_out(values, 5, prior=0.0)
    assert math.isclose(found.error[0], math.sqrt((1 + 8 / 32) * variance / 40), rel_tol=1e-12)
    assert found.df == 39


def test_equal_answers_are_not_certainty() -> None:
    found = left_out(np.zeros((1, 10)), 5)
    assert math.isclose(found.error[0], math.sqrt(5 / 4 / 10 * (1 / 10)))
    assert left_out(np.zeros((1, 10)), 5, prior=0.0).error[0] == 0


def test_several_others_have_the_covariance_of_numpy() -> None:
    values = np.random.default_rng(3).normal(size=(30, 3))
    found = left_out(values[None], 5, prior=0.0)
    expected = np.cov(values.T) * 5 / 4 / 30
    assert np.allclose(found.covariance, expected, rtol=1e-12)
    drawn = found.sample(400_000, seed=0)
    assert np.allclose(drawn.mean(0), values.mean(0), atol=0.003)
    assert np.allclose(np.cov(drawn.T), expected * 29 / 27, atol=0.003)  # the variance of t is df / (df - 2)


@pytest.mark.parametrize(("between", "within", "by_item"), [(0.05, 0.5, 0.3), (0.0, 0.5, 0.0), (0.1, 0.2, 0.0)])
def test_intervals_over_draws_hold_what_they_promise(between: float, within: float, by_item: float) -> None:
    generator = np.random.default_rng(4)
    held = 0
    for _ in range(600):
        values = 0.1 + generator.normal(0, between, (5, 1)) + generator.normal(0, by_item, (1, 100))
        values = values + generator.normal(0, within, (5, 100))
        low, high = over_draws(values, prior=0.0).interval()
        held += bool(low[0] <= 0.1 <= high[0])
    assert held / 600 >= 0.94  # no more than chance below 95%


def test_one_draw_is_judged_by_its_test_examples() -> None:
    values = np.random.default_rng(5).normal(size=(1, 50))
    found = over_draws(values, prior=0.0)
    assert math.isclose(found.error[0], stats.sem(values[0]))
    assert found.df == 49


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: corrected_resampled([0.1], 0.2), "2 or more, got 1"),
        (lambda: left_out(np.array([[0.1, np.nan]]), 5), "finite"),
        (lambda: left_out(np.zeros((1, 10)), 1), "2 folds or more, got 1"),
    ],
)
def test_what_cannot_be_judged_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def of(mean: list[float], error: float, correlation: float = 0.0, df: float = 30) -> Differences:
    covariance = error**2 * (correlation + (1 - correlation) * np.eye(len(mean)))
    return Differences(np.array(mean), covariance, df, 31)


def test_the_words() -> None:
    assert judge("mix", ["head"], [0.5], of([0.2], 0.05), 0.01).word == "helps"
    assert judge("mix", ["head"], [0.5], of([-0.2], 0.05), 0.01).word == "harms"
    assert judge("mix", ["head"], [0.5], of([0.001], 0.002), 0.01).word == "equivalent"
    assert judge("mix", ["head"], [0.5], of([0.02], 0.05), 0.01).word == "cannot tell"


def test_to_harm_it_must_be_worse_than_a_single_one_by_more_the_more_there_are() -> None:
    one = judge("mix", ["a"], [0.5], of([-0.14], 0.05), 0.01)  # 99.3% for each; 99% are needed
    assert one.word == "harms"
    several = judge("mix", ["a", "b", "c"], [0.5] * 3, of([-0.14] * 3, 0.05), 0.01)  # 99.7% are needed
    assert several.harms < 0.9 < one.harms
    assert several.word == "cannot tell"


@pytest.mark.parametrize(("others", "needed"), [(1, 0.95), (3, 0.9)])
def test_to_help_against_a_single_one_it_must_be_surer(others: int, needed: float) -> None:
    def word(chance: float) -> str:  # all differences are the same one
        mean = 0.01 + stats.t.ppf(chance, 30) * 0.05
        return judge("mix", ["a", "b", "c"][:others], [0.5] * others, of([mean] * others, 0.05, 1.0), 0.01).word

    assert word(needed + 0.01) == "helps"
    assert word(needed - 0.01) == "cannot tell"


@pytest.mark.parametrize("mean", [[0.02, 0.3, 0.1], [-0.3, 0.2, -0.1], [0.25, 0.4, 0.2]])
def test_difference_and_interval_are_of_the_one_that_is_named(mean: list[float]) -> None:
    """The interval was that of the difference to the best, whichever it is, beside the difference to the one named."""
    errors = np.array([0.02, 0.08, 0.11])
    found = Differences(np.array(mean), np.diag(errors**2), 30, 31)
    for best in range(3):
        scores = [0.5 + 0.1 * (number == best) for number in range(3)]
        verdict = judge("mix", ["a", "b", "c"], scores, found, 0.01)
        half = stats.t.ppf(1 - 0.025 / 3, 30) * errors[best]  # 95% for all three together
        assert verdict.against == "abc"[best]
        assert verdict.difference == mean[best]
        assert np.allclose([verdict.low, verdict.high], [mean[best] - half, mean[best] + half], rtol=1e-9)
        assert f"{100 * mean[best]:+.1f} points [{100 * (mean[best] - half):+.1f}, " in str(verdict)
        high = mean[best] + stats.t.ppf(1 - 0.01 / 3, 30) * errors[best]
        assert (verdict.word == "harms") == (high < -0.01)  # what is said is true of the one that is named


def test_the_chances_of_one_other_are_those_of_t() -> None:
    """Their odds in proportion, so that 0.9 is stated where 0.95 and 0.99 are needed."""
    verdict = judge("mix", ["head"], [0.5], of([0.03], 0.04), 0.01)
    better, worse = stats.t.sf((0.01 - 0.03) / 0.04, 30), stats.t.cdf((-0.01 - 0.03) / 0.04, 30)
    odds = 9 / 19 * better / (1 - better), 9 / 99 * worse / (1 - worse)
    assert np.allclose([verdict.helps, verdict.harms], [own / (1 + own) for own in odds], atol=0.01)
    assert math.isclose(verdict.equivalent, 1 - better - worse, abs_tol=0.01)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("level", [0.8, 0.9])
def test_what_is_stated_is_what_decides(count: int, level: float) -> None:
    """A chance of harm of 95% stood beside "cannot tell"."""
    words = set()
    for mean in np.linspace(-0.2, 0.2, 41):
        for error in (0.002, 0.05):
            found = of([mean] * count, error, 0.5)
            verdict = judge("mix", ["a", "b", "c"][:count], [0.5] * count, found, 0.01, level, counts_more=False)
            stated = {"helps": verdict.helps, "equivalent": verdict.equivalent, "harms": verdict.harms}
            assert [word for word, sure in stated.items() if sure >= level] in ([verdict.word], [])
            assert (verdict.word == "cannot tell") == (max(stated.values()) < level)
            words.add(verdict.word)
    assert len(words) == 4


def test_a_verdict_never_looks_surer_or_less_sure_than_its_word() -> None:
    for level in (0.8, 0.9, 0.95):
        for needed in (0.9, 0.95, 0.975):
            assert verdicts._stated(needed, needed, level) >= level
            assert verdicts._stated(np.nextafter(needed, 0), needed, level) < level
    assert [verdicts._percent(own) for own in (0.8999, 0.9, 0.29, 1.0)] == ["89%", "90%", "29%", "100%"]


def test_it_must_be_better_than_each_other() -> None:
    one = judge("mix", ["head", "lora"], [0.5, 0.6], of([0.2, 0.02], 0.05), 0.01)
    assert one.word == "cannot tell"
    assert one.against == "lora"
    two = judge("mix", ["head", "lora"], [0.5, 0.5], of([0.1, 0.1], 0.05), 0.01)
    # Independent but for the common chi-square of t, which 30 degrees of freedom make nearly constant.
    better = stats.t.sf((0.01 - 0.1) / 0.05, 30)
    assert np.isclose(two.helps, better**2, atol=0.01)
    assert two.helps < better


def test_how_many_more_examples() -> None:
    found = of([0.05], 0.05)
    needed = 31 * (stats.t.ppf(0.95, 30) * 0.05 / 0.04) ** 2
    assert examples_to_tell(found, 0, 0.01) == pytest.approx(needed - 31, rel=0.04)  # the word is from 20,000 draws
    assert examples_to_tell(of([0.01], 0.05), 0, 0.01) is None  # on the edge no number would do
    harmful = 31 * (stats.t.ppf(0.99, 30) * 0.05 / 0.04) ** 2
    assert examples_to_tell(of([-0.05], 0.05), 0, 0.01) == pytest.approx(harmful - 31, abs=1)
    assert "more examples would tell" in str(judge("mix", ["head"], [0.5], found, 0.01))
    # Zero is within the region when both of its ends are far enough.
    both = 31 * (stats.t.ppf(0.95, 30) * 0.05 / 0.01) ** 2
    assert examples_to_tell(of([0.0], 0.05), 0, 0.01) == pytest.approx(both - 31, rel=0.04)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
@pytest.mark.parametrize(
    ("mean", "error", "word"),
    [
        ([0.03], 0.03, "helps"),
        ([0.05, 0.05], 0.04, "helps"),
        ([0.05, 0.06, 0.2], 0.05, "helps"),
        ([0.005], 0.03, "equivalent"),
        ([0.0, 0.1], 0.02, "equivalent"),
        ([-0.03], 0.03, "harms"),
        ([-0.05, -0.05, -0.05], 0.04, "harms"),
    ],
)
def test_with_that_many_more_it_tells_and_with_fewer_it_does_not(
    mean: list[float], error: float, word: str, correlation: float
) -> None:
    now, others = of(mean, error, correlation), ["a", "b", "c"][: len(mean)]

    def with_more(number: int) -> str:
        then = of(mean, error * math.sqrt(31 / (31 + number)), correlation)
        return judge("mix", others, [0.5] * len(mean), then, 0.01).word

    more = judge("mix", others, [0.5] * len(mean), now, 0.01).more
    assert more is not None
    assert with_more(0) == "cannot tell"
    assert with_more(more + 1) == word
    assert with_more(int(0.85 * more) - 1) == "cannot tell"
