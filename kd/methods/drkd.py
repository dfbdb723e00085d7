"""DRKD (Ni et al., IJCAI 2023, "Dual relation knowledge distillation for object detection"): imitate how the cells of a
level relate (a graph unit on both sides), how the labelled objects of an image relate (attention among their RoIs on
the two finest levels), and these RoIs themselves. Reads the teacher's pyramid.

Every term is a norm, the root of a sum. Departures: one root per image and level, images averaged (the authors take the
graph's root over the batch, which has no shares, and sum the instances' over its images); the relation filter, which
the authors' code draws anew at random in every call, is a parameter: one score per object; objects relate in `width`
channels instead of half of their 9 C; GroupNorm in place of the graph's BatchNorm.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, each, same_levels
from kd.blocks.divergence import distance, root, squared_error
from kd.blocks.foreground import all_boxes
from kd.blocks.global_relation import GraphReasoning
from kd.blocks.instances import InstanceRelation, object_maps
from kd.methods.base import Advice, Method, MethodConfig, Pair

INSTANCE = {"one_stage": 5e-3, "two_stage": 4e-3}
"""The authors' weight of the instances' relation by the student's family."""
FINEST = 2
"""Levels on which objects are looked at."""
SIZE = 3
"""Cells per side of an object."""


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    pixel: float = 1e-3
    """Weight of the graphs' distance."""
    instance: float | None = None
    """Weight of the instances' relation; None: the authors' for the student's family."""
    foreground: float = 2.4e-3
    """Weight of the RoIs themselves."""
    width: int = 256
    """Channels in which objects are compared with each other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("pixel", "instance", "foreground")
        self.check_positive("width")


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        self.pixel, self.foreground, self.strides = config.pixel, config.foreground, pair.student.strides
        self.instance = INSTANCE[pair.student.family] if config.instance is None else config.instance
        levels = same_levels(self.strides, pair.teacher.strides)
        widths = pair.student.pyramid_channels, pair.teacher.pyramid_channels
        finest = min(levels, FINEST)
        self.match = MatchChannels(*widths, levels, always=True)
        self.match_instances, self.match_foreground = (MatchChannels(*widths, finest, always=True) for _ in range(2))
        self.student_graph, self.teacher_graph = (
            nn.ModuleList(GraphReasoning(c, nodes=max(1, c // 4) if i < FINEST else c) for i in range(levels))
            for c in widths
        )
        self.student_relation, self.teacher_relation = (
            nn.ModuleList(InstanceRelation(c * SIZE**2, config.width) for _ in range(finest)) for c in widths
        )

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        mine, taught, images = student.pyramid, teacher.detach().pyramid, batch.totals["images"].clamp(min=1)
        terms: dict[str, Tensor] = {}
        if self.pixel:
            s, t = self.match(each(self.student_graph, mine)), each(self.teacher_graph, taught)
            distances = [distance(a, b) for a, b in zip(s, t, strict=True)]
            terms["feat"] = self.pixel * torch.stack(distances).sum() / images
        boxes, image = all_boxes(batch)
        s, t = (self._objects(pyramid, boxes, image) for pyramid in (mine, taught))
        if self.foreground:
            found = _between(self.match_foreground(s), t, image, len(batch))
            terms["foreground"] = self.foreground * found / images
        if self.instance:
            s, t = _told(self.student_relation, s, image), _told(self.teacher_relation, t, image)
            terms["instance"] = self.instance * _between(self.match_instances(s), t, image, len(batch)) / images
        return terms

    def _objects(self, pyramid: tuple[Tensor, ...], boxes: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        """Per finest level (M, C, 3, 3)."""
        levels = zip(pyramid[:FINEST], self.strides, strict=False)
        return tuple(object_maps(level, boxes, image, stride, SIZE) for level, stride in levels)


def _told(blocks: nn.ModuleList, objects: tuple[Tensor, ...], image: Tensor) -> tuple[Tensor, ...]:
    """What the relation among the objects of each image (M,) makes of them, per level (M, C, 3, 3)."""
    return tuple(block(x.flatten(1), image).view_as(x) for block, x in zip(blocks, objects, strict=True))


def _between(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], image: Tensor, images: int) -> Tensor:
    """Per level (M, C, 3, 3) -> the sum over levels and images of an image's root of its objects' squared distances."""
    squares = [squared_error(s, t).flatten(1).sum(dim=1) for s, t in zip(student, teacher, strict=True)]
    per_image = [sums.new_zeros(images).index_add(0, image, sums) for sums in squares]
    return root(torch.stack(per_image)).sum()
