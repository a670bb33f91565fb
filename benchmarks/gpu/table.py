"""What a run on a GPU found, as one text: short enough to be all that comes back from a machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..peers import BASE, COMPOSITION, FROZEN, LOOP, LORA, MERGED, PEFT


STEP_GOAL, MEMORY_GOAL = 1.10, 1.05  # of LoRA's, with N = 20 in bf16
ORDER = [LORA, COMPOSITION, MERGED, FROZEN, BASE, PEFT, LOOP]
HEADINGS = {
    LORA.title: "LoRA",
    COMPOSITION.title: "ours",
    MERGED.title: "merged",
    FROZEN.title: "frozen",
    BASE.title: "base",
    PEFT.title: "PEFT",
    LOOP.title: "loop",
}
LONGEST_ERROR = 200


def table(document: dict[str, Any]) -> Iterator[str]:
    """The lines: checks, times and sizes of all peers, launches, failures, goals, and the machine."""
    rows = document["rows"]
    yield from _checks([row for row in rows if "passed" in row])
    measured = [row for row in rows if "peer" in row]
    yield from _grid("milliseconds", measured, "ms")
    yield from _grid("peak memory, MB", measured, "peak_mb")
    yield from _grid("saved for backward, MB", measured, "saved_mb")
    yield from _launches([row for row in measured if "kernels" in row or "operators" in row])
    skipped = dict.fromkeys(
        f"skipped {row['model']} {row['what']} N={row['N']} {row['peer']}: {row['skipped'][:90]}"
        for row in measured
        if "skipped" in row
    )
    yield from skipped
    for failure in document["failures"]:
        yield f"FAILED {failure['part']}: {failure['error'][:LONGEST_ERROR]}"
    yield "left out: " + (", ".join(document["left_out"]) or "nothing")
    yield from _goals(measured)
    machine = document["machine"]
    versions = " ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft"))
    yield f"{machine.get('gpu', machine['cpu'])}, {versions}, {document['seconds']:.0f} s"


def _checks(rows: list[dict[str, Any]]) -> Iterator[str]:
    failed = [row for row in rows if not row["passed"]]
    yield f"checks: {len(rows) - len(failed)} of {len(rows)} passed"
    for row in failed:
        yield f"  FAILED {row['part']}: {row['check']}: {row['error']:.3g} > {row['bound']:.3g}"
    worst: dict[str, float] = {}
    for row in rows:
        if row["bound"]:
            worst[row["check"]] = max(row["error"] / row["bound"], worst.get(row["check"], 0.0))
    yield "largest error / bound: " + ", ".join(f"{name} {share:.2f}" for name, share in worst.items())


def _grid(heading: str, rows: list[dict[str, Any]], key: str) -> Iterator[str]:
    """One line for every model, call and N, one column for every peer."""
    cells: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        if key in row:
            # The reference is measured again beside slow peers; its first figures are those beside ours.
            cells.setdefault((row["model"], row["what"], row["N"]), {}).setdefault(row["peer"], row[key])
    if not cells:
        return
    titles = [peer.title for peer in ORDER if any(peer.title in found for found in cells.values())]
    yield f"\n{heading:39}  N" + "".join(f"{HEADINGS[title]:>8}" for title in titles) + "  ours/LoRA"
    for (model, what, count), found in cells.items():
        numbers = "".join(f"{_number(found.get(title)):>8}" for title in titles)
        ratio = ""
        if LORA.title in found and COMPOSITION.title in found:
            ratio = f"{found[COMPOSITION.title] / found[LORA.title]:11.3f}"
        yield f"{f'{model} {what}'[:37]:37} {count:4}{numbers}{ratio}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _launches(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        extra = [
            f"{key} {row[key]:.1f}" if key == "busy_ms" else f"{key} {row[key]}"
            for key in ("kernels", "operators", "busy_ms", "waits_of_ours", "waits_of_others")
            if key in row
        ]
        yield f"a step of {row['model']}, N={row['N']}, {row['peer']}: {', '.join(extra)}"


def _goals(rows: list[dict[str, Any]]) -> Iterator[str]:
    steps = [row for row in rows if row["what"] == "training step" and row["N"] == 20]
    for model in dict.fromkeys(row["model"] for row in steps):
        of = {row["peer"]: row for row in reversed(steps) if row["model"] == model}
        for what, key, goal in (("step", "ms", STEP_GOAL), ("memory", "peak_mb", MEMORY_GOAL)):
            pair = [of.get(peer.title, {}).get(key) for peer in (COMPOSITION, LORA)]
            if None in pair:
                yield f"goal {model} N=20 {what}: not measured"
                continue
            ratio = pair[0] / pair[1]
            yield f"goal {model} N=20 {what}: {ratio:.3f} of LoRA's, at most {goal:.2f}: " + (
                "met" if ratio <= goal else "NOT MET"
            )
