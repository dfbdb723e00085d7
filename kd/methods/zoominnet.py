"""ZoomInNet (2021, cross-scale distillation of drone images): a teacher of the student's make that sees twice the
pixels is imitated at few key points near objects, where the two heads disagree most. Reads the teacher's pyramid, and
asks its head (of two stages, the first).

The paper's feature-level alignment is the teacher's `align: shift`: its level of twice the stride stands at each of the
student's. Departures: the adaptive choice of key points is not published; here an image's points are the greatest of
|teacher's score - student's score| x a Gaussian about an object's centre, over all levels, and the mean over channels
of squared differences is weighted by these, which sum to 1. The student's pyramid keeps its levels (the authors start
it one lower); the loss's weight is not published either.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels
from kd.blocks.divergence import squared_error
from kd.blocks.key_points import best_scores, object_bumps, strongest
from kd.methods.base import Advice, Method, MethodConfig, Pair, check_comparable


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    points: int = 100
    """Most key points of an image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("points")


class Loss(Method):
    needs_head = True

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        check_comparable(pair, "zoominnet")
        self.points, self.strides = config.points, pair.student.strides
        widths = pair.student.pyramid_channels, pair.teacher.pyramid_channels
        self.match = MatchChannels(*widths, len(self.strides))

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        weights = self._weights(outputs.detach(), advice.teacher_outputs, teacher, batch)
        pairs = zip(self.match(student.pyramid), teacher.detach().pyramid, strict=True)
        errors = torch.cat([squared_error(s, t).mean(dim=1).flatten(1) for s, t in pairs], dim=1)
        return {"feat": (errors * weights).sum() / batch.totals["images"].clamp(min=1)}

    @torch.no_grad()
    def _weights(self, mine: Outputs, its: Outputs, like: Taps, batch: Batch) -> Tensor:
        """(B, cells of all levels): the weights of an image's key points, 0 elsewhere."""
        gaps = zip(
            best_scores(mine.class_logits), best_scores(its.class_logits), like.pyramid, self.strides, strict=True
        )
        levels = [((a - b).abs() * object_bumps(batch, x, stride)).flatten(1) for a, b, x, stride in gaps]
        return strongest(torch.cat(levels, dim=1), self.points)
