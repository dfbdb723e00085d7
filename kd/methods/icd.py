"""ICD (Kang et al., NeurIPS 2021, arXiv:2110.12724): a decoder, asked about each labelled object, attends to
the cells of the teacher's pyramid that tell of it, and the student's values there equal the teacher's. The decoder is
an assistant: it learns to tell the objects from invented ones and to find their sides. Reads the teacher's pyramid.

With no object there is no loss. Departures: the student's value projection is stepped by the student's optimizer and
begins to learn with the loss, not before it on detached maps; what the decoder is asked is drawn by (seed, epoch,
image); sizes are described in cells of the finest level; invented objects are drawn evenly over classes and places;
neck and head are not inherited unless the recipe says so.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import same_levels
from kd.blocks.decoder import DecoderConfig, InstanceDecoder, adamw
from kd.blocks.inquiry import Asking, ask
from kd.blocks.instance_values import StudentValues, value_error
from kd.methods import base
from kd.methods.base import Advice, Method, MethodConfig, Pair, Scene

DEFAULTS = {"one_stage": 8.0, "two_stage": 3.0}
"""The paper's weight by the student's family."""


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    start: float = 1_000 / 90_000
    """The decoder learns alone for the first 1,000 of 90,000 iterations."""
    alpha: float | None = None
    """Weight of the imitation; None: the paper's for the student's family."""
    values: Literal["own", "shared"] = "own"
    """Whether the student's values have a projection of their own or go through the teacher's."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("alpha")

    @property
    def assisted(self) -> bool:
        return self.alpha != 0


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        self.alpha = DEFAULTS[pair.student.family] if config.alpha is None else config.alpha
        self.heads = config.decoder.heads
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        channels = pair.student.pyramid_channels, pair.teacher.pyramid_channels
        self.project = StudentValues(config.values, *channels, config.decoder.width, levels)

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        if not self.alpha:
            return {}
        if not advice.notes:
            raise ValueError("icd's loss needs its assistant's attention; or set alpha to 0")
        mine = self.project(student.pyramid, advice.notes["weight"], advice.notes["bias"])
        error = value_error(mine, advice.notes["values"], self.heads)
        # An object's attention sums to 1 over the cells, so this is the mean over heads and labelled objects.
        mass = self.heads * batch.totals["boxes"].clamp(min=1)
        return {"feat": self.alpha * (advice.notes["attention"] * error).sum() / mass}


class Assistant(base.Assistant):
    """The decoder over all levels of the teacher's pyramid."""

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        same_levels(pair.student.strides, pair.teacher.strides)
        self.config, self.clip, self.strides = config.decoder, config.decoder.clip, pair.student.strides
        classes = pair.student.num_classes
        self.decoder = InstanceDecoder(pair.teacher.pyramid_channels, classes, config.decoder)
        self.asking = Asking(
            classes=classes,
            fakes=config.decoder.fakes,
            most=config.decoder.most_of(pair.student.family),
            jitter=config.decoder.jitter,
            purpose="icd",
        )

    def rate(self, progress: float) -> float:
        return self.config.rate(progress)

    def watch(self, scene: Scene) -> tuple[Tensor, ...]:
        asked = ask(scene.batch, self.asking)
        look = self.decoder.look(asked, scene.teacher.pyramid, self.strides, scene.batch.geometry)
        attention, values, erred = look
        return (attention * asked.real[:, None, :, None]).sum(dim=2), values, erred

    def advise(self, made: tuple[Tensor, ...], scene: Scene) -> Advice:
        attention, values, erred = made
        projection = self.decoder.value
        # Copies: the step that follows must not change what these values were made with.
        shared = {"weight": projection.weight.clone(), "bias": projection.bias.clone()}
        return Advice(scene.student, notes={"attention": attention, "values": values, "erred": erred, **shared})

    def loss(self, advice: Advice, scene: Scene) -> Tensor:
        return advice.notes["erred"].sum() / scene.batch.totals["images"].clamp(min=1)

    def optimizer(self) -> torch.optim.Optimizer:
        return adamw(self.config, self)
