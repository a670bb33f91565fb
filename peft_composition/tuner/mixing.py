"""`Mixing`: the mixing weights of one or more modules, learned or constant."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..config import CompositionConfig
from ..names import block_of
from . import functional
from .base_layer import real_device
from .folding import Motion


class Mixing(nn.Module):
    """Mixing weights of one or more modules: `w = softmax(v0 + gain * theta)`, or without the softmax.

    Starting weights with a sum below 1 leave the rest to the base model: it takes part in the softmax, by a logit that
    stays what it is.

    theta is the parameter `weight`, zero at the start, of shape (N,); uniform and fixed mixings have none. It is kept
    in float32 (float64 in a float64 model), whatever dtype the model is cast to.

    Args:
        config: the config with `mixing`, `weights`, `normalization` and `gain`.
        dtype: float32 or float64.
        device: device of the parameter.
    """

    def __init__(self, config: CompositionConfig, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        count = len(config.adapters or ())
        weights = config.weights if config.weights is not None else [1 / count] * count
        self.normalization = config.normalization
        assert config.gain is not None  # __post_init__ fills in the default
        self.count = count
        self.gain = config.gain
        self.start: list[float] | None = None
        if config.mixing == "learned":
            self.weight: nn.Parameter | None = nn.Parameter(torch.zeros(count, dtype=dtype, device=device))
            if config.weights is not None or config.normalization == "none":
                self.start = functional.starting_logits(weights, config.normalization)
        else:
            self.register_parameter("weight", None)
            self.start = weights
        self.motion = Motion()  # of theta; shared by replicas of nn.DataParallel
        # Constants are not buffers, which DDP would broadcast in every step.
        self._start: Tensor | None = None
        if self.start is not None:
            self._start_on(real_device(device), torch.promote_types(dtype, torch.float32))

    def forward(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The mixing weights w, shape (N,), in float32 or wider.

        Args:
            device: device for the constants of a uniform or fixed mixing; learned weights are on theta's device.
                Default: the CPU.
            dtype: the least precise dtype for these constants.
        """
        if self.weight is None:
            wide = torch.promote_types(dtype, torch.float32)
            return self._start_on(torch.device("cpu") if device is None else device, wide)
        logits = self.gain * _gathered(self.weight, self.count)
        if self._start is None:
            return functional.normalize(logits, self.normalization)
        start = self._start_on(logits.device, logits.dtype)
        return functional.normalize(logits + start[: self.count], self.normalization, start[self.count :])

    def _start_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self._start is None or self._start.device != device or self._start.dtype != dtype:
            with torch.inference_mode(False):  # training may use it, but no tensors made in inference mode
                self._start = torch.tensor(self.start, dtype=dtype, device=device)
        return self._start

    def restart(self, weights: Sequence[float]) -> None:
        """Replace the weights: constants, or the start of a training with theta at zero."""
        kept, theta = self._start, self.weight
        if theta is None:
            self.start = list(weights)
        else:
            self.start = functional.starting_logits(weights, self.normalization)
            with torch.no_grad():
                theta.zero_()
        self._start = None
        if kept is not None:
            self._start_on(kept.device, kept.dtype)
        elif theta is not None:
            self._start_on(real_device(theta.device), torch.promote_types(theta.dtype, torch.float32))

    def reset(self, device: torch.device) -> None:
        """Set theta to zero on `device`, even if it was created on the meta device."""
        if self.weight is not None:
            self._parameters["weight"] = nn.Parameter(
                torch.zeros(self.weight.shape, dtype=self.weight.dtype, device=device),
                requires_grad=self.weight.requires_grad,
            )

    def train(self, mode: bool = True) -> Mixing:
        """Switch between training and evaluation."""
        if self.weight is None or self.weight.grad is None:  # no step is expected
            self.motion.end()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mixing:
        """Move like any module, but never round theta below float32."""
        before = self.weight
        kept = None if before is None or before.is_meta else before.detach().clone()
        super()._apply(fn, recurse)
        if self.weight is not None and self.weight.dtype.itemsize < torch.float32.itemsize:
            source = self.weight.detach() if kept is None else kept.to(self.weight.device)
            gradient, self.weight.grad = self.weight.grad, None
            self.weight.data = source.float()
            self.weight.grad = None if gradient is None else gradient.float()
        if self._start is not None:  # now and not in the first forward pass, which may be compiled
            self._start_on(real_device(fn(self._start[:0]).device), self._start.dtype)
        return self

    def extra_repr(self) -> str:
        """Number of adapters and gain."""
        return f"adapters={self.count}, gain={self.gain}"


def _gathered(theta: Tensor, count: int) -> Tensor:
    """The complete parameter theta in float32 or wider, even if FSDP rounds or shards it."""
    if type(theta) is not nn.Parameter and hasattr(theta, "full_tensor"):  # FSDP2, outside of a forward pass
        theta = theta.full_tensor()
    if theta.shape[0] != count:
        raise RuntimeError(
            f"This process holds only {theta.shape[0]} of {count} mixing weights: FSDP1 has sharded them. It cannot "
            "shard weights that several modules share: use FSDP2 (peft_composition.sharding.shard) or "
            'weight_sharing="module". Outside of a forward pass, read them within '
            "FSDP.summon_full_params(model)."
        )
    return theta.to(torch.promote_types(theta.dtype, torch.float32))


def sharing_key(config: CompositionConfig, module: str) -> str:
    """The key of a module: modules with equal keys share one weight vector. Modules outside blocks share none."""
    if config.weight_sharing == "model":
        return ""
    if config.weight_sharing == "module":
        return module
    return block_of(module, config.layers_pattern) or module
