"""The parts of a two-stage detector that have weights, under torchvision's names, and its pooler.

Shape letters: B images, A anchors per cell, N regions of all images, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from kd.blocks.dense import keep_rows

SIZE = 7
"""Cells per side of a pooled region."""


class Proposer(nn.Module):
    """The head of the region proposal network, shared by all levels."""

    def __init__(self, width: int, depth: int, per_cell: int) -> None:
        super().__init__()
        # torchvision's module holds and initialises the layers; its forward speaks in lists, which ZeRO does not see.
        self.head = RPNHead(width, per_cell, depth)

    def forward(self, pyramid: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(B, width, H, W) per level -> per level objectness logits (B, A, H, W) and box codes (B, A * 4, H, W)."""
        towers = [self.head.conv(level) for level in pyramid]
        return tuple(self.head.cls_logits(x) for x in towers), tuple(self.head.bbox_pred(x) for x in towers)


class RegionHead(nn.Module):
    """The second stage: pooled regions to class logits and box codes."""

    def __init__(self, width: int, convolutions: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        if convolutions:
            self.box_head = FastRCNNConvFCHead((width, SIZE, SIZE), [width] * convolutions, [hidden])
        else:
            self.box_head = TwoMLPHead(width * SIZE**2, hidden)
        self.box_predictor = FastRCNNPredictor(hidden, num_classes + 1)
        self.kept: Tensor | None
        self.register_buffer("kept", None, persistent=False)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """(N, width, 7, 7) -> class logits (N, K + 1), background first, and box codes (N, (K + 1) * 4)."""
        logits, codes = self.box_predictor(self.box_head(regions))
        if self.kept is None:
            return logits, codes
        # An object of a class that nobody asks for is background here: dropping its logit would share its
        # probability out among the others.
        other = logits.index_fill(1, self.kept, -torch.inf).logsumexp(dim=1, keepdim=True)
        return torch.cat([other, logits[:, self.kept]], dim=1), codes

    def keep_classes(self, classes: Sequence[int]) -> None:
        """Answer for these classes alone, in this order; the rest become background."""
        rows = torch.tensor([c + 1 for c in classes], device=self.box_predictor.bbox_pred.weight.device)
        self.kept = rows if self.kept is None else self.kept[rows - 1]
        codes = [0, *rows.tolist()]
        keep_rows(self.box_predictor.bbox_pred, [4 * row + i for row in codes for i in range(4)])


def pool(
    pyramid: tuple[Tensor, ...],
    boxes: Sequence[Tensor],
    strides: tuple[int, ...],
    canvas: tuple[int, int],
    size: int = SIZE,
) -> Tensor:
    """(B, C, H, W) maps and per image (n, 4) boxes -> (N, C, size, size): RoIAlign at the level that fits a box's size
    (FPN, eq. 1: a box of 14 cells' side), of those whose `strides` do not exceed 32."""
    used = [stride for stride in strides if stride <= 32]
    names = [str(stride) for stride in used]
    pooler = MultiScaleRoIAlign(names, size, sampling_ratio=2)
    # Left alone it would guess the scales from the sizes of the maps, which are rounded up.
    pooler.scales = [1 / stride for stride in used]
    pooler.map_levels = initLevelMapper(used[0].bit_length() - 1, used[-1].bit_length() - 1)
    # Places need float32, also where autocast made the maps bfloat16 (at 300 px its next number is 2 px away).
    wide = torch.promote_types(pyramid[0].dtype, torch.float32)
    maps = {name: level.to(wide) for name, level in zip(names, pyramid, strict=False)}
    return pooler(maps, [b.to(wide) for b in boxes], [canvas] * len(boxes))


def level_of(boxes: Tensor, strides: tuple[int, ...]) -> Tensor:
    """(M, 4) boxes -> (M,) int64: which of the levels of `strides` fits each box's size (FPN, eq. 1)."""
    return initLevelMapper(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)([boxes])
