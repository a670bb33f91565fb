"""The gain of learned weights over the number of adapters: is one gain right for 4, 20 and 64 of them?

Head and weights train together from the uniform mix, module by module, as the recipe has it (100 steps of AdamW at
1e-2, falling to zero). The adapters are from the pools of `benchmarks.selecting`: one of eight is of the task.

python -m benchmarks.gain --folder build/selecting --targets clothes movies
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from scipy import stats
from torch import Tensor, nn

from peft_composition import CompositionConfig, mixing_weights

from . import machine
from .selecting.__main__ import CANDIDATES, RESULTS, SUPPORT, TESTS, pool_of
from .selecting.targets import RECIPES, Target, few_shot, labels_of


GAINS = (4.0, 10.0, 40.0, 160.0)
RATE, STEPS, PASS = 1e-2, 100, 50
ONE_OF = 8  # is of the task


def main(words: Sequence[str] | None = None) -> None:
    """Called from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gain", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/selecting"), help="for pools")
    parser.add_argument("--trained", type=Path, help="where the study keeps its adapters; default: the folder")
    parser.add_argument("--targets", nargs="+", choices=RECIPES, default=["clothes", "movies"])
    parser.add_argument("--adapters", type=int, nargs="+", default=[4, 20, 64])
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS / "gain.json")
    options = parser.parse_args(words)
    known = json.loads(options.out.read_text())["lines"] if options.out.is_file() else []
    for name in options.targets:
        target = Target(name, SUPPORT, TESTS, options.trained or options.folder)
        candidates = pool_of(target, options.folder / "pools" / name, CANDIDATES)
        for count in options.adapters:
            for seed in range(options.draws):
                if any((own["target"], own["adapters"], own["seed"]) == (name, count, seed) for own in known):
                    continue
                known += [
                    {"target": name, "adapters": count, "seed": seed, "k": options.k, **line}
                    for line in _draw(target, _some(candidates, count, seed), options.k, seed)
                ]
                options.out.write_text(
                    json.dumps({"machine": machine.describe(torch.device("cpu")), "lines": known}, indent=1) + "\n"
                )
    print(table(known))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Points on the uniform mix with 95% intervals over draws, and in brackets the weight of adapters of the task."""
    gains = sorted({own["gain"] for own in lines if own["gain"]})
    rows = ["| task | adapters | of the task | uniform, % | " + " | ".join(f"gain {gain:g}" for gain in gains) + " |"]
    rows.append("| --- | ---: | ---: | ---: |" + " ---: |" * len(gains))
    for target, count in dict.fromkeys((own["target"], own["adapters"]) for own in lines):
        own = [line for line in lines if (line["target"], line["adapters"]) == (target, count)]
        even = {line["seed"]: line["accuracy"] for line in own if not line["gain"]}
        cells = []
        for gain in gains:
            of_gain = [line for line in own if line["gain"] == gain]
            found = [line["accuracy"] - even[line["seed"]] for line in of_gain]
            margin = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found) if len(found) > 1 else float("nan")
            share = statistics.fmean(line["related"] for line in of_gain)
            cells.append(f"{statistics.fmean(found):+.1f} ± {margin:.1f} ({share:.2f})")
        of_task = f"{count // ONE_OF or 1} ({(count // ONE_OF or 1) / count:.2f})"
        rows.append(
            f"| {target} | {count} | {of_task} | {statistics.fmean(even.values()):.1f} | {' | '.join(cells)} |"
        )
    return "\n".join(rows)


def _some(candidates: Sequence[Path], count: int, seed: int) -> list[Path]:
    """So many candidates, one of eight of them of the task, in a random order."""
    kinds: dict[str, list[Path]] = {}
    for path in candidates:
        kinds.setdefault(path.name.partition("-")[0], []).append(path)
    draw = random.Random(seed)
    related = draw.sample(kinds["related"], count // ONE_OF or 1)
    found = related + draw.sample([*kinds["unrelated"], *kinds["random"]], count - len(related))
    draw.shuffle(found)
    return found


def _draw(target: Target, paths: Sequence[Path], k: int, seed: int) -> list[dict[str, object]]:
    places = few_shot(labels_of(target.support), k, seed)
    batch = target.batch(target.support, places)
    found: list[dict[str, object]] = []
    for gain in (None, *GAINS):
        model = get_peft_model(
            target.model.build(target.classes, seed),
            CompositionConfig(
                adapters=[{"path": str(path), "name": path.name} for path in paths],
                mixing="uniform" if gain is None else "learned",
                gain=gain,
                modules_to_save=["classifier"],
            ),
        )
        _fit(model, batch)
        share = statistics.fmean(
            sum(weight for name, weight in own.items() if name.startswith("related"))
            for own in mixing_weights(model).values()
        )
        found.append({"gain": gain, "accuracy": _accuracy(model, target), "related": round(share, 4)})
    return found


def _fit(model: PeftModel, batch: dict[str, Tensor]) -> None:
    model.eval()  # no dropout
    trained = [own for own in model.parameters() if own.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    inputs = {name: own for name, own in batch.items() if name != "labels"}
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(**inputs).logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        falling.step()


@torch.no_grad()
def _accuracy(model: PeftModel, target: Target) -> float:
    right = []
    for start in range(0, len(target.test), PASS):
        batch = target.batch(target.test, range(start, min(start + PASS, len(target.test))))
        labels = batch.pop("labels")
        right.append(model(**batch).logits.argmax(-1) == labels)
    return round(100 * float(torch.cat(right).double().mean()), 4)


if __name__ == "__main__":
    main()
