"""`score_adapters`: how well each adapter alone does on the K examples, without a validation set or training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from .batches import Collate
from .passes import ALL_KINDS, Precision, candidates, composition_in, passes, read_examples
from .streamed import read_in_turn
from .table import AdapterScores, tabulate


def score_adapters(
    model: nn.Module,
    data: Any,
    *,
    adapters: Sequence[Any] | None = None,
    adapter_name: str | None = None,
    head: str | nn.Module | None = None,
    collate: Collate | None = None,
    batch_size: int = 16,
    mixed_precision: Precision = "no",
    seed: int = 0,
) -> AdapterScores:
    """Score each adapter of a composition alone, their uniform mix and the base model, on a few labelled examples.

    A classifier is scored by its features, and not by its head, which may be new: each example is compared with the
    class means of the others (leave-one-out). A causal or encoder-decoder model is scored by the likelihood of the
    answers. Nothing is trained and the model is as before afterwards.

    Each candidate costs one forward pass over the examples, at the price of one LoRA: an adapter's pass computes with
    its own rank alone. All run in eval mode. Several processes share the candidates; each of them calls this.

    With `adapters` these are read from their files one after the other, so that memory does not grow with their
    number; their uniform mix is not scored then, and several processes do all of it each.

    Args:
        model: a model with a composition, neither merged nor disabled; with `adapters`, a base model without any.
        data: the examples: a `DataLoader` (not prepared by accelerate), a list of batches, or a data set or list of
            rows. A batch is a mapping of the model's arguments with `labels`: one class for each example, or the
            tokens of its answer with -100 elsewhere. It is read once, and kept.
        adapters: Hub ids, folders or dicts, as `CompositionConfig` takes them. Default: those of the composition.
        adapter_name: of the composition. Default: the active one.
        head: the module that makes classes of features, or its name. Default: that in `modules_to_save`, or else
            `classifier`, `score` or the like.
        collate: makes a batch of rows. Default: their own (`EncodedRows`), or transformers' `default_data_collator`.
        batch_size: for rows.
        mixed_precision: `"bf16"` or `"fp16"` runs the passes under autocast, as the Trainer does with `bf16=True`.
        seed: of the bootstraps behind the intervals.

    Returns:
        The table; `print` shows it.

    Raises:
        ValueError: no composition, merged or disabled adapters, no head, one example of each class (nothing can be
            left out), batches without labels, features that are not finite. The message says what to do.
        AdapterError: an entry of `adapters` cannot be composed.

    Example:
        >>> print(score_adapters(model, support_set))
        >>> print(score_adapters(base_model, support_set, adapters=["me/lora-a", "me/lora-b", "./lora-c"]))
    """
    if adapters is None:
        composition = composition_in(model, adapter_name)
        called, mixes = composition.model, candidates(composition, ALL_KINDS)
    else:
        called, mixes = model, read_in_turn(model, adapters)
    examples = read_examples(called, data, head, collate, batch_size)
    if examples.labels is not None:
        require_pairs(examples.labels)
    passed = passes(called, mixes, examples, mixed_precision, are_shared=adapters is None)
    return tabulate(mixes, passed, len(examples), seed)


def require_pairs(labels: Tensor) -> None:
    """Refuse examples none of which could be left out."""
    counts = cast(Tensor, labels.unique(return_counts=True)[1])
    if len(counts) > 1 and int(counts.max()) == 1:
        raise ValueError(
            f"There is one example of each of {len(counts)} classes: none can be left out and compared with others of "
            "its class. Give two or more of a class; with one, fit_mixing_weights goes by the adapters' own heads."
        )
