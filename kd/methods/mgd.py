"""MGD (Yang et al., ECCV 2022, arXiv:2205.01529, section 3): a random share of the student's cells is blanked out, and
a small generator must restore the teacher's whole map from what is left, so each cell learns to speak for its
neighbours. Reads the teacher's pyramid.

The floor of the loss is the generator's error, not 0: with nothing masked and no generator it is FitNet's sum. Masks
are drawn per image, level and epoch. Departure: neck and head are not inherited unless the recipe says so.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.divergence import squared_error
from kd.blocks.draw import chances
from kd.blocks.generate import Generator, masked
from kd.methods.base import Advice, Method, MethodConfig, Pair

DEFAULTS = {"one_stage": (2e-5, 0.65), "two_stage": (5e-7, 0.45)}
"""The authors' alpha and masked share by the student's family."""


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    alpha: float | None = None
    """Weight of the squared error, summed over channels and cells; None: the paper's for the student's family."""
    masked: float | None = None
    """Share of the cells that are masked (the paper's lambda), in [0, 1); None: the paper's."""
    layers: int = 2
    """3x3 convolutions of the generator; 0: none, the masked map itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("alpha")
        if self.masked is not None and not 0 <= self.masked < 1:
            raise ValueError(f"masked must be in [0, 1), or null for the paper's value, got {self.masked}")
        if self.layers < 0:
            raise ValueError(f"layers must be >= 0, got {self.layers}")


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        chosen = zip((config.alpha, config.masked), DEFAULTS[pair.student.family], strict=True)
        self.alpha, self.masked = (default if own is None else own for own, default in chosen)
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        self.match = MatchChannels(pair.student.pyramid_channels, pair.teacher.pyramid_channels, levels)
        self.generators = nn.ModuleList(Generator(pair.teacher.pyramid_channels, config.layers) for _ in range(levels))

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        if not self.alpha:
            return {}
        levels = [
            squared_error(generator(masked(s, self._chances(batch, i, s), self.masked)), t).sum()
            for i, (generator, s, t) in enumerate(
                zip(self.generators, self.match(student.pyramid), teacher.detach().pyramid, strict=True)
            )
        ]
        return {"feat": self.alpha * torch.stack(levels).sum() / batch.totals["images"].clamp(min=1)}

    def _chances(self, batch: Batch, level: int, x: Tensor) -> Tensor:
        return chances((*batch.key, "mgd", level), batch.image_ids, (x.shape[2], x.shape[3]))
