"""The helpers for the Trainer: groups and learning rates, the head's warm-up, logs, and trainings that are killed."""

from __future__ import annotations

import array
import fcntl
import json
import math
import os
import signal
import termios
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from peft_composition import (
    CompositionConfig,
    HeadWarmupCallback,
    MixingWeightsCallback,
    composition_optimizer,
    last_complete_checkpoint,
    parameter_groups,
)
from peft_composition.training import _weights_by_composition
from peft_composition.tuner.mixing import Mixing

from . import tiny, warm
from .ports import free_port
from .test_trainer import Sentences, StopAt


NAMES = [
    f"some-organisation/{name}" for name in ("lora-of-book-reviews", "lora of film reviews", "lora_of_film_reviews")
]
TAGS = [
    "some-organisation_lora-of-book-reviews",
    "some-organisation_lora_of_film_reviews-1",
    "some-organisation_lora_of_film_reviews-2",
]
MIXING_LR, HEAD_LR = 2e-3, 3e-4
HEAD = "base_model.model.classifier.modules_to_save.default"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base, folder = tiny.build("bert"), tmp_path_factory.mktemp("adapters")
    return [str(tiny.save_lora(folder / f"{n}", base, ["query", "value"], seed=n, r=n + 1)) for n in range(3)]


def compose(adapters: list[str], **fields: Any) -> nn.Module:
    """A composition whose mixing weights have been trained before: what would pull them back to zero shows."""
    references = [{"path": path, "name": name} for path, name in zip(adapters, NAMES)]
    config = CompositionConfig(**{"adapters": references, "task_type": "SEQ_CLS", **fields})
    model = get_peft_model(tiny.build("bert"), config)
    for number, theta in enumerate(thetas(model).values()):
        theta.data.copy_(torch.linspace(-0.01, 0.02, len(theta)).roll(number))
    return model


def thetas(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".composition_mixing." in name and p.requires_grad}


def arguments(folder: Path, **more: Any) -> Arguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return Arguments(**{**settings, **more})


def trainer(model: nn.Module, args: Arguments, *callbacks: TrainerCallback, count: int = 64, **more: Any) -> Trainer:
    return Trainer(model, args, train_dataset=Sentences(count, seed=0), callbacks=list(callbacks), **more)


def grouped(args: Arguments) -> dict[str, Any]:
    return {"optimizer_cls_and_kwargs": composition_optimizer(args, mixing_lr=MIXING_LR, head_lr=HEAD_LR)}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Recorder(TrainerCallback):
    """Notes what a step starts from and what comes out of it."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(trained_state(kwargs["model"]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append([group["lr"] for group in kwargs["optimizer"].param_groups])
        named = kwargs["model"].named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(trained_state(kwargs["model"]))

    def moved(self) -> list[bool]:
        """For every step whether any mixing weight changed in it."""
        return [
            any(not torch.equal(before[name], after[name]) for name in before if ".composition_mixing." in name)
            for before, after in zip(self.weights, self.weights[1:])
        ]


# Parameter groups


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    def apart(module: nn.Module) -> bool:
        return isinstance(module, Mixing)

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return lambda_auto_wrap_policy(module, recurse, nonwrapped_numel, apart)

    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


def fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for module in model.modules():
        if isinstance(module, Mixing):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "compile": torch.compile,
    "ddp": DistributedDataParallel,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
}
WRAPPER_PARTS = {"module", "_fsdp_wrapped_module", "_orig_mod"}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_groups_hold_what_trains_under_every_wrapper(adapters: list[str], wrapper: str) -> None:
    model = WRAPPERS[wrapper](compose(adapters, modules_to_save=["classifier", "layer.1.output"]))
    groups = parameter_groups(model, mixing_lr=MIXING_LR, head_lr=HEAD_LR, weight_decay=0.1)
    names = {
        id(p): ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)
        for name, p in model.named_parameters()
    }
    found = [(group["lr"], group["weight_decay"], {names[id(p)] for p in group["params"]}) for group in groups]

    block = "base_model.model.bert.encoder.layer.1.output.modules_to_save.default."
    layers = [f"layer.{n}.attention.self.{target}" for n in (0, 1) for target in ("query", "value")]
    mixing = {f"base_model.model.bert.encoder.{layer}.composition_mixing.default.weight" for layer in layers}
    assert found == [
        (MIXING_LR, 0.0, mixing),
        (HEAD_LR, 0.1, {f"{HEAD}.weight", f"{block}dense.weight"}),
        (HEAD_LR, 0.0, {f"{HEAD}.bias", f"{block}dense.bias", f"{block}LayerNorm.weight", f"{block}LayerNorm.bias"}),
    ]


def test_decay_and_rates_default_to_those_of_the_trainer(adapters: list[str], tmp_path: Path) -> None:
    model = compose(adapters, modules_to_save=["classifier", "layer.1.output"])
    args = arguments(tmp_path)
    plain = trainer(model, args).create_optimizer()
    decaying = {id(p) for group in plain.param_groups if group["weight_decay"] for p in group["params"]}
    decaying -= {id(p) for p in thetas(model).values()}
    ours = trainer(model, args, optimizer_cls_and_kwargs=composition_optimizer(args)).create_optimizer()
    assert type(ours) is type(plain)
    assert {id(p) for group in ours.param_groups if group["weight_decay"] for p in group["params"]} == decaying
    assert {group["lr"] for group in ours.param_groups} == {1e-3}
    assert {group["weight_decay"] for group in ours.param_groups} == {0.1, 0.0}


def test_groups_of_a_model_without_head_and_of_a_frozen_one(pair: Callable[[str], list[str]]) -> None:
    model = tiny.compose("llama", pair("llama"))
    (group,) = parameter_groups(model, head_lr=1.0)
    assert {id(p) for p in group["params"]} == {id(p) for p in thetas(model).values()}
    assert "lr" not in group
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model.requires_grad_(False))


@pytest.mark.usefixtures("process_group")
def test_optimizer_is_built_from_what_fsdp_has_wrapped(adapters: list[str], tmp_path: Path) -> None:
    """As the Trainer does under FSDP, where the parameters that train are not those that it was given."""
    model, args = compose(adapters), arguments(tmp_path)
    run = trainer(model, args, **grouped(args))
    wrapped = fsdp1(model)
    optimizer = run.create_optimizer(wrapped)
    assert [group["lr"] for group in optimizer.param_groups] == [MIXING_LR, HEAD_LR, HEAD_LR]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in wrapped.parameters() if p.requires_grad)


def factor(schedule: str, step: int) -> float:
    """By how much the schedules over 8 steps with a warm-up of 3 scale every learning rate, from their definition."""
    if step < 3:
        return step / 3
    return (8 - step) / 5 if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (step - 3) / 5))


@pytest.mark.parametrize(
    ("way", "schedule"), [("optimizers", "linear"), ("optimizer_cls_and_kwargs", "linear"), ("optimizers", "cosine")]
)
def test_every_group_follows_the_schedule_also_after_resume(
    adapters: list[str], tmp_path: Path, way: str, schedule: str
) -> None:
    def run(*callbacks: TrainerCallback) -> Trainer:
        model = compose(adapters)
        args = arguments(tmp_path, lr_scheduler_type=schedule, warmup_steps=3, save_strategy="steps", save_steps=4)
        if way == "optimizers":
            groups = parameter_groups(model, mixing_lr=MIXING_LR, head_lr=HEAD_LR, weight_decay=0.1)
            return trainer(model, args, *callbacks, optimizers=(torch.optim.AdamW(groups), None))
        return trainer(model, args, *callbacks, **grouped(args))

    before, after = Recorder(), Recorder()
    run(before, StopAt(5)).train()
    run(after).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    rates = before.rates[:4] + after.rates
    expected = [[lr * factor(schedule, n) for lr in (MIXING_LR, HEAD_LR, HEAD_LR)] for n in range(8)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=0)


def test_steps_use_each_groups_rate_and_decay_on_clipped_gradients(adapters: list[str], tmp_path: Path) -> None:
    """Against plain gradient descent in float64, from the gradients that the optimizer sees."""
    model, seen = compose(adapters), Recorder()
    args = arguments(tmp_path, optim="sgd", max_grad_norm=0.03, lr_scheduler_type="constant")
    run = trainer(model, args, seen, **grouped(args))
    run.train()
    norms = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    assert min(norms) > 0.03
    for before, gradients, after in zip(seen.weights, seen.gradients, seen.weights[1:]):
        assert math.sqrt(sum(g.double().square().sum() for g in gradients.values())) == pytest.approx(0.03, rel=1e-4)
        for name, start in before.items():
            lr = MIXING_LR if ".composition_mixing." in name else HEAD_LR
            decay = 0.1 if name == f"{HEAD}.weight" else 0.0
            expected = start.double() - lr * (gradients[name].double() + decay * start.double())
            torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-9)


def test_optimizers_that_group_by_themselves_are_refused(
    adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, args = compose(adapters), arguments(tmp_path)
    own = torch.optim.AdamW, {"params": list(model.parameters())}  # as for GaLore, which is not installed
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model: own))
    with pytest.raises(ValueError, match="groups the parameters itself"):
        trainer(model, args, **grouped(args)).create_optimizer()


# The head's warm-up


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "rmsprop"])
def test_mixing_weights_rest_bit_for_bit_while_the_head_warms_up(
    adapters: list[str], tmp_path: Path, optim: str
) -> None:
    """With the Trainer's own groups, whose decay would pull the mixing weights to zero."""
    seen = Recorder()
    args = arguments(tmp_path, optim=optim, optim_args="momentum=0.9" if optim == "rmsprop" else None)
    trainer(compose(adapters), args, HeadWarmupCallback(steps=5), seen).train()
    assert seen.moved() == [False] * 5 + [True] * 3
    heads = [weights[f"{HEAD}.weight"] for weights in seen.weights]
    assert all(not torch.equal(before, after) for before, after in pairwise(heads))


def test_optimizer_starts_afresh_with_the_mixing_weights(adapters: list[str], tmp_path: Path) -> None:
    """Their first step is Adam's first one, in float64: bias correction included, it is lr g / (|g| + eps)."""
    model, seen = compose(adapters), Recorder()
    args = arguments(tmp_path, max_steps=4, lr_scheduler_type="constant")
    run = trainer(model, args, HeadWarmupCallback(steps=3), seen, **grouped(args))
    run.train()
    for name, theta in thetas(model).items():
        gradient = seen.gradients[3][name].double()
        expected = seen.weights[3][name].double() - MIXING_LR * gradient / (gradient.abs() + args.adam_epsilon)
        torch.testing.assert_close(theta.detach().double(), expected, rtol=1e-5, atol=1e-9)
        assert run.optimizer.state[theta]["step"] == 1
    assert run.optimizer.state[model.get_parameter(f"{HEAD}.weight")]["step"] == 4


@pytest.mark.parametrize(("epochs", "steps"), [(2, 6), (0.5, 2), (1.34, 4)])
def test_warm_up_by_epochs_counts_steps_of_the_optimizer(
    adapters: list[str], tmp_path: Path, epochs: float, steps: int
) -> None:
    """40 examples are 5 batches, and those with accumulation 3 steps an epoch."""
    seen = Recorder()
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=2)
    trainer(compose(adapters), args, HeadWarmupCallback(epochs=epochs), seen, count=40).train()
    assert seen.moved() == [False] * steps + [True] * (9 - steps)


def test_resume_within_at_the_end_of_and_after_the_warm_up(adapters: list[str], tmp_path: Path) -> None:
    def run(**more: Any) -> dict[str, Tensor]:
        model = compose(adapters)
        args = arguments(tmp_path, save_strategy="steps", save_steps=2)
        trainer(model, args, HeadWarmupCallback(steps=4), **grouped(args)).train(**more)
        return trained_state(model)

    expected = run()
    for step in (2, 4, 6):
        actual = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for name, weight in expected.items():
            assert torch.equal(actual[name], weight), (step, name)


@pytest.mark.filterwarnings("error:Training ended")
def test_training_that_ends_within_the_warm_up_says_so(adapters: list[str], tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            control.should_training_stop = state.global_step == 5

    model = compose(adapters)
    with pytest.warns(UserWarning, match=r"ended at step 5, during the warm-up of the head \(6 steps\)"):
        trainer(model, arguments(tmp_path), HeadWarmupCallback(steps=6), Stop()).train()
    trainer(model, arguments(tmp_path), HeadWarmupCallback(steps=7)).train()


@pytest.mark.parametrize(
    ("length", "said"), [({"steps": 8}, "(8 steps)"), ({"epochs": 50}, "(50 epochs, 400 steps)"), ({"steps": 9}, "9")]
)
def test_a_warm_up_of_the_whole_training_is_refused(
    adapters: list[str], tmp_path: Path, length: dict[str, Any], said: str
) -> None:
    """As one who leaves the Trainer's three epochs gets with the paper's fifty: weights that never move."""
    model = compose(adapters)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="takes the whole training of 8 steps") as refused:
        trainer(model, arguments(tmp_path), HeadWarmupCallback(**length)).train()
    assert said in str(refused.value)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("length", [{}, {"epochs": 1, "steps": 1}, {"epochs": 0}, {"steps": -1}, {"epochs": math.nan}])
def test_length_of_the_warm_up_is_checked(length: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="warm-up"):
        HeadWarmupCallback(**length)


def test_warm_up_refuses_what_it_cannot_do(adapters: list[str], tmp_path: Path) -> None:
    args = arguments(tmp_path)
    for model, match in (
        (compose(adapters[:1], mixing="uniform"), "no trainable mixing weights"),
        (tiny.compose("bert", adapters, modules_to_save=None, task_type=None), "only mixing weights"),
    ):
        with pytest.raises(ValueError, match=match):
            trainer(model, args, HeadWarmupCallback(steps=1)).train()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield from Sentences(64, seed=0)

    run = Trainer(compose(adapters), args, train_dataset=Stream(), callbacks=[HeadWarmupCallback(epochs=1)])
    with pytest.raises(ValueError, match="has no length"):
        run.train()
    args.deepspeed_plugin = object()  # DeepSpeed does not install everywhere
    with pytest.raises(ValueError, match="DeepSpeed"):
        HeadWarmupCallback(steps=1).on_train_begin(args, TrainerState(), TrainerControl(), model=run.model)


@pytest.mark.usefixtures("process_group")
def test_fsdp2_shards_rest_and_their_optimizer_can_be_resumed(adapters: list[str], tmp_path: Path) -> None:
    """The Trainer has no FSDP on the CPU: its calls are made by hand. PyTorch loads only complete optimizer states."""
    model = fsdp2(compose(adapters))
    warmup, state, args = HeadWarmupCallback(steps=3), TrainerState(), arguments(tmp_path)
    optimizer = torch.optim.AdamW(parameter_groups(model, mixing_lr=MIXING_LR, head_lr=HEAD_LR))
    warmup.on_train_begin(args, state, TrainerControl(), model=model, train_dataloader=None)
    batch = next(iter(torch.utils.data.DataLoader(Sentences(8, seed=0), batch_size=8)))
    start = _weights_by_composition(compose(adapters))["default"]
    for step in range(5):
        state.global_step = step
        warmup.on_step_begin(args, state, TrainerControl(), model=model, optimizer=optimizer)
        model(**batch).loss.backward()
        optimizer.step()
        warmup.on_optimizer_step(args, state, TrainerControl())
        optimizer.zero_grad()
        weights = _weights_by_composition(model)["default"]
        assert torch.equal(weights, start) is (step < 3)
        saved = get_optimizer_state_dict(model, optimizer)
        fresh = torch.optim.AdamW(parameter_groups(model, mixing_lr=MIXING_LR, head_lr=HEAD_LR))
        set_optimizer_state_dict(model, fresh, saved)
        assert len(fresh.state) == len(optimizer.state) == 6
    assert weights.shape == (4, 3)


# Logs


def softmax_weights(theta: Tensor) -> np.ndarray:
    """The mixing weights of learned compositions that start uniform, in float64."""
    logits = 40 * theta.double().numpy()
    return np.exp(logits) / np.exp(logits).sum()


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    (events,) = folder.glob("runs/*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_mixing_weights_are_in_the_logs_and_in_tensorboard(adapters: list[str], tmp_path: Path) -> None:
    model, seen = compose(adapters, gain=40.0), Recorder()
    args = arguments(tmp_path, report_to="tensorboard", logging_steps=2, eval_strategy="steps", eval_steps=4)
    run = trainer(model, args, seen, eval_dataset=Sentences(8, seed=1))
    run.add_callback(MixingWeightsCallback(run))
    run.train()
    tables = [
        np.stack([softmax_weights(theta) for name, theta in weights.items() if ".composition_mixing." in name])
        for weights in seen.weights[::2]
    ]
    expected = {
        **{f"mixing_weight/{tag}": [table[:, n].mean() for table in tables[1:]] for n, tag in enumerate(TAGS)},
        "mixing_entropy": [-(table * np.log(table)).sum(1).mean() / np.log(3) for table in tables[1:]],
        "mixing_max_change": [abs(after - before).max() for before, after in pairwise(tables)],
    }
    assert min(expected["mixing_max_change"]) > 1e-4
    scalars = read_events(tmp_path)
    assert {tag for tag in scalars if "mixing" in tag} == {f"train/{tag}" for tag in expected}
    for tag, values in expected.items():
        assert [step for step, _ in scalars[f"train/{tag}"]] == [2, 4, 6, 8] == [n for n, _ in scalars["train/loss"]]
        np.testing.assert_allclose([value for _, value in scalars[f"train/{tag}"]], values, rtol=1e-4)
        history = [entry for entry in run.state.log_history if tag in entry]
        np.testing.assert_allclose([entry[tag] for entry in history], values, rtol=1e-4)
        assert all("loss" in entry for entry in history)
    assert sum("loss" in entry for entry in run.state.log_history) == 4


def test_logs_name_the_active_compositions(adapters: list[str], tmp_path: Path) -> None:
    model = compose(adapters, task_type=None)  # PEFT has one head for all that is active
    free = CompositionConfig(adapters=adapters[:1], normalization="none", weights=[0.7], gain=10.0)
    for name in ("free", "idle"):
        model.add_adapter(name, free)
    model.base_model.set_adapter(["default", "free"])
    run = trainer(model, arguments(tmp_path, max_steps=1))
    run.add_callback(MixingWeightsCallback(run))
    run.train()
    (logged,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert {key for key in logged if key.startswith("mixing_")} == {
        *(f"mixing_weight/default/{tag}" for tag in TAGS),
        "mixing_entropy/default",
        "mixing_max_change/default",
        "mixing_weight/free/0",
        "mixing_max_change/free",
    }
    own = [0.7 + 10 * theta.item() for name, theta in thetas(model).items() if name.endswith(".free.weight")]
    assert len(own) == 4
    assert logged["mixing_weight/free/0"] == pytest.approx(sum(own) / 4, rel=1e-6)
    assert logged["mixing_max_change/free"] == pytest.approx(max(abs(w - 0.7) for w in own), rel=1e-4)


def test_callback_of_another_trainer_is_refused(adapters: list[str], tmp_path: Path) -> None:
    model, args = compose(adapters), arguments(tmp_path)
    with pytest.raises(ValueError, match="another Trainer"):
        trainer(model, args, MixingWeightsCallback(trainer(model, args))).train()


def test_early_stopping_ends_with_the_best_weights(adapters: list[str], tmp_path: Path) -> None:
    """Judged by flipped labels, the loss rises as soon as the mixing weights move: two evaluations later it ends."""
    model, seen = compose(adapters), Recorder()
    args = arguments(
        tmp_path,
        max_steps=20,
        learning_rate=0.02,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    callbacks = HeadWarmupCallback(steps=2), EarlyStoppingCallback(early_stopping_patience=2), seen
    run = trainer(model, args, *callbacks, eval_dataset=Sentences(64, seed=0, flipped=True))
    run.add_callback(MixingWeightsCallback(run))
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert run.state.global_step == max(losses) == best + 4 < 20
    for name, weight in trained_state(model).items():
        assert torch.equal(weight, seen.weights[best][name]), name


# Several processes, and processes that are killed


def start(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """A process of its own, from a server that has done the imports."""
    process = warm.context().Process(target=target, args=args, daemon=True)
    process.start()
    return process


def train_in_parallel(rank: int, port: int, adapters: list[str], folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ.update(ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    model, seen = compose(adapters), Recorder()
    args = arguments(
        folder, per_device_train_batch_size=4, max_steps=4, report_to="tensorboard", ddp_find_unused_parameters=False
    )
    run = trainer(model, args, HeadWarmupCallback(steps=2), seen, **grouped(args))
    run.add_callback(MixingWeightsCallback(run))
    run.train()
    assert args.world_size == 2
    assert isinstance(run.model_wrapped, DistributedDataParallel)
    torch.save((seen.moved(), trained_state(model)), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_warm_up_alike_and_one_logs(adapters: list[str], tmp_path: Path) -> None:
    port = free_port()
    processes = [start(train_in_parallel, rank, port, adapters, tmp_path) for rank in range(2)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    (moved, weights), (other_moved, others) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert moved == other_moved == [False, False, True, True]
    for name, weight in weights.items():
        assert torch.equal(others[name], weight), name
    assert len(list(tmp_path.glob("runs/*/events*"))) == 1
    assert [step for step, _ in read_events(tmp_path)["train/mixing_entropy"]] == [1, 2, 3, 4]


class KillAt(TrainerCallback):
    """Kills its own process in the middle of a step, when gradients are there and weights have not moved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(adapters: list[str], folder: Path, resume: str | bool | None = None, kill_at: int = -1) -> None:
    """Eight steps, a checkpoint after every second and four of warm-up; leaves what it trained in `final.pt`."""
    torch.set_num_threads(1)
    model = compose(adapters)
    args = arguments(folder, save_strategy="steps", save_steps=2)
    run = trainer(model, args, HeadWarmupCallback(steps=4), KillAt(kill_at), **grouped(args))
    run.add_callback(MixingWeightsCallback(run))
    run.train(resume_from_checkpoint=resume)
    torch.save(trained_state(model), folder / "final.pt")


@pytest.fixture(scope="module")
def uninterrupted(adapters: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(adapters, folder)
    return torch.load(folder / "final.pt")


def require_same(folder: Path, expected: dict[str, Tensor]) -> None:
    actual = torch.load(folder / "final.pt")
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


def test_killed_training_ends_where_an_uninterrupted_one_does(
    adapters: list[str], uninterrupted: dict[str, Tensor], tmp_path: Path
) -> None:
    """Killed within the warm-up, and after it."""
    for step, last in ((3, "checkpoint-2"), (7, "checkpoint-6")):
        process = start(train, adapters, tmp_path, last_complete_checkpoint(tmp_path), step)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / last)
    process = start(train, adapters, tmp_path, last_complete_checkpoint(tmp_path))
    process.join(120)
    assert process.exitcode == 0
    require_same(tmp_path, uninterrupted)


def waiting_bytes(pipe: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="makes a pipe of one page, which only Linux can")
@pytest.mark.parametrize(
    ("file", "error"),
    [
        ("optimizer.pt", FileNotFoundError),  # of trainer_state.json, which comes last
        ("trainer_state.json", json.JSONDecodeError),
    ],
)
def test_kill_within_the_write_of_a_checkpoint(
    adapters: list[str], uninterrupted: dict[str, Tensor], tmp_path: Path, file: str, error: type[Exception]
) -> None:
    """The file is a pipe of one page that nobody reads: the process stands still in the middle of writing it."""
    half = tmp_path / "checkpoint-8"
    half.mkdir()
    os.mkfifo(half / file)
    pipe = os.open(half / file, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
    process = start(train, adapters, tmp_path)
    deadline, waiting = time.monotonic() + 120, [0]
    while not waiting[-1] or len(set(waiting[-10:])) > 1:  # it may stop before the page is full
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)
        waiting.append(waiting_bytes(pipe))
    process.kill()
    process.join()
    written = os.read(pipe, 4096)
    os.close(pipe)
    (half / file).unlink()
    (half / file).write_bytes(written)

    with pytest.raises(error):
        train(adapters, tmp_path, resume=True)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    PeftModel.from_pretrained(tiny.build("bert"), tmp_path / "checkpoint-6")
    train(adapters, tmp_path, last_complete_checkpoint(tmp_path))
    require_same(tmp_path, uninterrupted)


def test_last_complete_checkpoint_looks_at_numbers_and_nothing_else(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for name, state in (
        ("checkpoint-9", "{}"),
        ("checkpoint-10", "{}"),
        ("checkpoint-11", ""),
        ("checkpoint-best", "{}"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-13").write_text("a file")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
