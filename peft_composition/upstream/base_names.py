"""Decides whether two names of base models stand for the same weights, as far as names can tell."""

from __future__ import annotations

import re


# What people append to the name of a model for a copy of its weights in another format.
_COPY = re.compile(
    r"""[-_.](
      unsloth | bnb | quantized | quant | gptq | awq | hqq | eetq | quanto | torchao | auto[-_]?round
    | aqlm ([-_]\d+bit)? ([-_]\d+x\d+)?
    | \d+[-_]?bits? | u?int[248] | w\d+a\d+(fp|int)?\d* | g(s|roup)?(32|64|128|256) | (32|64|128|256)g
    | nf4 | fp4 | nvfp4(a16)? | mxfp[468] | float8 | fp8([-_](dynamic|static|block|kv))?
    | fp16 | fp32 | bf16 | f16 | f32 | float16 | float32 | bfloat16
    | gguf | ggml | i?q\d(_(k|0|1|s|m|l|xs|xxs|nl))* | onnx | mlx | dwq([-_]v\d+)?
    | exl[23] | \d+(\.\d+)?bpw([-_]h\d)?
    | sharded | safetensors | hf
    )$""",
    re.VERBOSE,
)
# The longest name on the Hub; longer ones are compared unchanged.
_LONGEST = 96


def without_owner(name: str) -> str:
    """The last part of a Hub id in lower case: organisations are renamed, and the Hub ignores case."""
    return name.rpartition("/")[2].lower()


def original(name: str) -> str:
    """The name of the original of a copy, such as a 4-bit one, in lower case and without the owner.

    Example:
        >>> original("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit")
        'llama-3.1-8b-instruct'
    """
    bare = without_owner(name)
    if len(bare) > _LONGEST:
        return bare
    bare = bare.removeprefix("meta-")  # Meta's Llama models were renamed without it
    while (suffix := _COPY.search(bare)) and suffix.start() > 0:
        bare = bare[: suffix.start()]
    return bare
