"""What every detector file promises: the contract between detectors, methods, teachers and the step.

Shape letters: B images, C channels, H x W cells of one level, K classes, D detections of one image.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Union

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Geometry, Outputs, Taps
from kd.backbones.base import BackboneConfig
from kd.plugins import plugins

if TYPE_CHECKING:
    AnyBackbone = BackboneConfig
else:
    # The type of every detector's `backbone` setting: whatever lies in the folder, so that a recipe is checked
    # against the settings of the backbone it names, and a new backbone touches one file.
    AnyBackbone = Union[tuple(module.Config for module in plugins("kd.backbones").values())]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The shape facts a method needs before the first batch."""

    c5_channels: int
    c5_stride: int
    pyramid_channels: int
    strides: tuple[int, ...]
    """Pixels per cell, level by level, finest first."""
    num_classes: int
    family: Literal["one_stage", "two_stage"] = "one_stage"
    """Papers give default loss weights by family."""


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first, in canvas pixels."""

    boxes: Tensor
    """(D, 4) float32 as x1 y1 x2 y2."""
    scores: Tensor
    """(D,) float32 in [0, 1]."""
    labels: Tensor
    """(D,) int64."""


class Detector(nn.Module, ABC):
    """A detector in parts. Every part is a plain method that calls sub-modules, so that ZeRO's hooks, which see
    only tensors, tuples and dicts, never meet a dataclass.
    """

    shapes: Shapes
    mean: Tensor
    """(3,) buffer, in 0..1 RGB."""
    std: Tensor
    """(3,) buffer, in 0..1 RGB."""
    backbone: nn.Module
    """images (B, 3, H, W) -> tuple of stages; frozen and counted apart from the rest."""

    def normalise(self, images: Tensor, geometry: Geometry) -> Tensor:
        """uint8 pixels (B, 3, H, W) -> float32, standardised, exactly zero on the padding."""
        scaled = (images.float() / 255 - self.mean.view(1, 3, 1, 1)) / self.std.view(1, 3, 1, 1)
        rows = torch.arange(images.shape[2], device=images.device) < geometry.sizes[:, :1]
        columns = torch.arange(images.shape[3], device=images.device) < geometry.sizes[:, 1:]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return (scaled * inside).contiguous(memory_format=torch.channels_last)

    @abstractmethod
    def features(self, images: Tensor, freeze_backbone: bool = False) -> Taps:
        """Normalised images (B, 3, H, W) -> taps. With `freeze_backbone` the backbone runs without gradient and
        with its running statistics untouched."""

    @abstractmethod
    def predict(self, pyramid: tuple[Tensor, ...], geometry: Geometry) -> Outputs:
        """Run the head on any pyramid of this detector's shape, its own or an assistant's."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars of this micro-batch that the losses divide by, to be summed over the global batch. They depend
        on the labels and the geometry alone, so that they are known before the first forward."""

    @abstractmethod
    def task_losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """This micro-batch's share of the loss of the global batch, by name (`cls`, `box`, ...): summing the shares
        over ranks and micro-batches gives the loss. Divides by `batch.totals`."""

    @abstractmethod
    def distill_losses(self, student: Outputs, target: Outputs, batch: Batch, box_loss: str) -> dict[str, Tensor]:
        """Response distillation in this detector's own terms: {`cls`, `box`}, shares as in `task_losses`.

        `target` is detached. `cls`: soft-target binary cross-entropy at every location, divided by the positives;
        `box`: on the detector's own positives, `bounded` (Chen et al. 2017: only where the student errs more than
        the target) or `smooth_l1`. Ambiguity S18 of the reference.
        """

    @abstractmethod
    def detect(self, outputs: Outputs, geometry: Geometry) -> list[Detections]:
        """Scores, decoding, per-class non-maximum suppression and the cap on detections; boxes are clipped to each
        image's valid area."""
