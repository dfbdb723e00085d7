"""TinyKD (2023; the authors' code is haotianll/TinyKD): imitate the teacher's map, and the map after its cells have
attended to their neighbours, with object cells and background each weighing 1 per image, however small the objects are.
Reads the teacher's pyramid.

A cell's foreground weight is the greatest 1 / area (in pixels) of the boxes it meets, so a tiny box is neither lost at
a coarse level nor drowned by a large one; weights sum to 1 over an image's level. Departures: an image without boxes
has background alone (the authors divide by 0); patches are not shifted at random; heads are not inherited unless the
recipe says so. Both nets' attentions learn; they start as the identity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, each, same_levels
from kd.blocks.divergence import squared_error
from kd.blocks.foreground import all_boxes, cover_objects, even
from kd.blocks.patch_attention import PatchAttention
from kd.methods.base import Advice, Method, MethodConfig, Pair


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    ramp: float = 1000 / 90_000
    """The authors' warm-up of 1,000 iterations, of a schedule of 90,000."""
    feature: float = 1.0
    """The paper's lambda1; 0.5 on AI-TOD."""
    relation: float = 1.0
    """The paper's lambda2; 0.5 on AI-TOD."""
    foreground: float = 1.0
    background: float = 0.5
    patch: int = 16
    """Cells per side of a neighbourhood."""
    temperature: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("feature", "relation", "foreground", "background")
        self.check_positive("patch", "temperature")


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        self.config, self.strides = config, pair.student.strides
        levels = same_levels(self.strides, pair.teacher.strides)
        widths = pair.student.pyramid_channels, pair.teacher.pyramid_channels
        self.match, self.match_relation = (MatchChannels(*widths, levels, kernel=3, always=True) for _ in range(2))
        self.student_relation, self.teacher_relation = (
            nn.ModuleList(PatchAttention(width, config.patch, config.temperature) for _ in range(levels))
            for width in widths
        )

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        taught = teacher.detach().pyramid
        weights = [self._weights(batch, t, stride) for t, stride in zip(taught, self.strides, strict=True)]
        terms: dict[str, Tensor] = {}
        if self.config.feature:
            terms["feat"] = self.config.feature * _error(self.match(student.pyramid), taught, weights, batch)
        if self.config.relation:
            related, wanted = each(self.student_relation, student.pyramid), each(self.teacher_relation, taught)
            terms["relation"] = self.config.relation * _error(self.match_relation(related), wanted, weights, batch)
        return terms

    def _weights(self, batch: Batch, like: Tensor, stride: int) -> Tensor:
        """(B, H, W): what each cell of a level counts."""
        boxes, level = all_boxes(batch)[0], cover_objects(batch, like, stride)
        sides = (boxes[:, 2:].ceil() - boxes[:, :2].floor()).clamp(min=1)
        objects = even(level.greatest(1 / sides.prod(dim=1)))
        return self.config.foreground * objects + self.config.background * level.background()


def _error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], weights: list[Tensor], batch: Batch) -> Tensor:
    """This micro-batch's share of the weighted squared errors: means over channels and images, summed over levels."""
    levels = [
        (squared_error(s, t).mean(dim=1) * weight).sum() for s, t, weight in zip(student, teacher, weights, strict=True)
    ]
    return torch.stack(levels).sum() / batch.totals["images"].clamp(min=1)
