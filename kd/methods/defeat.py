"""DeFeat (Guo et al., CVPR 2021, arXiv:2103.14475): objects and background teach apart, each with a weight of
its own, on the pyramid and on the regions' classes. Reads the teacher's pyramid; asks its head where classes teach.

Pyramid: w_fg / 2 of the mean squared error over the cells of a level's boxes, w_bg / 2 of that over the others, through
a 3 x 3 adapter, levels averaged; a box belongs to the level that fits its size (FPN, eq. 1). Classes: the divergence at
temperature T, the mean over an image's regions on objects and the mean over the others, the student's regions being
asked of both.

Departures: means are of each image and images are averaged, so that ranks add up, where the authors' are of a batch;
the adapter starts as the identity where widths agree; on a dense head the class terms, off by default, are of its
places and sum over classes. The weights are the authors' for Pascal VOC.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.divergence import share_of_image_means, share_of_mean, squared_error
from kd.blocks.foreground import all_boxes, cover
from kd.blocks.response import soften
from kd.blocks.rois import level_of
from kd.methods.base import Advice, Method, MethodConfig, Pair, check_comparable


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    foreground: float = 3.0
    """Weight of the pyramid's cells on objects."""
    background: float = 12.0
    """Weight of the others."""
    objects: float | None = None
    """Weight of the classes of regions on objects; None: 2 of a two-stage student, 0 of a one-stage one."""
    rest: float | None = None
    """Weight of the classes of the other regions; None: as `objects`."""
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("foreground", "background", "objects", "rest")
        self.check_positive("temperature")


class Loss(Method):
    needs_head = True

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        usual = 2.0 if pair.student.family == "two_stage" else 0.0
        self.objects, self.rest = (usual if w is None else w for w in (config.objects, config.rest))
        self.config, self.strides, self.needs_head = config, pair.student.strides, bool(self.objects or self.rest)
        if self.needs_head:
            check_comparable(pair, "defeat with class terms (objects, rest)")
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        channels = pair.student.pyramid_channels, pair.teacher.pyramid_channels
        self.match = MatchChannels(*channels, levels, kernel=3, always=True)

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        boxes, image = all_boxes(batch)
        level, levels = level_of(boxes, self.strides), []
        for number, (s, t) in enumerate(zip(self.match(student.pyramid), teacher.detach().pyramid, strict=True)):
            error, mine = squared_error(s, t).mean(dim=1), level == number
            covered = cover(boxes[mine], image[mine], (len(s), *s.shape[2:]), self.strides[number]).any()
            parts = _mean_over(error, covered), _mean_over(error, ~covered)
            levels.append(torch.stack([share_of_mean(part, batch.totals["images"]) / 2 for part in parts]))
        on, off = torch.stack(levels).mean(dim=0)
        terms = {"feat": self.config.foreground * on + self.config.background * off}
        return terms | (self._classes(outputs, batch, advice) if self.needs_head else {})

    def _classes(self, outputs: Outputs, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        mine = advice.detector.answers(outputs, batch)
        divergence = soften(mine, advice.detector.answers(advice.teacher_outputs, batch), self.config.temperature)
        on, off = (
            share_of_image_means(divergence[part], mine.image[part], len(batch), batch.totals["images"])
            for part in (mine.positive, mine.allowed & ~mine.positive)
        )
        return {"cls": self.objects * on + self.rest * off}


def _mean_over(error: Tensor, mask: Tensor) -> Tensor:
    """(B, H, W) twice -> (B,): each image's mean over its masked cells, 0 where there are none."""
    return (error * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1)
