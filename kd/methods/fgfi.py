"""FGFI (Wang et al., CVPR 2019, arXiv:1906.03609): the student imitates the teacher's pyramid only where
anchors overlap an object, on it and close around it. Reads the teacher's pyramid at those positions alone.

Departures: on every level, a box's anchors being those of all levels together, so that each object is imitated on the
levels of its size; the anchors are RetinaNet's, centred on the cells, for every student (FCOS has none, and the mask is
relative to a box's best); no position that the box made 1.2 times as large does not meet, so that a cache of foreground
alone suffices; N_p counts an image's positions, over its levels, and images are averaged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from data_sharding.codecs.foreground import ENLARGED
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.divergence import squared_error
from kd.blocks.imitation import anchor_masks
from kd.methods.base import Advice, Method, MethodConfig, Pair


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    weight: float = 0.01
    start: float = 400 / 90_000
    """400 iterations go without, of a schedule of 90,000."""
    phi: float = 0.5
    """Share of a box's best IoU from which an anchor's position is imitated, in [0, 1); 0: wherever one overlaps."""
    anchor_sizes: tuple[float, ...] = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))
    """Square roots of the anchors' areas, in strides."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width."""
    enlarged: float = ENLARGED
    """How many times as large as a box is what its positions must meet; a sparse cache must hold that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.phi < 1:
            raise ValueError(f"phi must be in [0, 1), got {self.phi}")
        for name in ("anchor_sizes", "anchor_ratios"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be one or more numbers above 0, got {getattr(self, name)}")
        if self.enlarged < 1:
            raise ValueError(f"enlarged must be >= 1, got {self.enlarged}")

    @property
    def reads_within(self) -> float | None:
        return self.enlarged


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        self.config, self.strides = config, pair.student.strides
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        channels = pair.student.pyramid_channels, pair.teacher.pyramid_channels
        self.match = MatchChannels(*channels, levels, kernel=3, always=True)

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        matched, at = self.match(student.pyramid), self.config
        shapes = [(len(x), x.shape[2], x.shape[3]) for x in matched]
        masks = anchor_masks(batch, shapes, self.strides, at.anchor_sizes, at.anchor_ratios, at.phi, at.enlarged)
        positions = torch.stack([mask.sum(dim=(1, 2)) for mask in masks]).sum(0)
        share = 1 / (2 * positions * batch.totals["images"]).clamp(min=1)
        levels = [
            (_at(s, t, mask) * share[mask.nonzero()[:, 0]]).sum()
            for s, t, mask in zip(matched, teacher.detach().pyramid, masks, strict=True)
        ]
        return {"feat": torch.stack(levels).sum()}


def _at(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """(B, C, H, W) twice, (B, H, W) bool -> (positions,): squared errors summed over channels, of the mask alone."""
    return squared_error(student.movedim(1, -1)[mask], teacher.movedim(1, -1)[mask]).sum(dim=1)
