"""CLSD, or DICOD (Guo et al., NeurIPS 2021, "Distilling image classifiers in object detectors"): an image
classifier teaches the detector, its classes on the objects' crops, its eye for content where the boxes are. It reads
nothing of the detector that is the recipe's teacher; its own is a torchvision classifier, live.

Classes: T^2 times the divergence of the student's classes, on places that answer for an object, from the classifier's
on the 112 x 112 crop of that object; a dense head's probabilities are brought to sum 1. Boxes: the image is sampled in
the student's predicted box and in the object's, and the L1 between the two, of pixels pooled to 4 x 4 plus of the
classifier's first layer pooled to 8 x 8, moves the box.

Departures: per image, 32 drawn places are localised instead of all, which a step could not hold; their mean is taken
per image, and images are averaged.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.answers import Answers
from kd.blocks.classifier import Classifier, cropped, standardised
from kd.blocks.divergence import share_of_image_means
from kd.blocks.draw import draw
from kd.blocks.foreground import all_boxes
from kd.blocks.pooling import pooled
from kd.blocks.response import normalised_classes
from kd.methods.base import Advice, Method, MethodConfig, Pair


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    weights: Path | None = None
    """A state dict of a torchvision classifier (`torch.save(model.state_dict(), path)`)."""
    classifier: str = "resnet50"
    """Its name at torchvision."""
    outputs: tuple[int, ...] = ()
    """The classifier's output of each class of the data set, in their order; empty: it was trained on just these."""
    cls: float = 0.4
    """Weight of the classes."""
    loc: float = 0.15
    """Weight of the boxes."""
    temperature: float = 2.0
    crop: int = 112
    """Pixels per side of a crop."""
    places: int = 32
    """Most places per image that are localised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("cls", "loc")
        if self.temperature <= 0 or self.crop < 32 or self.places < 1:
            raise ValueError(
                "temperature must be > 0, crop >= 32 and places >= 1, got "
                f"{self.temperature}, {self.crop} and {self.places}"
            )

    @property
    def taught(self) -> bool:
        """The classifier teaches, and no detector."""
        return False


class Loss(Method):
    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        if config.weights is None:
            raise ValueError("clsd learns from an image classifier; set distill.clsd.weights to its state dict's path")
        self.config = config
        self.classifier = Classifier(config.classifier, config.weights, config.outputs, pair.student.num_classes)

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        mine, (boxes, image) = advice.detector.answers(outputs, batch), all_boxes(batch)
        pixels = standardised(batch.scaled_images.get(1, batch.images))
        with torch.autocast(pixels.device.type, enabled=False):
            terms = {
                "cls": self._classes(mine, pixels, boxes, image, batch) if self.config.cls else None,
                "box": self._boxes(mine, pixels, boxes, batch) if self.config.loc else None,
            }
        return {name: term for name, term in terms.items() if term is not None}

    def _classes(self, mine: Answers, pixels: Tensor, boxes: Tensor, image: Tensor, batch: Batch) -> Tensor:
        """The divergence from what the classifier sees in each object."""
        with torch.no_grad():
            crops = cropped(pixels, boxes, image, batch.geometry, self.config.crop)
            seen = self.classifier.to(pixels.device).logits(crops)
        on = mine.positive
        divergence = normalised_classes(mine.logits[on], seen[mine.truth[on]], self.config.temperature, mine.regions)
        return self.config.cls * divergence.sum() * mine.share

    def _boxes(self, mine: Answers, pixels: Tensor, boxes: Tensor, batch: Batch) -> Tensor:
        """How far the contents of the predicted boxes are from the objects'."""
        chosen = _drawn(mine, batch, self.config.places)
        image, found = mine.image[chosen], mine.decode(mine.code_of(mine.label))[chosen]
        crops, truth = (
            cropped(pixels, b, image, batch.geometry, self.config.crop) for b in (found, boxes[mine.truth[chosen]])
        )
        stem = self.classifier.to(pixels.device).stem
        apart = _distance(crops, truth, 4) + _distance(stem(crops), stem(truth), 8)
        return self.config.loc * share_of_image_means(apart, image, len(batch), batch.totals["images"])


def _distance(found: Tensor, wanted: Tensor, size: int) -> Tensor:
    """(P, C, H, W) twice -> (P,): the mean L1 of what is pooled to size x size."""
    return (pooled(found, size) - pooled(wanted.detach(), size)).abs().mean(dim=(1, 2, 3))


def _drawn(mine: Answers, batch: Batch, most: int) -> Tensor:
    """(N,) bool: up to `most` of each image's places that answer for an object, drawn by (`batch.key`, image)."""
    chosen = []
    for number, image in enumerate(batch.image_ids):
        here = mine.positive[mine.image == number]
        chosen.append(draw(here, torch.zeros_like(here), most, 1.0, (*batch.key, "clsd", image)))
    return torch.cat(chosen)
