"""FitNets hints on a pyramid (Romero et al., ICLR 2015, arXiv:1412.6550, eq. 3): the student's maps, through a
learned 1x1 convolution, equal the teacher's. Reads the teacher's pyramid.

Departure: hints at every pyramid level (summed) instead of one stage, as detection papers do, with a mean instead of
half a sum, weight 2 (LD's setting). Where the widths are equal the convolution starts as the identity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.divergence import share_of_mean, squared_error
from kd.methods.base import Advice, Method, MethodConfig, Pair


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    weight: float = 2.0


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        self.match = MatchChannels(pair.student.pyramid_channels, pair.teacher.pyramid_channels, levels, always=True)

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        pairs = zip(self.match(student.pyramid), teacher.detach().pyramid, strict=True)
        levels = [share_of_mean(squared_error(s, t), batch.totals["images"]) for s, t in pairs]
        return {"feat": torch.stack(levels).sum()}
