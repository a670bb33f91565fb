"""Checks on a device against float64 on the CPU: every form, dtype and way of training, on tiny models."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from peft_composition import CompositionConfig, to_lora


RANK, ALPHA = 4, 6
# Products of a few hundred terms through four layers: what rounding adds up to, in units of the dtype's eps. A
# gradient passes through them twice, and the mixing weights subtract nearly equal numbers.
OUTPUT_EPS, GRADIENT_EPS = 8, 64


@dataclass(frozen=True)
class Check:
    """A relative error and its bound; `error` is 0 or 1 where something holds or does not."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN


class Net(nn.Module):
    """An embedding, a convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.conv = nn.Conv1d(32, 48, 3, padding=1)
        self.wide = nn.Linear(48, 96)
        self.out = nn.Linear(96, 8)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, length) -> (batch, 8)."""
        x = self.conv(self.words(ids).mT).mT
        return self.out(torch.nn.functional.gelu(self.wide(x))).mean(1)


TARGETS = ("words", "conv", "wide", "out")


class Bench:
    """A `Net`, adapters for it in a folder, and the formula in float64.

    Args:
        folder: where the adapters are written.
        device: where compositions are checked.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device, self.folder = device, folder
        self.net = Net().requires_grad_(False)
        self.ids = torch.randint(0, 50, (6, 12))
        self.targets = torch.randn(6, 8)
        self._folders: list[Path] = []

    def adapters(self, count: int) -> list[str]:
        for seed in range(len(self._folders), count):
            torch.manual_seed(seed)
            config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), init_lora_weights=False)
            lora = get_peft_model(copy.deepcopy(self.net), config)
            with torch.no_grad():
                for name, parameter in lora.named_parameters():
                    if "lora_" in name:
                        parameter.normal_(std=0.2)
            self._folders.append(self.folder / f"adapter-{seed}")
            lora.save_pretrained(str(self._folders[-1]))
        return [str(folder) for folder in self._folders[:count]]

    def compose(self, count: int, dtype: torch.dtype = torch.float32, scatter: bool = True) -> PeftModel:
        """A learned composition on the device, with mixing weights away from their start."""
        base = copy.deepcopy(self.net).to(self.device, dtype)
        model = get_peft_model(base, CompositionConfig(adapters=list(self.adapters(count))))
        if scatter:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for theta in thetas(model).values():
                    theta.add_((torch.randn(theta.shape, generator=generator) / 40).to(theta.device))
        return model

    @torch.enable_grad()
    def formula(
        self, model: PeftModel, count: int, dtype: torch.dtype = torch.float32, gain: float = 40.0
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Output, loss and the gradient of every theta of W0 + sum_n softmax(gain theta)_n s B_n A_n, in float64."""
        own = {name: theta.detach().double().cpu().requires_grad_() for name, theta in thetas(model).items()}
        weights = {
            name: parameter.to(dtype).double() for name, parameter in copy.deepcopy(self.net).named_parameters()
        }
        for name, theta in own.items():
            w = torch.softmax(gain * theta, 0)
            deltas = [self._delta(folder, name, weights[f"{name}.weight"]) for folder in self.adapters(count)]
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + (w @ torch.stack(deltas).flatten(1)).view_as(
                deltas[0]
            )
        output = functional_call(self.net.double(), weights, (self.ids,))
        self.net.float()
        loss = (output - self.targets.double()).square().mean()
        loss.backward()
        return output.detach(), loss.detach(), {name: theta.grad for name, theta in own.items()}  # type: ignore[misc]

    def _delta(self, folder: str, name: str, weight: Tensor) -> Tensor:
        saved = load_file(Path(folder, "adapter_model.safetensors"))
        prefix = f"base_model.model.{name}.lora_"
        if name == "words":
            A, B = saved[f"{prefix}embedding_A"].double(), saved[f"{prefix}embedding_B"].double()
            return ALPHA / RANK * (B @ A).T
        A, B = saved[f"{prefix}A.weight"].double(), saved[f"{prefix}B.weight"].double()
        return ALPHA / RANK * (B.flatten(1) @ A.flatten(1)).view_as(weight)

    def output(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        return model(self.ids.to(self.device))

    def loss(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        return (self.output(model).float() - self.targets.to(self.device)).square().mean()


def thetas(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameter of every composed module."""
    marker = ".composition_mixing.default.weight"
    return {
        name.removesuffix(marker).removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(marker)
    }


def error_of(actual: Tensor, expected: Tensor) -> float:
    """The relative error in the Frobenius norm."""
    expected = expected.double().cpu()
    return float((actual.detach().double().cpu() - expected).norm() / expected.norm())


def worst(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(error_of(actual[name], expected[name]) for name in expected)


def run(device: torch.device) -> Iterator[tuple[str, Callable[[], list[Check]]]]:
    """The checks by name, each to be called; they share one folder of adapters."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for count in (1, 5, 64):
                yield f"forms {_short(dtype)} N={count}", partial(forms, bench, dtype, count)
        for dtype in (torch.bfloat16, torch.float16):
            yield f"autocast {_short(dtype)}", partial(autocast, bench, dtype)
        yield "gradient bit for bit", lambda: reproducible(bench)
        yield "no stale folds", lambda: no_stale_folds(bench)
        yield "DataParallel", lambda: data_parallel(bench)
        yield "torch.compile", lambda: compiled(bench, "aot_eager")
        if device.type == "cuda":
            yield "torch.compile, inductor", lambda: compiled(bench, "inductor")
        yield "merge, unmerge, export", lambda: merged(bench)
        yield "two compositions", lambda: two_compositions(bench)
        yield "save and reload", lambda: reloaded(bench)
        yield "Trainer", lambda: trainer(bench)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forms(bench: Bench, dtype: torch.dtype, count: int) -> list[Check]:
    """Every form of layer: with gradient, and folded without."""
    eps = torch.finfo(dtype).eps
    model = bench.compose(count, dtype)
    output, _, gradients = bench.formula(model, count, dtype)
    bench.loss(model).backward()
    found = {name: theta.grad for name, theta in thetas(model).items() if theta.grad is not None}
    checks = [Check("output", error_of(bench.output(model), output), OUTPUT_EPS * eps)]
    if count > 1:  # the weight of a single adapter is 1, whatever theta
        checks.append(Check("gradient", worst(found, gradients), GRADIENT_EPS * eps))
    with torch.no_grad():
        checks.append(Check("folded", error_of(bench.output(model.eval()), output), OUTPUT_EPS * eps))
    return checks


def autocast(bench: Bench, dtype: torch.dtype) -> list[Check]:
    """A float32 model under autocast; in float16 with a loss scaler, whose steps move the weights."""
    model = bench.compose(5)
    output, _, _ = bench.formula(model, 5)
    device_type = bench.device.type
    eps = torch.finfo(dtype).eps
    with torch.autocast(device_type, dtype):
        checks = [Check("output", error_of(bench.output(model), output), OUTPUT_EPS * eps)]
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)
    before = {name: theta.detach().clone() for name, theta in thetas(model).items()}
    optimizer = torch.optim.AdamW(thetas(model).values(), lr=1e-3)
    losses = []
    for _ in range(10):
        with torch.autocast(device_type, dtype):
            loss = bench.loss(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    moved = all(bool((theta != before[name]).all()) for name, theta in thetas(model).items())
    return [*checks, _holds("weights move", moved), _holds("loss falls", losses[-1] < losses[0])]


def reproducible(bench: Bench) -> list[Check]:
    """The same gradient to the last bit, again and again."""
    model = bench.compose(64)
    found = []
    for _ in range(5):
        model.zero_grad()
        bench.loss(model).backward()
        found.append(torch.cat([theta.grad for theta in thetas(model).values() if theta.grad is not None]).clone())
    return [_holds("five times", all(torch.equal(found[0], other) for other in found[1:]))]


def no_stale_folds(bench: Bench) -> list[Check]:
    """Fused optimizers move no version counters; a pass without gradient lies between backward and step."""
    model = bench.compose(5)
    optimizer = torch.optim.AdamW(thetas(model).values(), lr=1e-2, fused=True)
    errors = []
    for _ in range(3):
        bench.loss(model).backward()
        with torch.no_grad():
            bench.output(model)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            errors.append(error_of(bench.output(model), bench.formula(model, 5)[0]))
    return [Check("after three steps", max(errors), OUTPUT_EPS * torch.finfo(torch.float32).eps)]


def data_parallel(bench: Bench) -> list[Check]:
    """What `nn.DataParallel` does, which the Trainer uses where one process sees several devices.

    With one device it would call the model itself. So the replicas are made here, two on the same device.
    """
    model = bench.compose(5)
    output, _, gradients = bench.formula(model, 5)
    eps = torch.finfo(torch.float32).eps
    if bench.device.type != "cuda":  # PyTorch replicates on accelerators alone
        return [Check("output", error_of(bench.output(nn.DataParallel(model)), output), OUTPUT_EPS * eps)]
    devices = [bench.device, bench.device]
    halves = bench.ids.to(bench.device).chunk(2)
    replicas = nn.parallel.replicate(model, devices)
    parts = nn.parallel.parallel_apply(replicas, [(half,) for half in halves], devices=devices)
    found = torch.cat(parts)
    (found - bench.targets.to(bench.device)).square().mean().backward()
    own = {name: theta.grad for name, theta in thetas(model).items() if theta.grad is not None}
    return [
        Check("output", error_of(found, output), OUTPUT_EPS * eps),
        Check("gradient", worst(own, gradients), GRADIENT_EPS * eps),
    ]


def compiled(bench: Bench, backend: str) -> list[Check]:
    """One graph for training and one for inference, and weights that move between."""
    model = bench.compose(5)
    torch.compiler.reset()
    graph = torch.compile(model, fullgraph=True, backend=backend)
    eps = torch.finfo(torch.float32).eps
    output, _, gradients = bench.formula(model, 5)
    bench.loss(graph).backward()
    found = {name: theta.grad for name, theta in thetas(model).items() if theta.grad is not None}
    checks = [Check("gradient", worst(found, gradients), GRADIENT_EPS * eps)]
    with torch.no_grad():
        checks.append(Check("output", error_of(bench.output(graph), output), OUTPUT_EPS * eps))
        for theta in thetas(model).values():
            theta.add_(torch.linspace(0, 0.02, len(theta), device=theta.device))
        checks.append(Check("moved", error_of(bench.output(graph), bench.formula(model, 5)[0]), OUTPUT_EPS * eps))
    return checks


def merged(bench: Bench) -> list[Check]:
    """Merging, unmerging, and the plain LoRA in PEFT."""
    eps = torch.finfo(torch.float32).eps
    model = bench.compose(5).eval()
    output, _, _ = bench.formula(model, 5)
    export = to_lora(model)
    plain = copy.deepcopy(bench.net).to(bench.device)
    with torch.no_grad():
        model.merge_adapter()
        checks = [Check("merged", error_of(bench.output(model), output), OUTPUT_EPS * eps)]
        model.unmerge_adapter()
        checks.append(Check("unmerged", error_of(bench.output(model), output), OUTPUT_EPS * eps))
        with model.disable_adapter():
            base = bench.output(plain)
            checks.append(Check("disabled", error_of(bench.output(model), base), OUTPUT_EPS * eps))
        with tempfile.TemporaryDirectory() as folder:
            export.save_pretrained(folder)
            lora = PeftModel.from_pretrained(plain, folder).eval()
        checks.append(Check("exported", error_of(bench.output(lora), output), OUTPUT_EPS * eps))
    return checks


def two_compositions(bench: Bench) -> list[Check]:
    """Active compositions add up: twice the same is the base and two updates."""
    model = bench.compose(5).eval()
    model.add_adapter("again", CompositionConfig(adapters=list(bench.adapters(5)), mixing="uniform"))
    with torch.no_grad():
        model.base_model.set_adapter(["default", "again"])  # type: ignore[operator]
        together = {name: _delta_of(model, name) for name in TARGETS}
        model.base_model.set_adapter("default")  # type: ignore[operator]
        alone = {name: _delta_of(model, name) for name in TARGETS}
    uniform = {name: torch.stack([bench._delta(f, name, _weight(bench.net, name)) for f in bench.adapters(5)]).mean(0)
               for name in TARGETS}  # fmt: skip
    found = {name: together[name].double().cpu() - alone[name].double().cpu() for name in TARGETS}
    return [Check("their sum", worst(found, uniform), 64 * torch.finfo(torch.float32).eps)]


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).get_parameter("weight")


def _delta_of(model: PeftModel, name: str) -> Tensor:
    layer = model.get_base_model().get_submodule(name)
    active = [adapter for adapter in layer.active_adapters if adapter in layer.composition_factors]  # type: ignore[union-attr, operator]
    return torch.stack([layer.get_delta_weight(adapter) for adapter in active]).sum(0)  # type: ignore[operator]


def reloaded(bench: Bench) -> list[Check]:
    """A saved composition gives the same output to the last bit."""
    model = bench.compose(5).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(copy.deepcopy(bench.net).to(bench.device), folder).eval()
        return [_holds("bit for bit", torch.equal(bench.output(model), bench.output(again)))]


def trainer(bench: Bench) -> list[Check]:
    """Five steps of a plain Trainer in bf16 on a tiny BERT, saved and loaded again."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    base = BertForSequenceClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(3):
            torch.manual_seed(seed)
            lora = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
            get_peft_model(copy.deepcopy(base), lora).save_pretrained(f"{folder}/{seed}")
        composition = CompositionConfig(adapters=[f"{folder}/{seed}" for seed in range(3)], task_type="SEQ_CLS")
        model = get_peft_model(copy.deepcopy(base), composition)
        data = [
            {"input_ids": ids, "labels": torch.tensor(number % 2)}
            for number, ids in enumerate(torch.randint(0, 60, (40, 10)))
        ]
        arguments = TrainingArguments(
            f"{folder}/out",
            max_steps=5,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            bf16=True,
            use_cpu=bench.device.type == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            average_tokens_across_devices=False,
        )
        trained = Trainer(model=model, args=arguments, train_dataset=data)
        trained.train()
        # accelerate leaves autocast around the forward of what it has prepared
        model = trained.accelerator.unwrap_model(trained.model, keep_fp32_wrapper=False)
        moved = all(bool(theta.detach().any()) for theta in thetas(model).values())
        ids = torch.randint(0, 60, (4, 10), device=bench.device)
        model.eval().save_pretrained(f"{folder}/saved")
        plain: nn.Module = copy.deepcopy(base)
        again = PeftModel.from_pretrained(plain.to(bench.device), f"{folder}/saved").eval()
        with torch.no_grad(), nullcontext():
            same = torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    return [_holds("weights move", moved), _holds("reloaded bit for bit", same)]


def _holds(name: str, condition: bool) -> Check:
    return Check(name, 0.0 if condition else 1.0, 0.0)
