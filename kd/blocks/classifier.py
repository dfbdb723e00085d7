"""An image classifier as a teacher: torchvision's, read from a state dict, asked about crops.

Shape letters: B images, M crops, K classes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model

from data_sharding.batch import Geometry
from kd.foreign import read

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, as for all of torchvision's classifiers."""


class Classifier:
    """A frozen classifier. It is no module, so that whoever holds it does not own its weights."""

    def __init__(self, architecture: str, weights: Path, outputs: Sequence[int], classes: int) -> None:
        """`outputs`: which of its outputs is which of our `classes`, in our order; empty: it knows just these."""
        if not weights.is_file():
            raise ValueError(f"the classifier's weights are not there: {weights}; save a state dict of torchvision's")
        state = read(weights)
        known = len(list(state.values())[-1])  # the last bias
        self._outputs = list(outputs) or list(range(known))
        if len(self._outputs) != classes or not all(0 <= i < known for i in self._outputs):
            raise ValueError(
                f"the classifier of {weights} has {known} outputs, the data set {classes} classes; name an output for "
                f"each class in their order, got {list(outputs)}"
            )
        model = get_model(architecture, weights=None, num_classes=known)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{weights} is no state dict of torchvision's {architecture}: {error}") from None
        self._model = model.eval().requires_grad_(False)
        self._stem = _stem(model, architecture)

    def to(self, device: torch.device) -> "Classifier":
        """The same classifier, moved."""
        self._model.to(device)
        return self

    def logits(self, crops: Tensor) -> Tensor:
        """(M, 3, h, w) standardised crops -> (M, K)."""
        return self._model(crops)[:, self._outputs]

    def stem(self, crops: Tensor) -> Tensor:
        """(M, 3, h, w) standardised crops -> the features of its first layer."""
        return self._stem(crops)


def standardised(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 as a classifier wants it."""
    mean, std = (torch.tensor(x, device=images.device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def cropped(images: Tensor, boxes: Tensor, image: Tensor, geometry: Geometry, size: int) -> Tensor:
    """(B, 3, H, W) pixels, (M, 4) boxes of images (M,) -> (M, 3, size, size): the image, sampled bilinearly and evenly
    in each box (a spatial transformer), with gradient to the boxes alone. Boxes are clipped to their image."""
    limit = geometry.sizes[image].to(boxes.dtype).flip(1).repeat(1, 2)
    corners = boxes.clamp(min=0).minimum(limit)
    steps = (torch.arange(size, device=boxes.device) + 0.5) / size
    places = corners[:, None, :2] + (corners[:, 2:] - corners[:, :2])[:, None] * steps[:, None]
    left, right, across = _neighbours(places[..., 0], images.shape[3])
    top, bottom, down = _neighbours(places[..., 1], images.shape[2])
    pixels, which = images.movedim(1, -1), image[:, None, None]
    # A sampler of torch's own has no deterministic backward on a GPU; here only the weights carry gradient.
    upper, lower = (
        torch.lerp(pixels[which, row[:, :, None], left[:, None]], pixels[which, row[:, :, None], right[:, None]], w)
        for row, w in ((row, across[:, None, :, None]) for row in (top, bottom))
    )
    return torch.lerp(upper, lower, down[:, :, None, None]).movedim(-1, 1)


def _neighbours(places: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places in pixels, whose middles are at halves -> the pixels before and after, and how far between they are."""
    place = (places - 0.5).clamp(0, length - 1)
    before = place.detach().floor().clamp(max=max(0, length - 2)).long()
    return before, (before + 1).clamp(max=length - 1), place - before


def _stem(model: nn.Module, architecture: str) -> nn.Module:
    if isinstance(model.__dict__["_modules"].get("conv1"), nn.Conv2d):  # the ResNets
        return nn.Sequential(*(model.get_submodule(name) for name in ("conv1", "bn1", "relu")))
    if isinstance(first := getattr(model, "features", None), nn.Sequential):
        return first[0]
    raise ValueError(f"where the first layer of {architecture} ends is not known; choose a ResNet, MobileNet or VGG")
