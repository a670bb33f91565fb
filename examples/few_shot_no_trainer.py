"""Few-shot text classification without the Trainer: a bare accelerate loop, to be changed at will.

    accelerate launch few_shot_no_trainer.py --model_name_or_path org/encoder --adapters me/lora-a you/lora-b \
        --dataset_name org/dataset --text_columns text --label_column label --k 5 --output_dir composed

It takes the arguments of few_shot_text_classification.py, and in place of TrainingArguments the few that are below.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from few_shot import (
    HeadArguments,
    Record,
    be_quiet,
    draw,
    encode_classes,
    parse_arguments,
    report,
    require_one_group,
    require_short_warmup,
    takes_evidence,
    trainable,
    weigh_by_evidence,
)
from few_shot_text_classification import TextArguments, load_model, load_tokenizer, tokenize
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from peft_composition import push_to_hub
from peft_composition.training import parameter_groups


@dataclass
class LoopArguments:
    """How the loop trains."""

    _argument_group_name = "training"

    output_dir: Path = field(
        default=Path("few-shot-no-trainer"), metadata={"help": "Folder for the composition and the results."}
    )
    learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the mixing weights; it falls to zero along a line."}
    )
    steps: int = field(default=100, metadata={"help": "Steps of the optimizer."})
    batch_size: int = field(default=8, metadata={"help": "Training examples per step and process."})
    eval_batch_size: int = field(default=32, metadata={"help": "Test examples per step and process."})
    seed: int = field(default=42, metadata={"help": "Seed of the draw, the head and the training."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Push to this repository on the Hub."})


def make_loader(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, shuffle_seed: int | None = None
) -> DataLoader:
    """Padded batches, in order or shuffled."""
    generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
    return DataLoader(
        data,
        batch_size=batch_size,
        shuffle=generator is not None,
        generator=generator,
        collate_fn=DataCollatorWithPadding(tokenizer),
    )


def is_mixing(name: str) -> bool:
    """Whether a parameter is a mixing weight, by its name."""
    return "composition_mixing" in name.split(".")


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    loader: DataLoader,
    steps: int,
    warmup: int,
) -> None:
    """Full passes over the few examples until the steps are done; in the warm-up the mixing weights stay."""
    model.train()
    done = 0
    mixing = [parameter for name, parameter in model.named_parameters() if is_mixing(name)]
    with tqdm(total=steps, desc="training", disable=not accelerator.is_local_main_process) as bar:
        while done < steps:
            for batch in loader:
                loss = nn.functional.cross_entropy(model(**without_labels(batch)).logits, batch["labels"])
                accelerator.backward(loss)
                if done < warmup:
                    for parameter in mixing:
                        parameter.grad = None  # the optimizer passes over it
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                done += 1
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
                if done == steps:
                    break


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model gets to see."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()
def measure_accuracy(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    """The share of right predictions over the test examples of all processes, each counted once."""
    model.eval()
    hits: list[Tensor] = []
    for batch in tqdm(loader, desc="testing", disable=not accelerator.is_local_main_process):
        right = model(**without_labels(batch)).logits.argmax(dim=-1) == batch["labels"]
        hits.append(accelerator.gather_for_metrics(right))
    return torch.cat(hits).float().mean().item()


def main() -> None:
    """Runs it all."""
    arguments, head, loop = parse_arguments([TextArguments, HeadArguments, LoopArguments], __doc__)
    if arguments.method == "learned":
        require_short_warmup(head.head_warmup_steps, loop.steps)
    accelerator = Accelerator()
    require_one_group(accelerator.num_processes)
    if not accelerator.is_main_process:
        be_quiet()
    set_seed(loop.seed)
    with accelerator.local_main_process_first():  # the others find data set, model and adapters in the cache
        support, test = draw(arguments, loop.seed, arguments.text_columns, arguments.label_column)
        support, test, classes = encode_classes(support, test, arguments.label_column)
        tokenizer = load_tokenizer(arguments)
        features = [tokenize(data, tokenizer, arguments) for data in (support, test)]
        model = load_model(arguments, classes, tokenizer)
    if takes_evidence(arguments.method, head):
        rows = make_loader(features[0], tokenizer, loop.batch_size)
        weigh_by_evidence(model.to(accelerator.device), rows, None, accelerator.is_main_process)
    count = trainable(model)
    groups = parameter_groups(model, head_lr=head.head_learning_rate)
    model, optimizer, support_loader, test_loader = accelerator.prepare(
        model,
        torch.optim.AdamW(groups, lr=loop.learning_rate),
        make_loader(features[0], tokenizer, loop.batch_size, shuffle_seed=loop.seed),
        make_loader(features[1], tokenizer, loop.eval_batch_size),
    )
    schedule = LambdaLR(optimizer, lambda step: 1 - step / loop.steps)
    train(accelerator, model, optimizer, schedule, support_loader, loop.steps, head.head_warmup_steps)
    accuracy = measure_accuracy(accelerator, model, test_loader)

    accelerator.wait_for_everyone()
    trained = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        trained.save_pretrained(str(loop.output_dir))
        tokenizer.save_pretrained(loop.output_dir)
        record = Record(
            method=arguments.method,
            k=arguments.k,
            seed=loop.seed,
            processes=accelerator.num_processes,
            support=len(support),
            test=len(test),
            trainable=count,
            metrics={"accuracy": accuracy},
        )
        report(record, loop.output_dir)
        if loop.hub_model_id is not None and isinstance(trained, PeftModel):
            push_to_hub(trained, loop.hub_model_id, metrics={"accuracy": accuracy})
    accelerator.end_training()


if __name__ == "__main__":
    main()
