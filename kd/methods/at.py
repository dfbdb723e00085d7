"""AT (Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928, eq. 2): the student is strong where the teacher is. Each
map's energy over the plane, as a vector of length 1, equals the teacher's. Reads the teacher's pyramid.

Nothing is adapted, so any two widths agree. Departures: at every pyramid level (summed) instead of a stage's end, and
the distance squared as in the authors' code; their beta of 1000 / cells is the weight 1000 of a mean over cells.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import same_levels
from kd.blocks.attention_maps import energy_map
from kd.blocks.divergence import share_of_mean, squared_error
from kd.methods.base import Advice, Method, MethodConfig, Pair


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    weight: float = 1000.0


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        same_levels(pair.student.strides, pair.teacher.strides)

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        pairs = zip(student.pyramid, teacher.detach().pyramid, strict=True)
        errors = [squared_error(energy_map(s), energy_map(t)) for s, t in pairs]
        levels = [share_of_mean(error, batch.totals["images"]) for error in errors]
        return {"feat": torch.stack(levels).sum() / 2}
