"""The doctor on losses: one step of every method with the live teacher, on few images, and what share each term has."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cluster import build
from cluster.build import LoadedTeacher
from cluster.checkup.sample import Sample
from cluster.config import RunConfig
from cluster.repeatable import repeatable
from data_sharding.batch import Batch, Taps
from data_sharding.loader import Loader, order_of
from data_sharding.world import World
from kd.clock import Clock
from kd.distiller import Distiller, Lesson, Moment
from kd.engine import PlainEngine
from kd.methods.base import MethodConfig
from kd.pull import pulls
from kd.step import StepReport, global_totals, train_step

BATCHES = 3
"""Over which the terms are averaged: those of a few images differ by half."""
MOST_IMAGES = 8
"""In a batch on a processor: bytes and seconds per image hardly depend on it."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """A batch, and what the teachers see in it."""

    batch: Batch
    taught: Mapping[str, Taps]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every dry step uses: the same images and the same answers of the teachers."""

    config: RunConfig
    device: torch.device
    looks: Sequence[Looked]
    loaded: Mapping[str, LoadedTeacher]
    classes: int
    strides: tuple[int, ...]
    """Of the student's pyramid, in pixels."""

    @property
    def batch(self) -> Batch:
        """The one that steps are done on."""
        return self.looks[0].batch


@dataclass(frozen=True, kw_only=True)
class Dry:
    """What a method showed; the plain student where there is no method."""

    lesson: Lesson | None
    losses: Mapping[str, float]
    """With the first weights, the mean of some batches."""
    pulls: Mapping[str, tuple[str, float]]
    """The gradient of each distillation term at the student's maps, beside the task's: see `kd.pull`."""
    norm: float | None
    seconds: float
    """Student, methods and optimizer, per image; on processors, theirs."""
    saved_bytes: float
    """Activations that are kept for the backward, per image."""
    parameters: int
    """That the student's optimizer owns: student and adapters."""
    student_parameters: int
    assistant_parameters: int
    assisted: bool


def lay_bench(config: RunConfig, sample: Sample, loaded: Mapping[str, LoadedTeacher], device: torch.device) -> Bench:
    """A few batches as the loader makes them, and what the teachers see in them."""
    classes = len(sample.train.dataset.categories)
    shapes = build.build_student(config, classes).shapes
    reads = build.reads_of(config)
    for teacher in loaded.values():
        teacher.detector.to(device)
    teachers = {name: build.live_teacher(t, shapes, reads) for name, t in loaded.items()}
    count = min(config.micro_batch, len(sample.train.dataset), MOST_IMAGES if device.type == "cpu" else 10**6)
    with _loader(config, sample, loaded, count) as loader, _as_in_a_run(config):
        batches = [next(loader)[0].to(device) for _ in range(BATCHES)]
        looks = [Looked(batch=b, taught={name: teacher(b) for name, teacher in teachers.items()}) for b in batches]
    return Bench(config=config, device=device, looks=looks, loaded=loaded, classes=classes, strides=shapes.strides)


def _loader(config: RunConfig, sample: Sample, loaded: Mapping[str, LoadedTeacher], count: int) -> Loader:
    order = order_of(sample.train.dataset, sample.train.views, seed=config.seed, batch=count)
    factors = tuple(sorted({t.config.factor for t in loaded.values()} - {1}))
    return Loader(
        sample.train.dataset,
        sample.train.views,
        order,
        world=World(),
        factors=factors,
        prefetch=1,
        threads=config.resources.threads,
    )


def dry_step(bench: Bench, name: str | None) -> Dry:
    """One optimizer step of lesson `name` alone, with the first weights, at the moment its strength is greatest.

    Raises what a run would raise: a method that refuses its settings, a loss that is not finite.
    """
    config = bench.config
    student, lessons, assistants = _model(bench, config, name)
    engine = _engine(bench, config, student, lessons)
    lesson = lessons[name][0] if name is not None else None
    step = 0 if lesson is None else lesson.config.fullest(config.optim.steps)
    teachers: dict[str, Any] = {key: (lambda batch, taps=taps: taps) for key, taps in bench.looks[0].taught.items()}
    saved = _Saved(engine.distiller)

    def once() -> StepReport:
        clock = Clock(bench.device)
        return train_step(engine, [bench.batch], teachers, assistants, config.optim, step, World(), clock)

    with _as_in_a_run(config):
        with saved.counting():
            first = once().norm
        began = _clock(bench.device)
        second = once().norm  # the first step of a process is slower than all others
        seconds = _clock(bench.device) - began
    return Dry(
        lesson=lesson,
        losses=_mean_losses(bench, config, name, step),
        pulls=_pulls(bench, config, name, step),
        # A calibrated method only measures in its first step.
        norm=second if engine.distiller.calibrations else first,
        seconds=seconds / len(bench.batch),
        saved_bytes=saved.bytes / len(bench.batch),
        parameters=_count(engine.distiller),
        student_parameters=_count(student),
        assistant_parameters=sum(_count(a.assistant) for a in assistants.values()),
        assisted=bool(assistants),
    )


def terms_with(bench: Bench, name: str, settings: MethodConfig) -> dict[str, float]:
    """The lesson's terms at its greatest strength with other settings, without a step."""
    method = name.rpartition("/")[2]
    config = replace(bench.config, distill={**bench.config.distill, method: settings})
    losses = _mean_losses(bench, config, name, settings.fullest(config.optim.steps))
    return {term: value for term, value in losses.items() if term.startswith("kd/")}


def _mean_losses(bench: Bench, config: RunConfig, name: str | None, step: int) -> dict[str, float]:
    """Every term with the first weights at `step` of the schedule, the mean over the batches; nothing is stepped but
    the assistant, which learns as in a run."""
    sums: dict[str, float] = {}
    for look in bench.looks:
        with torch.no_grad():
            losses = _forward(bench, config, name, look, Moment(progress=step / config.optim.steps))
        for term, value in losses.items():
            sums[term] = sums.get(term, 0.0) + float(value) / len(bench.looks)
    return sums


def _pulls(bench: Bench, config: RunConfig, name: str | None, step: int) -> dict[str, tuple[str, float]]:
    """How hard every term pulls at the first weights on the first batch, at `step` of the schedule."""
    seen: list[Taps] = []
    losses = _forward(bench, config, name, bench.looks[0], Moment(progress=step / config.optim.steps, seen=seen))
    return pulls(losses, seen[-1])


def _forward(bench: Bench, config: RunConfig, name: str | None, look: Looked, moment: Moment) -> dict[str, Tensor]:
    """Every term of a run's first step in which the method has a scale: where it is calibrated that is the second."""
    student, lessons, assistants = _model(bench, config, name)
    engine = _engine(bench, config, student, lessons)
    batch = look.batch.with_totals(global_totals(engine.distiller, [look.batch], World()))
    with _as_in_a_run(config):
        losses = engine(batch, look.taught, assistants, moment)
        if engine.distiller.calibrations:
            engine.distiller.calibrate({term: float(value.detach()) for term, value in losses.items()})
            losses = engine(batch, look.taught, assistants, moment)
    return losses


def _engine(bench: Bench, config: RunConfig, student: Any, lessons: Any) -> PlainEngine:
    distiller = Distiller(student, lessons).to(bench.device)
    return PlainEngine(distiller, config.optim, World(), config.resources.precision)


def _model(bench: Bench, config: RunConfig, name: str | None) -> tuple[Any, Any, Any]:
    """Student, the one lesson and its assistant, each with the first weights of a run."""
    student = build.build_student(config, bench.classes).to(bench.device).train()
    if name is None:
        return student, {}, {}
    taught = build.build_lessons(config, student.shapes, bench.loaded, World(), bench.device)
    assistants = {name: taught.assistants[name]} if name in taught.assistants else {}
    return student, {name: taught.lessons[name]}, assistants


def _clock(device: torch.device) -> float:
    """Seconds; of processors their own, so that a busy machine does not make a student look slow."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@contextmanager
def _as_in_a_run(config: RunConfig) -> Iterator[None]:
    """With the threads of a worker, and with deterministic algorithms where the recipe asks for them."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(config.resources.threads)
    repeatable(config.deterministic)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        repeatable(deterministic)


class _Saved:
    """Counts what autograd keeps for the backward, once per piece of memory and without the weights."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._found: dict[int, int] = {}
        self._weights = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}

    @property
    def bytes(self) -> int:
        return sum(self._found.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._found[storage.data_ptr()] = max(storage.nbytes(), self._found.get(storage.data_ptr(), 0))
        return tensor
