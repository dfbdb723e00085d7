"""Every detector plug-in in miniature, for tests that hold for all of them, and labelled noise to show it."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from data_sharding.batch import Batch, Geometry, Outputs
from kd.backbones import mobilenetv2
from kd.detectors.base import Detector
from kd.plugins import plugins

DETECTORS = plugins("kd.detectors")
every_detector = pytest.mark.parametrize("module", DETECTORS.values(), ids=DETECTORS.keys())
every_one_stage = pytest.mark.parametrize(
    "module", [DETECTORS["fcos"], DETECTORS["retinanet"]], ids=["fcos", "retinanet"]
)
CLASSES = 3
SMALL: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"roi_width": 16, "roi_samples": 16, "anchor_samples": 64, "proposals": 50, "anchor_sizes": (4.0,)}
}
"""What makes a plug-in tiny beyond the settings that all have."""
SOME = [[[10.0, 10, 40, 50], [60, 60, 66, 65]], [[0.0, 0, 120, 120]]]
"""Boxes of two images: a small one, and one that fills the canvas."""


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def config(module: ModuleType, **changes: Any) -> Any:
    settings = {"width": 16, "head_depth": 1, "backbone": mobilenetv2.Config(width_mult=0.1)}
    return module.Config(**settings | SMALL.get(name_of(module), {}) | changes)


def detector(module: ModuleType, **changes: Any) -> Detector:
    return module.build(config(module, **changes), CLASSES)


def batch(boxes: list[list[list[float]]], canvas: tuple[int, int] = (128, 128), **rest: object) -> Batch:
    """Noise images with the given boxes; labels 0, 1, 2, 0, ..."""
    count = len(boxes)
    images = torch.randint(0, 256, (count, 3, *canvas), dtype=torch.uint8)
    made = Batch(
        images,
        Geometry(canvas, torch.tensor([canvas] * count)),
        tuple(torch.tensor(b).reshape(-1, 4) for b in boxes),
        tuple(torch.arange(len(b)) % CLASSES for b in boxes),
        tuple(torch.zeros(0, 4) for _ in boxes),
        tuple(range(count)),
        (0,) * count,
    )
    return replace(made, **rest)  # pyright: ignore[reportArgumentType]


def part_of(whole: Batch, keep: slice) -> Batch:
    """Some of the images."""
    return replace(
        whole,
        images=whole.images[keep],
        geometry=Geometry(whole.geometry.canvas, whole.geometry.sizes[keep]),
        boxes=whole.boxes[keep],
        labels=whole.labels[keep],
        ignore=whole.ignore[keep],
        image_ids=whole.image_ids[keep],
        views=whole.views[keep],
    )


def counted(d: Detector, b: Batch) -> Batch:
    return b.with_totals({"images": torch.tensor(float(len(b))), **d.counts(b)})


def pyramid_of(d: Detector, b: Batch) -> tuple[Tensor, ...]:
    return d.features(d.normalise(b.images, b.geometry)).pyramid


def outputs_of(d: Detector, b: Batch) -> Outputs:
    """As in training."""
    return d.predict(pyramid_of(d, b), b.geometry, sampling=b)


def seen_by(d: Detector, b: Batch) -> Outputs:
    """As in evaluation."""
    return d.predict(pyramid_of(d, b), b.geometry)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def cells_on_image(d: Detector, geometry: Geometry, image: int = 0) -> list[Tensor]:
    """Per level (H, W) bool: the cell's top left corner lies on the image."""
    height, width = geometry.sizes[image].tolist()
    found = []
    for stride in d.shapes.strides:
        rows = torch.arange(-(-geometry.canvas[0] // stride)) * stride < height
        columns = torch.arange(-(-geometry.canvas[1] // stride)) * stride < width
        found.append(rows[:, None] & columns)
    return found
