"""The values that travel from the loader to the loss.

Shape letters: B images, C channels, H x W pixels of the canvas or cells of one pyramid level, N boxes of one
image, R ignored regions of one image, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from data_sharding.codecs.stored import TapGroup


@dataclass(frozen=True)
class Outputs:
    """What a head says of every cell, finest level first, and, where the detector has two stages, of its proposals.
    Flattened levels are for the detector alone."""

    class_logits: tuple[Tensor, ...]
    """One (B, A * K, H, W) map per level for A answers per cell, before the sigmoid."""
    box_deltas: tuple[Tensor, ...]
    """One (B, A * 4, H, W) map per level, in the detector's own coding."""
    centerness: tuple[Tensor, ...] = ()
    """One (B, 1, H, W) map per level, before the sigmoid; empty where the detector has none."""
    proposals: tuple[Tensor, ...] = ()
    """Two stages: per image (N, 4) float32 boxes in canvas pixels, the regions that the second stage was asked about.
    The maps are then the first stage's, with one class."""
    roi_logits: Tensor | None = None
    """(N of all images, K + 1) before the softmax, background first."""
    roi_deltas: Tensor | None = None
    """(N of all images, (K + 1) * 4): each class's box, in the detector's own coding."""

    def detach(self) -> "Outputs":
        """The same values, cut off from the graph."""
        maps = {n: tuple(x.detach() for x in getattr(self, n)) for n in ("class_logits", "box_deltas", "centerness")}
        rois = {n: None if (x := getattr(self, n)) is None else x.detach() for n in ("roi_logits", "roi_deltas")}
        return replace(self, **maps, **rois)


@dataclass(frozen=True)
class Taps:
    """What a detector shows to distillation methods, finest pyramid level first.

    A detector file maps its own modules to these names once, so no method ever names a module path. Taps handed
    to a method are on the student's grid, whatever the teacher's resolution.
    """

    c5: Tensor | None = None
    """(B, C, H, W): the last backbone stage."""
    pyramid: tuple[Tensor, ...] = ()
    """One (B, C, H, W) map per level, after the neck."""

    def detach(self) -> "Taps":
        """The same values, cut off from the graph."""
        return Taps(None if self.c5 is None else self.c5.detach(), tuple(p.detach() for p in self.pyramid))


@dataclass(frozen=True)
class StoredTaps:
    """Taps of a batch as a cache stores them: few bytes to move, decoded where they are needed."""

    c5: TapGroup | None = None
    pyramid: tuple[TapGroup, ...] = ()
    """All levels, finest first, however many of them each group holds."""

    def to(self, device: torch.device) -> "StoredTaps":
        """The same on `device`, still encoded."""
        return StoredTaps(None if self.c5 is None else self.c5.to(device), tuple(p.to(device) for p in self.pyramid))

    def decode(self, dtype: torch.dtype = torch.float32) -> Taps:
        """The maps, on the device where the rows are."""
        c5 = None if self.c5 is None else self.c5.maps(dtype)[0]
        return Taps(c5, tuple(level for group in self.pyramid for level in group.maps(dtype)))


@dataclass(frozen=True)
class Geometry:
    """Where the images lie on their common canvas: at the top left, the rest is padding."""

    canvas: tuple[int, int]
    """(H, W) in pixels, equal for the whole global batch."""
    sizes: Tensor
    """(B, 2) int64: valid (height, width) of each image on the canvas."""

    def scaled(self, factor: int) -> "Geometry":
        """The geometry of the same views rendered `factor` times as large."""
        return Geometry((self.canvas[0] * factor, self.canvas[1] * factor), self.sizes * factor)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. All images of a global batch share one canvas."""

    images: Tensor
    """(B, 3, H, W) uint8 RGB, zero outside the valid area."""
    geometry: Geometry
    boxes: tuple[Tensor, ...]
    """Per image (N, 4) float32 as x1 y1 x2 y2 in canvas pixels; crowds and difficult objects are not."""
    labels: tuple[Tensor, ...]
    """Per image (N,) int64 class ids in [0, K)."""
    ignore: tuple[Tensor, ...]
    """Per image (R, 4) float32, in canvas pixels: ignored regions, crowds, difficult and hardly visible objects."""
    image_ids: tuple[int, ...]
    views: tuple[int, ...]
    """The view's index of each image."""
    scaled_images: Mapping[int, Tensor] = field(default_factory=dict)
    """For live teachers that see more pixels: factor -> (B, 3, factor * H, factor * W) uint8."""
    cached: Mapping[str, StoredTaps] = field(default_factory=dict)
    """For cached teachers: teacher's name -> its taps on the student's grid, encoded as they were stored."""
    scales: Tensor | None = None
    """(B, 2) float32: canvas pixels per source pixel, down and across; None: unknown."""
    key: tuple[object, ...] = ()
    """What the random draws of its images are keyed with beside purpose and image: the run's seed and the epoch."""
    totals: Mapping[str, Tensor] = field(default_factory=dict)
    """Counts over the whole global batch (all ranks, all micro-batches): `images`, `boxes`, and what the detector
    counts, such as `positives`. The step fills it in; every loss divides by these, never by its own share."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def with_totals(self, totals: Mapping[str, Tensor]) -> "Batch":
        """The same batch, knowing the counts of the global batch it is part of."""
        return replace(self, totals=totals)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; pinned tensors travel without blocking, cached taps encoded."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return replace(
            self,
            images=move(self.images),
            geometry=Geometry(self.geometry.canvas, move(self.geometry.sizes)),
            boxes=tuple(move(x) for x in self.boxes),
            labels=tuple(move(x) for x in self.labels),
            ignore=tuple(move(x) for x in self.ignore),
            scaled_images={factor: move(x) for factor, x in self.scaled_images.items()},
            cached={name: taps.to(device) for name, taps in self.cached.items()},
            scales=None if self.scales is None else move(self.scales),
        )
