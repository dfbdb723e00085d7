"""FitNets hints on a pyramid (Romero et al., ICLR 2015, arXiv:1412.6550, eq. 3): the student's maps, through a
learned 1x1 convolution, equal the teacher's. Reads the teacher's pyramid.

Departure: hints at every pyramid level (summed) instead of one stage, as detection papers do, with a mean instead of
half a sum, weight 2 (LD's setting). Where the widths are equal the convolution starts as the identity.

With `foreground` the mean of a level is over the positions that meet a slightly enlarged box of an object, in all
images of the global batch together: nothing else of the teacher is read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from data_sharding.codecs.foreground import ENLARGED, foreground_cells
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.divergence import share_of_mean, squared_error
from kd.methods.base import Advice, Method, MethodConfig, Pair


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    weight: float = 2.0
    foreground: bool = False
    """Hints on objects alone; a sparse cache then suffices."""
    enlarged: float = ENLARGED
    """By how much their boxes grow first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enlarged < 1:
            raise ValueError(f"enlarged must be >= 1, got {self.enlarged}")

    @property
    def reads_within(self) -> float | None:
        return self.enlarged if self.foreground else None


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        self.enlarged, self.strides = config.reads_within, pair.student.strides
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        self.match = MatchChannels(pair.student.pyramid_channels, pair.teacher.pyramid_channels, levels, always=True)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """With `foreground`, the positions of each level; without, there are no masks."""
        return {self._count(s): mask.sum() for s, mask in zip(self.strides, self._masks(batch), strict=False)}

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        pairs = zip(self.match(student.pyramid), teacher.detach().pyramid, strict=True)
        errors = [squared_error(s, t) for s, t in pairs]
        if self.enlarged is None:
            levels = [share_of_mean(error, batch.totals["images"]) for error in errors]
        else:
            levels = [
                (error.mean(1) * mask).sum() / batch.totals[self._count(s)].clamp(min=1)
                for s, error, mask in zip(self.strides, errors, self._masks(batch), strict=True)
            ]
        return {"feat": torch.stack(levels).sum()}

    def _masks(self, batch: Batch) -> tuple[Tensor, ...]:
        """(B, H, W) bool per level; none without `foreground`."""
        if self.enlarged is None:
            return ()
        return foreground_cells(batch.boxes, batch.geometry.canvas, self.strides, self.enlarged)

    def _count(self, stride: int) -> str:
        return f"positions within {self.enlarged:g} x boxes, stride {stride}"
