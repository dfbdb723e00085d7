"""The global context block (Cao et al., ICCV workshops 2019, arXiv:1904.11492) as FGD and HMKD use it: what a level
attends to, gathered into one vector per image, and added to every cell.

Shape letters: B images, C channels, H x W cells.
"""

import torch
from torch import Tensor, nn

from kd.blocks.divergence import squared_error


class GcBlock(nn.Module):
    """F + C_v2(ReLU(LN(C_v1(sum_p softmax_p(C_k F) F_p)))); the last convolution starts at zero, so that the block
    starts as the identity."""

    def __init__(self, channels: int, ratio: float = 0.5) -> None:
        """`ratio`: the width between the two last convolutions, as a share of `channels`."""
        super().__init__()
        inner = max(1, int(channels * ratio))
        # A constant added to every score moves no softmax: no bias.
        self.attend = nn.Conv2d(channels, 1, 1, bias=False)
        self.squeeze = nn.Conv2d(channels, inner, 1)
        self.norm = nn.LayerNorm(inner)
        self.expand = nn.Conv2d(inner, channels, 1)
        for parameter in self.expand.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> same shape."""
        where = self.attend(x).flatten(2).softmax(dim=2)  # (B, 1, H * W)
        context = torch.bmm(x.flatten(2).to(where.dtype), where.transpose(1, 2))  # (B, C, 1)
        narrow = self.norm(self.squeeze(context[..., None])[..., 0, 0])
        return x + self.expand(narrow.relu()[..., None, None])


class ContextError(nn.Module):
    """How far two pyramids' contexts are apart: |R_T(F^T) - R_S(F^S)|^2 with a block of its own for each side and
    level, or with `absdiff` one block's |R(|F^T - F^S|)|^2. A new one is the plain squared error."""

    def __init__(self, channels: int, levels: int, absdiff: bool) -> None:
        super().__init__()
        self.absdiff = absdiff
        self.student = nn.ModuleList(GcBlock(channels) for _ in range(levels))
        self.teacher = nn.ModuleList(GcBlock(channels) for _ in range(0 if absdiff else levels))

    def forward(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        """(B, C, H, W) per level, twice -> the sum over levels, images and cells of the mean over channels."""
        pairs = list(zip(self.student, student, teacher, strict=True))
        if self.absdiff:
            found = [block((t - s).abs()).float().square() for block, s, t in pairs]
        else:
            sides = zip(pairs, self.teacher, strict=True)
            found = [squared_error(block(s), other(t)) for (block, s, t), other in sides]
        return torch.stack([x.mean(dim=1).sum() for x in found]).sum()
