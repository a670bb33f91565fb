"""From paired differences to a verdict in words: helps, equivalent, harms, or cannot tell. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..text import plural
from .differences import Differences, Floats


Word = Literal["helps", "equivalent", "harms", "cannot tell"]
ROPE = 0.01
"""Differences of accuracy up to this are no difference in practice."""
LEVEL = 0.9
"""Chosen with the region on half of the tasks of simulated users: no false \"helps\" there, and the most true ones."""
OF_ONE = 1 / 2
"""Of what `level` leaves: for \"helps\" against a single alternative. To beat each of several is harder by itself."""
OF_HARM = 1 / 10
"""Of what `level` leaves: for \"harms\". Harm is rare, so that of few true ones the false ones are a large share."""
INTERVAL = 0.95
DRAWS = 20_000
MOST_MORE = 100_000  # examples; to ask for more is to say that nothing will tell


@dataclass(frozen=True)
class Verdict:
    """What the examples say of one method against the best of the others.

    Attributes:
        word: "helps", "equivalent", "harms" or "cannot tell".
        judged: the method.
        against: the other with the highest score.
        difference: of their scores.
        low: lower end of the 95% interval of that difference. It was picked among several, so that the interval is one
            of as many that all hold together (Bonferroni).
        high: upper end.
        helps: how sure it is, from 0 to 1, that the method is better than every other by more than the region of
            practical equivalence. This and the next two decide: a word is said where its own reaches `level`.
        equivalent: that it is as good as the best, whichever that is.
        harms: that it is worse than the one it is judged against by more than that region.
        others: how many there are.
        rope: half the width of the region.
        level: what a word needs.
        more: about how many more examples would tell, if the difference stayed as it is; None where they tell now or
            where it would be more than 100,000.
    """

    word: Word
    judged: str
    against: str
    difference: float
    low: float
    high: float
    helps: float
    equivalent: float
    harms: float
    others: int
    rope: float
    level: float
    more: int | None

    def __str__(self) -> str:
        points = f"{100 * self.difference:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        chances = f"helps {_percent(self.helps)}, equivalent {_percent(self.equivalent)}, harms {_percent(self.harms)}"
        text = {
            "helps": f"{self.judged} helps: it is better than {self.against}, the best without adapters",
            "equivalent": f"{self.judged} is equivalent to {self.against}, the best without adapters, in practice",
            "harms": f"{self.judged} harms: it is worse than {self.against}, the best without adapters",
            "cannot tell": f"cannot tell whether {self.judged} is better or worse than {self.against}",
        }[self.word]
        end = ""
        if self.word == "cannot tell":
            end = (
                f" About {plural(self.more, 'more example')} would tell, if the difference stays as it is."
                if self.more is not None
                else " More examples of a difference this small would not tell."
            )
        region = f"{100 * self.rope:g}"
        unit = "point" if region == "1" else "points"
        needed = f"{100 * self.level:g}% are needed; the same in practice within {region} {unit}"
        return f"{text}: {points} ({chances}; {needed}).{end}"


def judge(
    judged: str,
    others: Sequence[str],
    scores: Sequence[float],
    found: Differences,
    rope: float,
    level: float = LEVEL,
    counts_more: bool = True,
) -> Verdict:
    """The verdict on a method against the best of the others.

    Which of the others is best is not known: the one with the highest score is so by luck in part. So "helps" is about
    the smallest difference to any of them, drawn from their joint distribution: the method must be better than each
    (an intersection-union test), with a probability of `level`, or of 1 - (1 - level) / 2 where there is a single
    other. "Harms" is about the one with the highest score: the method must be worse than that by more than the region
    with a probability of 1 - (1 - level) / 10, counting how many it was picked from (Bonferroni). At the default level
    the whole 95% interval is then below the region, and more. Where a word needs more than `level`, the odds are
    stated in the same proportion smaller, so that what is stated reaches `level` where the word is said.

    Args:
        judged: the method.
        others: the names of the others.
        scores: theirs.
        found: differences of the method to each of them.
        rope: half the width of the region of practical equivalence, in units of the score.
        level: what a word needs, as above.
        counts_more: whether to compute how many more examples would tell, which takes most of the time.
    """
    require_good_limits(rope, level)
    best = int(np.argmax(scores))
    word, chances = _decide(found, best, rope, level)
    low, high = found.interval(1 - (1 - INTERVAL) / len(others))
    more = examples_to_tell(found, best, rope, level) if counts_more and word == "cannot tell" else None
    return Verdict(
        word=word,
        judged=judged,
        against=others[best],
        difference=float(found.mean[best]),
        low=float(low[best]),
        high=float(high[best]),
        helps=chances["helps"],
        equivalent=chances["equivalent"],
        harms=chances["harms"],
        others=len(others),
        rope=rope,
        level=level,
        more=more,
    )


def require_good_limits(rope: float, level: float) -> None:
    """Refuse a region or a level that mean nothing."""
    if not (0 <= rope < 1 and 0.5 < level < 1):
        raise ValueError(f"rope must be in 0..1 and level in 0.5..1, got {rope} and {level}")


def examples_to_tell(found: Differences, best: int, rope: float, level: float = LEVEL) -> int | None:
    """How many more examples a word would need, if differences and their spread stayed as they are.

    Standard errors shrink with the root of the number of examples; with that many more, `judge` tells.

    Args:
        found: differences to each of the others.
        best: the other with the highest score.
        rope: half the width of the region of practical equivalence.
        level: as for `judge`.

    Returns:
        The number, at least 1; None for more than 100,000.
    """
    spread = found.sample(DRAWS, seed=0) - found.mean

    def tells(more: int) -> bool:
        share = found.examples / (found.examples + more)
        shrunk = replace(found, covariance=found.covariance * share)
        return _decide(shrunk, best, rope, level, found.mean + share**0.5 * spread)[0] != "cannot tell"

    too_few, enough = 0, MOST_MORE
    if not tells(enough):
        return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if tells(middle) else (middle, enough)
    return enough


def _decide(
    found: Differences, best: int, rope: float, level: float, draws: Floats | None = None
) -> tuple[Word, dict[Word, float]]:
    """The word, and how sure each of the other three is, of which one that is said has `level` or more."""
    least = (found.sample(DRAWS, seed=0) if draws is None else draws).min(1)
    others = len(found.mean)
    better, worse = float((least > rope).mean()), float((least < -rope).mean())
    for_helps = level if others > 1 else 1 - (1 - level) * OF_ONE
    worse_than_best, for_harms = float(found.probabilities(rope)[best, 0]), 1 - (1 - level) * OF_HARM / others
    sure: dict[Word, float] = {
        "helps": _stated(better, for_helps, level),
        "equivalent": 1 - better - worse,
        "harms": _stated(worse_than_best, for_harms, level),
    }
    if better >= for_helps:
        return "helps", sure
    if worse_than_best >= for_harms:
        return "harms", sure
    return "equivalent" if sure["equivalent"] >= level else "cannot tell", sure


def _percent(probability: float) -> str:
    """Rounded down, so that what is not enough does not look like it."""
    return f"{math.floor(100 * probability + 1e-9)}%"


def _stated(probability: float, needed: float, level: float) -> float:
    """A probability with its odds in proportion, so that it becomes `level` where it is `needed`."""
    share = level / (1 - level) * (1 - needed) / needed
    stated = share * probability / (share * probability + 1 - probability)
    return max(level, stated) if probability >= needed else min(math.nextafter(level, 0), stated)
