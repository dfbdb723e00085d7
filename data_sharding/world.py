"""Which of how many processes this one is, and sums over all of them.

The world is a value that is passed down; only the worker's entry point asks torch or Ray for it.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    """`rank` of `size` processes that train one model together."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be in [0, {self.size}), got {self.rank}")

    def sum(self, x: Tensor) -> Tensor:
        """Sum `x` over all ranks, without gradient. Every rank must call it with the same shape and type."""
        if self.size == 1:
            return x.detach()
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    def sum_with_gradient(self, x: Tensor) -> Tensor:
        """Sum `x` over all ranks; the gradient of the sum flows back into every rank's `x`."""
        return x if self.size == 1 else _SumOverRanks.apply(x)  # pyright: ignore[reportReturnType]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: object) -> list[object]:
        """`value` of every rank, in rank order, on every rank. The value is pickled between processes of one run."""
        if self.size == 1:
            return [value]
        found: list[object] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward and backward: each rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
