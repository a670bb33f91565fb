"""What scenarios will cost on a GPU, as a Markdown table: an estimate from counts and stated assumptions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .counting import Body, Sizes, Tally, Work, sizes_of, tally
from .footprint import footprint
from .markdown import table
from .scenario import Scenario


ANSWER_BATCH = 16  # as in language_model.py


@dataclass(frozen=True)
class Assumptions:
    """What a machine is taken to do.

    Args:
        tflops: 10^12 floating point operations a second that training sustains.
        images: images that are decoded, resized and normalised in a second.
        step: least seconds of an optimizer step: the time to launch it.
        head_step: seconds of a step of a head alone.
        token: seconds of a token that is generated for a batch of answers.
    """

    tflops: float = 20.0
    images: float = 1600.0
    step: float = 0.05
    head_step: float = 0.004
    token: float = 0.03

    def __str__(self) -> str:
        return (
            f"{self.tflops:g} TFLOP/s sustained (float32 with TF32 on an A100); {self.images:g} images/s read, "
            "decoded and resized (eight CPU cores at 200, one for each process of the loader); at least "
            f"{self.step:g} s a step, {self.head_step:g} s a step of a head alone, and {self.token:g} s for a token "
            f"of {ANSWER_BATCH} answers"
        )


@dataclass(frozen=True)
class Cost:
    """Of a piece of work: FLOPs, and seconds that the GPU computes, waits for images, and is in use in all."""

    flops: float = 0.0
    computing: float = 0.0
    images: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.computing + other.computing,
            self.images + other.images,
            self.seconds + other.seconds,
        )


def cost_of(scenario: Scenario, work: Iterable[Work], assumed: Assumptions) -> Cost:
    """The sum over pieces of work; each takes as long as the slower of computing and reading images."""
    total = Cost()
    for own in work:
        one = footprint(scenario.model, own.body, scenario.downstream.batch_size, _tokens(scenario, own.task))
        flops = own.trained * one.step + (own.seen + own.answered) * one.forward
        generating = math.ceil(own.answered / ANSWER_BATCH) * scenario.model.max_new_tokens * assumed.token
        computing = max(flops / (assumed.tflops * 1e12), own.steps * assumed.step) + generating
        images = (own.trained + own.seen) / assumed.images if scenario.model.kind == "image" else 0.0
        seconds = max(computing, images) + own.head_steps * assumed.head_step
        total += Cost(flops, computing, images, seconds)
    return total


def memory_of(scenario: Scenario) -> dict[str, int | None]:
    """Bytes of the hungriest step of upstream training, full fine-tuning and learned composition; None: not run.

    Texts are taken to fill the batch to the model's `max_length`.
    """
    how, model = scenario.downstream, scenario.model
    settings = list(scenario.settings())
    targets = [sizes_of(scenario, setting.target) for setting in settings]
    upstream = [(sizes_of(scenario, name), rank) for name, rank in scenario.wanted()]
    ranks = max(rank for _, rank in upstream)
    answer = max(sizes.answer for sizes in (*targets, *(own for own, _ in upstream)))
    most = max(max(sizes.support(k) for k in how.shots) for sizes in targets)
    adapters = max(len(setting.upstream) for setting in settings)

    def bytes_of(body: Body, batch: int) -> int:
        return footprint(model, body, batch, (model.max_length, answer)).memory

    batch = min(how.batch_size, most)
    learned = any(method in scenario.methods for method in ("learned", "learned-free", "random-learned"))
    return {
        "upstream": bytes_of(Body("lora", ranks), scenario.upstream.batch_size),
        "full": bytes_of(Body("full"), batch) if "full" in scenario.methods else None,
        "learned": bytes_of(Body("mixing", ranks, adapters), batch) if learned else None,
    }


def write(scenarios: Sequence[Scenario], assumed: Assumptions) -> str:
    """The table, what it assumes, and the commands."""
    columns = (
        "scenario",
        "LoRAs",
        "runs",
        "of them computed",
        "steps",
        "steps of heads",
        "examples",
        "PFLOP",
        "computing, h",
        "images, h",
        "GPU hours",
        "GB upstream",
        "GB full",
        "GB learned",
    )
    rows: list[list[str]] = []
    upstream: dict[str, Work] = {}
    total = Cost()
    for scenario in scenarios:
        counted = tally(scenario)
        new = {key: work for key, work in counted.upstream.items() if key not in upstream}
        upstream.update(new)
        downstream = cost_of(scenario, counted.downstream, assumed)
        total += downstream + cost_of(scenario, new.values(), assumed)
        rows.append(_row(scenario, counted, downstream + cost_of(scenario, counted.upstream.values(), assumed)))
    together = ["**all, LoRAs shared**", str(len(upstream)), *[""] * 5, *_hours(total), "", "", ""]
    commands = [f"accelerate launch -m examples.few_shot_transfer run {scenario.name}" for scenario in scenarios]
    return "\n".join(
        [table(columns, [*rows, together]), "", f"An estimate. Assumed: {assumed}.", "", "```", *commands, "```"]
    )


def _row(scenario: Scenario, counted: Tally, cost: Cost) -> list[str]:
    works = [*counted.upstream.values(), *counted.downstream]
    sums = (
        sum(work.steps for work in works),
        sum(work.head_steps for work in works),
        sum(work.trained + work.seen + work.answered for work in works),
    )
    memory = ["-" if size is None else f"{size / 1e9:.1f}" for size in memory_of(scenario).values()]
    counts = (len(counted.upstream), counted.runs, counted.computed, *sums)
    return [f"`{scenario.name}`", *(f"{count:,}" for count in counts), *_hours(cost), *memory]


def _hours(cost: Cost) -> list[str]:
    hours = (cost.computing / 3600, cost.images / 3600, cost.seconds / 3600)
    return [f"{cost.flops / 1e15:,.0f}", *(f"{value:.1f}" for value in hours)]


def _tokens(scenario: Scenario, sizes: Sizes) -> tuple[int, int]:
    """Of a question and its answer; no more than the model reads, which is what is taken where nothing is known."""
    longest = scenario.model.max_length
    return min(sizes.question or longest, longest), sizes.answer
