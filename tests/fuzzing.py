"""Composes and inspects broken adapters, many in one process: `python -m tests.fuzzing --cases 600`.

Each ends in the numbers that the files say, computed here in float64, or in an error that names the adapter; soon, in
little memory, and without harm to the adapters beside it. Prints counts as JSON; exits 1 where one ends otherwise.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
from peft import get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_composition import AdapterError, CompositionConfig
from peft_composition.analysis.inspection import inspect_adapters
from peft_composition.tuner.locating import composition_layers

from . import tiny
from .mutations import CONFIG, ENDLESS, MUTATIONS, PICKLE, WEIGHTS


MEMORY = 2 << 30
SECONDS = 10  # of the processor, since a busy machine must not fail
WALL_SECONDS = 60  # what waits for something takes no processor
# Relative to the norm; the models are float64.
EXACT = 1e-11
ARGUMENTS = 6  # their share, as in MUTATIONS
MIX = (0.75, -1.5)
FIELDS: dict[str, list[Any]] = {
    "mixing": ["learned", "uniform", "fixed", "", None, 5, ["learned"], {}],
    "weights": [
        *([0.25, 0.75], [1, 0], (0.5, 0.5), [2, -1], [0.5], [], None, "ab", 5, [None, 1], [float("nan"), 1]),
        *([1e400, 0], [10**400, 0], [1e39, 1], torch.tensor([0.5, 0.5]), [True, False], [[0.5], [0.5]], {0: 1, 1: 0}),
    ],
    "normalization": ["softmax", "none", "sum", None, 3, []],
    "gain": [1, 40.0, 1e-3, 0, -1, float("nan"), 1e39, 10**400, "40", None, True, [1], torch.tensor(3.0)],
    "weight_sharing": ["module", "block", "model", "layer", None, 1],
    "target_modules": [
        "lin0",
        ["lin1"],
        {"lin0"},
        "all-linear",
        "(",
        "*",
        5,
        [5],
        "",
        [],
        "lin[01]",
        [None],
        {"a": 1},
    ],
    "exclude_modules": ["lin0", ["lin1"], "(", 5, [5], "", [], "head", {"lin0": 1}, [["lin0"]], "*"],
    "layers_to_transform": [0, [0, 1], "(", -1, 1.5, [None], [], True, {}, "0", 10**400],
    "layers_pattern": ["layers", ["h"], "(", 5, "", [5], "(.*)*!", {}],
    "modules_to_save": [["head"], ["head", "lin0"], "head", 5, [5], ["("], [], [""], {"head": 1}, ["(.*)*!"], True],
    "save_adapters": [True, False, None, "yes", 5],
    "adapters": [
        *([], None, 5, "me/a", {"path": "a"}, [5], [None], [[]], [""], [{}], [{"path": 5}], [{"path": ""}], ["."]),
        *([".."], ["/"], ["\0"], ["\ud800"], ["x" * 100_000], ["a\nb"], [b"a"], [{"path": "a", "name": 5}]),
        *([{"path": "a", "revision": 5}], [{"path": "a", "subfolder": "\0"}], [{"path": "a", "more": 1}], ["a", "a"]),
        *([{"path": ".", "subfolder": "x" * 5000}], [{"path": "a", "name": "\x1b[2J"}], ["a/b/c"], ["~"], ["a@b"]),
    ],
}


class _TooSlowError(BaseException):
    pass


def _too_slow(*_: Any) -> None:
    raise _TooSlowError


class Fuzzing:
    """Two healthy adapters, one that is broken anew for every case, and the counts."""

    def __init__(self, folder: Path, seed: int) -> None:
        base = tiny.build("mlp")
        self.seed = seed
        self.base = base.double()
        self.folder = folder
        self.good = tiny.save_lora(folder / "good", base, ["lin0", "lin1"], seed=1, r=2, lora_alpha=8)
        self.other = tiny.save_lora(folder / "other", base, ["lin0", "lin1"], seed=3, r=3, lora_alpha=3)
        self.whole = tiny.save_lora(folder / "whole", base, ["lin0", "lin1"], seed=2, r=4, lora_alpha=16)
        self.mutant = folder / "mutant"
        self.counts: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        self.slowest: tuple[float, str] = (0.0, "")

    def run(self, cases: Iterable[int]) -> None:
        shares = {kind: share for kind, (_, share) in MUTATIONS.items()} | {"arguments": ARGUMENTS}
        kinds = [kind for kind, share in shares.items() for _ in range(share)]
        for number in cases:
            self._case(kinds[number % len(kinds)], random.Random(f"{self.seed} {number}"), number)

    def _case(self, kind: str, draw: random.Random, number: int) -> None:
        what, start = "", time.process_time()
        try:
            signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
            if kind == "arguments":
                field = draw.choice([*FIELDS])
                value = draw.choice(FIELDS[field])
                what = f"{field}={str(value)[:100]!r}"
                outcome = self._arguments(field, value)
            else:
                shutil.rmtree(self.mutant, ignore_errors=True)
                shutil.copytree(self.whole, self.mutant)
                what = draw.choice(MUTATIONS[kind][0])(draw, self.mutant)
                outcome = self._adapter()
            self.counts[kind, outcome] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.failures.append(f"{kind} {number}: {what}\n{''.join(traceback.format_exception(error, limit=-8))}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.process_time() - start
        self.slowest = max(self.slowest, (seconds, f"{kind} {number}: {what}"))
        if seconds > SECONDS:
            self.failures.append(f"{kind} {number}: {what}\ntook {seconds:.1f} s")

    def _adapter(self) -> str:
        """Compose and inspect the broken adapter beside a healthy one; says how that ended."""
        reason = None
        try:
            model = self._compose([self.good, self.mutant], mixing="fixed", normalization="none", weights=list(MIX))
        except AdapterError as error:
            reason = error.reason
            _require_refusal(error, "adapter 'mutant': ")
        else:
            self._require_right(model, [self.good, self.mutant], MIX)
        for folders, base in (([self.mutant, self.good], self.base), ([self.good, self.mutant, self.other], None)):
            reports = inspect_adapters(CompositionConfig(adapters=[*folders]).references, base)
            assert [report.name for report in reports] == [folder.name for folder in folders]
            for report in reports:
                if report.name != "mutant":
                    assert report.reason is None, report
                elif base is not None:
                    # Not the same words always: safetensors names any one of the tensors that are wrong.
                    assert (report.reason is None) is (reason is None), (report.reason, reason)
                for text in (report.license, report.base, report.task_type, report.reason, *report.notes):
                    _require_readable(text or "")
        return "right" if reason is None else "refused"

    def _arguments(self, field: str, value: Any) -> str:
        """Compose two healthy adapters with an argument that may be anything."""
        fields: dict[str, Any] = {"adapters": [self.good, self.other], field: value}
        try:
            config = CompositionConfig(**fields)
            references = config.references
            model = get_peft_model(copy.deepcopy(self.base), config)
        except AdapterError as error:
            _require_refusal(error, "adapter " if field == "adapters" else field)
            inspect_adapters(references)
            return "refused"
        except ValueError as error:
            _require_refusal(error, "adapter" if field == "adapters" else field)
            return "refused"
        start = [0.5, 0.5]
        if field == "weights" and value is not None:
            start = [float(weight) for weight in value]
        self._require_right(model, [self.good, self.other], start, is_narrowed=True)
        return "right"

    def _compose(self, folders: list[Path], **fields: Any) -> nn.Module:
        return get_peft_model(copy.deepcopy(self.base), CompositionConfig(adapters=[*folders], **fields))

    def _require_right(self, model: Any, folders: list[Path], weights: Any, is_narrowed: bool = False) -> None:
        """The update of every composed module is the one that the files say."""
        adapters = [products(folder) for folder in folders]
        touched = {module for adapter in adapters for module in adapter}
        found = dict(composition_layers(model.get_base_model()))
        assert found.keys() <= touched if is_narrowed else found.keys() == touched, (found.keys(), touched)
        for module, layer in found.items():
            zero = torch.zeros_like(self.base.get_submodule(module).weight)
            terms = [weight * adapter.get(module, zero) for weight, adapter in zip(weights, adapters, strict=True)]
            delta, expected = layer.get_delta_weight("default").detach(), torch.stack(terms).sum(0)
            assert delta.shape == expected.shape
            size = torch.stack(terms).norm()
            assert torch.isfinite(delta).all()
            assert (delta - expected).norm() <= EXACT * size, (module, float((delta - expected).norm()), float(size))


def products(folder: Path) -> dict[str, Tensor]:
    """s B A in float64 by module, from the files; as simple as can be."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
    is_safe = (folder / WEIGHTS).is_file()
    tensors = load_file(folder / WEIGHTS) if is_safe else torch.load(folder / PICKLE, weights_only=True)
    plain = {_plain(key): tensor.detach().double() for key, tensor in tensors.items()}
    assert len(plain) == len(tensors)
    found = {}
    for key, A in plain.items():
        path, is_factor, end = key.partition(".lora_A")
        if not is_factor:
            continue
        assert end == ".weight"
        B = plain[f"{path}.lora_B.weight"]
        rank = A.shape[0]
        assert rank == _by_pattern(config.get("rank_pattern"), path, config.get("r") or rank)
        alpha = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        assert config.get("bias", "none") == "none"
        assert config["peft_type"] == "LORA"
        found[path] = scale * (B @ A)
    assert found
    return found


def _plain(key: str) -> str:
    return key.replace("_orig_mod.", "").replace(".default.", ".").removeprefix("base_model.model.")


def _by_pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """As PEFT, but for the keys that it never finishes to match."""
    keys = [key for key in pattern or {} if key not in ENDLESS]
    return (pattern or {}).get(get_pattern_key(keys, module), default)


def _require_refusal(error: Exception, named: str) -> None:
    """It names what is refused, and can be read."""
    assert named in str(error), error
    _require_readable(str(error))


def _require_readable(text: str) -> None:
    """One line of moderate length, without what a terminal obeys."""
    assert len(text) < 5000
    assert all(character.isprintable() for character in text), text
    text.encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of the one case to run again")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_slow)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzzing = Fuzzing(Path(folder), arguments.seed)
        fuzzing.run(range(100_000, 100_040))  # what is loaded late is loaded now
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        fuzzing.counts.clear()
        cases = range(arguments.cases) if arguments.only is None else [arguments.only]
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        faulthandler.dump_traceback_later(arguments.cases + 120, exit=True)
        fuzzing.run(cases)
        faulthandler.cancel_dump_traceback_later()
    counts: dict[str, dict[str, int]] = {}
    for (kind, outcome), count in sorted(fuzzing.counts.items()):
        counts.setdefault(kind, {"right": 0, "refused": 0})[outcome] = count
    result = {
        "cases": len(cases),
        "right": sum(row["right"] for row in counts.values()),
        "refused": sum(row["refused"] for row in counts.values()),
        "kinds": counts,
        "seconds": round(time.perf_counter() - start, 1),
        "memory_before": before,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "slowest": fuzzing.slowest,
        "failures": fuzzing.failures,
    }
    print(json.dumps(result, indent=2))
    sys.exit(bool(fuzzing.failures))


if __name__ == "__main__":
    main()
