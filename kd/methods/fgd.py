"""FGD (Yang et al., CVPR 2022, arXiv:2111.11837, sections 3.1-3.2): imitate objects and background apart (focal), most
where the teacher attends, every object weighing the same however small; and imitate what each cell makes of the whole
map (global, a GcBlock on both sides). Reads the teacher's pyramid.

Sums over channels and cells, averaged over images, added over levels, as in the paper. Departures: a cell belongs to a
box when it shares area with it (the authors add a row and a column); adapters stand only where the widths differ; neck
and head are not inherited unless the recipe says so.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, each, same_levels
from kd.blocks.attention_maps import channel_attention, spatial_attention
from kd.blocks.divergence import squared_error
from kd.blocks.foreground import cover_objects
from kd.blocks.gcblock import GcBlock
from kd.methods.base import Advice, Method, MethodConfig, Pair

DEFAULTS = {
    "fcos": (0.8, 1.6e-3, 8e-4, 8e-4, 8e-6),
    "one_stage": (0.5, 1e-3, 5e-4, 5e-4, 5e-6),
    "two_stage": (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7),
}
"""The authors' temperature, alpha, beta, gamma and lambda by the student's detector, else by its family."""
SETTINGS = ("temperature", "foreground", "background", "attention", "relation")


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    temperature: float | None = None
    """Of the attention's softmax; None, as for the weights: the authors' for the student's detector or family."""
    foreground: float | None = None
    """The paper's alpha."""
    background: float | None = None
    """The paper's beta."""
    attention: float | None = None
    """The paper's gamma: weight of the distance between the attention maps."""
    relation: float | None = None
    """The paper's lambda: weight of the global term."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights(*SETTINGS[1:])
        self.check_positive("temperature")


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        name = str(pair.student.places[0]) if pair.student.places else ""
        chosen = DEFAULTS.get(name, DEFAULTS[pair.student.family])
        own = (getattr(config, setting) for setting in SETTINGS)
        self.temperature, self.foreground, self.background, self.attention, self.relation = (
            default if mine is None else mine for mine, default in zip(own, chosen, strict=True)
        )
        self.strides = pair.student.strides
        levels, width = same_levels(self.strides, pair.teacher.strides), pair.teacher.pyramid_channels
        self.match = MatchChannels(pair.student.pyramid_channels, width, levels)
        self.student_relation, self.teacher_relation = (
            nn.ModuleList(GcBlock(width) for _ in range(levels)) for _ in range(2)
        )

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        s, t = self.match(student.pyramid), teacher.detach().pyramid
        found: dict[str, list[Tensor]] = {}
        if self.foreground or self.background:
            found["feat"] = [self._focal(*level, batch) for level in zip(s, t, self.strides, strict=True)]
        if self.attention:
            found["attention"] = [self.attention * self._attention_gap(*level) for level in zip(s, t, strict=True)]
        if self.relation:
            pairs = zip(each(self.student_relation, s), each(self.teacher_relation, t), strict=True)
            found["relation"] = [self.relation * squared_error(*level).sum() for level in pairs]
        images = batch.totals["images"].clamp(min=1)
        return {name: torch.stack(levels).sum() / images for name, levels in found.items()}

    def _focal(self, student: Tensor, teacher: Tensor, stride: int, batch: Batch) -> Tensor:
        """The squared errors of one level, by the teacher's attention and by what a cell shows: 1 / its box's cells (of
        several boxes, the smallest), or 1 / the background's cells."""
        cells = cover_objects(batch, teacher, stride)
        masks = self.foreground * cells.greatest(1 / cells.cells) + self.background * cells.background()
        attended = masks[:, None] * spatial_attention(teacher, self.temperature)
        return (squared_error(student, teacher) * attended * channel_attention(teacher, self.temperature)).sum()

    def _attention_gap(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The summed differences of both attention maps."""
        maps = (spatial_attention, channel_attention)
        gaps = [(of(student, self.temperature) - of(teacher, self.temperature)).abs().sum() for of in maps]
        return torch.stack(gaps).sum()
