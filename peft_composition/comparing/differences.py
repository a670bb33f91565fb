"""Paired differences between a method and several others, with errors that respect how the splits overlap.

Pure functions on arrays; `verdict.py` says what follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


Floats = NDArray[np.float64]
PRIOR = 1.0
"""Squared differences that are added to those of the examples: without, ten equal answers would mean certainty."""


@dataclass(frozen=True)
class Differences:
    """What is known of the mean differences to m others: a multivariate t distribution.

    Attributes:
        mean: shape (m,).
        covariance: of the means, shape (m, m).
        df: degrees of freedom.
        examples: how many the differences are from.
    """

    mean: Floats
    covariance: Floats
    df: float
    examples: int

    @property
    def error(self) -> Floats:
        """Standard errors, shape (m,)."""
        return np.sqrt(np.diag(self.covariance))

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """The ends of the interval of each mean difference, both of shape (m,)."""
        half = _t().ppf((1 + level) / 2, self.df) * self.error
        return self.mean - half, self.mean + half

    def probabilities(self, rope: float) -> Floats:
        """The probability that each difference is below -rope, within, and above rope, shape (m, 3).

        The correlated Bayesian t-test (Corani and Benavoli 2015), whose interval is the one of Nadeau and Bengio.
        """
        t, scale = _t(), np.maximum(self.error, np.finfo(float).tiny)
        below, above = t.cdf((-rope - self.mean) / scale, self.df), t.sf((rope - self.mean) / scale, self.df)
        return np.stack([below, 1 - below - above, above], axis=-1)

    def sample(self, draws: int, seed: int) -> Floats:
        """Draws from the distribution, shape (draws, m)."""
        generator = np.random.default_rng(seed)
        values, vectors = np.linalg.eigh(self.covariance)
        # The symmetric root is the same whichever eigenvectors of equal values are found: more spread, the same draws.
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        normal = generator.standard_normal((draws, len(self.mean))) @ root
        return self.mean + normal / np.sqrt(generator.chisquare(self.df, (draws, 1)) / self.df)


def corrected_resampled(values: ArrayLike, test_share: float) -> Differences:
    """The corrected resampled t-test (Nadeau and Bengio 2003): (1/J + n_test/n_train) s^2 in place of s^2/J.

    Training sets of different splits overlap, so that the differences of J splits are not independent; their mean
    varies more than s^2/J says.

    Args:
        values: the mean difference of each split, shape (J,) or (J, m).
        test_share: examples that are left out over those that are trained on.

    Raises:
        ValueError: there are fewer than two splits, or a value is not finite.
    """
    wide = _columns(values, 2)
    factor = 1 / len(wide) + test_share
    return Differences(wide.mean(0), factor * _covariance(wide), len(wide) - 1, len(wide))


def left_out(values: ArrayLike, folds: int, prior: float = PRIOR) -> Differences:
    """Differences of (repeated) cross-fitting, each example left out once in every repeat: (1 + n_test/n_train) s^2/n.

    Here s^2 is the variance of the n examples, each a mean over its repeats. The second term stands for training sets
    that overlap, as in `corrected_resampled`, and n examples give n - 1 degrees of freedom where J folds give J - 1.
    The test of a whole split, 1/J + n_test/n_train, would count the examples twice: a split's own variance has them.
    How often verdicts from this are wrong was measured on simulated users (docs/concepts/verdicts.md).

    Args:
        values: the difference for each example when it is left out, shape (repeats, n) or (repeats, n, m).
        folds: J, of each repeat.
        prior: added to the sum of squares, as one more example that differs by 1 from the mean of all.

    Raises:
        ValueError: there are fewer than two examples or folds, or a value is not finite.
    """
    wide = np.asarray(values, dtype=np.float64)
    wide = wide[..., None] if wide.ndim == 2 else wide
    if folds < 2:
        raise ValueError(f"cross-fitting has 2 folds or more, got {folds}")
    by_example = _columns(wide.mean(0), 2)
    factor = folds / (folds - 1) / len(by_example)
    return Differences(
        by_example.mean(0), factor * _with_prior(by_example, prior), len(by_example) - 1, len(by_example)
    )


def over_draws(values: ArrayLike, prior: float = PRIOR) -> Differences:
    """Draws of training examples crossed with test examples: both vary, and the same test examples judge every draw.

    The variance is that of the draws' means over their number and that of the test examples' means over theirs; with
    one draw only the latter is known, and the result is about that draw. Degrees of freedom as Satterthwaite has them.

    Args:
        values: shape (draws, tests) or (draws, tests, m).
        prior: added to the sum of squares of the test examples as one more of them.

    Raises:
        ValueError: there are fewer than two test examples, or a value is not finite.
    """
    wide = np.asarray(values, dtype=np.float64)
    wide = wide[..., None] if wide.ndim == 2 else wide
    draws, tests = wide.shape[:2]
    by_test, by_draw = _columns(wide.mean(0), 2), _columns(wide.mean(1), 1)
    of_tests = _with_prior(by_test, prior) / tests
    if draws == 1:
        return Differences(wide.mean((0, 1)), of_tests, tests - 1, tests)
    of_draws = _covariance(by_draw) / draws
    a, b = np.diag(of_draws), np.diag(of_tests)
    df = (a + b) ** 2 / (a**2 / (draws - 1) + b**2 / (tests - 1))
    return Differences(wide.mean((0, 1)), of_draws + of_tests, float(df.min()), tests)


def _columns(values: ArrayLike, least: int) -> Floats:
    wide = np.asarray(values, dtype=np.float64)
    wide = wide[:, None] if wide.ndim == 1 else wide
    if len(wide) < least or not np.isfinite(wide).all():
        raise ValueError(f"differences must be finite and {least} or more, got {len(wide)}")
    return wide


def _with_prior(wide: Floats, prior: float) -> Floats:
    """The covariance with one more example, which differs by 1 from the mean in all columns."""
    count = len(wide)
    return (_covariance(wide) * (count - 1) + prior) / (count - 1 + prior)


def _covariance(wide: Floats) -> Floats:
    return np.atleast_2d(np.cov(wide, rowvar=False, ddof=1))


def _t():  # type: ignore[no-untyped-def]
    try:
        from scipy.stats import t
    except ImportError as missing:
        raise ImportError(
            f"{missing}. Comparing methods needs scipy, an extra: pip install 'peft-composition[analysis]'"
        ) from missing
    return t
