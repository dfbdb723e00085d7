"""One way to take training steps, ready to be timed: the student alone, or taught from memory, a cache or live."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.plain_setup import Setup, Split, build_detector
from benchmarks.plain_teaching import TEACHER, live_factors, taught
from data_sharding.batch import Batch, StoredTaps
from data_sharding.cache.reader import TeacherCache
from data_sharding.codecs.catalogue import TapGroup
from data_sharding.loader import NO_CACHES, Loader, order_of
from data_sharding.order import Order
from data_sharding.world import World
from kd.assistants import AssistantTrainer
from kd.clock import Clock
from kd.distiller import Distiller
from kd.engine import PlainEngine
from kd.methods.base import MethodConfig
from kd.step import train_step

Source = Literal["none", "memory", "cache", "first read", "live"]
"""Where the taps come from. `memory`: they wait on the training device in float32. `cache`: files that this process
has mapped and verified before. `first read`: files that it has just opened; the page cache is warm in both."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One of the things that are compared."""

    source: Source
    methods: Mapping[str, MethodConfig] = field(default_factory=dict)
    codec: str | None = None
    """Of the cache; None: the size's own."""
    parts: bool = False
    """Whether the parts of ScaleKD are timed one by one."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Means over the steps of one round, in seconds per step."""

    wall: float
    cpu: float
    """Processor time of all threads, the loader's among them."""
    waited: float
    """For the loader."""
    parts: dict[str, float]
    """Exclusive time per section of the step."""


class Contestant:
    """A mode with its own student, optimizer, teacher and open cache."""

    def __init__(self, setup: Setup, mode: Mode, split: Split) -> None:
        assert setup.teaching is not None
        teaching = replace(setup.teaching, cached=mode.source != "live", codec=mode.codec or setup.teaching.codec)
        self.setup, self.mode, self.split = replace(setup, methods=mode.methods, teaching=teaching), mode, split
        self.device = torch.device(setup.device)
        self.clock = Clock(self.device)
        student = build_detector(self.setup, split.dataset.categories).train()
        teacher, self.caches, lessons, self.assistants = taught(self.setup, split, student.shapes)
        self.teachers = {} if teacher is None else {TEACHER: teacher}
        self.engine = PlainEngine(Distiller(student, lessons).to(self.device), setup.optim, precision=setup.precision)
        if mode.parts:
            time_parts(self.engine.distiller, self.assistants, self.clock)

    def round(self, first: int, steps: int) -> Timing:
        """Steps `first`..`first + steps` of the run, of which the first one only fills the pipeline."""
        order = order_of(self.split.dataset, self.split.views, seed=0, batch=self.setup.optim.batch)
        ready = self._prepare(order, first, steps + 1)
        with self._loader(order, first, self._caches()) as loader:
            self._step(loader, first, ready)
            self._finish()
            self.clock.read()
            waited, cpu, wall = loader.wait_seconds, time.process_time(), time.perf_counter()
            for step in range(first + 1, first + 1 + steps):
                self._step(loader, step, ready)
            self._finish()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            waited = loader.wait_seconds - waited
        parts = {name: seconds / steps for name, seconds in self.clock.read().items()}
        return Timing(wall=wall / steps, cpu=cpu / steps, waited=waited / steps, parts=parts)

    def _caches(self) -> Mapping[str, TeacherCache]:
        if self.mode.source == "cache":
            return self.caches
        if self.mode.source == "first read":
            return {name: TeacherCache.open(cache.folder, cache.key) for name, cache in self.caches.items()}
        return NO_CACHES

    def _prepare(self, order: Order, first: int, steps: int) -> list[Mapping[str, StoredTaps]]:
        """Before the clock runs: read and verify what the steps need; for `memory` also keep it."""
        if self.mode.source not in ("memory", "cache"):
            return [{}] * steps
        with self._loader(order, first, self.caches) as loader:
            read = [_float(batch.cached, self.device) for (batch,) in islice(loader, steps)]
        return read if self.mode.source == "memory" else [{}] * steps

    def _loader(self, order: Order, first: int, caches: Mapping[str, TeacherCache]) -> Loader:
        return Loader(
            self.split.dataset, self.split.views, order, world=World(), factors=live_factors(self.setup),
            caches=caches, start_step=first, threads=self.setup.threads, pin=self.device.type == "cuda",
        )  # fmt: skip

    def _step(self, loader: Loader, step: int, ready: list[Mapping[str, StoredTaps]]) -> None:
        (batch,) = next(loader)
        batch: Batch = batch.to(self.device)
        if self.mode.source == "memory":
            batch = replace(batch, cached=ready.pop(0))
        train_step(self.engine, [batch], self.teachers, self.assistants, self.setup.optim, step, World(), self.clock)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _float(cached: Mapping[str, StoredTaps], device: torch.device) -> Mapping[str, StoredTaps]:
    """Decoded on the device, in the form that costs the step nothing more."""

    def ready(groups: Sequence[TapGroup]) -> tuple[TapGroup, ...]:
        return tuple(_dense(x) for group in groups for x in group.to(device).maps())

    return {
        name: StoredTaps(None if taps.c5 is None else ready([taps.c5])[0], ready(taps.pyramid))
        for name, taps in cached.items()
    }


def _dense(x: Tensor) -> TapGroup:
    """One map, of which `maps` gives the same memory again."""
    images, channels, *size = x.shape
    values = x.permute(0, 2, 3, 1).reshape(-1, channels)
    return TapGroup(images=images, channels=channels, sizes=((size[0], size[1]),), values=values)


def time_parts(distiller: Distiller, assistants: Mapping[str, AssistantTrainer], clock: Clock) -> None:
    """Let `clock` count ScaleKD's parts: what runs without gradient in the student's head is the advice."""
    method, trainer = distiller.methods["scalekd"], assistants["scalekd"]
    assert isinstance(method.features, nn.Module)
    _count(clock, method.features, "forward", lambda: "features: forward")
    _count(clock, distiller.student, "distill_losses", lambda: "responses: forward")
    _count(clock, trainer, "learn", lambda: "assistant: backward")
    _count(clock, trainer, "step", lambda: "assistant: step")
    _count(clock, trainer.assistant, "forward", lambda: _learning("assistant: forward"))
    _count(clock, distiller.student, "predict", lambda: _learning(None))


def _learning(name: str | None) -> str | None:
    return name if torch.is_grad_enabled() else "advice"


def _count(clock: Clock, owner: nn.Module | AssistantTrainer, name: str, section: Callable[[], str | None]) -> None:
    """Replace a method of one object by itself inside a section of the clock."""
    plain = getattr(owner, name)

    def counted(*args: Any, **settings: Any) -> Any:
        running = section()
        with nullcontext() if running is None else clock.section(running):
            return plain(*args, **settings)

    setattr(owner, name, counted)
