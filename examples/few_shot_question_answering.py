"""Learns to answer questions, in words or from choices, from K examples, by mixing LoRA adapters of other tasks.

    python few_shot_question_answering.py --model_name_or_path org/t5 --adapters me/lora-a you/lora-b \
        --dataset_name org/questions --prompt "Question: {question} Answer:" --answer_column answer --k 16

Encoder-decoder models and causal language models; answers are generated and scored by exact match. With several
processes: `accelerate launch` or `torchrun --nproc_per_node 2` before the script; all arguments of TrainingArguments
work.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import evaluate
import numpy as np
from datasets import Dataset
from few_shot import FewShotArguments, FewShotTrainer, build_model, draw, parse_arguments, prepare_process
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.modeling_outputs import ModelOutput


IGNORED = -100  # label of tokens that do not count


@dataclass
class QuestionArguments(FewShotArguments):
    """What this script asks for beside them."""

    prompt: str = field(
        default="{question}",
        metadata={
            "help": "What the model reads: text with columns of the data set in braces. A list of choices is put in "
            "as one line each."
        },
    )
    answer_column: str = field(
        default="answer",
        metadata={
            "help": "Column of the answers: a text, a list of texts that are all right (the first is trained on), "
            "SQuAD's dict of such a list, or a number, with --choices_column that of a choice."
        },
    )
    choices_column: str | None = field(
        default=None, metadata={"help": "Column with the list of choices, where the answer is the number of one."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of classes to draw --k examples of each. Default: --k in all."}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens after which a prompt is cut."})
    max_new_tokens: int = field(default=16, metadata={"help": "Tokens after which an answer is cut."})

    @property
    def input_columns(self) -> list[str]:
        """The columns that the prompt shows."""
        return [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name]


# The metric


class ExactMatch(evaluate.Metric):
    """The share of predictions that are one of the right answers; case, spacing and final punctuation do not count.

    `evaluate.load("exact_match")` fetches code from the Hub and takes one right answer; this one is at hand offline.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Exact match with one of the references",
            citation="",
            inputs_description="predictions: texts; references: for each the list of right answers",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        hits = [
            normalized(prediction) in map(normalized, answers) for prediction, answers in zip(predictions, references)
        ]
        return {"exact_match": float(np.mean(hits))}


def normalized(answer: str) -> str:
    """What is compared of an answer."""
    return " ".join(answer.lower().split()).rstrip(".!?,;: ")


# Data


def answers_of(row: Mapping[str, Any], arguments: QuestionArguments) -> list[str]:
    """All right answers of an example."""
    answer = row[arguments.answer_column]
    if arguments.choices_column is not None and isinstance(answer, int):
        answer = row[arguments.choices_column][answer]
    if isinstance(answer, Mapping):
        answer = answer["text"]
    return [str(text) for text in answer] if isinstance(answer, list) else [str(answer)]


def prompt_of(row: Mapping[str, Any], arguments: QuestionArguments) -> str:
    """What the model reads of an example."""
    columns = {name: row[name] for name in arguments.input_columns}
    return arguments.prompt.format(
        **{name: "\n".join(value) if isinstance(value, list) else value for name, value in columns.items()}
    )


def tokenize(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: QuestionArguments, is_causal: bool, train: bool
) -> Dataset:
    """Token ids and labels; for a causal model that trains, the answer follows the prompt."""

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        answer = answers_of(row, arguments)[0]
        features = dict(tokenizer(prompt_of(row, arguments), truncation=True, max_length=arguments.max_length))
        if not is_causal:
            return {**features, "labels": tokenizer(text_target=answer)["input_ids"]}
        labels = [*tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if not train:
            return {**features, "labels": labels}
        prompt = features["input_ids"]
        return {
            "input_ids": prompt + labels,
            "attention_mask": [1] * (len(prompt) + len(labels)),
            "labels": [IGNORED] * len(prompt) + labels,
        }

    return data.map(encode, remove_columns=data.column_names)


# The model


def load_tokenizer(arguments: QuestionArguments, is_causal: bool) -> PreTrainedTokenizerBase:
    """The tokenizer; a causal model goes on writing at the right end, so that padding and cuts are at the left."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    if is_causal:
        tokenizer.padding_side = tokenizer.truncation_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class AnswerTrainer(FewShotTrainer):
    """Tests by generating answers, for encoder-decoder and causal models alike.

    transformers' `Seq2SeqTrainer` knows no causal models, and on several processes it counts the examples twice that
    fill up the last batch.
    """

    max_new_tokens: int

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Returns no loss, the tokens of the answers (batch, at most max_new_tokens) and the labels."""
        inputs = self._prepare_inputs(inputs)
        generator = self.accelerator.unwrap_model(model)
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        tokens = generator.generate(**prompt, max_new_tokens=self.max_new_tokens, do_sample=False)
        if not generator.config.is_encoder_decoder:
            tokens = tokens[:, prompt["input_ids"].shape[1] :]
        return None, tokens, inputs["labels"]


def token_cross_entropy(shift: int) -> Callable[..., Tensor]:
    """The Trainer's `compute_loss_func`: mean over the answers' tokens in the whole batch of all processes.

    Args:
        shift: 1 for causal models, whose logits are about the next token; 0 for others.
    """

    def loss(outputs: ModelOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"][:, : labels.shape[1] - shift].float()  # (batch, tokens, vocabulary)
        labels = labels[:, shift:]
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total / (labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

    return loss


def scorer(
    tokenizer: PreTrainedTokenizerBase, references: Sequence[list[str]]
) -> Callable[[EvalPrediction], dict[str, float]]:
    """The Trainer's `compute_metrics`, for test examples with these right answers."""
    metric = ExactMatch(keep_in_memory=True)

    def score(prediction: EvalPrediction) -> dict[str, float]:
        tokens = np.asarray(prediction.predictions)
        tokens = np.where(tokens == IGNORED, tokenizer.pad_token_id, tokens)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        if len(texts) != len(references):
            raise RuntimeError(f"{len(texts)} answers for {len(references)} questions")
        return metric.compute(predictions=texts, references=references)

    return score


def main() -> None:
    """Runs it all."""
    arguments, settings = parse_arguments(
        [QuestionArguments, TrainingArguments], __doc__, output_dir="few-shot-question-answering", method="learned"
    )
    prepare_process(settings)
    with settings.main_process_first(desc="data set, model and adapters"):  # the others find them in the cache
        support, test = draw(arguments, settings.seed, arguments.input_columns, arguments.label_column)
        is_causal = not AutoConfig.from_pretrained(arguments.model_name_or_path).is_encoder_decoder
        tokenizer = load_tokenizer(arguments, is_causal)
        kind = AutoModelForCausalLM if is_causal else AutoModelForSeq2SeqLM
        base = kind.from_pretrained(arguments.model_name_or_path)
        model = build_model(base, arguments, "CAUSAL_LM" if is_causal else "SEQ_2_SEQ_LM")
        features = [tokenize(data, tokenizer, arguments, is_causal, data is support) for data in (support, test)]
    trainer = AnswerTrainer(
        model,
        settings,
        arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer, None if is_causal else base),
        train_dataset=features[0],
        eval_dataset=features[1],
        processing_class=tokenizer,
        compute_metrics=scorer(tokenizer, [answers_of(row, arguments) for row in test]),
        compute_loss_func=token_cross_entropy(shift=int(is_causal)),
    )
    trainer.max_new_tokens = arguments.max_new_tokens
    trainer.run()


if __name__ == "__main__":
    main()
