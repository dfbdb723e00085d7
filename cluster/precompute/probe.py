"""Measure what the cache's arithmetic needs, on this very machine: teacher, step, codec and disk."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from cluster import build
from cluster.build import LoadedTeacher, Split
from cluster.config import RunConfig
from cluster.precompute.batches import Assembled
from data_sharding.batch import Batch, Taps
from data_sharding.cache.cost import BreakEven, break_even
from data_sharding.cache.foreground import foreground_masks
from data_sharding.cache.key import CacheKey
from data_sharding.codecs.catalogue import Encoded, stack
from data_sharding.world import World
from kd.clock import Clock
from kd.detectors.base import Detector
from kd.distiller import Distiller
from kd.engine import PlainEngine
from kd.step import train_step

CHUNK = 32 << 20
MOST_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Seconds per image and device, bytes per second of one machine's disk."""

    teacher: float
    step: float
    """The student's, methods and optimizer included, with the taps at hand."""
    write: float
    """Synced."""
    read: float
    """Past the page cache."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """A batch and what a teacher saw of it."""

    positions: tuple[int, ...]
    batch: Batch
    taps: Taps


def look(
    config: RunConfig, teacher: LoadedTeacher, student: Detector, train: Split, folder: Path, device: torch.device,
    *, batch: int, seconds: float,
) -> tuple[Speeds, Looked]:  # fmt: skip
    """Measure for `seconds` each, twice at least; `batch` images a forward, `folder` on the cache's disk. With a batch
    for `coding_seconds`."""
    positions = np.arange(min(batch, len(train.dataset)))
    canvas = train.views.view(0, 0).canvas
    positions = np.array([p for p in positions if train.views.view(int(p), 0).canvas == canvas])
    with Assembled(train, teacher.config.factor) as assembled:
        images = assembled.batch(positions, 0).to(device)
    teacher.detector.to(device)
    live = build.live_teacher(teacher, student.shapes, build.stored_of(config, teacher.config))
    taps = live(images)
    looking = _timed(lambda: live(images), device, seconds)
    stepping = _timed(_step(config, teacher, images, taps, device), device, seconds)
    write, read = disk_speed(folder, seconds)
    speeds = Speeds(teacher=looking / len(images), step=stepping / len(images), write=write, read=read)
    return speeds, Looked(positions=tuple(positions.tolist()), batch=images, taps=taps)


def coding_seconds(
    key: CacheKey, train: Split, looked: Looked, device: torch.device, seconds: float
) -> tuple[float, float]:
    """Seconds per image of encoding on a processor, and of copying and decoding on the training device."""
    layout, positions = key.layout, looked.positions
    canvas = train.views.view(positions[0], 0).canvas
    maps = [x.cpu() for x in layout.split(looked.taps, len(positions), canvas)]
    masks = foreground_masks(key, train.dataset, train.views, positions, 0)
    shapes = [(c, h, w) for c, (h, w) in zip(layout.channels, layout.sizes(canvas), strict=True)]
    taps = list(zip(layout.names, key.coding, maps, masks, shapes, strict=True))

    def encoded() -> list[list[Encoded]]:
        return [
            [c.encode(x[i], None if m is None else m[i], level=n) for i in range(len(positions))]
            for n, c, x, m, _ in taps
        ]

    stored = encoded()

    def decoded() -> None:
        for (name, codec, _, _, shape), rows in zip(taps, stored, strict=True):
            stack(codec, rows, shape, level=name).to(device).maps()

    encoding = _timed(encoded, torch.device("cpu"), seconds) / len(positions)
    return encoding, _timed(decoded, device, seconds) / len(positions)


def verdict(
    config: RunConfig, train: Split, speeds: Speeds, needed: int, *, gpus: int = 1, students: int = 1,
    encode: float = 0.0, decode: float = 10e-6,
) -> BreakEven:  # fmt: skip
    """The cache's formula with these figures, for a cache of `needed` bytes."""
    samples = len(train.dataset) * train.views.count
    return break_even(
        student_seconds=speeds.step,
        teacher_seconds=max(speeds.teacher, encode),
        bytes_per_image=needed / samples,
        read_bandwidth=speeds.read,
        write_bandwidth=speeds.write,
        gpus=gpus,
        epochs=epochs_of(config, train),
        students=students,
        views=train.views.count,
        overhead_seconds=decode,
    )


def epochs_of(config: RunConfig, train: Split) -> int:
    """How often the recipe's schedule goes through its images."""
    return max(1, round(config.optim.steps * config.optim.batch / max(1, len(train.dataset))))


def measured_break_even(
    config: RunConfig, key: CacheKey, teacher: LoadedTeacher, student: Detector, train: Split, folder: Path,
    needed: int, *, students: int,
) -> BreakEven:  # fmt: skip
    """What is said before a cache is filled, from a moment's measurement by the driver."""
    device = torch.device("cpu")
    speeds, _ = look(config, teacher, student, train, folder, device, batch=key.batch, seconds=0.0)
    return verdict(config, train, speeds, needed, students=students)


def disk_speed(folder: Path, seconds: float) -> tuple[float, float]:
    """Bytes per second written with fsync, and read back past the page cache, in `folder`; a file of its own, which is
    gone afterwards."""
    path, content = folder / f"speed-{os.getpid()}.tmp", os.urandom(CHUNK)
    try:
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            while file.tell() == 0 or (time.perf_counter() - began < seconds and file.tell() < MOST_BYTES):
                file.write(content)
                os.fsync(file.fileno())
            size = file.tell()
            writing = time.perf_counter() - began
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, read = time.perf_counter(), 0
        with path.open("rb", buffering=0) as file:
            while read == 0 or time.perf_counter() - began < seconds:
                found = len(file.read(CHUNK))
                read += found
                if found == 0:
                    break
        return size / writing, read / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def _step(
    config: RunConfig, teacher: LoadedTeacher, batch: Batch, taps: Taps, device: torch.device
) -> Callable[[], object]:
    """A whole step of a student of its own, when every method is on; its weights stay about where they are."""
    student = build.build_student(config, len(teacher.categories)).to(device).train()
    taught = build.build_lessons(config, student.shapes, {teacher.config.name: teacher}, World(), device)
    optim = replace(config.optim, lr=1e-12, accumulate=1)
    distiller = Distiller(student, taught.lessons).to(device)
    engine = PlainEngine(distiller, optim, World(), config.resources.precision)
    moment = max(lesson.config.fullest(optim.steps) for lesson, _ in taught.lessons.values())
    teachers = {teacher.config.name: lambda _: taps}
    clock = Clock(device)
    return lambda: train_step(engine, [batch], teachers, taught.assistants, optim, moment, World(), clock)


def _timed(act: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The median time of `act` over `seconds`, once at least, after a first time that warms up."""
    act()
    times: list[float] = []
    while not times or sum(times) < seconds:
        _wait(device)
        began = time.perf_counter()
        act()
        _wait(device)
        times.append(time.perf_counter() - began)
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
