"""Knowledge distillation of logits (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531, section 2): the student's class
probabilities, softened by a temperature, equal the teacher's. Asks the teacher's head; reads its pyramid.

T^2 times the divergence, summed over the places that answer for an object and divided by their number, so that the
background does not drown them; `where: all` takes every place. Regions of a second stage have one distribution over
classes and background, the student's regions being asked of both; a dense head has a coin per class, and its
divergences are summed over classes.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.response import soften
from kd.methods.base import Advice, Method, MethodConfig, Pair, check_comparable


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    temperature: float = 2.0
    where: Literal["objects", "all"] = "objects"
    """Places that answer for an object, or every place on the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("temperature")


class Loss(Method):
    needs_head = True

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        check_comparable(pair, "hinton")
        self.temperature, self.where = config.temperature, config.where

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        mine = advice.detector.answers(outputs, batch)
        its = advice.detector.answers(advice.teacher_outputs, batch)
        divergence = soften(mine, its, self.temperature)
        counted = mine.positive if self.where == "objects" else mine.positive | mine.allowed
        return {"cls": (divergence * counted).sum() * mine.share}
