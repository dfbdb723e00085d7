"""The two towers of an anchor head (RetinaNet's), shared by all pyramid levels, under torchvision's names."""

from typing import Literal

from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.ops import Conv2dNormActivation

from kd.blocks.distribution import last_layer
from kd.blocks.norms import group_norm

HeadNorm = Literal["none", "group"]
"""GroupNorm after each convolution of a head, or nothing."""


class AnchorTowers(nn.Module):
    """Classes in one tower, box codes in the other; tensors in, tensors out."""

    def __init__(
        self, width: int, depth: int, per_cell: int, num_classes: int, norm: HeadNorm, bins: int | None = None
    ) -> None:
        super().__init__()
        layer = group_norm if norm == "group" else None
        # torchvision's modules hold and initialise the layers (class prior 0.01); their forward would flatten the maps.
        self.classification_head = RetinaNetClassificationHead(width, per_cell, num_classes, norm_layer=layer)
        self.regression_head = RetinaNetRegressionHead(width, per_cell, norm_layer=layer)
        self.regression_head.bbox_reg = last_layer(width, per_cell, bins, self.regression_head.bbox_reg)
        for head in (self.classification_head, self.regression_head):
            head.conv = convolutions(width, depth, norm)

    def forward(self, pyramid: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One (B, width, H, W) map per level -> per level class logits (B, A * K, H, W), box codes (B, A * 4, H, W), or
        with `bins` the logits of their distributions (B, A * 4 * E, H, W)."""
        classes = tuple(self.classification_head.cls_logits(self.classification_head.conv(p)) for p in pyramid)
        boxes = tuple(self.regression_head.bbox_reg(self.regression_head.conv(p)) for p in pyramid)
        return classes, boxes


def convolutions(width: int, depth: int, norm: HeadNorm) -> nn.Sequential:
    """`depth` 3 x 3 convolutions with ReLU, initialised as torchvision's heads are."""
    layer = group_norm if norm == "group" else None
    found = nn.Sequential(*(Conv2dNormActivation(width, width, norm_layer=layer) for _ in range(depth)))
    for part in found.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=0.01)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return found
