"""Learns to classify texts, or pairs of texts, from K examples per class, by mixing LoRA adapters of other tasks.

    python few_shot_text_classification.py --model_name_or_path org/encoder --adapters me/lora-a you/lora-b \
        --dataset_name org/dataset --text_columns text --label_column label --k 5 --output_dir composed

With several processes: `accelerate launch` or `torchrun --nproc_per_node 2` before the script; all arguments of
TrainingArguments work.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import Dataset
from few_shot import (
    FewShotArguments,
    FewShotTrainer,
    HeadArguments,
    accuracy,
    build_model,
    cross_entropy,
    draw,
    encode_classes,
    parse_arguments,
    prepare_process,
)
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainingArguments,
)


@dataclass
class TextArguments(FewShotArguments):
    """What this script asks for beside them."""

    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Column of the texts, or two columns of pairs."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the classes."})
    max_length: int = field(default=128, metadata={"help": "Tokens after which a text is cut."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.text_columns) > 2:
            raise ValueError(f"--text_columns takes one or two columns, got {' '.join(self.text_columns)}")


def load_tokenizer(arguments: TextArguments) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; causal models often have no token for padding."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: TextArguments) -> Dataset:
    """Token ids and `labels`; everything else is dropped."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [batch[name] for name in arguments.text_columns]
        return dict(tokenizer(*texts, truncation=True, max_length=arguments.max_length))

    return data.map(encode, batched=True, remove_columns=[name for name in data.column_names if name != "labels"])


def load_model(arguments: TextArguments, classes: list[str], tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The base model with a new head for these classes, and the adapters mixed in."""
    base = AutoModelForSequenceClassification.from_pretrained(
        arguments.model_name_or_path,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
        ignore_mismatched_sizes=True,  # the checkpoint may have a head for other classes
    )
    if base.config.pad_token_id is None:  # a causal model; it looks for the end of a text by the padding
        base.config.pad_token_id = tokenizer.pad_token_id
    head = [name for name in ("classifier", "score") if hasattr(base, name)]
    return build_model(base, arguments, "SEQ_CLS", head)


def main() -> None:
    """Runs it all."""
    arguments, head, settings = parse_arguments(
        [TextArguments, HeadArguments, TrainingArguments],
        __doc__,
        output_dir="few-shot-text-classification",
    )
    prepare_process(settings)
    with settings.main_process_first(desc="data set, model and adapters"):  # the others find them in the cache
        support, test = draw(arguments, settings.seed, arguments.text_columns, arguments.label_column)
        support, test, classes = encode_classes(support, test, arguments.label_column)
        tokenizer = load_tokenizer(arguments)
        support, test = (tokenize(data, tokenizer, arguments) for data in (support, test))
        model = load_model(arguments, classes, tokenizer)
    trainer = FewShotTrainer(
        model,
        settings,
        arguments,
        head,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=support,
        eval_dataset=test,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        compute_loss_func=cross_entropy,
    )
    trainer.run()


if __name__ == "__main__":
    main()
