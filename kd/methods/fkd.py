"""FKD (Zhang and Ma, ICLR 2021, "Improve object detection with feature-based knowledge distillation"): imitate most
where either net looks, imitate the means over the plane and over channels, and imitate how each cell relates to all
others (a non-local block on both sides). Reads the teacher's pyramid.

Every term is a norm, the root of a sum. Departures: one root per image and level, images averaged, where the authors
take one root over the batch, which has no shares; GroupNorm inside the non-local blocks; the mask is spatial alone, as
in the authors' code; adapters start as the identity where the widths are equal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, each, same_levels
from kd.blocks.attention_maps import spatial_attention
from kd.blocks.divergence import distance
from kd.blocks.global_relation import NonLocal
from kd.methods.base import Advice, Method, MethodConfig, Pair

DEFAULTS = {"one_stage": (4e-4, 2e-2, 4e-4), "two_stage": (7e-5, 4e-3, 7e-5)}
"""The authors' weights of features, means and relation by the student's family."""


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    feature: float | None = None
    """Weight of the attended features; None, as for the next two: the authors' for the student's family."""
    means: float | None = None
    relation: float | None = None
    temperature: float = 0.5
    """Of the attention's softmax."""
    rates: tuple[int, ...] = (8, 4, 2)
    """Down-sampling of the related cells, finest level first; the last holds for all coarser levels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("feature", "means", "relation")
        if self.temperature <= 0 or not self.rates or min(self.rates) < 1:
            raise ValueError(f"temperature and rates must be positive, got {self.temperature} and {self.rates}")


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        chosen = zip((config.feature, config.means, config.relation), DEFAULTS[pair.student.family], strict=True)
        self.feature, self.means, self.relation = (default if own is None else own for own, default in chosen)
        self.temperature = config.temperature
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        widths = pair.student.pyramid_channels, pair.teacher.pyramid_channels
        rates = [config.rates[min(i, len(config.rates) - 1)] for i in range(levels)]
        self.match, self.match_channels, self.match_relation = (
            MatchChannels(*widths, levels, always=True) for _ in range(3)
        )
        self.match_plane = MatchChannels(1, 1, levels, kernel=3, always=True)
        self.student_relation, self.teacher_relation = (
            nn.ModuleList(NonLocal(width, rate) for rate in rates) for width in widths
        )

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        mine, taught = student.pyramid, teacher.detach().pyramid
        found: dict[str, list[Tensor]] = {}
        if self.feature:
            found["feat"] = [
                self.feature * distance(a, t, self._attention(s, t))
                for a, s, t in zip(self.match(mine), mine, taught, strict=True)
            ]
        if self.means:
            found["means"] = [self.means * d for d in self._means(mine, taught)]
        if self.relation:
            s, t = each(self.student_relation, mine), each(self.teacher_relation, taught)
            found["relation"] = [self.relation * distance(a, b) for a, b in zip(self.match_relation(s), t, strict=True)]
        images = batch.totals["images"].clamp(min=1)
        return {name: torch.stack(distances).sum() / images for name, distances in found.items()}

    def _attention(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, 1, H, W): the mean of both nets' attention, without gradient."""
        both = spatial_attention(student.detach(), self.temperature) + spatial_attention(teacher, self.temperature)
        return both / 2

    def _means(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> list[Tensor]:
        """Per level twice (B,): distances of the means over the plane and over the channels."""
        pooled = self.match_channels(tuple(x.mean(dim=(2, 3), keepdim=True) for x in student))
        planes = self.match_plane(tuple(x.mean(dim=1, keepdim=True) for x in student))
        over_plane = [distance(a, t.mean(dim=(2, 3), keepdim=True)) for a, t in zip(pooled, teacher, strict=True)]
        return over_plane + [distance(a, t.mean(dim=1, keepdim=True)) for a, t in zip(planes, teacher, strict=True)]
