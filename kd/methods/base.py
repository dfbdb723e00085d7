"""What every method file promises."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Outputs, Taps
from data_sharding.world import World
from kd.blocks.adapt import same_levels
from kd.detectors.base import Detector, Shapes


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Settings that every method has. Times are shares of the schedule, so that recipes of any length agree."""

    late: ClassVar[frozenset[str]] = frozenset({"weight", "ramp", "stop", "share", "share_steps"})
    """Settings that change nothing before the step at which the method begins, as long as they stay above 0: runs that
    differ in these alone are the same up to there. A method adds its own."""

    weight: float = 1.0
    """Multiplies every term of the method."""
    start: float = 0.0
    """Share of the schedule before which the method's losses do not reach the student."""
    ramp: float = 0.0
    """Share of the schedule over which the weight grows linearly from 0 after `start`."""
    stop: float = 1.0
    """Share of the schedule after which the method is off."""
    freeze: float = 0.0
    """Share of the schedule, from its beginning, in which the student's backbone is frozen."""
    share: float | None = None
    """Scale the method once so that its terms are this share of the task loss, whatever its `weight`; null: do not."""
    share_steps: int = 50
    """Steps, from the first in which the method is on, over which that scale is measured."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must be >= 0, got {self.weight}")
        for name in ("start", "ramp", "stop", "freeze"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of the schedule in [0, 1], got {getattr(self, name)}")
        if self.start >= self.stop:
            raise ValueError(f"start must be before stop, got start {self.start} and stop {self.stop}")
        if (self.share is not None and self.share <= 0) or self.share_steps < 1:
            raise ValueError(f"share must be > 0 or null, share_steps >= 1, got {self.share} and {self.share_steps}")

    def strength(self, progress: float) -> float:
        """`weight` after gate and ramp, at `progress` in [0, 1) of the schedule; 0 means: not computed."""
        return self.weight * self.opening(progress)

    def opening(self, progress: float) -> float:
        """How far the gate is open at `progress`: 0 outside [start, stop), growing to 1 over the ramp."""
        if not self.start <= progress < self.stop:
            return 0.0
        return min(1.0, (progress - self.start) / self.ramp) if self.ramp else 1.0

    def fullest(self, steps: int) -> int:
        """The first of `steps` at which the method has its full weight, or the nearest to it."""
        full = min(self.start + self.ramp, self.stop)
        step = min(steps - 1, -int(-full * steps // 1))
        return step if self.strength(step / steps) > 0 else max(0, min(steps - 1, int(self.stop * steps) - 1))

    def check_weights(self, *names: str) -> None:
        """Raise ValueError unless these settings are >= 0, or None, which stands for the paper's value."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be >= 0, or null where the paper's is its default; got {value}")

    def check_positive(self, *names: str) -> None:
        """Raise ValueError unless these settings are > 0, or None, which stands for the paper's value."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")

    @property
    def taught(self) -> bool:
        """Whether the method learns from a teacher. One that does not (its `reads` is empty) is one lesson of the run,
        however many teachers there are."""
        return True

    @property
    def reads_within(self) -> float | None:
        """By how much boxes grow inside which lies all that it reads of the teacher (`foreground_cells` of
        `data_sharding.codecs.foreground` says which cells these are); None: it reads everywhere."""
        return None

    @property
    def sparse_suffices(self) -> bool:
        """Whether a cache of foreground alone serves it."""
        return self.reads_within is not None

    @property
    def assisted(self) -> bool:
        """Whether these settings need the assistant of a method that has one."""
        return True


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The shape facts of a student and its (aligned) teacher, known before the first batch."""

    student: Shapes
    teacher: Shapes
    world: World = field(default_factory=World)
    """For statistics over the whole global batch."""
    accumulate: int = 1
    """Micro-batches per step, for methods whose statistics cannot span them: they refuse."""
    detector: Callable[[], Detector] | None = None
    """Makes a new detector with the student's settings, for an assistant that wants a head of its own."""


class Method(nn.Module, ABC):
    """A loss between student and teacher taps. It may own parameters, each inside a sub-module that takes and
    returns tensors (see `Detector`); it never runs a backbone. The teacher operand is always detached."""

    reads: ClassVar[frozenset[str]] = frozenset({"pyramid"})
    """Fields of the teacher's `Taps` that it or its assistant reads: the cache stores only these."""
    needs_head: bool = False
    """Whether it asks what the teacher's head says (`Advice.teacher_outputs`): the frozen head then stays loaded, also
    beside a cached teacher, and is run on the taught pyramid. Such a method calls `check_comparable` first."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What its losses divide by beside the images, of one micro-batch: scalars, found summed over the global batch
        in `batch.totals`. Equal names must mean equal counts, for all methods see all of them."""
        return {}

    @abstractmethod
    def losses(
        self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: "Advice"
    ) -> dict[str, Tensor]:
        """Weighted terms by name: this micro-batch's share of the loss of the global batch (divide by
        `batch.totals`). A term whose own weight is 0 is left out, not computed."""


@dataclass(frozen=True)
class Advice:
    """What a method gets beside the taps: the student detector, for losses in its own terms, and what its own
    assistant has to say (empty for methods without one)."""

    detector: Detector
    outputs: Outputs | None = None
    """Of the student's head on the assistant's pyramid."""
    ask: Callable[[], Outputs] | None = None
    """Runs the teacher's head when it is first called; None where no method `needs_head`."""
    pyramid: tuple[Tensor, ...] = ()
    """The assistant's own, of the student's shape."""
    notes: Mapping[str, Tensor] = field(default_factory=dict)
    """Everything else, by names that only the method and its assistant know."""

    @property
    def teacher_outputs(self) -> Outputs:
        """What the frozen teacher's head says of the taught pyramid, on the student's grid, in the student's pixels and
        of the student's proposals; without gradient, computed once however many methods ask."""
        if self.ask is None:
            raise ValueError("the teacher's head is not here; a method that asks it must set needs_head")
        return self.ask()

    def detach(self) -> "Advice":
        """The same values, cut off from the graph."""
        return replace(
            self,
            outputs=None if self.outputs is None else self.outputs.detach(),
            pyramid=tuple(x.detach() for x in self.pyramid),
            notes={name: x.detach() for name, x in self.notes.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A micro-batch as an assistant sees it; nothing of it carries gradient."""

    student: Detector
    """Its head may be asked; its weights get no gradient from the assistant's loss."""
    taps: Taps
    """The student's."""
    teacher: Taps
    """On the student's grid; empty for a lesson without a teacher."""
    batch: Batch
    proposals: tuple[Tensor, ...] | None = None
    """Two stages: the student's own regions in this step."""


class Assistant(nn.Module, ABC):
    """A module that learns beside the student, from a loss of its own, with its own optimizer, and is stepped first.

    A step asks in this order: `watch`, `advise`, `loss`, whose gradient moves the assistant's parameters alone; the
    method then gets the advice without gradient. Any `forward` takes and returns tensors or tuples.
    """

    refresh: bool = False
    """Whether the advice is computed again after the assistant's step (else the forward of the step is reused)."""
    moves_head: bool = False
    """Whether its loss moves the student's head as well: one more term of the student's loss, in which what it made of
    the scene is a constant."""
    clip: float | None = None
    """Largest 2-norm of its gradient over the global batch; None: not clipped."""

    def learns(self, method_is_on: bool) -> bool:
        """Whether it learns in a step in which the method's losses do or do not reach the student: by default always,
        so that its advice is worth something when they begin (S7)."""
        return True

    def rate(self, progress: float) -> float:
        """What its optimizer's learning rate is multiplied by at `progress` in [0, 1) of the schedule."""
        return 1.0

    @abstractmethod
    def watch(self, scene: Scene) -> tuple[Tensor, ...]:
        """What it makes of a scene, with gradient to its own parameters."""

    @abstractmethod
    def advise(self, made: tuple[Tensor, ...], scene: Scene) -> Advice:
        """What the method and the assistant's own loss need of that."""

    @abstractmethod
    def loss(self, advice: Advice, scene: Scene) -> Tensor:
        """This micro-batch's share of its loss over the global batch: a scalar that hangs on its parameters, also where
        no image has a box."""

    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """A new torch optimizer over this module's parameters."""


class PyramidAssistant(Assistant):
    """An assistant that makes a pyramid of the student's shape, which the student's own head turns into outputs: the
    detection loss of those outputs trains the assistant; pyramid and outputs are its advice."""

    def predictor(self, student: Detector) -> Detector:
        """Whose head turns its pyramid into outputs: by default the student's."""
        return student

    def watch(self, scene: Scene) -> tuple[Tensor, ...]:
        """Its pyramid: by default `forward` of the student's and the teacher's."""
        return self(scene.taps.pyramid, scene.teacher.pyramid)

    def advise(self, made: tuple[Tensor, ...], scene: Scene) -> Advice:
        outputs = self.predictor(scene.student).predict(made, scene.batch.geometry, scene.proposals)
        return Advice(scene.student, outputs, pyramid=made)

    def loss(self, advice: Advice, scene: Scene) -> Tensor:
        assert advice.outputs is not None
        return torch.stack(list(scene.student.task_losses(advice.outputs, scene.batch).values())).sum()


def check_comparable(pair: Pair, method: str) -> None:
    """ValueError unless the heads of `pair` answer about the same places and classes, so that a method can compare
    their answers one by one."""
    student, teacher = pair.student, pair.teacher
    same_levels(student.strides, teacher.strides)
    mine, its = ((*shapes.places, f"{shapes.num_classes} classes") for shapes in (student, teacher))
    if mine != its:
        raise ValueError(
            f"{method} compares what two heads say place by place, but the student's places are {_told(mine)}, the "
            f"teacher's {_told(its)}; give both the same detector, anchors (or point_offset) and classes, or choose a "
            "method that compares pyramids"
        )


def _told(places: tuple[object, ...]) -> str:
    return ", ".join(str(place) for place in places)
