"""What every detector file promises: the contract between detectors, methods, teachers and the step.

Shape letters: B images, C channels, H x W cells of one level, K classes, D detections of one image.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self, Union

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Geometry, Outputs, Taps
from kd.backbones import mobilenetv2
from kd.backbones.base import Backbone, BackboneConfig, evaluating
from kd.blocks.answers import Answers
from kd.blocks.fpn import FPN, Top, check_levels
from kd.plugins import plugin, plugins

if TYPE_CHECKING:
    AnyBackbone = BackboneConfig
else:
    # The type of every detector's `backbone` setting: whatever lies in the folder, so that a recipe is checked
    # against the settings of the backbone it names, and a new backbone touches one file.
    AnyBackbone = Union[tuple(module.Config for module in plugins("kd.backbones").values())]


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Settings that every detector has; the defaults are torchvision's where it has them."""

    name: str
    # The metadata tells whoever checks a recipe that `name` picks the member of the union.
    backbone: AnyBackbone = field(default_factory=mobilenetv2.Config, metadata={"discriminator": "name"})
    width: int = 256
    """Channels of pyramid and head."""
    head_depth: int = 4
    """3 x 3 convolutions of the dense head before its last ones."""
    levels: tuple[int, ...] = (3, 4, 5, 6, 7)
    """Consecutive pyramid levels, within 2..7; level l has stride 2^l. Small objects want 2."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from RGB in 0..1; ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides RGB in 0..1."""
    score_threshold: float = 0.05
    """Detections of a lower score are dropped."""
    candidates: int = 1000
    """Best answers per level before non-maximum suppression."""
    nms: float = 0.5
    """Boxes of one class that overlap more (IoU) are suppressed."""
    detections: int = 100
    """Most detections per image. Drone images hold hundreds of objects."""

    def __post_init__(self) -> None:
        check_levels(self.levels)
        for name, least in (("width", 4), ("head_depth", 0), ("candidates", 1), ("detections", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("score_threshold", "nms"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need 3 numbers each, std above 0; got {self.mean} and {self.std}")


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
    places: tuple[object, ...] = ()
    """What the head's answers are of: the plug-in's name, then its anchors or locations, then how it codes boxes. Two
    heads whose places are equal can be compared number by number, on one grid."""
    bins: int | None = None
    """The greatest distance of the distributions that its boxes are, where they are such."""


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

    def on_grid(self, strides: tuple[int, ...]) -> Self:
        """The same detector, sharing its weights, for pyramids whose levels have other strides: to run a teacher's head
        on taps aligned to a student's grid, with the student's geometry and proposals, in the student's pixels."""
        if len(strides) != len(self.shapes.strides):
            raise ValueError(f"the head knows {len(self.shapes.strides)} levels, got strides {strides}")
        other = copy(self)
        other.shapes = replace(self.shapes, strides=strides)
        return other

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
    def predict(
        self,
        pyramid: tuple[Tensor, ...],
        geometry: Geometry,
        proposals: tuple[Tensor, ...] | None = None,
        sampling: Batch | None = None,
    ) -> Outputs:
        """Run the head on any pyramid of this detector's shape, its own or an assistant's.

        Only a detector of two stages looks at the rest. `proposals` (per image (N, 4), canvas pixels) are what its
        second stage is asked about; without them, it asks about its own, and with `sampling`, a labelled batch of
        these images, about those of them that are drawn for training. Either way `Outputs.proposals` says which.
        """

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

        `target` is detached. `cls`: cross-entropy to the target's probabilities, less their entropy; `box`: on the
        detector's own positives, `bounded` (Chen et al. 2017: only where the student errs more than the target) or
        `smooth_l1`, errors in the detector's own coding. Ambiguity S18 of the reference.
        """

    @abstractmethod
    def answers(self, outputs: Outputs, batch: Batch) -> Answers:
        """What these outputs, its own or a comparable teacher's, say place by place, and which places answer for which
        of the batch's boxes by the detector's own assignment; of a detector of two stages, the second's regions."""

    @abstractmethod
    def detect(self, outputs: Outputs, geometry: Geometry) -> list[Detections]:
        """Scores, decoding, per-class non-maximum suppression and the cap on detections; boxes are clipped to each
        image's valid area."""

    @abstractmethod
    def keep_classes(self, classes: Sequence[int]) -> None:
        """Answer for these of its classes alone, in this order; the rest of the head forgets them. For a teacher that
        knows more classes than the data set has, or in another order."""


class PyramidDetector(Detector):
    """A backbone and a feature pyramid, under torchvision's parameter names, and the pixel statistics."""

    def __init__(
        self,
        config: DetectorConfig,
        num_classes: int,
        backbone: Backbone,
        top: Top,
        places: tuple[object, ...],
        family: Literal["one_stage", "two_stage"] = "one_stage",
        bins: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = FPN(backbone.channels, config.width, config.levels, top)
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)
        self.shapes = Shapes(
            c5_channels=backbone.channels[-1],
            c5_stride=backbone.strides[-1],
            pyramid_channels=config.width,
            strides=tuple(2**level for level in config.levels),
            num_classes=num_classes,
            family=family,
            places=(config.name, *places, *(() if bins is None else (f"bins {bins}",))),
            bins=bins,
        )

    def features(self, images: Tensor, freeze_backbone: bool = False) -> Taps:
        """See `Detector.features`."""
        if freeze_backbone:
            with torch.no_grad(), evaluating(self.backbone):
                stages = self.backbone(images)
        else:
            stages = self.backbone(images)
        return Taps(c5=stages[-1], pyramid=self.fpn(stages))

    def keep_classes(self, classes: Sequence[int]) -> None:
        """See `Detector.keep_classes`."""
        wrong = [c for c in classes if not 0 <= c < self.shapes.num_classes]
        if wrong or not classes:
            raise ValueError(f"classes to keep must be some of 0..{self.shapes.num_classes - 1}, got {list(classes)}")
        self._keep_classes(classes)
        self.shapes = replace(self.shapes, num_classes=len(classes))

    @abstractmethod
    def _keep_classes(self, classes: Sequence[int]) -> None:
        """Thin out the last layers."""


def build_backbone(config: BackboneConfig, weights_follow: bool) -> Backbone:
    """The backbone that the settings name. With `weights_follow` the caller loads a whole state dict next, so the
    backbone's own weights are neither read nor asked for."""
    return plugin("kd.backbones", config.name).build(config, weights_follow)
