"""The forward of a training step: student, taught pyramids and methods in, named losses out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Outputs, Taps
from kd.assistants import AssistantTrainer
from kd.calibration import Calibration
from kd.clock import Clock
from kd.detectors.base import Detector
from kd.methods.base import Advice, Assistant, Method, MethodConfig, Scene
from kd.teacher import TeacherHead


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One method learning from one teacher."""

    name: str
    """`scalekd`, or `big/scalekd` where several teachers teach: the loss's name in logs."""
    teacher: str | None
    """None: the method reads no teacher."""
    config: MethodConfig
    weight: float = 1.0
    """The teacher's weight."""
    head: TeacherHead | None = None
    """The teacher's head, where the method needs it. No module of the student's optimizer or checkpoint."""

    def strength(self, progress: float) -> float:
        """What the method's terms are multiplied by at `progress` in [0, 1) of the schedule."""
        return self.weight * self.config.strength(progress)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When in the run a forward happens, and what of it is asked for."""

    progress: float
    """Share of the schedule that is done, in [0, 1). Every gate depends on it alone, so ranks never differ."""
    last: bool = True
    """Whether this is the step's last micro-batch."""
    single: bool = True
    """Whether the step has one micro-batch."""
    rehearsal: bool = False
    """Only the refreshing assistants learn; no losses for the student (accumulation: see `kd.step`)."""
    clock: Clock = field(default_factory=Clock)
    seen: list[Taps] | None = None
    """Takes the student's taps, with their graph, for who asks how hard each term pulls at them (`kd.pull`)."""


class Distiller(nn.Module):
    """Everything that the student's optimizer owns, in one module, so that DeepSpeed sees all of its parameters.

    Teachers and assistants are passed to each call: stored here they would enter the optimizer's shards and
    every checkpoint.
    """

    def __init__(self, student: Detector, lessons: Mapping[str, tuple[Lesson, Method]]) -> None:
        super().__init__()
        self.student = student
        self.lessons = {name: lesson for name, (lesson, _) in lessons.items()}
        # A module's name may not hold a dot; lessons of several teachers hold a slash, which is fine.
        self.methods = nn.ModuleDict({name: method for name, (_, method) in lessons.items()})
        configs = {name: lesson.config for name, lesson in self.lessons.items()}
        self.calibrations = nn.ModuleDict(
            {name: Calibration(c.share, c.share_steps) for name, c in configs.items() if c.share is not None}
        )

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What the student's and the methods' losses divide by, of one micro-batch."""
        found = self.student.counts(batch)
        for name in self.methods:
            found |= self._method(name).counts(batch)
        return found

    def frozen(self, progress: float) -> bool:
        """Whether a method keeps the student's backbone frozen at `progress`."""
        return any(progress < lesson.config.freeze for lesson in self.lessons.values())

    def forward(
        self,
        batch: Batch,
        taught: Mapping[str, Taps],
        assistants: Mapping[str, AssistantTrainer],
        moment: Moment,
    ) -> dict[str, Tensor]:
        """Named shares of the global batch's loss: `task/...` and `kd/<lesson>/...`, to be summed and stepped on;
        `assistant/<lesson>` and `raw/<lesson>` (a calibrated method before its scale) are for the log, without
        gradient."""
        student = self.student
        images = student.normalise(batch.images, batch.geometry)
        keep = _statistics_kept(student) if moment.rehearsal else nullcontext()
        with keep, torch.set_grad_enabled(torch.is_grad_enabled() and not moment.rehearsal):
            taps = student.features(images, freeze_backbone=self.frozen(moment.progress))
            if moment.seen is not None:
                moment.seen.append(taps)
            # Assistants of two stages are asked about the student's proposals (S19), so these come first.
            outputs = self._predict(taps, batch) if student.shapes.family == "two_stage" else None
        proposals = None if outputs is None else outputs.proposals
        losses: dict[str, Tensor] = {}
        advice: dict[str, Advice] = {}
        for name, trainer in assistants.items():
            with moment.clock.section("assistant"):
                teacher = self._taught(name, taught).detach()
                scene = Scene(student=student, taps=taps.detach(), teacher=teacher, batch=batch, proposals=proposals)
                found, advised = self._assist(name, trainer, scene, moment)
            losses |= found
            advice |= {name: advised} if advised is not None else {}
        if moment.rehearsal:
            return losses
        outputs = self._predict(taps, batch) if outputs is None else outputs
        losses |= {f"task/{term}": loss for term, loss in student.task_losses(outputs, batch).items()}
        ask = self._heads(taught, batch, outputs)
        for name, lesson in self.lessons.items():
            strength = lesson.strength(moment.progress)
            if strength == 0:
                continue
            told = replace(advice.get(name, Advice(student)), ask=ask.get(lesson.teacher or ""))
            terms = self._method(name).losses(taps, outputs, self._taught(name, taught), batch, told)
            scale: float | Tensor = strength
            if name in self.calibrations and terms:
                losses[f"raw/{name}"] = torch.stack(list(terms.values())).sum().detach()
                scale = lesson.weight * lesson.config.opening(moment.progress) * self._calibration(name).scale()
            losses |= {f"kd/{name}/{term}": scale * loss for term, loss in terms.items()}
        return losses

    def calibrate(self, losses: Mapping[str, float]) -> None:
        """After a step: what its losses, summed over the global batch, say of the scale of methods with a `share`."""
        task = sum(value for name, value in losses.items() if name.startswith("task/"))
        for name in self.calibrations:
            self._calibration(name).see(task, losses.get(f"raw/{name}", 0.0))

    def _calibration(self, name: str) -> Calibration:
        found = self.calibrations[name]
        assert isinstance(found, Calibration)
        return found

    def _heads(self, taught: Mapping[str, Taps], batch: Batch, outputs: Outputs) -> dict[str, Callable[[], Outputs]]:
        """By teacher: how to ask its head, which answers once, and only if it is asked."""
        heads = {x.teacher: x.head for x in self.lessons.values() if x.teacher is not None and x.head is not None}
        return {
            name: cache(partial(head, taught[name], batch.geometry, outputs.proposals)) for name, head in heads.items()
        }

    def _method(self, name: str) -> Method:
        method = self.methods[name]
        assert isinstance(method, Method)
        return method

    def _predict(self, taps: Taps, batch: Batch) -> Outputs:
        return self.student.predict(taps.pyramid, batch.geometry, sampling=batch)

    def _taught(self, name: str, taught: Mapping[str, Taps]) -> Taps:
        """What the lesson's teacher shows; nothing where it has none."""
        teacher = self.lessons[name].teacher
        return Taps() if teacher is None else taught[teacher]

    def _assist(
        self, name: str, trainer: AssistantTrainer, scene: Scene, moment: Moment
    ) -> tuple[dict[str, Tensor], Advice | None]:
        """Let one assistant learn from this micro-batch; its losses, and its advice where the method is on.

        A refreshing assistant advises after its step: at once where the step has one micro-batch, else it learnt
        in the rehearsal. The others advise with the forward that they learn from and step with the last micro-batch.
        """
        on = self.lessons[name].strength(moment.progress) > 0
        assistant, refresh = trainer.assistant, trainer.assistant.refresh
        losses: dict[str, Tensor] = {}
        made, advice = (), None
        if assistant.learns(on) and moment.rehearsal == (refresh and not moment.single):
            with torch.enable_grad():
                made = assistant.watch(scene)
                advice = self._advise(assistant, made, scene)
                loss = assistant.loss(advice, scene)
            trainer.learn(loss)
            if moment.last:
                trainer.step(moment.progress)
            losses[f"assistant/{name}"] = loss.detach()
        moves_head = assistant.moves_head and assistant.learns(on)
        if moment.rehearsal or not (on or moves_head):
            return losses, None
        if refresh or moves_head or advice is None:
            with torch.no_grad():
                made = assistant.watch(scene) if refresh or advice is None else tuple(x.detach() for x in made)
            with torch.set_grad_enabled(moves_head and torch.is_grad_enabled()):
                advice = self._advise(assistant, made, scene)
        if moves_head:
            losses[f"kd/{name}/head"] = assistant.loss(advice, scene)
        return losses, advice.detach() if on else None

    def _advise(self, assistant: Assistant, made: tuple[Tensor, ...], scene: Scene) -> Advice:
        """What an assistant has to say, also through the student's head."""
        with _statistics_kept(self.student):
            return assistant.advise(made, scene)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Compute as in training, but leave every BatchNorm's running statistics alone."""
    tracking = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = not norm.training  # in evaluation the statistics are read, not written
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
