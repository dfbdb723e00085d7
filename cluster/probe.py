"""Measure what the cache's arithmetic needs: one teacher forward, one student step, one file, on this very machine."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import build
from cluster.batches import Assembled
from cluster.build import LoadedTeacher, Split
from cluster.config import RunConfig
from data_sharding.batch import Batch
from data_sharding.cache_cost import BreakEven, break_even
from data_sharding.cache_key import CacheKey
from data_sharding.world import World
from kd.detectors.base import Detector
from kd.distiller import Distiller
from kd.step import global_totals

PROBE_BYTES = 32 << 20


def measured_break_even(
    config: RunConfig, key: CacheKey, teacher: LoadedTeacher, student: Detector, train: Split, folder: Path, needed: int
) -> BreakEven:
    """The formula of the cache with this machine's own figures: one teacher forward, one student step, one file."""
    samples = len(train.dataset) * train.views.count
    count = min(key.batch, len(train.dataset))
    with Assembled(train, teacher.config.factor) as assembled:
        batch = assembled.batch(np.arange(count), 0, same_canvas=True)
    live = build.live_teacher(teacher, student.shapes, build.stored_of(config, teacher.config))
    teacher_seconds = _timed(lambda: live(batch)) / len(batch)
    student_seconds = _timed(lambda: _student_step(student, batch)) / len(batch)
    write, read = _disk_speed(folder)
    epochs = max(1, round(config.optim.steps * config.optim.batch / max(1, len(train.dataset))))
    return break_even(
        student_seconds=student_seconds,
        teacher_seconds=teacher_seconds,
        bytes_per_image=needed / samples,
        read_bandwidth=read,
        write_bandwidth=write,
        gpus=1,
        epochs=epochs,
        views=train.views.count,
    )


def _student_step(student: Detector, batch: Batch) -> None:
    batch = batch.with_totals(global_totals(Distiller(student, {}), [batch], World()))
    taps = student.features(student.normalise(batch.images, batch.geometry))
    losses = student.task_losses(student.predict(taps.pyramid, batch.geometry), batch)
    torch.stack(list(losses.values())).sum().backward()
    student.zero_grad(set_to_none=True)


def _timed(call: Any) -> float:
    """Seconds of a call after a first one that warms up."""
    call()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _disk_speed(folder: Path) -> tuple[float, float]:
    """Bytes per second written with fsync, and read back past the page cache, in the cache's own folder."""
    path = folder / "speed.tmp"
    content = os.urandom(PROBE_BYTES)
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = time.perf_counter()
        path.read_bytes()
        return PROBE_BYTES / (written - began), PROBE_BYTES / (time.perf_counter() - written)
    finally:
        path.unlink(missing_ok=True)
