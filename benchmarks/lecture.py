"""Real images, a teacher that has learnt the task on them, and what it sees: material to try methods on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.classroom import FACTOR, Classroom, built, looked
from data_sharding.batch import Batch, Geometry, Taps
from data_sharding.datasets import coco
from data_sharding.images import decode
from data_sharding.record import Category
from data_sharding.views import ViewConfig, draw, place_labels, render
from kd import student as exports
from kd.backbones import mobilenetv2
from kd.detectors import fcos
from kd.detectors.base import Detector
from kd.optimise import OptimConfig

VIEWS = ViewConfig(crop=(256, 256), crop_on_object=1.0, short_side=(128,), flip=0.0, buckets=((128, 128),))
"""The sensor's own pixels at half resolution, each on an object."""
BATCH = 4
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Lecture:
    """Fixed batches and what the teacher sees of them."""

    batches: Sequence[Batch]
    taps: Taps
    """Of all images, in their order."""

    def __len__(self) -> int:
        return len(self.batches) * BATCH

    def shown(self, number: int, whose: Tensor | None = None, labels: bool = False) -> tuple[Batch, Taps]:
        """A batch, and the taps of its own images or of those at `whose` (N,) places; a classifier then sees their
        pixels too. `labels`: the labels are theirs, for a method whose teacher these are."""
        batch, own = self.batches[number], torch.arange(BATCH) + number * BATCH
        places = own if whose is None else whose[own]
        c5 = None if self.taps.c5 is None else self.taps.c5[places]
        taps = Taps(c5, tuple(x[places] for x in self.taps.pyramid))
        if whose is None:
            return batch, taps
        batch = replace(batch, scaled_images={1: self._images[places]})
        if labels:
            parts = {name: tuple(self._labels[name][i] for i in places) for name in self._labels}
            batch = replace(batch, **parts)
        return batch, taps

    @cached_property
    def _images(self) -> Tensor:
        return torch.cat([batch.images for batch in self.batches])

    @cached_property
    def _labels(self) -> Mapping[str, list[Tensor]]:
        names = ("boxes", "labels", "ignore")
        return {name: [x for batch in self.batches for x in getattr(batch, name)] for name in names}


class Remembered(nn.Module):
    """A frozen backbone that keeps what it makes of each batch of images: of so few it need not be asked twice."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self._made: dict[bytes, tuple[Tensor, ...]] = {}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See `kd.backbones.base.Backbone.forward`."""
        pixels = images[:, 0, ::4, ::4].numpy().tobytes()
        if pixels not in self._made:
            self._made[pixels] = self.backbone(images)
        return self._made[pixels]


def hit_uav(folder: Path) -> coco.Config:
    """The data set as its folder holds it."""

    def split(name: str) -> coco.Split:
        return coco.Split(images=folder / "normal_json" / name, annotations=folder / "coco" / f"instances_{name}.json")

    return coco.Config(train=split("train"), val=split("val"), ignore_categories=("DontCare",))


def real_batches(config: coco.Config, split: str, count: int) -> list[Batch]:
    """The first `count` images that have objects, drawn from the whole split at even distances, in batches; each with
    its rendering for the teacher."""
    source = coco.source(config, split)
    records = (source.read(int(i)) for i in np.linspace(0, source.count - 1, min(source.count, 2 * count)).astype(int))
    chosen = [record for record in records if len(record.boxes)][:count]
    made = []
    for start in range(0, len(chosen) - BATCH + 1, BATCH):
        part = chosen[start : start + BATCH]
        views = [draw(VIEWS, source.fingerprint, r.image_id, r.width, r.height, r.boxes, 0) for r in part]
        pixels = [decode(record.image, record.file_name) for record in part]
        labels = [place_labels(record, v, min_visible=VIEWS.min_visible) for record, v in zip(part, views, strict=True)]
        made.append(
            Batch(
                images=torch.stack([render(x, v) for x, v in zip(pixels, views, strict=True)]),
                geometry=Geometry(views[0].canvas, torch.tensor([v.size for v in views])),
                boxes=tuple(boxes for boxes, _, _ in labels),
                labels=tuple(classes for _, classes, _ in labels),
                ignore=tuple(ignored for _, _, ignored in labels),
                image_ids=tuple(record.image_id for record in part),
                views=(0,) * BATCH,
                scaled_images={FACTOR: torch.stack([render(x, v, FACTOR) for x, v in zip(pixels, views, strict=True)])},
            )
        )
    return made


def trained_teacher(
    folder: Path, weights: Path, categories: Sequence[Category], batches: Sequence[Batch], steps: int
) -> tuple[Detector, fcos.Config]:
    """The teacher of `folder`; where there is none, one that learns the task now, at twice the pixels, and is kept
    there. Its boxes' sides are distributions, which LD asks for."""
    if not (folder / exports.FACTS).exists():
        backbone = mobilenetv2.Config(norm="frozen", weights=str(weights))
        config = fcos.Config(backbone=backbone, width=64, head_depth=1, levels=(4, 5, 6), bins=16)
        # At the full rate the backbone's deepest stage would end up with one answer for all images.
        optim = replace(optim_config(max(steps, 1)), backbone_lr=0.1)
        room = Classroom(config, built(config, len(categories), CPU), len(categories), None, None, optim, CPU)
        for step in range(steps):
            room.step(_enlarged(batches[step % len(batches)]), Taps(), step)
        exports.save(room.student, config, categories, folder)
    detector, info = exports.load(folder)
    return detector.requires_grad_(False), info.config


def pupil(teacher: fcos.Config, weights: Path) -> fcos.Config:
    """A student for that teacher: half as wide, one level finer, for it sees half the pixels."""
    backbone = mobilenetv2.Config(norm="frozen", weights=str(weights))
    levels = tuple(level - 1 for level in teacher.levels)
    return replace(teacher, backbone=backbone, width=teacher.width // 2, head_depth=1, levels=levels)


def lecture(student: fcos.Config, teacher: Detector, batches: Sequence[Batch]) -> Lecture:
    """What the teacher sees of the batches, on the student's grid."""
    looks = built(student, teacher.shapes.num_classes, CPU)
    seen = [looked(teacher, looks, batch) for batch in batches]
    c5 = [taps.c5 for taps in seen if taps.c5 is not None]
    pyramid = tuple(torch.cat(level) for level in zip(*(taps.pyramid for taps in seen), strict=True))
    return Lecture(batches=batches, taps=Taps(torch.cat(c5) if c5 else None, pyramid))


def optim_config(steps: int) -> OptimConfig:
    """How everyone learns here."""
    return OptimConfig(optimizer="adamw", lr=1e-3, weight_decay=0.0, batch=BATCH, steps=steps, warmup=0, clip_norm=10.0)


def _enlarged(batch: Batch) -> Batch:
    """The same images as the teacher sees them, as a batch of their own."""
    return replace(
        batch,
        images=batch.scaled_images[FACTOR],
        geometry=batch.geometry.scaled(FACTOR),
        boxes=tuple(FACTOR * boxes for boxes in batch.boxes),
        ignore=tuple(FACTOR * boxes for boxes in batch.ignore),
    )
