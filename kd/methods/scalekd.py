"""ScaleKD (Zhu et al., CVPR 2023, "ScaleKD: distilling scale-aware knowledge in small object detector").

A teacher at higher resolution teaches scale by scale: the student matches the teacher's c5 through branches of
several dilations (SDF, section 3.1), and its head matches the head's own answers on a pyramid in which the student's
cells have asked the teacher's (CSA, eqs. 3-6, an assistant), not the teacher's: eq. 7 without L_det. Reads the
teacher's c5 and pyramid.

Departures, by the names of our reference (A1.9). Fixed: V stands outside the softmax (S2); CSA's output is in units of
the student's level. By default, with a setting for the other reading: the student asks (S1); CSA shares the student's
head (S4) and does not move it (S5); it has a residual, LayerNorm and a position code and starts as the student's own
pyramid (S6); it learns from the first step on (S7), by AdamW, since Adam's coupled decay drives it back to the student;
its attention starts local; the teacher's SDF is frozen at random, or both sides could agree on a constant (S10), and
the student's begins as it.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import same_levels
from kd.blocks.cross_scale import Csa, attention
from kd.blocks.divergence import share_of_mean
from kd.blocks.sdf import DecoupledError, TeacherSide
from kd.detectors.base import Detector
from kd.methods import base
from kd.methods.base import Advice, Method, MethodConfig, Pair

On = Literal["c5", "pyramid"]

DEFAULTS = {"one_stage": (0.01, 0.2, 0.05), "two_stage": (0.07, 0.5, 0.2)}
"""The paper's alpha, beta and gamma by the student's family."""


@dataclass(frozen=True, kw_only=True)
class Sdf:
    """The scale-decoupled feature module."""

    on: On = "c5"
    """What it compares: c5 as in the paper, or every pyramid level (summed), where a small object still has cells."""
    width: int = 256
    """Channels after the adapter."""
    token_width: int = 256
    """Channels of each branch's tokens."""
    dilations: tuple[int, ...] = (1, 2, 3)
    weight_sharing: bool = True
    """One set of convolutions for all dilations."""
    teacher: TeacherSide = "frozen"
    """The teacher's side: frozen at orthogonal weights drawn from `seed`; the student's own module without gradient,
    tokens normalised; or trained as well, which can collapse."""
    seed: int = 0
    same_start: bool = True
    """The student's side begins as the frozen teacher's, as far as their widths agree; off: at random weights of its
    own, through which the first hundreds of steps teach little."""

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 4 or self.token_width < 1:
            raise ValueError(
                f"sdf.width must be a positive multiple of 4 and sdf.token_width positive, got {self.width} and "
                f"{self.token_width}"
            )
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"sdf.dilations must be one or more positive integers, got {self.dilations}")


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    late: ClassVar[frozenset[str]] = MethodConfig.late | {"alpha", "beta", "gamma", "box_loss"}
    start: float = 1 / 3
    freeze: float = 1 / 9
    alpha: float | None = None
    """Weight of the feature loss; None: the paper's for the student's family."""
    beta: float | None = None
    """Weight of the class loss."""
    gamma: float | None = None
    """Weight of the box loss."""
    box_loss: Literal["bounded", "smooth_l1"] = "bounded"
    sdf: Sdf = Sdf()
    csa: Csa = field(default_factory=Csa)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("alpha", "beta", "gamma")

    @property
    def assisted(self) -> bool:
        """Without output losses nobody listens to the assistant, unless it moves the head itself."""
        return self.beta != 0 or self.gamma != 0 or self.csa.moves_head


class Loss(Method):
    reads: ClassVar[frozenset[str]] = frozenset({"c5", "pyramid"})

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        chosen = zip((config.alpha, config.beta, config.gamma), DEFAULTS[pair.student.family], strict=True)
        self.alpha, self.beta, self.gamma = (default if own is None else own for own, default in chosen)
        self.box_loss = config.box_loss
        self.on: On = config.sdf.on
        if self.on == "pyramid":
            same_levels(pair.student.strides, pair.teacher.strides)
            channels = pair.student.pyramid_channels, pair.teacher.pyramid_channels
        else:
            channels = pair.student.c5_channels, pair.teacher.c5_channels
        self.features = DecoupledError(
            *channels,
            config.sdf.width,
            config.sdf.token_width,
            config.sdf.dilations,
            weight_sharing=config.sdf.weight_sharing,
            teacher_side=config.sdf.teacher,
            seed=config.sdf.seed,
            same_start=config.sdf.same_start and config.sdf.teacher == "frozen",
        )

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self.alpha:
            pairs = zip(_maps(student, self.on, "student"), _maps(teacher.detach(), self.on, "teacher"), strict=True)
            levels = [share_of_mean(self.features(s, t), batch.totals["images"]) for s, t in pairs]
            terms["feat"] = self.alpha * torch.stack(levels).sum()
        weights = {name: weight for name, weight in (("cls", self.beta), ("box", self.gamma)) if weight}
        if weights:
            if advice.outputs is None:
                raise ValueError(
                    "scalekd's cls and box losses need its assistant's outputs; or set beta and gamma to 0"
                )
            found = advice.detector.distill_losses(outputs, advice.outputs, batch, self.box_loss)
            terms |= {name: weight * found[name] for name, weight in weights.items()}
        return terms


class Assistant(base.PyramidAssistant):
    """CSA: one cross-attention per pyramid level (eqs. 3-6)."""

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        same_levels(pair.student.strides, pair.teacher.strides)
        self.csa, self.refresh, self.moves_head = config.csa, config.csa.refresh, config.csa.moves_head
        self.head = _own_head(pair) if config.csa.head == "own" else None
        channels = pair.student.pyramid_channels, pair.teacher.pyramid_channels
        self.levels = nn.ModuleList(attention(config.csa, *channels, stride) for stride in pair.student.strides)

    def learns(self, method_is_on: bool) -> bool:
        return method_is_on or self.csa.start == "always"

    def predictor(self, student: Detector) -> Detector:
        return student if self.head is None else self.head

    def forward(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Per level (B, C_student, H, W) and (B, C_teacher, H, W) -> (B, C_student, H, W)."""
        return tuple(level(s, t) for level, s, t in zip(self.levels, student, teacher, strict=True))

    def optimizer(self) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if self.csa.decay == "decoupled" else torch.optim.Adam
        return kind(self.parameters(), self.csa.learning_rate, weight_decay=self.csa.weight_decay)


def _own_head(pair: Pair) -> Detector:
    """A new detector of which only what `predict` needs is left."""
    if pair.detector is None:
        raise ValueError("csa.head 'own' needs Pair.detector, which makes the detector whose head CSA takes")
    detector = pair.detector()
    for features in ("backbone", "fpn"):
        setattr(detector, features, nn.Identity())
    return detector


def _maps(taps: Taps, on: On, whose: str) -> tuple[Tensor, ...]:
    """The maps that the scale-decoupled features are made of."""
    if on == "pyramid":
        return taps.pyramid
    if taps.c5 is None:
        raise ValueError(f"scalekd's feature loss needs the {whose}'s c5, which these taps lack")
    return (taps.c5,)
