"""Learns to classify images from K examples per class, by mixing LoRA adapters of other tasks.

    python few_shot_image_classification.py --model_name_or_path org/vit --adapters me/lora-a you/lora-b \
        --dataset_name ./flowers --k 5 --output_dir composed

The model is any image classifier of transformers, or any of timm (`timm/...` on the Hub). With several processes:
`accelerate launch` or `torchrun --nproc_per_node 2` before the script; all arguments of TrainingArguments work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    TimmWrapperForImageClassification,
    TrainingArguments,
    default_data_collator,
)


@dataclass
class ImageArguments(FewShotArguments):
    """What this script asks for beside them."""

    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes."})


def with_pixels(data: Dataset, processor: BaseImageProcessor, column: str) -> Dataset:
    """Images as the model takes them, made when they are asked for."""

    def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[column]]
        return {**processor(images, return_tensors="pt"), "labels": batch["labels"]}

    return data.with_transform(transform)


def head_of(model: nn.Module) -> list[str]:
    """The names of the modules that give the logits."""
    if isinstance(model, TimmWrapperForImageClassification):
        head = model.timm_model.get_classifier()
        return [name for name, module in model.named_modules() if module is head]
    return [name for name in ("classifier", "cls_classifier", "distillation_classifier") if hasattr(model, name)]


def load_model(arguments: ImageArguments, classes: list[str]) -> nn.Module:
    """The base model with a new head for these classes, and the adapters mixed in."""
    base = AutoModelForImageClassification.from_pretrained(
        arguments.model_name_or_path,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
        ignore_mismatched_sizes=True,  # the checkpoint may have a head for other classes
    )
    return build_model(base, arguments, head=head_of(base))


def main() -> None:
    """Runs it all."""
    arguments, head, settings = parse_arguments(
        [ImageArguments, HeadArguments, TrainingArguments],
        __doc__,
        output_dir="few-shot-image-classification",
        remove_unused_columns=False,  # the images are made to pixels when they are asked for
    )
    prepare_process(settings)
    with settings.main_process_first(desc="data set, model and adapters"):  # the others find them in the cache
        support, test = draw(arguments, settings.seed, [arguments.image_column], arguments.label_column)
        support, test, classes = encode_classes(support, test, arguments.label_column)
        processor = AutoImageProcessor.from_pretrained(arguments.model_name_or_path)
        model = load_model(arguments, classes)
    trainer = FewShotTrainer(
        model,
        settings,
        arguments,
        head,
        data_collator=default_data_collator,
        train_dataset=with_pixels(support, processor, arguments.image_column),
        eval_dataset=with_pixels(test, processor, arguments.image_column),
        processing_class=processor,
        compute_metrics=accuracy,
        compute_loss_func=cross_entropy,
    )
    trainer.run()


if __name__ == "__main__":
    main()
