"""GID (Dai et al., CVPR 2021, arXiv:2103.02340): where student and teacher disagree most, objects or not, the
student takes over the teacher's features, how these places stand to each other, and its answers. Asks the teacher's
head; reads its pyramid.

General instances: per image the 10 boxes (after suppression at IoU 0.3) on whose class the heads disagree most, the
surer head's boxes. On them: squared error of 10 x 10 RoI features through a 3 x 3 adapter, summed over channels; smooth
L1 between distances of pairs over their mean, of images with three instances; and, on the places that would answer for
them if they were labelled, soft cross-entropy of classes and L1 of box codes.

Departures: means are of each image's instances (pairs, places), and images are averaged, so that ranks add up; places
are chosen by the detector's own assignment (the authors' code: IoU 0.7); of two stages the second is compared, on the
student's regions.
"""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels
from kd.blocks.disagreement import Instances, instances
from kd.blocks.divergence import share_of_image_means, share_of_mean, squared_error
from kd.blocks.relation import relation_error
from kd.blocks.response import soften
from kd.blocks.rois import pool
from kd.methods.base import Advice, Method, MethodConfig, Pair, check_comparable


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    feature: float = 5e-4
    relation: float = 40.0
    cls: float = 0.1
    box: float = 1.0
    instances: int = 10
    """Most instances per image."""
    nms: float = 0.3
    size: int = 10
    """Cells per side of an instance's features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("feature", "relation", "cls", "box")
        if self.instances < 1 or self.size < 1 or not 0 < self.nms <= 1:
            raise ValueError(
                f"instances and size must be >= 1 and nms in (0, 1], got {self.instances}, {self.size} and {self.nms}"
            )


class Loss(Method):
    needs_head = True

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        check_comparable(pair, "gid")
        self.config, self.strides = config, pair.student.strides
        self.match = MatchChannels(
            pair.student.pyramid_channels, pair.teacher.pyramid_channels, 1, kernel=3, always=True
        )

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        read = advice.detector.answers
        mine, its = read(outputs, batch), read(advice.teacher_outputs, batch)
        found = instances(mine, its, batch.geometry, self.config.nms, self.config.instances)
        image, total = found.image, batch.totals["images"]
        taught = self._pool(teacher.detach().pyramid, found, batch)
        learnt = self._pool(tuple(self.match((level,))[0] for level in student.pyramid), found, batch)
        error = squared_error(learnt, taught).sum(dim=1).mean(dim=(1, 2))
        apart = relation_error(learnt.flatten(1), taught.flatten(1), image, len(batch))
        near = read(outputs, replace(batch, boxes=found.boxes, labels=found.labels))
        there, label = near.positive, near.label
        classes = soften(mine, its, 1.0)[there]
        boxes = F.l1_loss(mine.code_of(label), its.code_of(label).detach(), reduction="none").sum(dim=1)[there]
        return {
            "feat": self.config.feature * share_of_image_means(error, image, len(batch), total),
            "relation": self.config.relation * share_of_mean(apart, total),
            "cls": self.config.cls * share_of_image_means(classes, mine.image[there], len(batch), total),
            "box": self.config.box * share_of_image_means(boxes, mine.image[there], len(batch), total),
        }

    def _pool(self, pyramid: tuple[Tensor, ...], found: Instances, batch: Batch) -> Tensor:
        return pool(pyramid, found.boxes, self.strides, batch.geometry.canvas, self.config.size)
