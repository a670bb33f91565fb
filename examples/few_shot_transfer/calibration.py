"""How often verdicts on simulated users (`users.py`) are wrong, and how often they can tell: tables as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats

from peft_composition.comparing.differences import Differences, left_out, over_draws
from peft_composition.comparing.verdict import ROPE, Verdict, judge

from .markdown import table
from .records import Record
from .users import EVIDENCE, FOLDS, HEAD_ONLY, WITH_ADAPTERS, WITHOUT_ADAPTERS, unpacked


# The rule was chosen on these tasks; those on all others were looked at afterwards.
CHOSE = (
    ("vader-domains", "movies"),
    ("vader-domains", "nyt"),
    ("newsgroups-entangled", "new-4-8"),
    ("newsgroups-labels", "g16-20"),
    ("text-tasks", "newsgroups"),
)
IMAGES = "fashion"
TESTS = 100  # that a user has in the second table; the truth is then that of the others


@dataclass(frozen=True)
class Case:
    """A verdict on a user, and what is true.

    Attributes:
        k: examples of each class.
        judged: the method.
        verdict: on it.
        truth: its accuracy less that of the best alternative, on test examples, both trained on all K examples.
    """

    k: int
    judged: str
    verdict: Verdict
    truth: float

    @property
    def helps(self) -> bool:
        return self.truth > ROPE

    @property
    def harms(self) -> bool:
        return self.truth < -ROPE


def cases(
    users: Sequence[Record], judged: Sequence[str], others: Sequence[str], with_tests: bool = False
) -> list[Case]:
    """The verdicts on all users who have the alternatives, on the methods that they have.

    Args:
        users: what `users.simulate` made.
        judged: methods that reuse adapters, each with a verdict of its own.
        others: alternatives.
        with_tests: whether users have some test examples, and judge by these.
    """
    found = []
    for user in users:
        own = user["methods"]
        if not {*others} <= own.keys() or not (with_tests or "correct" in own[others[0]]):
            continue
        there = [name for name in judged if name in own]
        tests = {name: unpacked(own[name]["test_correct"]) for name in (*there, *others)}
        order = np.random.default_rng(user["seed"]).permutation(len(tests[others[0]]))
        seen, rest = (order[:TESTS], order[TESTS:]) if with_tests else (order[:0], order)
        correct = {
            name: values[seen] if with_tests else unpacked(own[name]["correct"]) for name, values in tests.items()
        }
        truth = {name: float(values[rest].mean()) for name, values in tests.items()}
        for name in there:
            differences = np.stack([correct[name] - correct[other] for other in others], axis=-1)[None]
            known: Differences = (
                over_draws(differences) if with_tests else left_out(differences, min(FOLDS, user["k"]))
            )
            scores = [float(correct[other].mean()) for other in others]
            verdict = judge(name, others, scores, known, ROPE, counts_more=False)
            found.append(Case(user["k"], name, verdict, truth[name] - max(truth[other] for other in others)))
    return found


def rates(found: Sequence[Case], heading: str = "K", of: Callable[[Case], str] = lambda case: str(case.k)) -> str:
    """How many verdicts there are of each kind, how many are false, and power: a row for each K and one for all.

    Args:
        found: the verdicts.
        heading: of the first column.
        of: what is in it.
    """
    heads = [heading, "verdicts", "helps: said, false", "harms: said, false", "told, of those that help", "that harm"]
    rows = []
    for name in (*dict.fromkeys(of(case) for case in sorted(found, key=lambda case: case.k)), None):
        own = [case for case in found if name in (None, of(case))]
        said = {
            word: [case for case in own if case.verdict.word == word] for word in ("helps", "harms", "cannot tell")
        }
        false = sum(not case.helps for case in said["helps"]), sum(not case.harms for case in said["harms"])
        true = [case for case in own if case.helps], [case for case in own if case.harms]
        told = sum(case.helps for case in said["helps"]), sum(case.harms for case in said["harms"])
        rows.append(
            [
                "all" if name is None else name,
                str(len(own)),
                f"{len(said['helps'])}, {_share(false[0], len(own) - len(true[0]))}",
                f"{len(said['harms'])}, {_share(false[1], len(own) - len(true[1]))}",
                _share(told[0], len(true[0])),
                _share(told[1], len(true[1])),
                _share(len(said["cannot tell"]), len(own)),
            ]
        )
    return table([*heads, "cannot tell"], rows)


def reliability(found: Sequence[Case]) -> str:
    """The stated probability that adapters help or harm, beside how often they do."""
    rows = []
    edges = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    for low, high in pairwise(edges):
        cells = [f"{100 * low:.0f} to {100 * high:.0f}%"]
        for stated, true in (("helps", "helps"), ("harms", "harms")):
            own = [case for case in found if low <= getattr(case.verdict, stated) < high + (high == 1.0)]
            mean = float(np.mean([getattr(case.verdict, stated) for case in own])) if own else 0.0
            share = _share(sum(getattr(case, true) for case in own), len(own))
            cells += [f"{100 * mean:.0f}%" if own else "-", share]
        rows.append(cells)
    return table(["stated", "helps: stated", "true", "harms: stated", "true"], rows)


def tables(users: Sequence[Record]) -> dict[str, str]:
    """All tables of the page, by name."""
    unique = {(user["scenario"], user["target"], user["k"], user["seed"]): user for user in users}
    kept = [user for user in unique.values() if len({*WITHOUT_ADAPTERS} & user["methods"].keys()) in (1, 3)]
    groups: dict[str, list[Record]] = {"chose": [], "others": [], "images": []}
    for user in kept:
        is_chosen = (user["scenario"], user["target"]) in CHOSE
        groups["images" if user["scenario"].startswith(IMAGES) else "chose" if is_chosen else "others"].append(user)
    found = {}
    with_tests: list[Case] = []
    for name, some in groups.items():
        for ending, others in (("", WITHOUT_ADAPTERS), ("-head", (HEAD_ONLY,))):
            if name == "images" and not ending:
                continue  # a fresh LoRA is one of sentence encoders
            verdicts = cases(some, WITH_ADAPTERS, others)
            found[name + ending] = rates([case for case in verdicts if case.judged == EVIDENCE])
            found[f"{name}-methods{ending}"] = rates(verdicts, "judged", lambda case: case.judged)
        others = (HEAD_ONLY,) if name == "images" else WITHOUT_ADAPTERS
        tested = cases(some, WITH_ADAPTERS, others, with_tests=True)
        found[f"{name}-tests"] = rates([case for case in tested if case.judged == EVIDENCE])
        with_tests += tested if name != "images" else []
    found["methods-tests"] = rates(with_tests, "judged", lambda case: case.judged)
    found["stated"] = reliability(cases([*groups["chose"], *groups["others"]], WITH_ADAPTERS, WITHOUT_ADAPTERS))
    return found


def _share(part: int, whole: int) -> str:
    """A share with its 95% interval (Clopper and Pearson)."""
    if not whole:
        return "-"
    low, high = stats.binomtest(part, whole).proportion_ci(0.95)
    return f"{part} of {whole} ({100 * low:.0f} to {100 * high:.0f}%)"
