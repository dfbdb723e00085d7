"""Put a teacher that sees more pixels onto the student's grid.

A teacher at `factor` times the student's resolution covers each object with `factor` times as many cells per side.
Its level of stride factor * s then has both the grid and the object scale of the student's level of stride s (MSAD,
ZoomInNet; ambiguity S9 of the reference): for a 2x teacher with the student's levels, level l + 1 stands at level l.
Pure functions of tensors: live and cached teachers go through the same lines.

Shape letters: B images, C channels, H x W cells.
"""

from typing import Literal, Protocol

import torch.nn.functional as F
from torch import Tensor

from data_sharding.batch import Taps

Rule = Literal["shift", "pool"]


class Grid(Protocol):
    """The part of a detector's shapes that says where its taps stand."""

    @property
    def c5_stride(self) -> int: ...

    @property
    def strides(self) -> tuple[int, ...]: ...


def align(taps: Taps, teacher: Grid, student: Grid, factor: int, rule: Rule = "shift") -> Taps:
    """Taps of a teacher that sees `factor` (1, 2, 4, ...) times the student's resolution -> taps on the student's grid.

    `shift` takes for each student level the teacher's level with `factor` times its stride; `pool` the teacher's
    level with the same stride, average-pooled factor x factor. The last backbone stage has no coarser neighbour and
    is average-pooled in both. Absent taps stay absent.
    """
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"a teacher's resolution factor must be a power of two (1, 2, 4, ...), got {factor}")
    if rule not in ("shift", "pool"):
        raise ValueError(f"unknown alignment {rule!r}; choose 'shift' or 'pool'")
    c5 = None if taps.c5 is None else pool(taps.c5, _ratio(student.c5_stride * factor, teacher.c5_stride))
    if not taps.pyramid:
        return Taps(c5)
    if rule == "shift":
        wanted = tuple(stride * factor for stride in student.strides)
        return Taps(c5, level_shift(taps.pyramid, teacher.strides, wanted))
    levels = level_shift(taps.pyramid, teacher.strides, student.strides)
    return Taps(c5, tuple(pool(level, factor) for level in levels))


def level_shift(pyramid: tuple[Tensor, ...], strides: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The levels of a pyramid with `strides` that have the `wanted` strides. Levels coarser than the last are made
    from it by stride-2 subsampling (max-pool of kernel 1: ceil sizes, as a padded strided convolution gives)."""
    by_stride = dict(zip(strides, pyramid, strict=True))
    while max(by_stride) < max(wanted):
        coarsest = max(by_stride)
        by_stride[2 * coarsest] = F.max_pool2d(by_stride[coarsest], kernel_size=1, stride=2)
    missing = [stride for stride in wanted if stride not in by_stride]
    if missing:
        raise ValueError(
            f"the teacher's pyramid has strides {strides}, the student's grid needs {wanted}: {missing} cannot be had; "
            "give the teacher finer levels or the student coarser ones"
        )
    return tuple(by_stride[stride] for stride in wanted)


def pool(x: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) -> (B, C, ceil(H / factor), ceil(W / factor)): means over the cells that exist."""
    return x if factor == 1 else F.avg_pool2d(x, factor, ceil_mode=True, count_include_pad=False)


def check_grid(taps: Taps, student: Grid, canvas: tuple[int, int]) -> None:
    """Raise a ValueError unless the present taps stand on the student's grid over a canvas of (H, W) pixels."""
    if taps.pyramid and len(taps.pyramid) != len(student.strides):
        raise ValueError(
            f"the aligned teacher has {len(taps.pyramid)} pyramid levels, the student {len(student.strides)} (strides "
            f"{student.strides}); align the teacher's taps to this student"
        )
    named = [
        (f"pyramid level {i}", level, student.strides[i]) for i, level in enumerate(taps.pyramid)
    ] + ([] if taps.c5 is None else [("c5", taps.c5, student.c5_stride)])  # fmt: skip
    for name, x, stride in named:
        found, expected = tuple(x.shape[-2:]), grid(canvas, stride)
        if found != expected:
            raise ValueError(
                f"the aligned teacher's {name} has {found[0]}x{found[1]} cells, the student's "
                f"{expected[0]}x{expected[1]} (canvas {canvas[0]}x{canvas[1]}, stride {stride}); render the teacher's "
                "images at exactly its factor times the student's canvas"
            )


def grid(canvas: tuple[int, int], stride: int) -> tuple[int, int]:
    """Cells (rows, columns) of a level over a canvas of (H, W) pixels: padded strided convolutions round up."""
    return -(-canvas[0] // stride), -(-canvas[1] // stride)


def _ratio(wanted: int, stride: int) -> int:
    """How many cells of `stride` become one of `wanted`."""
    if wanted % stride:
        raise ValueError(
            f"the teacher's c5 has stride {stride}, coarser than the {wanted} that the student's grid asks for (the "
            "student's c5 stride times the teacher's factor); choose a teacher or a student with another c5 stride"
        )
    return wanted // stride
