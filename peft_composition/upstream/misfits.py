"""Explains factors of an unexpected shape: the likely cause, and what to do. Errors end with these sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


# Names of the layer of causal language models that maps to the vocabulary.
OUTPUT_EMBEDDINGS = ("lm_head", "embed_out")
SPREAD = (
    "This happens when an adapter is saved under DeepSpeed ZeRO-3 or FSDP without gathering its values. Save it again "
    "with all values: trainer.save_model() with stage3_gather_16bit_weights_on_model_save, or "
    "model.save_pretrained(..., state_dict=accelerator.get_state_dict(model)); or take them from the training "
    "checkpoint (zero_to_fp32.py)"
)


class Sizes(NamedTuple):
    """The shape of a row of A, and the number of rows of B."""

    in_shape: tuple[int, ...]
    out_features: int


def why_no_matrix(shape: tuple[int, ...], all_shapes: Sequence[tuple[int, ...]]) -> str:
    """Why a factor is empty or one-dimensional, from its shape and the shapes of all tensors of the adapter."""
    if 0 in shape:
        empty = sum(0 in other for other in all_shapes)
        return f"is empty (shape {shape}), like {empty} of the {len(all_shapes)} tensors. {SPREAD}"
    return f"is not a matrix (shape {shape}). {SPREAD}"


def why_another_shape(module: str, is_embedding: bool, has: Sizes, needs: Sizes) -> str:
    """Whether an adapter is for another model, or only for another vocabulary.

    Args:
        module: the module's name.
        is_embedding: whether it is an embedding.
        has: the sizes of the factors.
        needs: the sizes of the module.
    """
    last = module.rpartition(".")[2]
    if is_embedding and has.out_features == needs.out_features:
        entries, wanted = has.in_shape[0], needs.in_shape[0]
    elif last in OUTPUT_EMBEDDINGS and has.in_shape == needs.in_shape:
        entries, wanted = has.out_features, needs.out_features
    else:
        return "Was it trained on another base model?"
    when = "when the adapter was trained" if entries > wanted else "since the adapter was trained"
    return (
        f"Its vocabulary has {entries} entries, not {wanted}: the model's vocabulary was enlarged {when}. Give the "
        f"model the same one, model.resize_token_embeddings({entries}) with the rows of the new tokens, or leave the "
        f"module out with exclude_modules=[{last!r}]"
    )
