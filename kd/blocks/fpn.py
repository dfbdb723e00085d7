"""Feature pyramid (Lin et al., CVPR 2017, arXiv:1612.03144) with any run of levels P2..P7, under torchvision's names.

P6 and P7 come by 3 x 3 convolutions of stride 2 from P5 (FCOS, and torchvision's first RetinaNet) or from C5
(RetinaNet, arXiv:1708.02002), or from P5 by subsampling (Faster R-CNN).
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Top = Literal["p5", "c5", "pool"]
"""What the levels above P5 are made from: P5 or C5 by convolution, or P5 by taking every second cell."""


class FPN(nn.Module):
    """Backbone stages to pyramid levels.

    The top-down path always begins at C5, also where P5 itself is not among the levels.
    """

    def __init__(self, channels: tuple[int, ...], width: int, levels: tuple[int, ...], top: Top = "p5") -> None:
        """`channels` of C2..C5; `width` of every level; `levels` a run of consecutive numbers in 2..7."""
        super().__init__()
        self.first, self.top, self.pooled = levels[0], top, sum(level > 5 for level in levels) * (top == "pool")
        self.inner_blocks = nn.ModuleList(_conv(channels[level - 2], width, 1) for level in range(levels[0], 6))
        self.layer_blocks = nn.ModuleList(_conv(width, width, 3) for level in levels if level <= 5)
        above = [level for level in levels if level > 5 and top != "pool"]
        inputs = {6: channels[-1] if top == "c5" else width}
        extra = {f"p{level}": nn.Conv2d(inputs.get(level, width), width, 3, stride=2, padding=1) for level in above}
        self.extra_blocks = nn.ModuleDict(extra)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_uniform_(part.weight, a=1)
                nn.init.zeros_(part.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, stages: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(C2, C3, C4, C5) -> one (B, width, ceil(H / stride), ceil(W / stride)) map per level, finest first."""
        inner = [block(stage) for block, stage in zip(self.inner_blocks, stages[self.first - 2 :], strict=True)]
        for i in range(len(inner) - 2, -1, -1):
            inner[i] = inner[i] + F.interpolate(inner[i + 1], size=inner[i].shape[-2:], mode="nearest")
        pyramid = [block(x) for block, x in zip(self.layer_blocks, inner, strict=False)]
        for i, block in enumerate(self.extra_blocks.values()):
            below = stages[-1] if self.top == "c5" and not i else pyramid[-1]
            pyramid.append(block(F.relu(below) if i else below))
        for _ in range(self.pooled):
            pyramid.append(F.max_pool2d(pyramid[-1], kernel_size=1, stride=2))
        return tuple(pyramid)


def check_levels(levels: tuple[int, ...]) -> None:
    """Refuse what is not a run of consecutive levels within 2..7 that has a backbone stage in it."""
    if not levels or list(levels) != list(range(levels[0], levels[0] + len(levels))):
        raise ValueError(f"levels must be consecutive, such as [3, 4, 5, 6, 7], got {list(levels)}")
    if levels[0] < 2 or levels[-1] > 7 or levels[0] > 5:
        raise ValueError(f"levels must lie within 2..7 and begin at 5 or below, got {list(levels)}")


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    # The Sequential of one keeps torchvision's parameter names (`inner_blocks.0.0.weight`).
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))
