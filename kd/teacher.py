"""What the teacher sees, live or from the cache, behind one call: its taps on the student's grid."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from data_sharding.batch import Batch, Geometry, Outputs, Taps
from kd.blocks.align import Rule, align
from kd.detectors.base import Detector, Shapes

Teacher = Callable[[Batch], Taps]
"""A batch -> detached taps on the student's grid, holding what the methods read."""


class LiveTeacher:
    """A frozen detector that looks at each batch, at `factor` times the student's resolution."""

    def __init__(
        self,
        detector: Detector,
        student: Shapes,
        *,
        factor: int,
        rule: Rule,
        reads: frozenset[str],
        precision: Literal["fp32", "bf16"] = "fp32",
        features: Callable[[Tensor], Taps] | None = None,
        images: int = 1,
    ) -> None:
        """`features`: another way to the detector's taps, for which ranks wait for each other: then all look as often
        as the one that has the most `images` in a batch."""
        self.detector = detector.eval().requires_grad_(False)
        self.shapes = aligned_shapes(detector.shapes, student)
        self._student, self._factor, self._reads = student, factor, reads
        self._rule: Rule = rule
        self._precision = precision
        self._features, self._images = features or detector.features, images

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Taps:
        # The student's own pixels may be colour-jittered; the clean ones then travel beside them.
        images = batch.scaled_images.get(1, batch.images) if self._factor == 1 else batch.scaled_images[self._factor]
        geometry = batch.geometry.scaled(self._factor)
        # On a CPU torch picks a convolution's algorithm by the number of images, and GroupNorm's sums by how threads
        # share them: one at a time, an image's taps do not depend on its batch mates and equal the cached ones to the
        # bit (a third slower at 256 px, faster from 512 px on). A GPU needs the whole batch, and agrees to rounding.
        size = 1 if images.device.type == "cpu" else max(len(images), self._images)
        parts = [
            self._look(images[i : i + size], Geometry(geometry.canvas, geometry.sizes[i : i + size]))
            for i in range(0, len(images), size)
        ]
        for _ in range(len(parts) * size, self._images, size):  # for the ranks that have more images
            self._look(images[:1], Geometry(geometry.canvas, geometry.sizes[:1]))
        c5 = None if parts[0].c5 is None else _joined([part.c5 for part in parts if part.c5 is not None])
        return Taps(c5, tuple(_joined(level) for level in zip(*(part.pyramid for part in parts), strict=True)))

    def _look(self, images: Tensor, geometry: Geometry) -> Taps:
        # The student's autocast must not reach in here: live and cached teacher have to agree to the bit.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            taps = self._features(self.detector.normalise(images, geometry))
        taps = align(taps, self.detector.shapes, self._student, self._factor, self._rule)
        return only(taps, self._reads)


class CachedTeacher:
    """The same taps, read from the cache by the loader, travelling with the batch and decoded on its device."""

    def __init__(self, name: str, shapes: Shapes, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.shapes, self._dtype = name, shapes, dtype

    def __call__(self, batch: Batch) -> Taps:
        return batch.cached[self.name].decode(self._dtype)


class Seeing(Protocol):
    """How a recipe says that a teacher sees."""

    @property
    def factor(self) -> int: ...

    @property
    def align(self) -> Rule: ...

    @property
    def precision(self) -> Literal["fp32", "bf16"]: ...


class TeacherHead:
    """The frozen head of a teacher, live or cached: what it says of a pyramid on the student's grid.

    It knows the teacher's head alone, on `device`: what stays loaded beside a cached teacher. A pyramid of stored taps
    is one of live ones, so are the answers.
    """

    def __init__(self, detector: Detector, student: Shapes, settings: Seeing, device: torch.device) -> None:
        if settings.factor > 1 and settings.align == "pool":
            raise ValueError(
                "a teacher that sees more pixels and is aligned by 'pool' has no head to ask: its answers would be in "
                "its own pixels; set the teacher's align to 'shift' or its factor to 1, or choose a method that "
                "compares pyramids"
            )
        head = detector.on_grid(student.strides)
        # The copy shares its registry of modules with the detector, which keeps its features.
        head._modules = {name: part for name, part in head._modules.items() if name not in ("backbone", "fpn")}
        self._head = head.eval().requires_grad_(False).to(device)
        self._precision = settings.precision

    @torch.no_grad()
    def __call__(self, taught: Taps, geometry: Geometry, proposals: tuple[Tensor, ...] = ()) -> Outputs:
        """`proposals`: what the student's second stage is asked about; empty where it has none."""
        # As for the taps: the student's autocast must not reach in here.
        with torch.autocast(taught.pyramid[0].device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            return self._head.predict(taught.pyramid, geometry, proposals or None)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """(b, C, H, W) of some images each -> (B, C, H, W) float32 with the very strides of taps from a cache: also a
    1 x 1 map's strides decide which kernel the student's side runs."""
    count = sum(len(part) for part in parts)
    out = parts[0].new_empty((count, *parts[0].shape[1:]), dtype=torch.float32)
    out = torch.empty_like(out, memory_format=torch.channels_last)
    for place, part in zip(out.split([len(part) for part in parts]), parts, strict=True):
        place.copy_(part)
    return out


def only(taps: Taps, reads: frozenset[str]) -> Taps:
    """The taps that the methods read; the rest is neither kept nor stored."""
    return Taps(taps.c5 if "c5" in reads else None, taps.pyramid if "pyramid" in reads else ())


def aligned_shapes(teacher: Shapes, student: Shapes) -> Shapes:
    """The teacher's shapes on the student's grid."""
    return replace(teacher, strides=student.strides, c5_stride=student.c5_stride)


def all_reads(reads: Sequence[frozenset[str]]) -> frozenset[str]:
    """What several methods read together."""
    return frozenset().union(*reads)
