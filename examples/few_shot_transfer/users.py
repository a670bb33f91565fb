"""Simulated users: each has K examples per class and some adapters, cross-fits every method, and has a truth to meet.

Bodies are frozen and their features cached; a mix by evidence is a stand-in for the models (`stand_in.py`). The fresh
LoRA is a real one, on the last block alone, whose inputs are cached. What a verdict says of these users, and how often
it is wrong, is in `calibration.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from peft_composition.comparing.heads import Budget, predict, train_heads
from peft_composition.comparing.splits import cross_fit
from peft_composition.comparing.tasks import best_and_weights

from .bench import BASE, BATCH, UNIFORM, Bench, Draw
from .records import Record, cut_torn_line, write_line
from .scenario import Scenario
from .stand_in import Corners, Recipe, train


HEAD_ONLY, SINGLE, EVIDENCE, LEARNED = "head only", "best single", "evidence", "evidence, learned"
FRESH = {1.0: "fresh LoRA", 0.5: "fresh LoRA x 0.5"}
WITHOUT_ADAPTERS = (HEAD_ONLY, *FRESH.values())
WITH_ADAPTERS = (SINGLE, UNIFORM, EVIDENCE, LEARNED)
FOLDS = 5
RANK, ALPHA, LORA_STEPS, LORA_RATE, LORA_BATCH = 16, 16, 40, 2e-3, 8
MOST_TEST = 1000


@dataclass
class LastBlock:
    """The last block of a sentence encoder with a LoRA on its query, key and value, for several folds at once.

    Attributes:
        layer: the block.
        states: what it is given for the examples, each of shape (tokens, width), in half precision.
    """

    layer: nn.Module
    states: Sequence[Tensor]

    def features(self, rows: Tensor, factors: Sequence[Tensor] | None, scale: float) -> Tensor:
        """Pooled features of examples under each fold's own LoRA.

        Args:
            rows: shape (folds, batch).
            factors: A and B of query, key and value, shapes (folds, rank, width) and (folds, width, rank).
            scale: of the product.

        Returns:
            Shape (folds, batch, width).
        """
        folds, batch = rows.shape
        states = nn.utils.rnn.pad_sequence([self.states[int(row)] for row in rows.flatten()], batch_first=True).float()
        lengths = torch.tensor([len(self.states[int(row)]) for row in rows.flatten()])
        mask = torch.arange(states.shape[1])[None] < lengths[:, None]
        own: Any = self.layer.attention
        by_fold = states.view(folds, -1, states.shape[-1])
        parts = []
        for number, linear in enumerate((own.self.query, own.self.key, own.self.value)):
            value = linear(states)
            if factors is not None:
                down, up = factors[2 * number : 2 * number + 2]
                value = value + scale * (by_fold @ down.mT @ up.mT).view_as(value)
            heads = own.self.num_attention_heads
            parts.append(value.view(*value.shape[:2], heads, -1).transpose(1, 2))
        query, key, value = parts
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        attended = own.output(mixed.transpose(1, 2).reshape(states.shape), states)
        layer: Any = self.layer
        last = layer.output(layer.intermediate(attended), attended)
        pooled = (last * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return pooled.view(folds, batch, -1)


@torch.no_grad()
def with_tests(spec: Scenario, more: int = 0) -> Scenario:
    """The scenario with `MOST_TEST` test examples, and some more."""
    return replace(spec, downstream=replace(spec.downstream, test_size=MOST_TEST + more))


def last_block(bench: Bench, rows: Dataset) -> LastBlock:
    """The last block and its inputs for some examples."""
    model: Any = bench.model.build(bench.classes, 0).eval()
    layer = model.bert.encoder.layer[-1]
    encoded: Any = bench.model.encode(rows)
    order = np.argsort([len(ids) for ids in encoded["input_ids"][:]], kind="stable")
    seen: list[Tensor] = []
    found: list[Tensor] = [torch.empty(0)] * len(order)
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = bench.model.collate([encoded[int(index)] for index in chosen])
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for index, state, length in zip(chosen, seen.pop(), batch["attention_mask"].sum(1)):
            found[int(index)] = state[: int(length)].half()
    hook.remove()
    return LastBlock(layer.requires_grad_(False), found)


def simulate(
    bench: Bench,
    draws: Sequence[Draw],
    known: Sequence[Record] = (),
    trains: bool = True,
    progress: bool = True,
    earlier: Sequence[Record] | None = None,
) -> Iterator[Record]:
    """Every draw of the support set is a user.

    Args:
        bench: a task of sentences, or of images where nothing trains a body.
        draws: K and seeds.
        known: records that there are; their users are not simulated again.
        trains: whether with a fresh LoRA and with weights that train on from evidence, which take most of the time.
        progress: whether to show a progress bar.
        earlier: records of other choices of weights, which the fresh LoRAs are taken from, because they do not depend
            on these. Their users are simulated in place of `draws`; who had no fresh LoRA gets none.

    Yields:
        For each user: for every method whether each example is named rightly when it is left out, the probability of
        its class (in hundredths), and the same of test examples by the method trained on all. A single example of a
        class cannot be left out: at K = 1 there are test examples alone.

    Raises:
        ValueError: a body is to be trained, and it is not one of sentences.
    """
    if trains and earlier is None and bench.model.spec.kind != "sentence":
        raise ValueError(f"{bench.scenario.name} has images: give --fast; the fresh LoRA is one of sentence encoders")
    facts = bench.facts
    done = {(r["k"], r["seed"]) for r in known if {**r, **facts} == r}
    kept = {(r["k"], r["seed"]): _fresh_of(r) for r in earlier or () if {**r, **facts} == r}
    draws = draws if earlier is None else list(kept)
    wanted = [draw for draw in draws if draw not in done]
    if not wanted:
        return
    bench.prepare(wanted)
    support, test = None, None
    place: dict[int, int] = {}
    if trains and earlier is None:
        pool = sorted({index for draw in wanted for index in bench.support(draw)})
        place = {index: number for number, index in enumerate(pool)}
        support, test = last_block(bench, bench.task.train.select(pool)), last_block(bench, bench.judged["test"])
    for draw in tqdm(wanted, desc=" ".join(facts.values()), unit="user", disable=not progress):
        started = time.perf_counter()
        own = None
        if support is not None:
            own = LastBlock(support.layer, [support.states[place[index]] for index in bench.support(draw)])
        learns = own is not None or bool(kept.get(draw))
        methods = _methods(bench, draw, own, test, learns) | kept.get(draw, {})
        methods = {name: methods[name] for name in (*WITHOUT_ADAPTERS, *WITH_ADAPTERS) if name in methods}
        seconds = round(time.perf_counter() - started, 2)
        yield {
            **facts,
            "k": draw[0],
            "seed": draw[1],
            "classes": bench.classes,
            "methods": methods,
            "seconds": seconds,
        }


def _fresh_of(record: Record) -> dict[str, Any]:
    return {name: own for name, own in record["methods"].items() if name in FRESH.values()}


def _methods(bench: Bench, draw: Draw, own: LastBlock | None, test: LastBlock | None, learns: bool) -> dict[str, Any]:
    labels, names, seed = bench.labels(draw), (*bench.names, UNIFORM, BASE), draw[1]
    corners = Corners.of({name: bench.features(name, draw) for name in names}, bench.names)
    judged = Corners.of({name: bench.features(name, "test") for name in names}, bench.names)
    everything = torch.arange(len(labels))
    folds = None if draw[0] == 1 else cross_fit(labels, FOLDS, 1, seed)[0]
    trained_on = [everything]
    if folds is not None:
        trained_on = [*((folds != fold).nonzero().flatten() for fold in range(int(folds.max()) + 1)), everything]
    picked, weights = zip(*(_chosen(bench, draw, rows) for rows in trained_on))
    inputs, tests = [], []
    for pick, weight in zip(picked, weights):
        rows = {
            HEAD_ONLY: lambda c, p, w: c.base,
            SINGLE: lambda c, p, w: c.adapters[p],
            UNIFORM: lambda c, p, w: c.uniform,
            EVIDENCE: lambda c, p, w: c.mixed(w.float()),
        }
        inputs.append(torch.stack([make(corners, pick, weight) for make in rows.values()]))
        tests.append(torch.stack([make(judged, pick, weight) for make in rows.values()]))
    budget = Budget(batch_size=LORA_BATCH)
    heads = train_heads(torch.stack(inputs, 1), labels, trained_on, bench.classes, budget, seed)
    logits = dict(zip(rows, predict(heads, torch.stack(inputs, 1))))  # (folds, n, classes)
    test_logits = dict(zip(rows, predict([part[:, -1:] for part in heads], tests[-1][:, None])[:, 0]))
    if learns:
        logits[LEARNED], test_logits[LEARNED] = _learned(
            corners, judged, labels, trained_on, weights, bench.classes, seed
        )
    if own is not None and test is not None:
        factors, lora_heads = _fresh(own, labels, trained_on, bench.classes, seed)
        every = everything[None].expand(len(trained_on), -1)
        with torch.no_grad():
            for scale, name in FRESH.items():
                logits[name] = predict(lora_heads, own.features(every, factors, scale * ALPHA / RANK)[None])[0]
                last = [factor[-1:] for factor in factors]
                pooled = [
                    test.features(rows[None], last, scale * ALPHA / RANK)[0]
                    for rows in torch.arange(len(test.states)).split(BATCH)
                ]
                test_logits[name] = predict([part[:, -1:] for part in lora_heads], torch.cat(pooled)[None, None])[0, 0]
    truth = bench.judged_labels["test"]
    return {
        name: (_described(logits[name][folds, everything], labels, "") if folds is not None else {})
        | _described(test_logits[name], truth, "test_")
        for name in (*WITHOUT_ADAPTERS, *WITH_ADAPTERS)
        if name in logits
    }


def _chosen(bench: Bench, draw: Draw, rows: Tensor) -> tuple[int, Tensor]:
    """The adapter that is best by evidence of some examples of a draw, and the weights: as `compare_methods` does."""
    features = [bench.features(name, draw)[rows] for name in (*bench.names, UNIFORM, BASE)]
    return best_and_weights(features, bench.labels(draw)[rows], bench.told(draw, rows), draw[1])


def _learned(
    corners: Corners,
    judged: Corners,
    labels: Tensor,
    trained_on: Sequence[Tensor],
    weights: Sequence[Tensor],
    classes: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    found, last = [], torch.empty(0)
    for rows, start in zip(trained_on, weights):
        part = Corners(corners.adapters[:, rows], corners.uniform[rows], corners.base[rows])
        head, learned = train(part, labels[rows], start, classes, Recipe(), LORA_BATCH, seed)
        with torch.no_grad():
            found.append(head(corners.mixed(learned)))
            last = head(judged.mixed(learned)) if rows is trained_on[-1] else last
    return torch.stack(found), last


def _fresh(
    block: LastBlock, labels: Tensor, trained_on: Sequence[Tensor], classes: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """A fresh LoRA and a fresh head for each fold, trained together."""
    generator = torch.Generator().manual_seed(seed)
    width, folds = block.states[0].shape[1], len(trained_on)
    factors: list[Tensor] = []
    for _ in range(3):
        down = (torch.rand(RANK, width, generator=generator) * 2 - 1) / width**0.5  # as PEFT's kaiming_uniform_
        factors += [down.repeat(folds, 1, 1), torch.zeros(folds, width, RANK)]
    head = torch.randn(width, classes, generator=generator) * 0.02
    heads = [head.repeat(1, folds, 1, 1), torch.zeros(1, folds, classes)]
    for parameter in (*factors, *heads):
        parameter.requires_grad_(True)
    groups = [{"params": factors, "lr": LORA_RATE}, {"params": heads, "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / LORA_STEPS)
    orders = [_order(rows, LORA_STEPS * LORA_BATCH, seed).view(LORA_STEPS, -1) for rows in trained_on]
    for batch in torch.stack(orders, 1):  # (folds, batch)
        logits = predict(heads, block.features(batch, factors, ALPHA / RANK)[None])[0]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[batch].flatten(), reduction="sum") / batch.shape[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return [factor.detach() for factor in factors], [part.detach() for part in heads]


def _order(rows: Tensor, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    passes = -(-count // len(rows))
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)] for _ in range(passes)])[:count]


def _described(logits: Tensor, labels: Tensor, prefix: str) -> dict[str, Any]:
    right = (logits.argmax(-1) == labels).int().tolist()
    if prefix:
        return {f"{prefix}correct": packed(right)}
    chances = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    return {"correct": packed(right), "chance": [round(100 * value) for value in chances.tolist()]}


def packed(right: Sequence[int]) -> str:
    """Zeros and ones as their number and hexadecimal digits."""
    return f"{len(right)}:{int(''.join(map(str, right)), 2):x}"


def unpacked(text: str) -> np.ndarray:
    """What `packed` made of them, as floats (n,)."""
    count, digits = text.split(":")
    return np.array([float(bit) for bit in f"{int(digits, 16):0{int(count)}b}"])


def write(records: Iterator[Record], path: Path) -> None:
    """Add users to a file of JSON lines as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_torn_line(path)
    for record in records:
        write_line(path, json.dumps(record, sort_keys=True))
