"""A saved student at work: pixels of any size in, boxes in those pixels out. Needs detector code alone, no cluster.

    predictor, facts = load("runs/hit_uav_scalekd/student")
    (found,) = predictor([decode(Path("photo.jpg").read_bytes())])          # data_sharding.images.decode
    found = sliced(image, predictor, SliceConfig(size=(640, 640)))          # kd.slicing, for large images

Images are rendered by the very code that rendered those the student was evaluated on (`data_sharding.view_apply`),
under the policy that `student.json` holds.

Shape letters: B images of one canvas, H x W canvas, h x w image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_sharding.batch import Geometry, Outputs
from data_sharding.view_apply import render
from data_sharding.view_policy import View, ViewConfig, draw
from kd import student
from kd.detectors.base import Detections, Detector
from kd.evaluation.coco import to_original
from kd.plugins import plugin

Network = Callable[[Detector, Tensor, Geometry], Outputs]


def network(detector: Detector, images: Tensor, geometry: Geometry) -> Outputs:
    """(B, 3, H, W) uint8 canvases -> what the head says: all that has fixed shapes, and nearly all of the work."""
    return detector.predict(detector.features(detector.normalise(images, geometry)).pyramid, geometry)


class Predictor:
    """A detector together with the way its images are rendered."""

    def __init__(
        self,
        detector: Detector,
        views: ViewConfig,
        *,
        batch: int = 8,
        factor: int = 1,
        network: Network = network,
    ) -> None:
        """`detector` in eval mode, on its device. `batch`: most images per forward. `factor`: every canvas is rendered
        so many times as large (a teacher's resolution). `network`: a faster stand-in for `kd.deploy.network`."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1 image, got {batch}")
        self.detector, self.views = detector, views
        self._batch, self._factor, self._network = batch, factor, network

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> list[Detections]:
        """(3, h, w) uint8 RGB images of any sizes -> each one's detections in its own pixels, on the CPU."""
        views = [self.view(image.shape[1], image.shape[2]) for image in images]
        found: dict[int, Detections] = {}
        for canvas in sorted({view.canvas for view in views}):
            members = [i for i, view in enumerate(views) if view.canvas == canvas]
            for start in range(0, len(members), self._batch):
                chosen = members[start : start + self._batch]
                looked = self._look([images[i] for i in chosen], [views[i] for i in chosen])
                found |= dict(zip(chosen, looked, strict=True))
        return [found[i] for i in range(len(images))]

    def with_network(self, network: Network) -> "Predictor":
        """The same with another `network`, such as `torch.compile(kd.deploy.network)`."""
        return Predictor(self.detector, self.views, batch=self._batch, factor=self._factor, network=network)

    def view(self, height: int, width: int) -> View:
        """How an image of this size is rendered: whole, never mirrored."""
        return draw(self.views, "", 0, width, height, np.zeros((0, 4), np.float32), 0)

    def _look(self, images: Sequence[Tensor], views: Sequence[View]) -> list[Detections]:
        device = self.detector.mean.device
        pixels = torch.stack(
            [render(image.cpu(), view, self._factor) for image, view in zip(images, views, strict=True)]
        )
        sizes = torch.tensor([view.size for view in views], device=device)
        geometry = Geometry(views[0].canvas, sizes).scaled(self._factor)
        found = self.detector.detect(self._network(self.detector, pixels.to(device), geometry), geometry)
        there = []
        for one, image, view in zip(found, images, views, strict=True):
            valid = (view.size[0] * self._factor, view.size[1] * self._factor)
            original = to_original(one, valid, (image.shape[1], image.shape[2]))
            there.append(Detections(original.boxes.cpu(), original.scores.cpu(), original.labels.cpu()))
        return there


def load(
    folder: Path | str, *, device: torch.device | str = "cpu", batch: int = 8, score: float | None = None
) -> tuple[Predictor, student.StudentInfo]:
    """A student by its folder, ready to look at images. `score`: its score threshold instead of the one it was
    trained with. Raises ValueError where `student.json` does not say how images are rendered."""
    detector, info = student.load(folder)
    views = views_of(info.input, str(folder))
    if score is not None:
        detector, info = _with_threshold(detector, info, score)
    return Predictor(detector.to(device), views, batch=batch), info


def views_of(input: Mapping[str, Any], folder: str) -> ViewConfig:
    """The rendering policy out of `student.json`'s `input`."""
    missing = [name for name in ("short_side", "long_side", "buckets") if name not in input]
    if missing:
        raise ValueError(
            f"{folder}/{student.FACTS} does not say how images are rendered for this student ({', '.join(missing)} "
            "missing below `input`); add what it was trained on, such as "
            '"input": {"short_side": [800], "long_side": 1333, "buckets": [[896, 1408], [1408, 896]]}'
        )
    sides = input["short_side"]
    return ViewConfig(
        short_side=None if sides is None else tuple(sides),
        long_side=input["long_side"],
        buckets=tuple((height, width) for height, width in input["buckets"]),
        flip=0.0,
    )


def _with_threshold(
    detector: Detector, info: student.StudentInfo, score: float
) -> tuple[Detector, student.StudentInfo]:
    """The same weights in a detector that keeps what scores higher than `score`."""
    if "score_threshold" not in {f.name for f in fields(info.config)}:
        raise ValueError(f"a {info.config.name} detector has no score_threshold to set; leave `score` out")
    config = replace(info.config, score_threshold=score)
    other = plugin("kd.detectors", config.name).build(config, len(info.categories), weights_follow=True)
    other.load_state_dict(detector.state_dict())
    return other.eval(), replace(info, config=config)
