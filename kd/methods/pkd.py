"""PKD (Cao et al., NeurIPS 2022, arXiv:2207.02039): squared error between standardised channels, which is
1 - Pearson's r, so only the pattern counts and a teacher of another family can teach. Reads the teacher's pyramid.

The statistics span the whole global batch: moments are summed over ranks, with gradient, and every rank's share is
its part (1 / ranks) of one loss. Micro-batches cannot see each other's moments before their backward, so
`statistics: batch` refuses accumulation and `image` standardises each image by itself. An adapter stands only where
the widths differ; levels are summed.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.divergence import plane_moments, share_of_mean, standardised_error
from kd.methods.base import Advice, Method, MethodConfig, Pair


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    alpha: float | None = None
    """Weight of the loss; None: the paper's for the student's family, 10 (one-stage) or 6 (two-stage)."""
    statistics: Literal["batch", "image"] = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("alpha")


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        if config.statistics == "batch" and pair.accumulate > 1:
            raise ValueError(
                f"pkd's statistics span the whole batch and cannot be had over {pair.accumulate} accumulated "
                "micro-batches; set pkd.statistics to image, or accumulate to 1"
            )
        default = 10.0 if pair.student.family == "one_stage" else 6.0
        self.alpha = default if config.alpha is None else config.alpha
        self.statistics, self.world = config.statistics, pair.world
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        self.match = MatchChannels(pair.student.pyramid_channels, pair.teacher.pyramid_channels, levels)

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        if not self.alpha:
            return {}
        level = self._over_images if self.statistics == "image" else self._over_batch
        pairs = zip(self.match(student.pyramid), teacher.detach().pyramid, strict=True)
        levels = [level(s, t, batch.totals["images"]) for s, t in pairs]
        return {"feat": self.alpha * torch.stack(levels).sum().float()}

    def _over_images(self, student: Tensor, teacher: Tensor, images: Tensor) -> Tensor:
        """(B, C, H, W) twice -> this micro-batch's share of the mean of 1 - r over images and channels."""
        *_, s_square, t_square, product = plane_moments(student, teacher)
        cells = student[0, 0].numel()
        return share_of_mean(standardised_error(s_square, t_square, product, cells), images)

    def _over_batch(self, student: Tensor, teacher: Tensor, images: Tensor) -> Tensor:
        """(B, C, H, W) twice -> this rank's share of the mean of 1 - r over channels, r over the global batch."""
        cells = student[0, 0].numel()
        s_mean, t_mean, s_square, t_square, product = plane_moments(student, teacher)
        raw = (
            s_mean, t_mean,
            s_square + cells * s_mean**2, t_square + cells * t_mean**2, product + cells * s_mean * t_mean,
        )  # fmt: skip
        # The teacher's moments carry no gradient, so one reduction with gradient serves both sides.
        total = self.world.sum_with_gradient(torch.stack(raw).sum(dim=1))
        count = images.clamp(min=1).double()
        s_mean, t_mean = total[0] / count, total[1] / count
        all_cells = count * cells
        central = (
            total[2] - all_cells * s_mean**2, total[3] - all_cells * t_mean**2, total[4] - all_cells * s_mean * t_mean,
        )  # fmt: skip
        return standardised_error(*central, all_cells).mean() / self.world.size
