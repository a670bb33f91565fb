"""Finds a classifier's head, and records the pooled features that it gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..text import quoted


HEADS = ("classifier", "score", "classification_head", "head", "fc")
"""Names of classifier heads in transformers, timm and torchvision."""


def find_head(model: nn.Module, head: str | nn.Module | None) -> nn.Module:
    """The module that turns features into classes.

    Args:
        model: the model, with or without PEFT's wrapper around the head.
        head: the module, its name or a suffix of its name. Default: the module that PEFT trains in full
            (`modules_to_save`), otherwise the module with a usual name.

    Returns:
        The module that the model calls, which is PEFT's wrapper if PEFT has a copy of the head.

    Raises:
        ValueError: there is no such module, or more than one.
    """
    if isinstance(head, nn.Module):
        if not any(module is head for module in model.modules()):
            raise ValueError(f"head: this {type(head).__name__} is not a module of the model ({type(model).__name__})")
        return _wrapper_of(model, head)
    if head is not None:
        found = {name: module for name, module in _outermost(model) if name == head or name.endswith(f".{head}")}
        return _only(found, f"called {quoted(head)}")
    saved = {name: module for name, module in _outermost(model) if isinstance(module, ModulesToSaveWrapper)}
    if saved:
        return _only(saved, "in modules_to_save")
    found = {name: module for name, module in _outermost(model) if name.rpartition(".")[2] in HEADS}
    shortest = min((name.count(".") for name in found), default=0)
    return _only(
        {name: module for name, module in found.items() if name.count(".") == shortest}, f"called {', '.join(HEADS)}"
    )


def _only(found: Mapping[str, nn.Module], which: str) -> nn.Module:
    if len(found) == 1:
        return next(iter(found.values()))
    there = "there is none" if not found else f"there are {', '.join(quoted(name) for name in sorted(found))}"
    raise ValueError(
        f"The head that turns features into classes was not found. Looked for one {which}: {there}. Pass head=..., a "
        "module or a suffix of its name."
    )


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, without those inside PEFT's wrapper of a head."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name, module in model.named_modules():
        if not any(name.startswith(f"{outer}.") for outer in wrapped):
            yield name, module


def _wrapper_of(model: nn.Module, head: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and any(inner is head for inner in module.modules()):
            return module
    return head


def original_head(head: nn.Module | None) -> nn.Module | None:
    """The head inside of PEFT's wrapper."""
    return head.original_module if isinstance(head, ModulesToSaveWrapper) else head


class Features:
    """Pooled features of a batch, as the head gets them; filled by a forward pass within `watching`.

    A head that gets one vector per example gets pooled features. A head that gets more (RoBERTa's selects the first
    token itself) contains a module that gets one vector. A linear head on all tokens, such as that of
    `LlamaForSequenceClassification`, is followed by pooling: while it is watched, it outputs a code for each position
    instead of classes, and the code that the model selects for an example shows the token.

    Args:
        head: the head.
        keeps_graph: whether gradients can be computed through the features.
    """

    def __init__(self, head: nn.Module, keeps_graph: bool = False) -> None:
        self.head = head
        self._keeps_graph = keeps_graph
        self._pooled: Tensor | None = None
        self._of_tokens: Tensor | None = None
        self._codes: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which the model runs on one batch."""
        self._pooled = self._of_tokens = self._codes = None
        handles = [module.register_forward_pre_hook(self._before, with_kwargs=True) for module in self.head.modules()]
        handles.append(self.head.register_forward_hook(self._after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self, output: Any, examples: int) -> Tensor:
        """The features, shape (examples, width).

        Args:
            output: the model's output.
            examples: number of examples in the batch.

        Raises:
            ValueError: no part of the head gets one vector per example.
        """
        pooled, tokens, codes, logits = self._pooled, self._of_tokens, self._codes, logits_of(output)
        if pooled is not None and pooled.shape[0] == examples:
            return pooled
        if (
            tokens is not None
            and codes is not None
            and logits is not None
            and logits.shape == (examples, codes.shape[1])
        ):
            is_taken = (codes.to(logits)[None] == logits[:, None]).all(-1)  # (examples, positions)
            if tokens.shape[0] == examples and bool(is_taken.any(1).all()):
                place = is_taken.to(torch.uint8).argmax(1).to(tokens.device)
                return tokens[torch.arange(examples, device=tokens.device), place]
        seen = "did not run" if tokens is None and pooled is None else "is given no pooled features"
        raise ValueError(
            f"The head ({type(self.head).__name__}) {seen}: it must get one vector for each of {examples} examples. "
            "Pass the module that gets them: head=..."
        )

    def _before(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = next((value for value in (*given, *named.values()) if isinstance(value, Tensor)), None)
        if first is None:
            return
        first = first if self._keeps_graph else first.detach()
        if first.dim() == 2 and self._pooled is None:
            self._pooled = first
        if first.dim() == 3 and self._of_tokens is None:
            self._of_tokens = first

    def _after(self, module: nn.Module, given: Any, output: Any) -> Tensor | None:
        if self._pooled is not None or not isinstance(output, Tensor) or output.dim() != 3:
            return None
        positions, classes = output.shape[1:]
        # Noise: a mean of positions, or anything else except one of them, matches none.
        generator = torch.Generator().manual_seed(0)
        self._codes = torch.rand(positions, classes, generator=generator).to(output)
        return self._codes[None].expand_as(output)


def logits_of(output: Any) -> Tensor | None:
    """The logits that a model returns."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if hasattr(output, "get") else getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    return found if isinstance(found, Tensor) else None
