"""CWD (Shu et al., ICCV 2021, arXiv:2011.13256, eqs. 3-4): each channel, softened into a distribution over the
plane, says where it looks; the student's channels look where the teacher's do. Reads the teacher's pyramid.

Departure: on pyramid levels (summed) instead of logits, weight 10, temperature 1, as mmrazor sets them there. An
adapter stands only where the widths differ. The padding takes part, since both nets see the same canvas.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.divergence import share_of_mean, softened_kl
from kd.methods.base import Advice, Method, MethodConfig, Pair


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    weight: float = 10.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        self.temperature = config.temperature
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        self.match = MatchChannels(pair.student.pyramid_channels, pair.teacher.pyramid_channels, levels)

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        pairs = zip(self.match(student.pyramid), teacher.detach().pyramid, strict=True)
        levels = [
            share_of_mean(softened_kl(s.flatten(2), t.flatten(2), self.temperature, dim=2), batch.totals["images"])
            for s, t in pairs
        ]
        return {"feat": torch.stack(levels).sum()}
