"""An image classifier as a teacher: torchvision's, read from a state dict, asked about crops.

Shape letters: B images, M crops, K classes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model

from data_sharding.batch import Geometry

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, as for all of torchvision's classifiers."""


class Classifier:
    """A frozen classifier. It is no module, so that whoever holds it does not own its weights."""

    def __init__(self, architecture: str, weights: Path, outputs: Sequence[int], classes: int) -> None:
        """`outputs`: which of its outputs is which of our `classes`, in our order; empty: it knows just these."""
        state = torch.load(weights, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
            raise ValueError(f"{weights} is no state dict; save a torchvision classifier's with model.state_dict()")
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
    """(B, 3, H, W) pixels, (M, 4) boxes of images (M,), ascending -> (M, 3, size, size), with gradient to the boxes (a
    spatial transformer's bilinear sampler). Boxes are clipped to their image."""
    counts = torch.bincount(image, minlength=len(images))
    most = int(counts.max()) if len(image) else 0
    place = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]
    sizes = geometry.sizes[image].to(boxes.dtype)
    limit = torch.stack([sizes[:, 1], sizes[:, 0]] * 2, dim=1)
    corners = boxes.clamp(min=0).minimum(limit)
    across = (torch.arange(size, device=boxes.device) + 0.5) / size
    x = corners[:, :1] + (corners[:, 2:3] - corners[:, :1]) * across
    y = corners[:, 1:2] + (corners[:, 3:4] - corners[:, 1:2]) * across
    height, width = images.shape[2:]
    x, y = 2 * x / width - 1, 2 * y / height - 1
    grid = torch.stack([x[:, None].expand(-1, size, size), y[:, :, None].expand(-1, size, size)], dim=-1)
    # The crops of an image stand below each other in one grid: so no image is copied for each of its crops.
    tall = grid.new_zeros(len(images), most, size, size, 2).index_put((image, place), grid)
    found = F.grid_sample(images, tall.flatten(1, 2), padding_mode="border", align_corners=False)
    return found.unflatten(2, (most, size)).movedim(2, 1)[image, place]


def _stem(model: nn.Module, architecture: str) -> nn.Module:
    if isinstance(model.__dict__["_modules"].get("conv1"), nn.Conv2d):  # the ResNets
        return nn.Sequential(*(model.get_submodule(name) for name in ("conv1", "bn1", "relu")))
    if isinstance(first := getattr(model, "features", None), nn.Sequential):
        return first[0]
    raise ValueError(f"where the first layer of {architecture} ends is not known; choose a ResNet, MobileNet or VGG")
