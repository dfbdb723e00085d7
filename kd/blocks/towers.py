"""The two towers of a dense head (RetinaNet's shape, with FCOS's centerness), shared by all pyramid levels."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead

from kd.blocks.distribution import last_layer
from kd.blocks.norms import group_norm


class Towers(nn.Module):
    """Classes in one tower, box distances and centerness in the other; tensors in, tensors out."""

    def __init__(self, width: int, depth: int, num_classes: int, bins: int | None = None) -> None:
        super().__init__()
        # torchvision's modules hold and initialise the layers (class prior 0.01); their forward would flatten the maps.
        self.classification_head = FCOSClassificationHead(width, 1, num_classes, depth, norm_layer=group_norm)
        self.regression_head = FCOSRegressionHead(width, 1, depth, norm_layer=group_norm)
        self.regression_head.bbox_reg = last_layer(width, 1, bins, self.regression_head.bbox_reg)
        self.floor = F.relu if bins is None else nn.Identity()

    def forward(self, pyramid: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
        """One (B, width, H, W) map per level -> per level class logits (B, K, H, W), box distances >= 0 (B, 4, H, W),
        or with `bins` the logits of their distributions (B, 4 * E, H, W), centerness logits (B, 1, H, W)."""
        classes = tuple(self.classification_head.cls_logits(self.classification_head.conv(p)) for p in pyramid)
        towers = [self.regression_head.conv(p) for p in pyramid]
        boxes = tuple(self.floor(self.regression_head.bbox_reg(x)) for x in towers)
        return classes, boxes, tuple(self.regression_head.bbox_ctrness(x) for x in towers)
