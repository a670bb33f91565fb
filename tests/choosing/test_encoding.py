"""Examples as model inputs: what is padded, cut and labelled; models run on them, and they are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from peft_composition import score_adapters
from peft_composition.choosing import EncodedRows, LabelledData, load_processor, read_data
from peft_composition.comparing.rows import Rows

from .. import tiny


WORDS = ["[UNK]", "[PAD]", "[BOS]", "[EOS]", "a", "b", "c", "d", "e", "f", "yes", "no"]


def tokenizer(has_bos: bool = False, side: str = "right") -> PreTrainedTokenizerFast:
    own = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    if has_bos:
        own.post_processor = processors.TemplateProcessing("[BOS] $A", "[BOS] $A $B", [("[BOS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="[UNK]", pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
        padding_side=side, model_max_length=8,
    )  # fmt: skip


def test_texts_and_pairs() -> None:
    rows = [{"text": "a b c", "more": "d", "label": "x"}, {"text": "a", "more": "e", "label": "y"}]
    one = EncodedRows(read_data(rows), tokenizer())
    batch = one.collate(one[:])
    assert batch["input_ids"].tolist() == [[4, 5, 6], [4, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [0, 1]
    pair = EncodedRows(read_data(rows, text=["text", "more"]), tokenizer())
    assert pair[1]["input_ids"] == [4, 8]
    assert (
        len(EncodedRows(read_data([{"text": "a " * 99, "label": n} for n in (0, 1)]), tokenizer())[0]["input_ids"])
        == 8
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_of_a_causal_model(side: str) -> None:
    """Only the answer and the end count; a long prompt loses its beginning, but not the mark of the beginning."""
    rows = [{"p": "a b c d e f a b c d", "a": "yes"}, {"p": "b", "a": "no"}]
    encoded = EncodedRows(read_data(rows, prompt="p", answer="a"), tokenizer(has_bos=True, side=side))
    # The answer, too, is tokenized without special tokens: no second mark of the beginning.
    assert encoded[0]["input_ids"] == [2, 9, 4, 5, 6, 7, 10, 3]
    assert encoded[0]["labels"] == [-100] * 6 + [10, 3]
    batch = encoded.collate(encoded[:])
    short = [2, 5, 11, 3]
    pad = [1] * 4
    assert batch["input_ids"][1].tolist() == (pad + short if side == "left" else short + pad)
    where = batch["labels"] != -100
    assert where.sum(1).tolist() == [2, 2]
    assert batch["input_ids"][where].tolist() == batch["labels"][where].tolist() == [10, 3, 11, 3]
    with pytest.raises(ValueError, match="the answer 'yes yes yes yes yes yes yes yes' has 9 tokens"):
        EncodedRows(read_data([{"p": "a", "a": " ".join(["yes"] * 8)}], prompt="p", answer="a"), tokenizer())


def test_answers_of_an_encoder_decoder_model() -> None:
    encoded = EncodedRows(read_data([{"p": "a b", "a": "yes"}, {"p": "a", "a": "no no"}], prompt="p", answer="a"),
                          tokenizer(), is_encoder_decoder=True)  # fmt: skip
    batch = encoded.collate(encoded[:])
    assert batch["input_ids"].tolist() == [[4, 5], [4, 1]]
    assert batch["labels"].tolist() == [[10, -100], [11, 11]]


def test_images_are_opened_when_they_are_asked_for(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        Image.new("L", (20, 10), 40 * number).save(tmp_path / name / "own.png")
    encoded = EncodedRows(read_data(tmp_path), ViTImageProcessor(size={"height": 8, "width": 8}))
    batch = encoded.collate(encoded[:])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1]
    (tmp_path / "b" / "own.png").write_bytes(b"broken")
    encoded[0]
    with pytest.raises(ValueError, match=r"the image .*own\.png could not be opened"):
        encoded[1]


def test_images_of_16_bits_and_of_floats_are_scaled(tmp_path: Path) -> None:
    ramp = numpy.arange(64, dtype=numpy.float64).reshape(8, 8) / 63
    wide = numpy.round(ramp * 65535).astype(numpy.uint16)
    floats = ramp.astype(numpy.float32)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(floats).save(tmp_path / "floats.tif")
    given = [tmp_path / "wide.png", tmp_path / "floats.tif", Image.fromarray(wide), Image.fromarray(floats)]
    for image in given:
        (row,) = pictures([image])
        pixels = row["pixel_values"] * 0.5 + 0.5  # as the processor normalizes
        assert pixels.numpy() == pytest.approx(numpy.broadcast_to(ramp, (3, 8, 8)), abs=1 / 255)
    with pytest.raises(
        ValueError, match=r"example 0: an image of mode 'F' has values from 0 to 255; they must be 0 to 1"
    ):
        pictures([Image.fromarray(floats * 255)])[0]


def test_an_image_that_is_not_there_or_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the test, example 1: an image has neither bytes nor a path"):
        pictures([Image.new("RGB", (8, 8)), {"bytes": None, "path": None}])[1]
    Image.new("RGB", (40, 40)).save(tmp_path / "own.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"example 0: the image .*own\.png could not be opened: .*decompression bomb"):
        pictures([str(tmp_path / "own.png")])[0]


def pictures(images: list[Any]) -> EncodedRows:
    data = LabelledData("image", tuple((own,) for own in images), (0,) * len(images), (), ("a",), "the test")
    return EncodedRows(data, ViTImageProcessor(size={"height": 8, "width": 8}))


def test_a_base_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer of .*nothing could not be loaded"):
        load_processor(str(tmp_path / "nothing"), "text")


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_adapters_are_scored_on_them(kind: str, tmp_path: Path) -> None:
    base = tiny.build(kind)
    own = tiny.save_lora(tmp_path / "own", base, {"bert": ["query"], "llama": ["q_proj"], "t5": ["q"]}[kind], seed=1)
    rows = [
        {"t": words, "l": answer} for words, answer in (("a b", "yes"), ("a", "yes"), ("c d", "no"), ("d e f", "no"))
    ]
    is_classifier = kind == "bert"
    data = read_data(rows, text="t", label="l") if is_classifier else read_data(rows, prompt="t", answer="l")
    encoded = EncodedRows(data, tokenizer(), is_encoder_decoder=kind == "t5")
    scores = score_adapters(base, encoded, adapters=[str(own)])  # of different lengths: they are padded as they say
    (batch,) = Rows(encoded, None).batches(torch.arange(4), 4)  # as for `compare_methods`
    expected = encoded.collate(encoded[:])
    assert all(torch.equal(batch[key], value) for key, value in expected.items())
    assert [row.name for row in scores] == ["own", "base"]
    assert scores.examples == 4
    assert torch.tensor([row.score for row in scores]).isfinite().all()
