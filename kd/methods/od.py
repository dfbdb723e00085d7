"""OD (Chen et al., NeurIPS 2017, "Learning efficient object detection models with knowledge distillation"):
the student takes from its teacher a hint on its features, soft classes in which the background weighs more, and boxes
only where it errs more than the teacher. Asks the teacher's head; reads its pyramid.

L_hint = 1/2 ||A(F^S) - F^T||^2, a mean over each level, levels summed; the soft cross-entropy and the bounded box error
(margin 0) are those of `Detector.distill_losses`, at both stages where there are two.

Departures: the hint is on every pyramid level instead of one layer; the hard class loss keeps its whole weight, the
soft one has its 1 - mu = 0.5; a dense head, which the paper lacks, has a soft binary cross-entropy at every location,
divided by the positives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.divergence import share_of_mean, squared_error
from kd.methods.base import Advice, Method, MethodConfig, Pair, check_comparable


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    hint: float = 0.5
    """Weight of the hint."""
    soft: float = 0.5
    """Weight of the soft class loss: 1 - mu."""
    box: float = 0.5
    """Weight of the bounded box loss: nu."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("hint", "soft", "box")


class Loss(Method):
    needs_head = True

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        self.config, self.needs_head = config, bool(config.soft or config.box)
        if self.needs_head:
            check_comparable(pair, "od")
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        channels = pair.student.pyramid_channels, pair.teacher.pyramid_channels
        self.match = MatchChannels(*channels, levels, always=True)

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self.config.hint:
            pairs = zip(self.match(student.pyramid), teacher.detach().pyramid, strict=True)
            levels = [share_of_mean(squared_error(s, t), batch.totals["images"]) for s, t in pairs]
            terms["feat"] = self.config.hint / 2 * torch.stack(levels).sum()
        if not self.needs_head:
            return terms
        found = advice.detector.distill_losses(outputs, advice.teacher_outputs, batch, "bounded")
        weights = {"cls": self.config.soft, "box": self.config.box}
        return terms | {name: weight * found[name] for name, weight in weights.items() if weight}
