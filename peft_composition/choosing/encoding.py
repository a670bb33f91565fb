"""Makes model inputs of labelled examples with the base's own tokenizer or image processor, and batches of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from ..text import one_line, quoted
from .data import Kind, LabelledData


IGNORED = -100
MOST_TOKENS = 512


def load_processor(base: str, kind: Kind, revision: str | None = None) -> Any:
    """The tokenizer or the image processor of a base model, as `EncodedRows` needs it.

    Args:
        base: Hub id or folder.
        kind: of the examples.
        revision: for a Hub id.

    Returns:
        It; a tokenizer without a token to pad with pads with that of the end.

    Raises:
        ValueError: the base has none.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    loads = AutoImageProcessor if kind == "image" else AutoTokenizer
    try:
        processor = loads.from_pretrained(base, revision=revision)
    except Exception as error:
        what = "image processor" if kind == "image" else "tokenizer"
        raise ValueError(f"the {what} of {one_line(base)} could not be loaded: {one_line(error, 600)}") from error
    if kind != "image" and processor.pad_token is None:
        processor.pad_token = processor.eos_token
    return processor


class EncodedRows(Sequence[dict[str, Any]]):
    """Examples as rows of model inputs with `labels`, and the function that makes a batch of them.

    It is what `score_adapters(model, rows)`, `fit_mixing_weights`, `compare_methods`, `explain` and
    `Trainer(train_dataset=rows, data_collator=rows.collate)` take. A causal model reads the prompt, a space, the
    answer and the end of text; only the last two count. An encoder-decoder model reads the prompt.

    Args:
        examples: the examples.
        processor: the base's tokenizer or image processor, as `load_processor` gives it.
        is_encoder_decoder: whether answers are the decoder's.
        max_length: tokens after which a text is cut; of a prompt for a causal model the end is kept. Default: what
            the tokenizer says, but 512 at most.

    Raises:
        ValueError: an image cannot be opened, or an answer leaves no room for its prompt.
    """

    def __init__(
        self,
        examples: LabelledData,
        processor: Any,
        is_encoder_decoder: bool = False,
        max_length: int | None = None,
    ) -> None:
        self.examples = examples
        self._processor = processor
        self._is_encoder_decoder = is_encoder_decoder
        stated = getattr(processor, "model_max_length", None) or MOST_TOKENS
        self._most = max_length or min(int(stated), MOST_TOKENS)
        self._rows: list[dict[str, Any]] = []
        if examples.kind != "image":
            self._rows = [self._encoded(number) for number in range(len(examples))]

    def encoded_alike(self, examples: LabelledData) -> EncodedRows:
        """Other examples, encoded as these are."""
        return EncodedRows(examples, self._processor, self._is_encoder_decoder, self._most)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        """A row; images are opened when they are asked for."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._rows[index] if self._rows else self._encoded(index % len(self))

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: texts are padded to the longest of it; labels of tokens with -100."""
        if self.examples.kind == "image":
            pixels = torch.stack([row["pixel_values"] for row in rows])
            return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}
        labels = [row["labels"] for row in rows]
        inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
        batch = dict(self._processor.pad(inputs, return_tensors="pt"))
        if self.examples.kind == "text":
            return {**batch, "labels": torch.tensor(labels)}
        longest = max(map(len, labels))
        is_left = self._processor.padding_side == "left" and not self._is_encoder_decoder
        filled = [
            [IGNORED] * (longest - len(own)) + own if is_left else own + [IGNORED] * (longest - len(own))
            for own in labels
        ]
        return {**batch, "labels": torch.tensor(filled)}

    def _encoded(self, number: int) -> dict[str, Any]:
        examples = self.examples
        given = examples.inputs[number]
        if examples.kind == "image":
            try:
                pixels = self._pixels(given[0])
            except ValueError as error:
                raise ValueError(f"{one_line(examples.source)}, example {number}: {error}") from error
            return {"pixel_values": pixels, "labels": examples.labels[number]}
        if examples.kind == "text":
            found = self._processor(*given, truncation=True, max_length=self._most)
            return {**found, "labels": examples.labels[number]}
        answer = examples.answers[number]
        if self._is_encoder_decoder:
            found = self._processor(given[0], truncation=True, max_length=self._most)
            target = self._processor(text_target=answer, truncation=True, max_length=self._most)
            return {**found, "labels": target["input_ids"]}
        end = [] if self._processor.eos_token_id is None else [self._processor.eos_token_id]
        labels = [*self._processor(f" {answer}", add_special_tokens=False)["input_ids"], *end]
        room = self._most - len(labels)
        if room < 1:
            raise ValueError(
                f"{one_line(examples.source)}: the answer {quoted(answer, 60)} has {len(labels)} tokens, which leaves "
                f"no room for its prompt in {self._most}; give a larger max_length=..."
            )
        prompt = self._processor(given[0])["input_ids"]
        first = prompt[:1] if prompt[:1] == [self._processor.bos_token_id] else []
        if len(prompt) > room:
            prompt = [*first, *prompt[len(prompt) - room + len(first) :]]
        ids = [*prompt, *labels]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + labels}

    def _pixels(self, image: Any) -> torch.Tensor:
        if isinstance(image, (str, os.PathLike, bytes, dict)):
            image = _opened(image)
        if hasattr(image, "convert"):
            image = _in_8_bits(image).convert("RGB")
        return self._processor(images=image, return_tensors="pt")["pixel_values"][0]


def _opened(image: Any) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images need pillow: pip install 'peft-composition[vision]'") from None
    from io import BytesIO

    stored: Any = image.get("bytes") if isinstance(image, dict) else image if isinstance(image, bytes) else None
    path: Any = image.get("path") if isinstance(image, dict) else None if stored is not None else image
    if stored is None and path is None:
        raise ValueError("an image has neither bytes nor a path")
    named = f"the image {one_line(path)}" if path else "an image"
    try:
        with Image.open(BytesIO(stored) if stored is not None else path) as opened:
            opened.load()
            return opened.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{named} could not be opened: {one_line(error)}") from error


def _in_8_bits(image: Any) -> Any:
    """Images of 16 bits or of floating-point numbers, which pillow would cut off at 255, scaled to 0 to 255."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    most = 1 if image.mode == "F" else 65535
    if not (low >= 0 and high <= most):  # NaN, too
        raise ValueError(
            f"an image of mode {image.mode!r} has values from {low:g} to {high:g}; they must be 0 to {most}: "
            "scale it, or save it with 8 bits"
        )
    return Image.fromarray(np.round(values * (255 / most)).astype(np.uint8))
