"""How good the selectors' picks are over draws of support sets, as lines of JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_composition.evidence.own_heads import own_head
from peft_composition.references import AdapterReference

from .backward import Read, derivatives, gradients, modules_of, scales_of
from .features import BASE
from .pool import RELATED
from .selectors import FULL, SAME_ORDER, SELECTORS, Draw, orders


FIRST = 5
NORMAL = 1.96


def judge(
    found: Mapping[str, Tensor],
    labels: Tensor,
    tests: Tensor,
    supports: Sequence[Sequence[int]],
    folder: Path,
    base: nn.Module,
    read: Read,
    first_seed: int = 0,
) -> list[dict[str, Any]]:
    """A line for each selector and draw.

    Accuracy is that of the nearest class mean of the support set on the test examples.

    Args:
        found: features of the candidates and the base, on what support sets are drawn from and then on the test set.
        labels: of what support sets are drawn from.
        tests: of the test set.
        supports: the draws, as places in `labels`.
        folder: of the candidates.
        base: the base model.
        read: makes a function that computes the base's features of some places, with a gradient.
        first_seed: of the draws.
    """
    names = sorted(name for name in found if name != BASE)
    related = torch.tensor([name.startswith(RELATED) for name in names])
    everything = torch.stack([found[name] for name in [*names, BASE]])
    support, test = everything[:, : len(labels)], everything[:, len(labels) :]
    paths = [folder / name for name in names]
    modules = modules_of(paths[int(related.nonzero()[0])])
    along = [gradients(base, read(rows), labels[list(rows)], modules) for rows in supports]
    slopes, norms = derivatives(paths, along)
    head = next(name for name in ("classifier", "head") if hasattr(base, name))
    heads = [own_head(head, AdapterReference(name=path.name, path=str(path))) for path in paths]
    lines: list[dict[str, Any]] = []
    for number, places in enumerate(supports):
        rows, own = list(places), labels[list(places)]
        means = torch.stack([support[:, rows][:, own == label].mean(1) for label in own.unique()], dim=1)
        accuracy = (torch.cdist(test, means).argmin(2) == tests).double().mean(1)
        seed, scales = first_seed + number, scales_of(along[number])
        draw = Draw(support[:-1, rows], support[-1, rows], own, slopes[number], norms, scales, seed, heads)
        ordered = orders(draw)
        for name, result in ordered.items():
            first = related[result.order]
            lines.append(
                {
                    "seed": draw.seed,
                    "selector": name,
                    "pick": float(accuracy[result.order[0]]),
                    "best": float(accuracy[:-1].max()),
                    "base": float(accuracy[-1]),
                    "first": float(first[0]),
                    "among first": float(first[:FIRST].double().mean()),
                    "among as many": float(first[: int(related.sum())].double().mean()),
                    "cost": result.passed / ordered[FULL].passed,
                    "risk": result.risk,
                }
            )
    return lines


def table(lines: Sequence[Mapping[str, Any]], related: int) -> str:
    """Markdown: a row for each K and selector, with 95% intervals over draws.

    A selector that orders by more than evidence is compared with all candidates on all examples in the same order.

    Args:
        lines: results of `judge`, with their `"k"`.
        related: how many candidates are of the task.
    """
    rows = [
        "| K | ranked by | regret, points | more than all on all examples | of the task: the pick | "
        f"of the first {FIRST} | of the first {related} | examples passed | pick worse than the base |",
        "| --- " * 9 + "|",
    ]
    for k in sorted({line["k"] for line in lines}):
        of_k = [line for line in lines if line["k"] == k]
        for name in SELECTORS:
            own = [line for line in of_k if line["selector"] == name]
            if not own:
                continue
            regrets, whole = _regrets(of_k, name), _regrets(of_k, SAME_ORDER.get(name, FULL))
            stated = [line["risk"] for line in own if line["risk"] is not None]
            said = f" (stated {_percent(stated)})" if stated else ""
            shares = [_percent([line[key] for line in own]) for key in ("first", "among first", "among as many")]
            rows.append(
                f"| {k} | {name} | {_mean(regrets)} | {'' if name == FULL else _mean(regrets - whole, signed=True)} | "
                f"{' | '.join(shares)} | {_percent([line['cost'] for line in own])} | "
                f"{_percent([line['pick'] < line['base'] for line in own])}{said} |"
            )
    return "\n".join(rows)


def _regrets(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """What the pick lacks of the best candidate, by draw, in points."""
    return np.array([100 * (line["best"] - line["pick"]) for line in lines if line["selector"] == name])


def _mean(values: np.ndarray, signed: bool = False) -> str:
    half = NORMAL * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():{'+' if signed else ''}.1f} ± {half:.1f}"


def _percent(values: Sequence[float]) -> str:
    return f"{100 * np.mean(values):.0f}%"
