"""A student, a teacher whose taps lie in memory, and one method: to measure methods without a loader or a cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from data_sharding.batch import Batch, Taps
from data_sharding.world import World
from kd.assistants import AssistantTrainer
from kd.blocks.align import Rule
from kd.clock import Clock
from kd.detectors.base import Detector
from kd.distiller import Distiller, Lesson, Moment
from kd.engine import PlainEngine, Precision
from kd.methods.base import Method, MethodConfig, Pair
from kd.optimise import OptimConfig
from kd.plugins import plugin, plugins
from kd.step import StepReport, global_totals, train_step
from kd.teacher import LiveTeacher, TeacherHead, aligned_shapes

TEACHER = "teacher"
FACTOR = 2
"""The teacher sees this many times the student's resolution, and is aligned by shifting levels."""
TAPS = frozenset({"c5", "pyramid"})


@dataclass(frozen=True, kw_only=True)
class Seeing:
    """How the teacher sees, for its head."""

    factor: int = FACTOR
    align: Rule = "shift"
    precision: Precision = "fp32"


def every_method() -> dict[str, MethodConfig]:
    """Every method with its own settings, its gate open from the first step to the last."""
    always: dict[str, Any] = {"start": 0.0, "ramp": 0.0, "stop": 1.0, "freeze": 0.0}
    return {name: replace(module.Config(), **always) for name, module in plugins("kd.methods").items()}


def built(config: Any, classes: int, device: torch.device, seed: int = 0) -> Detector:
    """A detector with first weights that depend on settings and seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = plugin("kd.detectors", config.name).build(config, classes)
    return detector.to(device, memory_format=torch.channels_last)


def looked(teacher: Detector, student: Detector, batch: Batch) -> Taps:
    """What the teacher sees of a batch with `scaled_images`, on the student's grid."""
    return LiveTeacher(teacher, student.shapes, factor=FACTOR, rule="shift", reads=TAPS)(batch)


class Classroom:
    """One contestant. Raises ValueError where the method does not go with the pair."""

    def __init__(
        self, student: Any, teacher: Detector, classes: int, method: str | None, config: MethodConfig | None,
        optim: OptimConfig, device: torch.device,
    ) -> None:  # fmt: skip
        self.device, self.optim, self.name = device, optim, method
        self.student = built(student, classes, device).train()
        lessons: Mapping[str, tuple[Lesson, Method]] = {}
        self.assistants: dict[str, AssistantTrainer] = {}
        if method is not None and config is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                lessons = {method: self._lesson(student, teacher, classes, method, config)}
        self.engine = PlainEngine(Distiller(self.student, lessons).to(device), optim)

    def _lesson(
        self, student: Any, teacher: Detector, classes: int, method: str, config: MethodConfig
    ) -> tuple[Lesson, Method]:
        pair = Pair(
            student=self.student.shapes,
            teacher=aligned_shapes(teacher.shapes, self.student.shapes),
            detector=lambda: plugin("kd.detectors", student.name).build(student, classes, weights_follow=True),
        )
        module = plugin("kd.methods", method)
        loss = module.Loss(config, pair)
        head = TeacherHead(teacher, self.student.shapes, Seeing(), self.device) if loss.needs_head else None
        if hasattr(module, "Assistant") and config.assisted:
            self.assistants[method] = AssistantTrainer(module.Assistant(config, pair).to(self.device), World())
        lesson = Lesson(name=method, teacher=TEACHER if config.taught else None, config=config, head=head)
        return lesson, loss

    def step(self, batch: Batch, taps: Taps, number: int = 0) -> StepReport:
        """A whole training step, task and method."""
        teachers = {TEACHER: lambda _: taps}
        return train_step(self.engine, [batch], teachers, self.assistants, self.optim, number, World(), Clock())

    def own_terms(self, batch: Batch, taps: Taps, learns: bool = False) -> dict[str, torch.Tensor]:
        """The method's terms alone, as in the middle of the schedule. `learns`: the assistant steps as in training."""
        counted = batch.with_totals(global_totals(self.engine.distiller, [batch], World()))
        assistants = self.assistants if learns else {n: _Resting(trainer) for n, trainer in self.assistants.items()}
        losses = self.engine(counted, {TEACHER: taps}, assistants, Moment(progress=0.5))
        # What a shared head learns from an assistant is the task's loss of another pyramid.
        own = {name.rpartition("/")[2]: value for name, value in losses.items() if name.startswith("kd/")}
        return {name: value for name, value in own.items() if name != "head"}

    @property
    def extra_parameters(self) -> int:
        """Numbers that are learnt beside the student's."""
        methods = sum(p.numel() for p in self.engine.distiller.methods.parameters() if p.requires_grad)
        return methods + sum(p.numel() for t in self.assistants.values() for p in t.assistant.parameters())


class _Resting(AssistantTrainer):
    """An assistant that advises and does not learn."""

    def __init__(self, trainer: AssistantTrainer) -> None:
        self.assistant = trainer.assistant

    def learn(self, loss: torch.Tensor) -> None:
        return

    def step(self, progress: float = 0.0) -> None:
        return
