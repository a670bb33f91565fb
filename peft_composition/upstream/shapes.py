"""`LayerShape`: what the factors of a target module must look like."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """What the factors of a target module must look like.

    Attributes:
        kind: class name of the base layer, for messages.
        in_shape: shape of one row of A: (in,), or (in, *kernel) for a convolution.
        out_features: number of rows of B.
        is_embedding: whether the factors belong to an embedding.
        refusal: why this layer cannot be composed; None if it can.
        experts: number of matrices in a parameter of three dimensions, each with factors of its own.
        is_transposed: whether these matrices are stored as (in, out).
    """

    kind: str
    in_shape: tuple[int, ...]
    out_features: int
    is_embedding: bool = False
    refusal: str | None = None
    experts: int | None = None
    is_transposed: bool = False

    @property
    def rank_dim_of_A(self) -> int:
        """The dimension of A that runs over the ranks."""
        return 0 if self.experts is None else 1

    @property
    def rank_dim_of_B(self) -> int:
        """The dimension of B that runs over the ranks."""
        return self.rank_dim_of_A + 1

    def shape_of_A(self, rank: int) -> tuple[int, ...]:
        """The shape of stacked A for a sum of ranks."""
        experts = () if self.experts is None else (self.experts,)
        return (*experts, rank, *self.in_shape)

    def shape_of_B(self, rank: int) -> tuple[int, ...]:
        """The shape of stacked B for a sum of ranks."""
        if self.experts is not None:
            return (self.experts, self.out_features, rank)
        return (self.out_features, rank, *(1,) * (len(self.in_shape) - 1))

    def saved_shape_of_A(self, rank: int) -> tuple[int, ...]:
        """The shape of A in an adapter's file, where the experts are below each other."""
        return self.shape_of_A(rank) if self.experts is None else (self.experts * rank, *self.in_shape)

    def saved_shape_of_B(self, rank: int) -> tuple[int, ...]:
        """The shape of B in an adapter's file, where the experts are beside each other."""
        return self.shape_of_B(rank) if self.experts is None else (self.out_features, rank * self.experts)

    def unpack_A(self, saved: Tensor) -> Tensor:
        """A from an adapter's file, reshaped for stacking."""
        return saved if self.experts is None else saved.reshape(self.experts, -1, *self.in_shape)

    def unpack_B(self, saved: Tensor) -> Tensor:
        """B from an adapter's file, reshaped for stacking; its columns run over the experts first, then the ranks."""
        if self.experts is None:
            return saved
        return saved.reshape(self.out_features, -1, self.experts).permute(2, 0, 1)
