"""What runs in every process of `test_distributed.py`; by hand:

    torchrun --nproc_per_node 2 -m tests.distributed_worker <group of checks> <folder>

Each check leaves its result, or the error it ended with, in `<folder>/rank<rank>.pt`.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_composition import CompositionLayer, to_lora
from peft_composition.sharding import shard
from peft_composition.tuner.mixing import Mixing

from . import tiny
from .test_trainer import Sentences


WORLD_SIZE = 2
SECONDS = 400


# DDP with the Trainer


class Traffic(TorchDispatchMode):
    """Counts what the process group is asked to carry: bytes by operation, before and within steps."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "start"
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sent = [args[0]] if isinstance(args[0], Tensor) else args[0]
            nbytes = sum(t.nbytes for t in torch.utils._pytree.tree_leaves(sent) if isinstance(t, Tensor))
            self.bytes[self.phase, func.__name__.partition(".")[0]] += nbytes
        return func(*args, **(kwargs or {}))


class Phases(TrainerCallback):
    """Tells `Traffic` when a step begins and ends."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.traffic.phase = "step"

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.traffic.phase = "after"


def composition_base() -> nn.Module:
    """The tiny BERT without dropout."""
    base = tiny.build("bert")
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


def composition(adapters: Sequence[Any], **fields: Any) -> nn.Module:
    """A composition on it that computes the same in every run."""
    return tiny.compose("bert", adapters, composition_base(), **fields)


def train(model: nn.Module, folder: Path, global_batch: int = 8, resume: str | None = None, **more: Any) -> Trainer:
    """Train with the plain Trainer for some steps, on the same examples however many processes share a batch."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": global_batch // world_size,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_find_unused_parameters": False,
        # transformers multiplies the losses of classifiers by the number of processes, as if they were sums
        "average_tokens_across_devices": False,
    }
    settings["per_device_train_batch_size"] //= more.get("gradient_accumulation_steps", 1)
    traffic = Traffic()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **more}),
        train_dataset=Sentences(64, seed=0),
        callbacks=[Phases(traffic)],
    )
    with traffic:
        trainer.train(resume_from_checkpoint=resume)
    trainer.traffic = dict(traffic.bytes)  # type: ignore[attr-defined]
    return trainer


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def outcome(trainer: Trainer) -> dict[str, Any]:
    """What is compared between processes and with a run in one process."""
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "weights": trained(trainer.model),
        "is_ddp": type(trainer.model_wrapped).__name__ == "DistributedDataParallel",
        "traffic": trainer.traffic,  # type: ignore[attr-defined]
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "module": {},
    "block": {"weight_sharing": "block"},
    "model": {"weight_sharing": "model"},
    "uniform": {"mixing": "uniform"},
}
TRAINERS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "search": {"ddp_find_unused_parameters": None},  # the Trainer's own choice for PEFT models: True
}


def ddp(inputs: Path, folder: Path) -> dict[str, Any]:
    """Every variant of a training run, by name; the same function makes the runs in one process."""
    adapters, zero = [str(inputs / "first"), str(inputs / "second")], str(inputs / "zero")
    runs: dict[str, Callable[[], Any]] = {}
    for name, fields in VARIANTS.items():
        runs[name] = lambda fields=fields: outcome(train(composition(adapters, **fields), folder / "out"))
    for name, more in TRAINERS.items():
        runs[name] = lambda more=more: outcome(train(composition(adapters), folder / "out", **more))
    runs["zero"] = lambda: outcome(train(composition([{"path": zero, "name": name} for name in "ab"]), folder / "out"))
    runs["saving"] = lambda: saving(adapters, folder)
    runs["resuming"] = lambda: resuming(lambda: composition(adapters), folder, "saved")
    runs["LoRA resuming"] = lambda: resuming(lora, folder, "saved-lora")
    return {name: attempt(run) for name, run in runs.items()}


def saving(adapters: list[str], folder: Path) -> dict[str, Any]:
    """Checkpoints and the card, as far as this process writes them."""
    model = composition(adapters)
    trainer = train(model, folder / "saved", save_strategy="steps", save_steps=3)
    trainer.create_model_card()
    model.save_pretrained(str(folder / "pretrained"), is_main_process=trainer.is_world_process_zero())
    return {"whole": trained(model), "files": files_in(folder)}


def resuming(make: Callable[[], nn.Module], folder: Path, name: str) -> dict[str, Any]:
    """Training to its end, and once more from rank 0's checkpoint in its middle."""
    whole = train(make(), folder / name, save_strategy="steps", save_steps=3)
    checkpoint = folder.with_name("rank0") / name / "checkpoint-3"
    resumed = train(make(), folder / "resumed", resume=str(checkpoint))
    return {"whole": trained(whole.model), "resumed": trained(resumed.model)}


def lora() -> nn.Module:
    """PEFT's LoRA on the same base, as a witness where upstream packages fail."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    return get_peft_model(composition_base(), config)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# FSDP, called directly: the Trainer and accelerate run DDP on the CPU, whatever they are told


def batch(step: int, rank: int) -> dict[str, Tensor]:
    tokens = torch.randint(1, 60, (4, 9), generator=torch.Generator().manual_seed(10 * step + rank))
    return {"input_ids": tokens, "labels": tokens[:, 0] % 2}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def steps(
    model: nn.Module,
    ranks: Sequence[int],
    numbers: Sequence[int],
    optimizer: torch.optim.Optimizer | None = None,
    factor: float = 1,
) -> list[float]:
    """Train on the examples of some ranks; returns the losses, averaged over all processes.

    The gradients of the last step stay; all are multiplied by `factor`.
    """
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for number in numbers:
        loss = torch.stack([model(**batch(number, rank)).loss for rank in ranks]).mean()
        optimizer.zero_grad()
        (factor * loss).backward()
        optimizer.step()
        mean = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(float(mean))
    return losses


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch(99, 0)).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that the last step has left, by the parameters' names."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return whole({name: gradient.detach().clone() for name, gradient in found.items() if gradient is not None})


def plain(inputs: Path, checkpointing: bool = False, factor: float = 1, **fields: Any) -> dict[str, Any]:
    """What one process computes with the examples of both; `factor` as in `steps`."""
    model = composition([str(inputs / "first"), str(inputs / "second")], **fields).train()
    losses = steps(model, range(WORLD_SIZE), range(6), factor=factor)
    return {
        "losses": losses,
        "gradients": gradients(model),
        "weights": trained(model),
        "logits": logits_of(model),
        "mixing": model.mixing_weights(),
    }


def fsdp2(
    inputs: Path, folder: Path, checkpointing: bool = False, mp_policy: Any = None, **fields: Any
) -> dict[str, Any]:
    """A run of six steps, and one that is saved after three and goes on in a fresh model."""
    adapters = [str(inputs / "first"), str(inputs / "second")]
    options = {} if mp_policy is None else {"mp_policy": mp_policy}

    def build() -> nn.Module:
        model = composition(adapters, **fields).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return shard(model, **options)

    model = build()
    optimizer = optimizer_of(model)
    losses = steps(model, [dist.get_rank()], range(3), optimizer)
    sharded = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(sharded, checkpoint_id=str(folder.with_name("dcp")))
    losses += steps(model, [dist.get_rank()], range(3, 6), optimizer)
    left = gradients(model)

    resumed = build()
    optimizer = optimizer_of(resumed)
    state = {"model": get_model_state_dict(resumed), "optimizer": get_optimizer_state_dict(resumed, optimizer)}
    dcp.load(state, checkpoint_id=str(folder.with_name("dcp")))
    set_state_dict(resumed, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    steps(resumed, [dist.get_rank()], range(3, 6), optimizer)

    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    saved = folder.with_name("full")
    if dist.get_rank() == 0:
        model.save_pretrained(str(saved), state_dict=full)
    dtypes = dtypes_in_forward(model)
    return {
        "losses": losses,
        "gradients": left,
        "weights": whole(trained(model)),
        "resumed": whole(trained(resumed)),
        "logits": logits_of(model),
        "again": logits_of(model),
        "mixing": model.mixing_weights(),
        "reloaded": reloaded(saved),
        "dtypes": dtypes,
        "sharded": sorted({type(p).__name__ for p in get_model_state_dict(model).values()}),
        "merge": error_of(model.merge_adapter),
        "export": error_of(lambda: to_lora(model)),
    }


def gradients_of_lora(model: nn.Module, ranks: Sequence[int]) -> dict[str, Tensor]:
    """Of the first step, as a witness."""
    steps(model.train(), ranks, range(1))
    return gradients(model)


def fsdp2_lora() -> dict[str, Tensor]:
    model = lora()
    for module in model.modules():
        if type(module).__name__ == "BertLayer":
            fully_shard(module)
    return gradients_of_lora(fully_shard(model), [dist.get_rank()])


def whole(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}


def dtypes_in_forward(model: nn.Module) -> dict[str, set[torch.dtype]]:
    """In what dtype theta and the factors are while the model computes."""
    seen: dict[str, set[torch.dtype]] = {"theta": set(), "factors": set(), "weights": set()}

    def look(layer: CompositionLayer, *_: Any) -> None:
        seen["factors"].add(layer.composition_factors["default"].A.dtype)

    def look_at_mixing(mixing: nn.Module, _: Any, output: Tensor) -> None:
        if mixing.weight is not None:
            seen["theta"].add(mixing.weight.dtype)
        seen["weights"].add(output.dtype)

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, CompositionLayer)]
    hooks += [m.register_forward_hook(look_at_mixing) for m in model.modules() if isinstance(m, Mixing)]
    logits_of(model)
    for hook in hooks:
        hook.remove()
    return seen


def reloaded(folder: Path) -> Tensor:
    """The logits of a model that is not sharded, from what rank 0 saved."""
    dist.barrier()
    model = composition_base()
    result = logits_of(PeftModel.from_pretrained(model, str(folder)))
    dist.barrier()
    return result


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fsdp1(inputs: Path, folder: Path, **fields: Any) -> dict[str, Any]:
    """With PEFT's wrapping policy, which the Trainer uses as well."""
    adapters = [str(inputs / "first"), str(inputs / "second")]
    inner = composition(adapters, **fields).train()
    model = FullyShardedDataParallel(
        inner, auto_wrap_policy=fsdp_auto_wrap_policy(inner), use_orig_params=True, device_id=torch.device("cpu")
    )
    losses = steps(model, [dist.get_rank()], range(6))
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        left = {name.replace("_fsdp_wrapped_module.", ""): gradient for name, gradient in gradients(model).items()}
    saved = folder.with_name("full1")
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        full = {name: weight.clone() for name, weight in model.state_dict().items()}
    # On every rank: PEFT asks wrapped heads for their state, which FSDP1 gathers.
    inner.save_pretrained(str(saved), state_dict=full, is_main_process=dist.get_rank() == 0)
    weights = {name: full[name] for name, p in composition(adapters, **fields).named_parameters() if p.requires_grad}
    return {
        "losses": losses,
        "gradients": left,
        "weights": weights,
        "logits": logits_of(model),
        "again": logits_of(model),
        "mixing": inner.mixing_weights(),
        "reloaded": reloaded(saved),
        "merge": error_of(inner.merge_adapter),
    }


FSDP2_RUNS: dict[str, dict[str, Any]] = {**VARIANTS, "checkpointing": {"checkpointing": True}}


def fsdp(inputs: Path, folder: Path) -> dict[str, Any]:
    runs: dict[str, Callable[[], Any]] = {}
    runs["LoRA"] = fsdp2_lora
    for name, fields in FSDP2_RUNS.items():
        runs[f"fsdp2 {name}"] = lambda fields=fields: fsdp2(inputs, folder, **fields)
    for sharing in ("module", "model"):
        runs[f"bf16 {sharing}"] = lambda sharing=sharing: fsdp2(
            inputs, folder, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16), weight_sharing=sharing
        )
    runs["fsdp1 module"] = lambda: fsdp1(inputs, folder)
    runs["fsdp1 uniform"] = lambda: fsdp1(inputs, folder, mixing="uniform")
    return {name: attempt(run) for name, run in runs.items()}


# Adapters from a Hub


def hub(inputs: Path, folder: Path) -> dict[str, Any]:
    """Each check uses a repository of its own; requests of rank 1 carry a token, so that the server can tell them."""
    rank = dist.get_rank()
    os.environ["HF_TOKEN"] = TOKENS[rank]
    runs: dict[str, Callable[[], Any]] = {
        "shared": lambda: record(["me/shared", "me/bare"]),
        "missing": lambda: error_of(lambda: record(["me/shared", "me/missing"])),
        "not a LoRA": lambda: error_of(lambda: record(["me/dora"])),
        "rank 0 alone": lambda: record(["me/alone"]) if rank == 0 else None,
        "again": lambda: record(["me/shared", "me/bare"]),
        "two nodes": lambda: on_own_node(folder, lambda: record(["me/nodes"])),
    }
    results = {}
    for name, run in runs.items():
        results[name] = attempt(run)
        dist.barrier()
    dist.destroy_process_group()
    results["no group"] = attempt(lambda: record(["me/locked"]))
    return results


TOKENS = ("", "hf_test_token")


def record(adapters: list[str]) -> list[tuple[str | None, str]]:
    """Compose; the commit and the hash of every adapter."""
    model = tiny.compose("mlp", adapters, modules_to_save=None, mixing="uniform")
    return [(entry["commit"], entry["sha256"]) for entry in model.peft_config["default"].provenance]


def on_own_node(folder: Path, check: Callable[[], Any]) -> Any:
    """As if every process were the first of its node, with a cache and a name of its own."""
    node = f"node{dist.get_rank()}"
    with (
        patch.dict(os.environ, LOCAL_RANK="0"),
        patch.object(constants, "HF_HUB_CACHE", str(folder / "cache")),
        patch("socket.gethostname", lambda: node),
    ):
        return check()


def attempt(check: Callable[[], Any]) -> Any:
    """The result of a check, or the text of its error: the other process and the other checks go on."""
    try:
        return check()
    except Exception:
        traceback.print_exc()  # now: the other process may wait for this one until it is killed
        return {"error": traceback.format_exc()}


def main(group: str, folder: Path) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # where it hangs, before it is killed
    torch.set_num_threads(1)
    PartialState(cpu=True)
    rank = dist.get_rank()
    assert dist.get_world_size() == WORLD_SIZE
    try:
        results = GROUPS[group](folder, folder / f"rank{rank}")
        torch.save({**results, "world_size": WORLD_SIZE}, folder / f"rank{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


GROUPS = {"ddp": ddp, "fsdp": fsdp, "hub": hub}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
