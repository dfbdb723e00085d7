"""MKD ("Multi-knowledge distillation" for RTMDet, ACML 2024): the student's map equals the teacher's at several sizes
of cell (eq. 1) and after a random share of its own frequencies is blanked out (FDMD, eqs. 2-4), and its channels look
where the teacher's do (FAD, eq. 5, which is CWD); their sum with weight 1 (eq. 6). Reads the teacher's pyramid.

FDMD's floor is the energy that the mask blanks out, not 0. Masks are drawn per image, level and epoch. The paper's
views are unique (Mosaic, MixUp), with a live teacher; ours are fixed: stored and replayed, so that a cached teacher
serves as well, and the paper's figures are not to be expected. Departures by ambiguity (A4.6): a symmetric mask that
keeps the mean (M2); no generator (M3) and no plain term (M4) unless asked for; scales are averaged (M6); levels are
summed. The control that it must beat (M1) is `cwd` with `norm: bn_noaffine`, temperature 1 and weight 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.divergence import share_of_mean, softened_kl, squared_error
from kd.blocks.draw import chances
from kd.blocks.frequency import Symmetry, filtered, frequency_mask
from kd.blocks.generate import Generator
from kd.blocks.pool_pyramid import pooled_error
from kd.methods.base import Advice, Method, MethodConfig, Pair


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    late: ClassVar[frozenset[str]] = MethodConfig.late | {
        "multiscale",
        "fdmd",
        "fad",
        "plain",
        "pools",
        "zeta",
        "mask",
        "temperature",
    }
    stop: float = 280 / 300
    """Off for the last 20 of the paper's 300 epochs."""
    multiscale: float = 1.0
    """Weight of eq. 1."""
    fdmd: float = 1.0
    """Weight of eq. 4."""
    fad: float = 1.0
    """Weight of eq. 5."""
    plain: float = 0.0
    """Weight of a plain mean squared error, the L_fea that the paper names and does not define."""
    pools: tuple[int, ...] = (1, 2, 4)
    """Cells per side of eq. 1's windows."""
    zeta: float = 0.5
    """Share of the frequencies that are blanked out."""
    mask: Symmetry = "symmetric"
    """`literal`: the paper's mask, whose inverse is complex; its imaginary part is dropped."""
    generator: bool = False
    """Restore the teacher's map from the masked one by two 3x3 convolutions, as MGD does."""
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("multiscale", "fdmd", "fad", "plain")
        if not self.pools or min(self.pools) < 1:
            raise ValueError(f"pools must be one or more positive integers, got {self.pools}")
        if not 0 <= self.zeta < 1:
            raise ValueError(f"zeta must be in [0, 1), got {self.zeta}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        self.config = config
        levels, width = same_levels(pair.student.strides, pair.teacher.strides), pair.teacher.pyramid_channels
        self.match = MatchChannels(pair.student.pyramid_channels, width, levels)
        layers = 2 if config.generator and config.fdmd else 0
        self.generators = nn.ModuleList(Generator(width, layers) for _ in range(levels))

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        pairs = list(zip(self.match(student.pyramid), teacher.detach().pyramid, strict=True))
        images, config = batch.totals["images"], self.config
        terms: dict[str, list[Tensor]] = {}
        if config.multiscale:
            terms["multiscale"] = [pooled_error(s, t, config.pools, images) for s, t in pairs]
        if config.fdmd:
            masked = [filtered(s, self._mask(batch, level, s)) for level, (s, _) in enumerate(pairs)]
            restored = [generator(x) for generator, x in zip(self.generators, masked, strict=True)]
            terms["fdmd"] = [
                share_of_mean(squared_error(s, t), images) for s, (_, t) in zip(restored, pairs, strict=True)
            ]
        if config.fad:
            planes = ((s.flatten(2), t.flatten(2)) for s, t in pairs)
            terms["fad"] = [share_of_mean(softened_kl(s, t, config.temperature, dim=2), images) for s, t in planes]
        if config.plain:
            terms["plain"] = [share_of_mean(squared_error(s, t), images) for s, t in pairs]
        return {name: getattr(config, name) * torch.stack(levels).sum() for name, levels in terms.items()}

    def _mask(self, batch: Batch, level: int, x: Tensor) -> Tensor:
        drawn = chances((*batch.key, "mkd", level), batch.image_ids, (x.shape[2], x.shape[3]))
        return frequency_mask(drawn, self.config.zeta, self.config.mask)
