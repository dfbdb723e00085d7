"""HKD (Petrovic and Fiorelli 2024, "hierarchical knowledge distillation"): at every level of the pyramid the student
matches the teacher's map (spatial), where it is strong (semantic), and its means over regions (contextual); each term
has a weight per level. Reads the teacher's pyramid.

The paper gives no number and no context term. Ours, by ambiguity (A3): a 1x1 adapter and a mean over elements (P1); the
energy map of attention transfer (P2); regions of 1x1, 2x2 and 4x4 (P3); weights of 1, each term being divided by its
moving average over the first 200 steps (P4), so that all count alike; levels up to P5 (P7). That average spans the
global batch and is saved with the run; it cannot span accumulated micro-batches, for which `scale: none` is.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.attention_maps import energy_map
from kd.blocks.divergence import share_of_mean, squared_error
from kd.blocks.pool_pyramid import region_error
from kd.blocks.unit_scale import UnitScale
from kd.methods.base import Advice, Method, MethodConfig, Pair

TERMS = ("spatial", "semantic", "contextual")


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """`weight` is the paper's lambda_KD."""

    spatial: tuple[float, ...] = (1.0,)
    """The paper's alpha: a weight for each level, finest first, or one for all."""
    semantic: tuple[float, ...] = (1.0,)
    """Its beta."""
    contextual: tuple[float, ...] = (1.0,)
    """Its gamma."""
    grids: tuple[int, ...] = (1, 2, 4)
    """Regions per side of the contextual term."""
    scale: Literal["ema", "none"] = "ema"
    """`ema`: divide each term of each level by its moving average."""
    settle: int = 200
    """Steps after which these averages stay as they are."""
    decay: float = 0.99
    """Of the average, per step."""
    coarsest: int = 5
    """Levels above this one are left alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in TERMS:
            weights = getattr(self, name)
            if not weights or min(weights) < 0:
                raise ValueError(f"{name} must be one weight >= 0, or one per level, got {weights}")
        if not self.grids or min(self.grids) < 1:
            raise ValueError(f"grids must be one or more positive integers, got {self.grids}")
        if self.settle < 1 or not 0 <= self.decay < 1:
            raise ValueError(f"settle must be >= 1 and decay in [0, 1), got {self.settle} and {self.decay}")


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        same_levels(pair.student.strides, pair.teacher.strides)
        if config.scale == "ema" and pair.accumulate > 1:
            raise ValueError(
                f"hkd.scale ema needs each step's whole terms, not parts from {pair.accumulate} accumulated "
                "micro-batches; set hkd.scale to none, or accumulate to 1"
            )
        self.levels = sum(stride <= 2**config.coarsest for stride in pair.student.strides)
        if not self.levels:
            raise ValueError(f"hkd.coarsest {config.coarsest} is below every level of strides {pair.student.strides}")
        self.grids = config.grids
        self.weights = {name: _per_level(name, getattr(config, name), self.levels) for name in TERMS}
        self.match = MatchChannels(pair.student.pyramid_channels, pair.teacher.pyramid_channels, self.levels)
        count = len(TERMS) * self.levels
        self.scale = UnitScale(count, config.settle, config.decay, pair.world) if config.scale == "ema" else None

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        own, images = student.pyramid[: self.levels], batch.totals["images"]
        pairs = list(zip(self.match(own), teacher.detach().pyramid[: self.levels], strict=True))
        errors = [
            *(share_of_mean(squared_error(s, t), images) for s, t in pairs),
            *(share_of_mean(squared_error(energy_map(s), energy_map(t)), images) for s, t in pairs),
            *(region_error(s, t, self.grids, images) for s, t in pairs),
        ]
        shares = torch.stack(errors)
        found = (shares if self.scale is None else self.scale(shares)).view(len(TERMS), self.levels)
        return {
            name: (found[i] * found.new_tensor(self.weights[name])).sum()
            for i, name in enumerate(TERMS)
            if any(self.weights[name])
        }


def _per_level(name: str, weights: tuple[float, ...], levels: int) -> tuple[float, ...]:
    if len(weights) not in (1, levels):
        raise ValueError(f"hkd.{name} has {len(weights)} weights, the student {levels} levels; give one, or one each")
    return weights * levels if len(weights) == 1 else weights
