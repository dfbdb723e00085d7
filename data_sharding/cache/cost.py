"""Does a teacher cache pay, and does it fit? Asked before a byte is written."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

RESERVED = 2 * 2**30
"""Bytes of a disk that are left to logs and to whatever else writes there (5 % of a disk below 40 GiB)."""


class NotEnoughSpace(OSError):
    """The disk cannot hold what is about to be written."""


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Times are seconds per image and GPU."""

    online: float
    """One training step with the live teacher."""
    cached: float
    """One training step with the cache."""
    gain: float
    """How many times faster the cached step is."""
    largest_gain: float
    """The same with free reading."""
    saved: float
    """Over all epochs and students."""
    spent: float
    """To fill the cache, once."""
    epochs_to_pay: float
    """Epochs, of one student after the other, until the cache has saved what it took; infinite where it never does."""
    largest_bytes: float
    """Bytes per image above which the cached step is slower than the live one."""
    pays: bool
    sentence: str


def break_even(
    *,
    student_seconds: float,
    teacher_seconds: float,
    bytes_per_image: float,
    read_bandwidth: float,
    write_bandwidth: float,
    gpus: int,
    epochs: int,
    students: int = 1,
    views: int = 1,
    overhead_seconds: float = 10e-6,
) -> BreakEven:
    """Compare a live with a cached teacher.

    Seconds are per image and GPU, bandwidths bytes per second of one node, `gpus` those of one node;
    `overhead_seconds` is work per image that does not overlap (gather, conversion).

        T_online = ts + tT        T_cached = max(ts + eps, B * G / W)
        pays when E * S * (T_online - T_cached) > K * max(tT, B * G / W_write)
    """
    checked = (student_seconds, teacher_seconds, bytes_per_image, read_bandwidth, write_bandwidth, gpus, epochs)
    if min(*checked, students, views) <= 0 or overhead_seconds < 0:
        raise ValueError(f"expected positive times, sizes and counts, got {(*checked, students, views)}")
    online = student_seconds + teacher_seconds
    reading = bytes_per_image * gpus / read_bandwidth
    cached = max(student_seconds + overhead_seconds, reading)
    saved = epochs * students * (online - cached)
    spent = views * max(teacher_seconds, bytes_per_image * gpus / write_bandwidth)
    pays = saved > spent
    limit = "reading" if reading > student_seconds + overhead_seconds else "the student"
    verdict = "pays" if pays else "does not pay"
    sentence = (
        f"The cache {verdict}: a step takes {cached * 1e3:.3g} ms per image with it (limited by {limit}) and "
        f"{online * 1e3:.3g} ms without ({online / cached:.2f}x, at most {online / student_seconds:.2f}x); over "
        f"{epochs} epochs and {students} student(s) it saves {saved * 1e3:.3g} ms per image and costs "
        f"{spent * 1e3:.3g} ms to fill with {views} view(s)."
    )
    return BreakEven(
        online=online,
        cached=cached,
        gain=online / cached,
        largest_gain=online / student_seconds,
        saved=saved,
        spent=spent,
        epochs_to_pay=spent / (online - cached) if online > cached else math.inf,
        largest_bytes=online * read_bandwidth / gpus,
        pays=pays,
        sentence=sentence,
    )


def require_space(folder: Path, needed: int) -> None:
    """Raise NotEnoughSpace unless `needed` bytes fit where `folder` will be, with RESERVED bytes or 5 % left over."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    disk = shutil.disk_usage(existing)
    reserved = min(RESERVED, disk.total // 20)
    left = disk.free - reserved
    if needed > left:
        raise NotEnoughSpace(
            f"{folder}: {_gib(needed)} are needed, {_gib(disk.free)} of {_gib(disk.total)} are free and "
            f"{_gib(reserved)} stay reserved; free {_gib(needed - left)}, choose another folder or a smaller codec"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
