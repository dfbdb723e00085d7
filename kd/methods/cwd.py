"""CWD (Shu et al., ICCV 2021, arXiv:2011.13256): each channel, softened into a distribution over the
plane, says where it looks; the student's channels look where the teacher's do. Reads the teacher's pyramid.

Departure: on pyramid levels (summed) instead of logits, weight 10, temperature 1, as mmrazor sets them there. An
adapter stands only where the widths differ. The padding takes part, since both nets see the same canvas.

With `norm: bn_noaffine`, temperature 1 and weight 1 it is MMYOLO's recipe for RTMDet (ambiguity M1), the control of
MKD: both sides' channels first get mean 0 and variance 1 over the whole global batch, as PKD's do.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.divergence import share_of_mean, softened_kl
from kd.blocks.norms import batch_standardised
from kd.methods.base import Advice, Method, MethodConfig, Pair


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    weight: float = 10.0
    temperature: float = 1.0
    norm: Literal["none", "bn_noaffine"] = "none"
    """`bn_noaffine`: standardise each channel over the global batch, which micro-batches cannot see."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("temperature")


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        if config.norm == "bn_noaffine" and pair.accumulate > 1:
            raise ValueError(
                f"cwd.norm bn_noaffine spans the whole batch and cannot be had over {pair.accumulate} accumulated "
                "micro-batches; set cwd.norm to none, or accumulate to 1"
            )
        self.temperature, self.norm, self.world = config.temperature, config.norm, pair.world
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        self.match = MatchChannels(pair.student.pyramid_channels, pair.teacher.pyramid_channels, levels)

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        images = batch.totals["images"]
        sides = self.match(student.pyramid), teacher.detach().pyramid
        if self.norm == "bn_noaffine":
            sides = tuple(tuple(batch_standardised(x, images, self.world) for x in side) for side in sides)
        levels = [
            share_of_mean(softened_kl(s.flatten(2), t.flatten(2), self.temperature, dim=2), images)
            for s, t in zip(*sides, strict=True)
        ]
        return {"feat": torch.stack(levels).sum()}
