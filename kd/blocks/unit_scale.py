"""Bringing loss terms of unlike size to about 1."""

import torch
from torch import Tensor, nn

from data_sharding.world import World


class UnitScale(nn.Module):
    """Divides each of several terms by a moving average of its global value, which settles after some steps: from then
    on the divisors are constants of the run. They are buffers, equal on every rank and saved with the run.
    """

    average: Tensor
    """(N,) float64: weighted sum of the values so far."""
    mass: Tensor
    """() float64: the sum of those weights."""
    steps: Tensor
    """() int64: how many values there were."""

    def __init__(self, terms: int, settle: int, decay: float, world: World) -> None:
        """`settle`: the number of steps after which the divisors stay; `decay` of the average per step."""
        super().__init__()
        self.settle, self.decay, self.world = settle, decay, world
        self.register_buffer("average", torch.zeros(terms, dtype=torch.float64))
        self.register_buffer("mass", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, shares: Tensor) -> Tensor:
        """(N,) this rank's shares of the terms -> the same, divided. In training every call is one step of the run, and
        every rank must make it."""
        if self.training:
            self._observe(self.world.sum(shares.detach()).double())
        # A term that has been 0 so far stays 0 instead of becoming 0 / 0.
        usual = self.average / self.mass.clamp(min=1e-30)
        return shares / torch.where(usual > 0, usual, 1).to(shares.dtype)

    def _observe(self, value: Tensor) -> None:
        open_ = self.steps < self.settle
        kept, new = torch.where(open_, self.decay, 1.0), torch.where(open_, 1 - self.decay, 0.0)
        self.average.mul_(kept).add_(new * value)
        self.mass.mul_(kept).add_(new)
        self.steps.add_(1)
